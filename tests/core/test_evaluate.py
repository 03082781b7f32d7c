from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from ncfm_core.coresets import random_real
from ncfm_core.datasets import Dataset
from ncfm_core.evaluate import Evaluation, choose_rate, evaluate
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


def test_students_in_one_step_are_judged_like_students_apart(digits: Dataset, spec: JobSpec) -> None:
    images, labels = random_real(digits, ipc=1, seed=0)
    entry = spec.evaluate[0]

    def judged(at_once: int) -> tuple[list[Progress], Evaluation]:
        return finish(
            evaluate(
                images,
                labels,
                digits,
                model=entry.model,
                training=entry.training,
                students=3,
                tests=2,
                seed=0,
                device=torch.device("cpu"),
                at_once=at_once,
            )
        )

    apart, together = judged(1), judged(2)
    assert [report.completed for report in together[0]] == [1, 2, 3]
    for one, other in ((apart[1].last, together[1].last), (apart[1].best, together[1].best)):
        # One test image of 500 is 0.2 %: rounding may turn a few of them.
        assert other == pytest.approx(one, abs=1.0)


def test_teacher_logits_are_what_students_learn(digits: Dataset, spec: JobSpec) -> None:
    images, labels = random_real(digits, ipc=4, seed=0)
    entry = spec.evaluate[0]
    wrong = (labels + 1) % 10
    _, evaluation = finish(
        evaluate(
            images,
            labels,
            digits,
            model=entry.model,
            training=entry.training.model_copy(update={"loss": "soft_cross_entropy", "epochs": 30}),
            students=1,
            tests=1,
            seed=0,
            device=torch.device("cpu"),
            targets=20.0 * torch.nn.functional.one_hot(wrong, 10).float(),
        )
    )
    assert evaluation.last[0] < 10


def test_rate_is_chosen_on_held_out_training_images(digits: Dataset, spec: JobSpec) -> None:
    held_out = digits.hold_out(0.1, seed=0)
    # With the test set out of reach, only the held-out images can have been looked at.
    images, labels = random_real(held_out, ipc=2, seed=0)
    entry = spec.evaluate[0]
    steps = choose_rate(
        images,
        labels,
        held_out,
        rates=(1e-7, 0.01),
        model=entry.model,
        training=entry.training,
        seed=0,
        device=torch.device("cpu"),
    )
    reports: list[Progress] = []
    while True:
        try:
            reports.append(next(steps))
        except StopIteration as stop:
            chosen = stop.value
            break
    assert chosen == 0.01
    assert [(report.completed, report.total, report.unit) for report in reports] == [(1, 2, "rate"), (2, 2, "rate")]
    assert {len(held_out.test_labels)} == {sum(max(1, round(0.1 * count)) for count in digits.class_counts)}
    assert held_out.test_images.untyped_storage().data_ptr() != digits.test_images.untyped_storage().data_ptr()
