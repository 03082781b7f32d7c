"""How good a set is: fresh students trained on it, tested on the test set, next to random real images and the full data."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ncfm_core.datasets import Dataset
from ncfm_core.models import build_model
from ncfm_core.progress import Progress
from ncfm_core.rng import generator
from ncfm_core.spec import ModelSpec, TrainingSpec
from ncfm_core.training import Training, accuracy


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Test accuracies in percent, one for each student."""

    last: tuple[float, ...]
    """At the end of training: what is published."""
    best: tuple[float, ...]
    """The best look at the test set along the way: optimistic, kept apart."""


def evaluate(
    images: Tensor,
    labels: Tensor,
    dataset: Dataset,
    *,
    model: ModelSpec,
    training: TrainingSpec,
    students: int,
    tests: int,
    seed: int,
    device: torch.device,
    first: int = 0,
) -> Generator[Progress, None, Evaluation]:
    """Train fresh students on labelled images and test each.

    Args:
        images: shape (N, channels, H, W), uint8 or float in [0, 1], already decoded.
        labels: int64 of shape (N,).
        dataset: gives the statistics and the test set.
        model: the students' network.
        training: their recipe.
        students: how many.
        tests: looks at the test set, evenly along the training, the last at its end.
        seed: of the students; student i of a seed starts from the same weights whatever it is trained on.
        device: where to train.
        first: index of the first of them, so that a seed's students can be trained in several calls.

    Yields:
        Progress after every student, with its accuracy.
    """
    dataset, images, labels = dataset.to(device), images.detach().to(device), labels.to(device)
    last, best = [], []
    for student in range(first, first + students):
        stream = f"student/{student}"
        network = build_model(
            model,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            draw=generator(seed, f"{stream}/init"),
        ).to(device)
        run = Training(network, images, labels, dataset, spec=training, seed=seed, stream=stream)
        looks = []
        for look in range(1, tests + 1):
            for _ in run.run(until=run.total * look // tests):
                pass
            looks.append(accuracy(network, dataset))
        last.append(looks[-1])
        best.append(max(looks))
        yield Progress(len(last), students, "student", {"accuracy": looks[-1], "best_accuracy": max(looks)})
    return Evaluation(tuple(last), tuple(best))


def random_real(dataset: Dataset, *, ipc: int, seed: int) -> tuple[Tensor, Tensor]:
    """The baseline: `ipc` random real images of each class.

    Returns:
        uint8 images of shape (C * ipc, channels, H, W) and their labels.
    """
    chosen = dataset.class_batches(ipc, generator(seed, "random-real")).flatten().to(dataset.device)
    return dataset.train_images[chosen], dataset.train_labels[chosen]
