"""What is in a content key and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from worker.plan import STAGE_OF, STAGE_VERSIONS, Plan, plan

DATA = "sha256:" + "0" * 64
OTHER = "sha256:" + "1" * 64

BASE: dict[str, Any] = {"dataset": "digits", "ipc": 1}


def changed(**parts: Any) -> JobSpec:
    return resolve(BASE | parts)


def keys(planned: Plan) -> dict[str, str | None]:
    return {build.label: build.key for build in planned.builds()}


def differing(**parts: Any) -> set[str]:
    """Names of the results that a change of the spec gives other keys."""
    before, after = keys(plan(changed(), DATA)), keys(plan(changed(**parts), DATA))
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}


TEACHERS = {"teacher 0", "teacher 1", "teacher 2"}
JUDGED = {"evaluation 0", "random real 0"}
FROM_DISTILL = {"distill", "evaluation 0", "publish"}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"resources": {"cpus": 1, "gpus": 1.0}}, set()),
        ({"checkpoint": {"every_steps": 1, "every_seconds": 1.0}}, set()),
        ({"limits": {"wall_seconds": 100.0}}, set()),
        ({"experiment": "another"}, set()),
        ({"method": {"reuse": 3}}, FROM_DISTILL),
        ({"method": {"precision": "bfloat16"}}, FROM_DISTILL),
        ({"method": {"steps": 10}}, FROM_DISTILL),
        ({"seed": 1}, FROM_DISTILL | {"random real 0"}),
        ({"ipc": 2}, FROM_DISTILL | {"random real 0"}),
        ({"teachers": {"seed": 1}}, TEACHERS | FROM_DISTILL | {"full data"}),
        ({"teachers": {"training": {"epochs": 3}}}, TEACHERS | FROM_DISTILL),
        ({"model": {"width": 16}}, TEACHERS | FROM_DISTILL | JUDGED | {"full data"}),
        ({"evaluate": [{"students": 2}]}, JUDGED | {"publish"}),
        ({"evaluate": [{"training": {"lr": 0.01}}]}, JUDGED | {"publish"}),
        ({"evaluate": [{"protocol": "custom"}]}, {"publish"}),
        ({"full_data": {"students": 1}}, {"full data", "publish"}),
    ],
)
def test_key_changes_with_what_changes_the_numbers(parts: dict[str, Any], expected: set[str]) -> None:
    assert differing(**parts) == expected


def test_set_that_was_cut_has_keys_of_its_own() -> None:
    whole = keys(plan(changed(), DATA))
    at_7, at_8 = (keys(plan(changed(), DATA, cut_at=step)) for step in (7, 8))
    assert {name for name in whole if whole[name] != at_7[name]} == FROM_DISTILL
    assert {name for name in whole if at_7[name] != at_8[name]} == FROM_DISTILL


def test_keys_change_with_the_data() -> None:
    before, after = keys(plan(changed(), DATA)), keys(plan(changed(), OTHER))
    assert all(before[name] != after[name] for name in before)


def test_no_key_is_known_before_the_data_was_inspected() -> None:
    assert set(keys(plan(changed(), None)).values()) == {None}


def test_ten_and_twenty_teachers_share_ten() -> None:
    ten = plan(changed(teachers={"count": 10}), DATA).teachers
    twenty = plan(changed(teachers={"count": 20}), DATA).teachers
    assert [each.key for each in twenty[:10]] == [each.key for each in ten]
    assert len({each.key for each in twenty}) == 20


def test_jobs_of_several_seeds_share_teachers_and_ceiling() -> None:
    assert differing(seed=7).isdisjoint(TEACHERS | {"full data"})


def test_two_evaluations_have_keys_of_their_own() -> None:
    planned = plan(changed(evaluate=[{}, {"model": {"width": 8}}]), DATA)
    assert planned.evaluations[0].key != planned.evaluations[1].key
    assert planned.random_real[0].key != planned.random_real[1].key


CORESETS = {"herding 0", "k center 0"}


def coresets(**parts: Any) -> dict[str, str | None]:
    """Keys of the coresets of a job that asks for both."""
    named = keys(plan(changed(baselines=["random_real", "herding", "k_center"], **parts), DATA))
    return {name: named[name] for name in CORESETS}


def test_coresets_are_planned_where_they_are_asked_for() -> None:
    assert plan(changed(), DATA).coresets == ()
    both = plan(changed(baselines=["random_real", "k_center", "herding"], evaluate=[{}, {"students": 2}]), DATA)
    assert [each.label for each in both.coresets] == ["herding 0", "herding 1", "k center 0", "k center 1"]
    assert len({each.key for each in both.coresets}) == 4
    assert differing(baselines=["random_real", "herding"]) == {"publish"}
    assert {each.key for each in plan(changed(baselines=["random_real", "herding"]), None).coresets} == {None}


@pytest.mark.parametrize(
    ("parts", "is_new"),
    [
        ({"teachers": {"training": {"epochs": 3}}}, True),
        ({"model": {"width": 16}}, True),
        ({"ipc": 2}, True),
        ({"seed": 1}, True),
        ({"evaluate": [{"students": 2}]}, True),
        ({"teachers": {"count": 1}}, False),
        ({"method": {"steps": 10}}, False),
        ({"full_data": {"students": 1}}, False),
    ],
)
def test_key_of_a_coreset_hangs_on_the_first_teacher_and_the_protocol(parts: dict[str, Any], is_new: bool) -> None:
    before, after = coresets(), coresets(**parts)
    assert all((before[name] != after[name]) is is_new for name in CORESETS)


SEARCH = {"space": {"image_lr": [0.01, 0.02]}}


def test_search_leaves_open_what_hangs_on_its_method() -> None:
    planned = plan(changed(search=SEARCH), DATA, held_out_digest=OTHER)
    assert planned.search is not None
    assert planned.search.key is not None
    assert planned.distill.key is planned.publish.key is planned.evaluations[0].key is None
    assert planned.random_real[0].key is not None
    held_out = {each.key for each in planned.search_teachers}
    assert None not in held_out
    assert held_out.isdisjoint({each.key for each in planned.teachers})


@pytest.mark.parametrize("parts", [{"seed": 1}, {"ipc": 2}, {"evaluate": [{"training": {"lr": 0.01}}]}])
def test_search_key_changes_with_what_its_trials_see(parts: dict[str, Any]) -> None:
    before, after = (plan(changed(search=SEARCH, **more), DATA).search for more in ({}, parts))
    assert before is not None
    assert after is not None
    assert before.key != after.key


def test_keys_are_the_recorded_ones() -> None:
    """A result that is stored today is found by every later release, unless the version of its stage was raised."""
    recorded = json.loads(Path(__file__).with_name("keys.json").read_text())
    spec = JobSpec.model_validate_json(json.dumps(recorded["spec"]))
    assert keys(plan(spec, recorded["data"])) == recorded["keys"]


def test_every_kind_has_a_version_and_a_stage() -> None:
    assert STAGE_VERSIONS.keys() == STAGE_OF.keys()
    assert all(version >= 1 for version in STAGE_VERSIONS.values())
