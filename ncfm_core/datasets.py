"""Data sets as tensors: all images as one uint8 tensor, with labels, statistics and a digest of what was really read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ncfm_core.catalog import DatasetFacts, dataset_facts
from ncfm_core.errors import DatasetError, Problem
from ncfm_core.rng import generator

_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
"""Names of torchvision's classes."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size.

    `train_images`, `test_images`: uint8 of shape (N, channels, H, W). Labels: int64 of shape (N,), in [0, classes).
    `mean`, `std`: float32 of shape (channels,), of pixels in [0, 1].
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, H, W)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Training images of each class."""
        return tuple(self.train_labels.bincount(minlength=self.num_classes).tolist())

    @cached_property
    def digest(self) -> str:
        """sha256 over the decoded images and labels in order, whatever the files looked like, as `sha256:...`."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            array = tensor.cpu().contiguous().numpy()
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def members(self) -> Tensor:
        """Indices of the training images by class, int64 of shape (classes, largest class), padded with -1."""
        table = torch.full((self.num_classes, max(self.class_counts)), -1, dtype=torch.int64)
        for label in range(self.num_classes):
            found = (self.train_labels == label).nonzero().squeeze(1).cpu()
            table[label, : len(found)] = found
        return table

    def class_batches(self, size: int, draw: torch.Generator) -> Tensor:
        """Indices of random training images, drawn without replacement from the whole of every class.

        Args:
            size: images per class; at most the size of the smallest class.
            draw: consumed in the same way whatever classes a caller then uses.

        Returns:
            int64 of shape (classes, size).
        """
        keys = torch.rand(self.members.shape, generator=draw).masked_fill_(self.members < 0, 2.0)
        return self.members.gather(1, keys.topk(size, dim=1, largest=False).indices)

    def normalise(self, images: Tensor) -> Tensor:
        """Standardised float32 pixels.

        Args:
            images: shape (N, channels, H, W); uint8, or float in [0, 1].
        """
        mean, std = (each.to(images.device).view(1, -1, 1, 1) for each in (self.mean, self.std))
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        return images.to(torch.float32).sub(mean * scale).div(std * scale)

    def to(self, device: torch.device) -> Dataset:
        """The same data on another device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("train_images", "train_labels", "test_images", "test_labels")
        }
        return replace(self, **moved)

    def hold_out(self, fraction: float, *, seed: int) -> Dataset:
        """The training data split in two, class by class; its second part stands where the test set was.

        Args:
            fraction: share of each class that is held out, in (0, 1).
            seed: of the split.
        """
        held = torch.zeros(len(self.train_labels), dtype=torch.bool)
        keys = torch.rand(self.members.shape, generator=generator(seed, "hold-out"))
        for label, count in enumerate(self.class_counts):
            order = self.members[label, :count][keys[label, :count].argsort()]
            held[order[: max(1, round(fraction * count))]] = True
        held = held.to(self.device)
        return replace(
            self,
            name=f"{self.name}-validation",
            train_images=self.train_images[~held],
            train_labels=self.train_labels[~held],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )


def load_dataset(name: str, *, data_dir: Path, allow_download: bool = False) -> Dataset:
    """Read a data set of the catalog into memory.

    Args:
        name: in the catalog.
        data_dir: folder in torchvision's layout; `digits` needs none.
        allow_download: whether torchvision may fetch what is missing.

    Raises:
        SpecError: the name is unknown.
        DatasetError: files are missing or damaged.
    """
    facts = dataset_facts(name)
    parts = _digits() if name == "digits" else _from_torchvision(facts, data_dir, allow_download)
    (train_images, train_labels), (test_images, test_labels) = parts
    return Dataset(
        name=name,
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        class_names=facts.class_names,
        mean=torch.tensor(facts.mean),
        std=torch.tensor(facts.std),
    )


Part = tuple[np.ndarray, np.ndarray]


def _digits() -> Iterator[Part]:
    """scikit-learn's digits in the fixed split `digits-1297-500`: in order of sha256("digits-1297-500/<index>")."""
    from sklearn.datasets import load_digits

    facts = dataset_facts("digits")
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    order = sorted(range(len(labels)), key=lambda index: hashlib.sha256(f"{facts.split}/{index}".encode()).digest())
    for chosen in (order[: facts.num_train], order[facts.num_train :]):
        yield images[chosen], labels[chosen]


def _from_torchvision(facts: DatasetFacts, data_dir: Path, allow_download: bool) -> Iterator[Part]:
    missing = [
        file
        for file in facts.files
        if not ((path := data_dir / file).exists() or path.with_name(path.name + ".gz").exists())
    ]
    if missing and not allow_download:
        raise DatasetError(
            Problem(
                "dataset.name",
                repr(facts.name),
                f"no data below {data_dir}: looked for {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}",
                "Put the files there in torchvision's layout, name another folder with NCFM_DATA_DIR, "
                "or allow the download with NCFM_ALLOW_DOWNLOAD=true.",
            )
        )
    # Imported here: it takes a second, and `digits` does without it.
    from torchvision import datasets

    for train in (True, False):
        try:
            read = getattr(datasets, _TORCHVISION[facts.name])(str(data_dir), train=train, download=bool(missing))
        except (
            RuntimeError,
            OSError,
            EOFError,
            ValueError,
            AssertionError,
        ) as error:  # torchvision asserts its formats
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise DatasetError.of(
                "dataset.name", facts.name, f"the files below {data_dir} cannot be read: {reason}", "Fetch them again."
            ) from error
        images = np.asarray(read.data)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        yield np.ascontiguousarray(images), np.asarray(read.targets, dtype=np.int64)
