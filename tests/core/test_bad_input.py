"""What does not go together is told at once, by an error that names the field and the way out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ncfm_core.coresets import random_real
from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.errors import DatasetError, NcfmError, SpecError
from ncfm_core.models import build_model
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.rng import generator
from ncfm_core.spec import JobSpec, ModelSpec

CPU = torch.device("cpu")


def made(
    *, train: tuple[int, ...] = (6, 3, 8, 8), test: tuple[int, ...] = (6, 3, 8, 8), labels: Tensor | None = None
) -> Dataset:
    labels = torch.tensor([0, 1, 0, 1, 0, 1]) if labels is None else labels
    images, others = (torch.rand(shape, generator=generator(0, "made")) for shape in (train, test))
    return Dataset.from_tensors("own", train=(images, labels), test=(others, labels), class_names=["a", "b"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": (6, 3, 8, 12)}, "training images of 8x12 pixels are not square"),
        ({"test": (6, 3, 12, 8)}, "test images of 12x8 pixels are not square"),
        ({"test": (6, 3, 12, 12)}, r"training images have the shape \(3, 8, 8\), test images \(3, 12, 12\)"),
        ({"test": (6, 1, 8, 8)}, r"test images \(1, 8, 8\)"),
        ({"train": (6, 2, 8, 8), "test": (6, 2, 8, 8)}, r"training images have 2 channels.*1 channel\) or colour ones"),
        ({"train": (6, 4, 8, 8)}, "training images have 4 channels"),
        ({"train": (6, 8, 8)}, r"must be uint8 of shape \(N, channels, H, W\)"),
        ({"train": (6,)}, r"must be uint8 of shape \(N, channels, H, W\)"),
        (
            {"labels": torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0, 1.0])},
            "training labels are torch.float32, not whole numbers",
        ),
        ({"labels": torch.tensor([[0], [1], [0], [1], [0], [1]])}, r"of shape \(N,\), not \(6, 1\).*labels.flatten"),
        ({"labels": torch.eye(2)[[0, 1, 0, 1, 0, 1]]}, r"of shape \(N,\), not \(6, 2\).*argmax"),
        ({"labels": torch.tensor(1)}, r"of shape \(N,\), not \(\)"),
    ],
    ids=str,
)
def test_images_and_labels_that_do_not_go_together_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DatasetError, match=says) as caught:
        made(**changes)
    assert caught.value.problems[0].field == "dataset.name" and caught.value.problems[0].hint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": np.zeros((6, 3, 8, 8), np.uint8)}, r"training images are ndarray array.*not a tensor.*from_numpy"),
        (
            {"images": [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)]},
            r"training images are list .*one size.*torch\.stack",
        ),
        ({"images": None}, "training images are NoneType None, not a tensor"),
        ({"labels": [0, 1]}, r"training labels are list \[0, 1\], not a tensor.*torch\.tensor\(labels\)"),
        ({"labels": np.array([0, 1])}, "training labels are ndarray .*from_numpy"),
    ],
    ids=str,
)
def test_what_is_no_tensor_is_refused(changes: dict[str, Any], says: str) -> None:
    dataset = made()
    given = {"images": dataset.train_images, "labels": dataset.train_labels} | changes
    good = (dataset.test_images, dataset.test_labels)
    pair = (given["images"], given["labels"])
    with pytest.raises(DatasetError, match=re.compile(says, re.DOTALL)) as caught:
        Dataset.from_tensors("own", train=pair, test=good, class_names=["a", "b"])
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("dataset.name", "'own'") and problem.hint
    with pytest.raises(DatasetError, match=re.compile(says.replace("training", "test"), re.DOTALL)):
        Dataset.from_tensors("own", train=good, test=pair, class_names=["a", "b"])
    with pytest.raises(DatasetError, match=r"test data are not images and labels, but Tensor.*\(images, labels\)"):
        Dataset.from_tensors("own", train=good, test=good[0], class_names=["a", "b"])  # type: ignore[arg-type]


def test_whole_numbers_of_any_kind_are_labels() -> None:
    for kind in (torch.uint8, torch.int32, torch.int64):
        dataset = made(labels=torch.tensor([0, 1, 0, 1, 0, 1], dtype=kind))
        assert dataset.train_labels.dtype == torch.int64
    images = dataset.train_images
    with pytest.raises(DatasetError, match=r"training labels must be int64, not torch\.int32"):
        labels = dataset.train_labels
        Dataset("own", images, labels.int(), images, labels, ("a", "b"), dataset.mean, dataset.std)


@pytest.mark.parametrize("ipc", [0, -1, 119, 500])
def test_more_images_than_a_class_has_are_refused(digits: Dataset, pool: TeacherPool, spec: JobSpec, ipc: int) -> None:
    for use in (
        lambda: Distillation(digits, pool, spec.method, ipc=ipc, seed=0, device=CPU),
        lambda: random_real(digits, ipc=ipc, seed=0),
    ):
        with pytest.raises(SpecError, match=r"ipc: .*Choose 1 to 118") as caught:
            use()
        assert caught.value.problems[0].value == str(ipc)


def test_factor_that_does_not_divide_the_images_is_refused(spec: JobSpec) -> None:
    dataset = made(train=(6, 3, 9, 9), test=(6, 3, 9, 9))
    teacher = TeacherTraining(dataset, spec.model, spec.teachers.training, seed=0, index=0, device=CPU)
    pool = TeacherPool(spec.model, dataset, [teacher.result()], CPU)
    method = spec.method.model_copy(update={"factor": 2})
    with pytest.raises(SpecError, match=r"method\.factor: does not divide images of 9 pixels \(got 2\)"):
        Distillation(dataset, pool, method, ipc=1, seed=0, device=CPU)
    whole = spec.method.model_copy(update={"factor": 1})
    assert Distillation(dataset, pool, whole, ipc=1, seed=0, device=CPU).total


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        (ModelSpec(name="convnet", depth=3, width=4, norm="instance"), 4, r"model\.depth: .*Choose at most 2"),
        (ModelSpec(name="convnet", depth=6, width=4, norm="none"), 8, r"model\.depth: .*Choose at most 3"),
        (ModelSpec(name="resnet18", depth=None, width=4, norm="instance"), 8, r"model\.norm: .*Choose group or batch"),
        (ModelSpec(name="vgg11", depth=None, width=4, norm="group"), 8, r"model\.name: needs images of at least 32"),
    ],
    ids=str,
)
def test_images_too_small_for_the_network_are_refused(model: ModelSpec, size: int, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        build_model(model, image_shape=(3, size, size), num_classes=2, draw=generator(0, "init"))


def test_network_for_images_of_two_channels_is_refused() -> None:
    model = ModelSpec(name="convnet", depth=1, width=4, norm="instance")
    with pytest.raises(SpecError, match=r"image_shape: images have 2 channels \(got \(2, 8, 8\)\)\. Give grey"):
        build_model(model, image_shape=(2, 8, 8), num_classes=2, draw=generator(0, "init"))


def test_network_for_images_that_are_not_square_is_refused() -> None:
    model = ModelSpec(name="convnet", depth=1, width=4, norm="instance")
    with pytest.raises(SpecError, match="image_shape: images are not square"):
        build_model(model, image_shape=(3, 8, 12), num_classes=2, draw=generator(0, "init"))


def test_pool_without_teachers_is_refused(digits: Dataset, spec: JobSpec) -> None:
    with pytest.raises(NcfmError, match="teachers: a pool needs a teacher"):
        TeacherPool(spec.model, digits, [], CPU)
