"""How good a set is: fresh students trained on it, tested on the test set, next to real images and the full data."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ncfm_core.batches import Batches
from ncfm_core.cohort import Cohort, students_at_once
from ncfm_core.datasets import Dataset, Images
from ncfm_core.devices import require_device, told
from ncfm_core.errors import OutOfMemoryError
from ncfm_core.models import build_model
from ncfm_core.progress import Progress, finish
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec, TrainingSpec
from ncfm_core.training import Training, accuracy, to_compile


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Test accuracies in percent, one for each student."""

    last: tuple[float, ...]
    """At the end of training: what is published."""
    best: tuple[float, ...]
    """The best look at the test set along the way: optimistic, kept apart."""
    compiled: bool
    """Whether the students went through `torch.compile`."""
    compile_error: str = ""
    """Why they did not although they were to, in one line; empty where that is not so."""
    halvings: int = 0
    """How often a batch was cut in smaller pieces for want of memory; the bits are then no longer those of another run."""


def evaluate(  # noqa: PLR0913 - the one call that judges, for the worker, the benchmark and the examples.
    images: Tensor | Images,
    labels: Tensor,
    dataset: Dataset,
    *,
    model: ModelSpec,
    training: TrainingSpec,
    students: int,
    tests: int,
    seed: int,
    device: torch.device,
    targets: Tensor | None = None,
    at_once: int | None = None,
    first: int = 0,
    compiled: bool | None = None,
    may_fall_back: bool | None = None,
    field: str = "evaluate.training",
) -> Generator[Progress, None, Evaluation]:
    """Train fresh students on labelled images and test each.

    Args:
        images: shape (N, channels, H, W), uint8 or float in [0, 1], already decoded; or those of a data set.
        labels: int64 of shape (N,).
        dataset: gives the statistics and the test set.
        model: the students' network.
        training: their recipe.
        students: how many.
        tests: looks at the test set, evenly along the training, the last at its end.
        seed: of the students; student i of a seed starts from the same weights whatever it is trained on.
        device: where to train.
        targets: teacher logits of the images, float32 of shape (N, classes); for losses that compare with them.
        at_once: students in one step; None for what is fast here (`cohort.students_at_once`).
        first: index of the first of them, so that a seed's students can be trained in several calls.
        compiled: whether students that are trained one by one go through `torch.compile`; None where it pays for all of them.
        may_fall_back: whether they are eager after all where the compiler fails at a first step; None if `compiled` is.
        field: where the recipe stands in a submission, for errors.

    Yields:
        Progress after every student, with its accuracy.

    Raises:
        SpecError: the loss compares with teacher logits and there are none, or images are too small for the network.
        ResourcesError: there is no such device, or its memory is too small, even for smaller pieces of a batch.
    """
    require_device(device)

    def full() -> OutOfMemoryError:
        message = f"the images and a network do not fit the memory of {device}"
        hint = "Lower it or NCFM_DATA_MEMORY_GIB, above which images stay in a file."
        return OutOfMemoryError.of("model.width", model.width, message, hint)

    with told(full):
        images = images.detach() if isinstance(images, Tensor) else images
        dataset, images, labels = dataset.to(device), images.to(device), labels.to(device)
        targets = None if targets is None else targets.detach().to(device)
        batches = Batches(images, labels, dataset, spec=training, targets=targets)
        fresh = _student(first, model, dataset, seed)
        at_once = students_at_once(fresh, batches) if at_once is None else at_once
        may_fall_back = compiled is None if may_fall_back is None else may_fall_back
        compiled = at_once == 1 and to_compile(fresh, batches, compiled, trainings=students)
    last: list[float] = []
    best: list[float] = []
    halvings, compile_error = 0, ""
    alone = partial(
        Training,
        images=images,
        labels=labels,
        dataset=dataset,
        spec=training,
        seed=seed,
        targets=targets,
        may_fall_back=may_fall_back,
        field=field,
    )
    while len(last) < students:
        members = range(first + len(last), first + min(len(last) + at_once, students))
        streams = [f"student/{index}" for index in members]
        run: Training | Cohort
        with told(full):
            networks = [_student(index, model, dataset, seed) for index in members]
            if len(networks) == 1:
                run = alone(networks[0], stream=streams[0], compiled=compiled)
                looks = _look_alone(run, dataset, tests)
            else:
                run = Cohort(networks, batches, seed=seed, streams=streams, field=field)
                looks = _look_together(run, len(members), dataset, tests)
        for accuracies in zip(*looks, strict=True):
            last.append(accuracies[-1])
            best.append(max(accuracies))
            yield Progress(len(last), students, "student", {"accuracy": last[-1], "best_accuracy": best[-1]})
        halvings += run.halvings
        if isinstance(run, Training) and run.compile_error:
            # Those after it need not fail first.
            compiled, compile_error = False, run.compile_error
    return Evaluation(tuple(last), tuple(best), compiled, compile_error, halvings)


def choose_rate(
    images: Tensor,
    labels: Tensor,
    held_out: Dataset,
    *,
    rates: Sequence[float],
    model: ModelSpec,
    training: TrainingSpec,
    seed: int,
    device: torch.device,
    targets: Tensor | None = None,
) -> Generator[Progress, None, float]:
    """Choose a learning rate on training data held out: one student for each, all from the same weights and draws.

    DD-Ranking's board chooses by the accuracy on the test set; here nothing is ever chosen there.

    Args:
        images: shape (N, channels, H, W), uint8 or float in [0, 1], already decoded.
        labels: int64 of shape (N,).
        held_out: from `Dataset.hold_out`: its test images are training images.
        rates: to choose from, at least one.
        model: the students' network.
        training: their recipe but the rate.
        seed: of the students.
        device: where to train.
        targets: teacher logits of the images, for losses that compare with them.

    Yields:
        Progress after every rate, with its accuracy.

    Returns:
        The best of them, the first of equals.
    """
    found: dict[float, float] = {}
    for rate in rates:
        recipe = training.model_copy(update={"lr": rate})
        judged = finish(
            evaluate(
                images,
                labels,
                held_out,
                model=model,
                training=recipe,
                students=1,
                tests=1,
                seed=seed,
                device=device,
                targets=targets,
            )
        )
        found[rate] = judged.last[0]
        yield Progress(len(found), len(rates), "rate", {"lr": rate, "validation_accuracy": found[rate]})
    return max(found, key=lambda rate: found[rate])


def _student(index: int, model: ModelSpec, dataset: Dataset, seed: int) -> nn.Module:
    return build_model(
        model,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        draw=generator(seed, f"student/{index}/init"),
    ).to(dataset.device)


def _look_alone(run: Training, dataset: Dataset, tests: int) -> Iterator[tuple[float, ...]]:
    """Train one student; its accuracy at every look."""
    for look in range(1, tests + 1):
        for _ in run.run(until=run.total * look // tests):
            pass
        yield (accuracy(run.model, dataset),)


def _look_together(cohort: Cohort, students: int, dataset: Dataset, tests: int) -> Iterator[tuple[float, ...]]:
    """Train several students at once; the accuracy of each at every look."""
    for look in range(1, tests + 1):
        cohort.advance(cohort.total * look // tests)
        yield tuple(accuracy(cohort.student(index), dataset) for index in range(students))
