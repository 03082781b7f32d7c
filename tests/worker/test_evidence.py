"""What is published of a job's accuracies."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ncfm_core.evaluate import Evaluation
from ncfm_core.ranking import label_robust_score
from ncfm_core.spec import JobSpec
from worker.driver.story import _headline
from worker.evidence import Evidence
from worker.judging import accuracy_of
from worker.records import Accuracy, StageResult, now


def result(name: str, mean: float, *, std: float | None = 1.0, n: int = 2) -> StageResult:
    accuracy = Accuracy(mean=mean, std=std, n=n, best_mean=mean + 1, values=(mean - 1, mean + 1)[:n])
    return StageResult(
        key=name,
        stage="evaluate",
        built_by="job-1",
        created_at=now(),
        files=(),
        figures={"accuracy": accuracy.model_dump(mode="json"), "lr": 0.01},
        seconds=1.0,
        environment={"device": "cpu"},
    )


def evidence(evaluations: int = 1) -> Evidence:
    return Evidence(
        distilled=result("distill", 0.0),
        evaluations=[result(f"evaluation {index}", 50.0 + index) for index in range(evaluations)],
        random_real=[result(f"random {index}", 30.0) for index in range(evaluations)],
        coresets={
            "herding": [result(f"herding {index}", 33.0) for index in range(evaluations)],
            "k_center": [result(f"k-center {index}", 20.0) for index in range(evaluations)],
        },
        full_data=result("full", 80.0),
    )


def test_every_baseline_and_the_score_are_published(spec: JobSpec) -> None:
    found = evidence()
    score = label_robust_score(full=0.8, hard=0.5, own=0.5, random=0.3)
    figures = found.figures(spec)
    assert figures.herding is not None and figures.herding.mean == 33.0
    assert figures.k_center is not None and figures.k_center.mean == 20.0
    assert figures.label_robust_score == pytest.approx(score.score)
    document = json.loads(found.document(spec))
    entry = document["evaluations"][0]
    assert [entry[name]["mean"] for name in ("distilled", "random_real", "herding", "k_center")] == [50, 30, 33, 20]
    assert entry["label_robust_score"]["score"] == pytest.approx(score.score)
    assert entry["label_robust_score"]["hard_label_recovery"] == pytest.approx(0.3)
    assert entry["lr"] == {"distilled": 0.01, "random_real": 0.01, "herding": 0.01, "k_center": 0.01}
    assert document["results"]["herding"] == ["herding 0"]
    rows = found.card_rows(spec)
    assert "chosen by herding" in rows and "chosen by k-center" in rows and f"{score.score:.3f}" in rows


def test_baselines_that_nobody_asked_for_are_not_mentioned(spec: JobSpec) -> None:
    found = replace(evidence(), coresets={})
    assert found.figures(spec).herding is None
    assert "herding" not in found.card_rows(spec)
    assert "herding" not in json.loads(found.document(spec))["evaluations"][0]


def test_score_is_left_out_where_it_would_compare_unlike_things(spec: JobSpec) -> None:
    first = spec.evaluate[0]
    wide = first.model_copy(update={"model": first.model.model_copy(update={"width": 16})})
    soft = first.model_copy(update={"training": first.training.model_copy(update={"loss": "kl"})})

    def scores(*entries: Any) -> list[float | None]:
        found = evidence(len(entries)).scores(spec.model_copy(update={"evaluate": entries}))
        return [None if score is None else score.score for score in found]

    hard, other, soft_beside_hard = scores(first, wide, soft)
    assert other is None
    assert hard == pytest.approx(label_robust_score(full=0.8, hard=0.5, own=0.5, random=0.3).score)
    assert soft_beside_hard == pytest.approx(label_robust_score(full=0.8, hard=0.5, own=0.52, random=0.3).score)
    assert scores(soft, wide) == [None, None]


def test_card_trains_at_the_rate_that_was_chosen(spec: JobSpec) -> None:
    assert evidence().as_trained(spec.evaluate[0]).training.lr == 0.01


@pytest.mark.parametrize("kept", [None, 0.0])
def test_one_student_has_no_spread_anywhere_also_where_an_older_result_says_none(
    spec: JobSpec, kept: float | None
) -> None:
    alone = result("full", 80.0, std=None, n=1)
    alone.figures["accuracy"]["std"] = kept  # type: ignore[index,call-overload]
    found = replace(evidence(), full_data=alone)
    assert found.figures(spec).full.std is None
    document = json.loads(found.document(spec))
    assert (document["full_data"]["std"], document["evaluations"][0]["distilled"]["std"]) == (None, 1.0)
    rows = found.card_rows(spec)
    assert "its own recipe | 80.0 % (n=1) |" in rows and "50.0 +- 1.0 % (n=2)" in rows
    (full,) = [row for _, row in _headline(found, alone, spec) if "full_data" in row]
    assert full["full_data"] == 80.0 and "full_data_std" not in full


def test_accuracy_of_one_student_has_no_standard_deviation() -> None:
    assert accuracy_of(Evaluation((50.0,), (51.0,), False)).std is None
    assert accuracy_of(Evaluation((50.0, 52.0), (51.0, 52.0), False)).std == pytest.approx(2**0.5)
