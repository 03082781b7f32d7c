from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from ncfm_core.datasets import Dataset
from ncfm_core.evaluate import Evaluation, evaluate, random_real
from ncfm_core.progress import Progress
from ncfm_core.spec import JobSpec


def finish(steps: Generator[Progress, None, Evaluation]) -> tuple[list[Progress], Evaluation]:
    reports = []
    while True:
        try:
            reports.append(next(steps))
        except StopIteration as stop:
            return reports, stop.value


def run(digits: Dataset, spec: JobSpec, seed: int) -> tuple[list[Progress], Evaluation]:
    images, labels = random_real(digits, ipc=2, seed=seed)
    entry = spec.evaluate[0]
    return finish(
        evaluate(
            images,
            labels,
            digits,
            model=entry.model,
            training=entry.training,
            students=entry.students,
            tests=entry.tests,
            seed=seed,
            device=torch.device("cpu"),
        )
    )


def test_evaluation_is_reproducible_and_keeps_last_and_best_apart(digits: Dataset, spec: JobSpec) -> None:
    reports, evaluation = run(digits, spec, 0)
    assert run(digits, spec, 0)[1] == evaluation
    assert run(digits, spec, 1)[1] != evaluation
    assert [report.completed for report in reports] == [1, 2]
    assert len(evaluation.last) == len(evaluation.best) == 2
    assert all(best >= last for best, last in zip(evaluation.best, evaluation.last, strict=True))
    assert [report.metrics["accuracy"] for report in reports] == list(evaluation.last)


def test_random_real_takes_as_many_of_each_class(digits: Dataset) -> None:
    images, labels = random_real(digits, ipc=3, seed=0)
    assert images.dtype == torch.uint8 and images.shape == (30, 1, 8, 8)
    assert labels.bincount().tolist() == [3] * 10
    assert not torch.equal(images, random_real(digits, ipc=3, seed=1)[0])


def test_students_of_a_set_with_all_images_beat_chance(digits: Dataset, spec: JobSpec) -> None:
    _, evaluation = run(digits, spec, 0)
    assert evaluation.last[0] == pytest.approx(50, abs=35)
    assert evaluation.last[0] > 20
