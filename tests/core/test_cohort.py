"""Students trained at once against students trained apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ncfm_core import cohort
from ncfm_core.batches import Batches
from ncfm_core.cohort import Cohort, forward_of, students_at_once
from ncfm_core.datasets import Dataset
from ncfm_core.models import build_model
from ncfm_core.models.probing import separable
from ncfm_core.rng import generator
from ncfm_core.spec import JobSpec, ModelSpec, TrainingSpec
from ncfm_core.submission import resolve
from ncfm_core.training import Training

STREAMS = ("student/0", "student/1", "student/2")


def students(model: ModelSpec, digits: Dataset) -> list[nn.Module]:
    return [
        build_model(model, image_shape=digits.image_shape, num_classes=10, draw=generator(0, f"{stream}/init"))
        for stream in STREAMS
    ]


def recipe(name: str, **changes: Any) -> TrainingSpec:
    entry = resolve({"dataset": "digits", "ipc": 1, "evaluate": [{"protocol": name}]}).evaluate[0]
    return entry.training.model_copy(update=changes)


@pytest.mark.parametrize(
    ("norm", "vmapped"), [("instance", False), ("group", False), ("none", False), ("instance", True)]
)
@pytest.mark.parametrize(
    "training",
    [
        recipe("quick", epochs=6, batch_size=16),
        recipe("dc", epochs=6, batch_size=16, milestones=(0.4,)),
        recipe("ncfm", epochs=3, batch_size=100, cutmix=1.0),
        recipe("dc", epochs=4, batch_size=16, loss="l1_logits", cutmix=0.5),
        recipe("dc", epochs=4, batch_size=16, loss="soft_cross_entropy", cutmix=0.5),
        recipe("dc", epochs=4, batch_size=16, loss="kl", cutmix=0.5),
    ],
    ids=["quick", "dc", "ncfm", "l1", "soft", "kl"],
)
def test_students_trained_at_once_equal_those_trained_apart(
    digits: Dataset, spec: JobSpec, training: TrainingSpec, norm: str, vmapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if vmapped:
        monkeypatch.setattr(cohort, "_has_grouped_form", lambda _: False)
    model = ModelSpec(name="convnet", depth=2, width=8, norm=norm)  # type: ignore[arg-type]
    images, labels = digits.train_images[:40], digits.train_labels[:40]
    targets = torch.randn((40, 10), generator=generator(0, "targets"))
    together = Cohort(
        students(model, digits),
        Batches(images, labels, digits, spec=training, targets=targets),
        seed=3,
        streams=STREAMS,
    )
    together.advance(together.total // 2)
    together.advance(together.total)
    seen = digits.normalise(digits.test_images[:50])
    for index, (stream, student) in enumerate(zip(STREAMS, students(model, digits), strict=True)):
        apart = Training(student, images, labels, digits, spec=training, seed=3, stream=stream, targets=targets)
        for _ in apart.run():
            pass
        # Logits, not weights: under instance norm a bias has no effect, its gradient is rounding, and AdamW makes steps of that.
        torch.testing.assert_close(together.student(index)(seen), apart.model(seen), atol=2e-3, rtol=2e-3)


def test_forms_of_the_forward_agree(digits: Dataset, spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = students(spec.model, digits)
    parameters = {
        name: torch.stack([network.get_parameter(name).detach() for network in networks])
        for name, _ in networks[0].named_parameters()
    }
    images = torch.randn((3, 5, 1, 8, 8), generator=generator(0, "images"))
    expected = torch.stack([network(batch) for network, batch in zip(networks, images, strict=True)])
    torch.testing.assert_close(forward_of(networks[0])(parameters, images), expected)
    monkeypatch.setattr(cohort, "_has_grouped_form", lambda _: False)
    torch.testing.assert_close(forward_of(networks[0])(parameters, images), expected)


def test_small_batches_share_a_step_and_large_ones_do_not(digits: Dataset, spec: JobSpec) -> None:
    network = students(spec.model, digits)[0]

    def at_once(images: int) -> int:
        training = recipe("dc")
        return students_at_once(
            network, Batches(digits.train_images[:images], digits.train_labels[:images], digits, spec=training)
        )

    # The largest map of an image: 16 channels of 8x8 floats, 4 KiB.
    assert at_once(10) == (2 * 2**20) // (40 * 2**10)
    assert at_once(32) == 16
    assert at_once(33) == at_once(1000) == 1


def test_networks_that_look_at_the_batch_or_draw_are_trained_apart() -> None:
    assert separable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)))
    assert not separable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    assert not separable(nn.Sequential(nn.Linear(1, 2), nn.Dropout()))
