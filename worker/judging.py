"""How a stage judges labelled images: the rate first where there is a choice, then the students, then the commit."""

from __future__ import annotations

import statistics
from collections.abc import Generator
from typing import TypeVar

import torch
from pydantic import JsonValue
from torch import Tensor

from ncfm_core.datasets import Dataset
from ncfm_core.evaluate import Evaluation, choose_rate, evaluate
from ncfm_core.progress import Progress
from ncfm_core.protocols import RATE_FRACTION
from ncfm_core.spec import EvaluationSpec
from worker.building import Building, how_computed
from worker.history import Event, History, Notice, Stage
from worker.records import Accuracy
from worker.site import Site

T = TypeVar("T")


def baseline_source(dataset: Dataset, entry: EvaluationSpec, seed: int) -> Dataset:
    """Where a baseline's images come from: not from those that its rate is chosen on."""
    return dataset.hold_out(RATE_FRACTION, seed=seed) if entry.lr_grid else dataset


def judge(
    building: Building,
    site: Site,
    dataset: Dataset,
    *,
    images: Tensor,
    labels: Tensor,
    entry: EvaluationSpec,
    seed: int,
    targets: Tensor | None = None,
) -> Stage:
    """Students of a protocol on labelled images, to the committed result.

    Args:
        building: of the result.
        site: where.
        dataset: with the test set.
        images: decoded, shape (N, channels, H, W).
        labels: int64 of shape (N,).
        entry: the protocol.
        seed: of the students.
        targets: teacher logits of shape (N, classes), for protocols that train on them.
    """
    training, device = entry.training, torch.device(site.device)
    if entry.lr_grid:
        rate = yield from follow(
            choose_rate(
                images,
                labels,
                dataset.hold_out(RATE_FRACTION, seed=seed),
                rates=entry.lr_grid,
                model=entry.model,
                training=training,
                seed=seed,
                device=device,
                targets=targets,
            ),
            building.history,
        )
        training = training.model_copy(update={"lr": rate})
    students = evaluate(
        images,
        labels,
        dataset,
        model=entry.model,
        training=training,
        students=entry.students,
        tests=entry.tests,
        seed=seed,
        device=device,
        targets=targets,
    )
    return (yield from commit(building, students, {"lr": training.lr}))


def commit(building: Building, students: Generator[Progress, None, Evaluation], figures: dict[str, JsonValue]) -> Stage:
    """Run students to their end and commit what they found."""
    found = yield from follow(students, building.history)
    failed = f": compiling failed ({found.compile_error})" if found.compile_error else ""
    yield Notice(f"the students were trained {'compiled' if found.compiled else 'eager'}{failed}")
    if found.halvings:
        yield Notice(
            f"memory ran out {found.halvings} times: students went on in smaller pieces; the last bits are their own"
        )
    accuracy = accuracy_of(found).model_dump(mode="json")
    done = how_computed(compiled=found.compiled, compile_error=found.compile_error, halvings=found.halvings)
    return (yield from building.commit({}, {"accuracy": accuracy, **done, **figures}))


def accuracy_of(evaluation: Evaluation) -> Accuracy:
    """The published figures of an evaluation."""
    last, best = evaluation.last, evaluation.best
    return Accuracy(
        mean=statistics.fmean(last),
        std=statistics.stdev(last) if len(last) > 1 else None,
        n=len(last),
        best_mean=statistics.fmean(best),
        values=last,
    )


def follow(steps: Generator[Progress, None, T], history: History) -> Generator[Event, None, T]:
    """Pass progress on, keeping it in the history; the value is that of the steps."""
    while True:
        try:
            progress = next(steps)
        except StopIteration as stop:
            value: T = stop.value
            return value
        history.add(progress)
        yield progress
