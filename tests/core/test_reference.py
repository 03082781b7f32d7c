"""Results of a fixed seed stay what they are, on any machine, unless the code version of their stage is raised.

`tests.core.reference` computes, keeps and compares them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ncfm_core.datasets import Dataset
from ncfm_core.training import part
from tests.core import reference
from tests.core.reference import (
    COMMAND,
    STAGES,
    Kept,
    bits,
    compute,
    distances,
    machine,
    problems,
    submission,
    tolerance,
)
from worker.plan import STAGE_OF, STAGE_VERSIONS

Record = dict[str, Any]


@pytest.fixture(scope="module")
def kept() -> Kept:
    return reference.load()[0]


@pytest.fixture(scope="module")
def record() -> Record:
    return reference.load()[1]


@pytest.fixture(scope="module")
def results(digits: Dataset, kept: Kept) -> dict[str, Kept]:
    return reference.compute_all(digits, kept)


@pytest.mark.parametrize("stage", STAGES)
def test_fixed_seed_gives_the_reference(results: dict[str, Kept], kept: Kept, record: Record, stage: str) -> None:
    problem = problems(stage, results[stage], kept, record)
    assert not problem, problem


def test_every_stage_that_computes_has_a_reference(record: Record) -> None:
    """A search is made of the others, and a publication writes files whose form its own tests hold."""
    assert STAGES.keys() == STAGE_OF.keys() - {"search", "publish"}
    assert record["versions"] == STAGE_VERSIONS, f"refresh with `{COMMAND}`"


def test_another_process_gives_the_same_bits(results: dict[str, Kept]) -> None:
    command = [sys.executable, "-m", "tests.core.reference", "--bits"]
    root = Path(__file__).parents[2]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=240).stdout
    assert json.loads(told) == {stage: bits(found) for stage, found in results.items()}


def test_bits_of_this_machine_are_known(record: Record) -> None:
    """Where they are, the reference holds to the last bit; elsewhere to the tolerances."""
    if machine() not in record["bits"]:
        pytest.skip(f"no bits are kept for {machine()}, so only the tolerances hold here: `{COMMAND}` adds them")
    assert record["bits"][machine()].keys() == STAGES.keys()


CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("distill", "method", {"sampler": "gaussian"}),
    ("distill", "method", {"sampler_steps": 0}),
    ("distill", "method", {"sampler_lr": 1e-4}),
    ("distill", "method", {"sampler_objective": "debiased"}),
    ("distill", "method", {"amplitude_weight": 0.4}),
    ("distill", "method", {"precision": "bfloat16"}),
    ("distill", "method", {"image_weight_decay": 0}),
    ("distill", "method", {"image_lr": 0.010001}),
    ("distill", "method", {"frequency_scale": 1.0001}),
    ("distill", "method", {"calibration_weight": 10.1}),
    ("distill", "method", {"reuse": 4}),
    ("distill", "method", {"schedule": "constant"}),
    ("distill", "method", {"real_sampling": "prefix"}),
    ("teacher", "teachers", {"weight_decay": 0}),
    ("teacher", "teachers", {"lr": 0.020001}),
    ("teacher", "teachers", {"cutmix": 0.4}),
    ("teacher", "teachers", {"gamma": 0.2001}),
    ("evaluation", "evaluate", {"weight_decay": 0}),
    ("evaluation", "evaluate", {"lr": 0.005001}),
    ("evaluation", "evaluate", {"cutmix": 0.4}),
    ("random_real", "evaluate", {"weight_decay": 0}),
    ("herding", "evaluate", {"gamma": 0.5001}),
    ("k_center", "evaluate", {"augment": {"policy": "none"}}),
    ("full_data", "full_data", {"weight_decay": 0}),
    ("full_data", "full_data", {"lr": 0.020001}),
]


@pytest.mark.parametrize(("stage", "place", "change"), CHANGES, ids=str)
def test_small_changes_are_noticed(
    digits: Dataset, kept: Kept, record: Record, stage: str, place: str, change: dict[str, Any]
) -> None:
    """By the tolerances alone, as on a machine whose bits are not known."""
    found = compute(stage, digits, kept, submission(place, **change))
    told = problems(stage, found, kept, {**record, "bits": {}})
    assert told.startswith(f"results of stage {stage} changed (") and "is allowed" in told
    assert f"raise its code version (STAGE_VERSIONS['{stage}'] in worker/plan.py)" in told
    assert told.endswith(f"refresh with `{COMMAND}`")


def test_rounding_is_no_change_where_no_bits_are_known(kept: Kept, record: Record) -> None:
    ours = part(kept, "distill.")
    moved = {name: tensor * (1 + 1e-7) if tensor.is_floating_point() else tensor for name, tensor in ours.items()}
    assert not problems("distill", moved, kept, {**record, "bits": {}})
    known = {**record, "bits": {machine(): {"distill": bits(ours)}}}
    assert "in their last bits, on a machine whose bits are known" in problems("distill", moved, kept, known)


def test_raised_version_asks_for_a_refresh(kept: Kept, record: Record) -> None:
    older = {**record, "versions": {**record["versions"], "distill": 1}}
    told = problems("distill", part(kept, "distill."), kept, older)
    assert (
        told
        == f"reference values of stage distill are of version 1, it has {STAGE_VERSIONS['distill']}: refresh with `{COMMAND}`"
    )


def test_what_cannot_be_compared_is_infinitely_far() -> None:
    ours, whole = {"a": torch.ones(2), "b": torch.ones(2)}, torch.zeros(2, dtype=torch.uint8)
    assert distances(ours, {"a": torch.ones(2), "b": torch.ones(3), "c": whole}) == {
        "a": 0,
        "b": torch.inf,
        "c": torch.inf,
    }
    assert distances({"a": torch.tensor([torch.nan])}, {"a": torch.ones(1)}) == {"a": torch.inf}
    assert distances({"a": whole + 1}, {"a": whole}) == {"a": torch.inf}
    assert tolerance("distill.images") < tolerance("distill.sampler.log_scales")


def test_refresh_refuses_results_whose_version_was_not_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: Kept, record: Record
) -> None:
    changed: Kept = dict(kept)
    monkeypatch.setattr(reference, "TENSORS", tmp_path / "kept.safetensors")
    monkeypatch.setattr(reference, "RECORD", tmp_path / "kept.json")
    monkeypatch.setattr(reference, "STAGES", {"teacher": lambda digits, kept, spec: part(changed, "teacher.")})
    reference.save(kept, {**record, "bits": {}})
    assert reference.write(anew=False) == 0, "nothing changed: the bits of this machine are added"
    assert reference.load()[1]["bits"].keys() == {machine()}

    changed["teacher.0.classifier.weight"] = kept["teacher.0.classifier.weight"] + 0.01
    assert reference.write(anew=False) == 1
    assert "results of stage teacher changed" in capsys.readouterr().err
    monkeypatch.setitem(STAGE_VERSIONS, "teacher", STAGE_VERSIONS["teacher"] + 1)
    assert reference.write(anew=False) == 0
    now, told = reference.load()
    assert torch.equal(now["teacher.0.classifier.weight"], changed["teacher.0.classifier.weight"])
    assert told["versions"] == STAGE_VERSIONS and torch.equal(now["distill.images"], kept["distill.images"])
