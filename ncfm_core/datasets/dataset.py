"""Data sets as tensors: uint8 images, in memory or in a mapped file, with labels, statistics and a digest of what was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncfm_core.catalog import DatasetFacts
from ncfm_core.datasets.pixels import as_bytes, map_pixels, statistics
from ncfm_core.errors import DatasetError, SpecError, shorten
from ncfm_core.geometry import CHANNELS
from ncfm_core.rng import generator, moved

CHUNK = 4096
"""Images that are hashed at once."""
DECIMALS = 6
"""Of statistics that leave the tensors."""


@dataclass(frozen=True, eq=False, slots=True)
class Images:
    """A choice of uint8 images behind one index: what `images[chosen]` gives is on the compute device."""

    pixels: Tensor
    """Shape (M, channels, H, W); on the compute device, or mapped from a file."""
    rows: Tensor | None
    """Which of them, int64 of shape (N,) on the CPU; None for all."""
    device: torch.device
    """Compute device."""
    mapped: bool
    """Whether they are in a file."""

    def to(self, device: torch.device) -> Images:
        """The same images for another compute device; those in a file stay there."""
        return Images(self.pixels if self.mapped else self.pixels.to(device), self.rows, device, self.mapped)

    @property
    def index_device(self) -> torch.device:
        """Where an index of theirs is read, and so where it should be."""
        return torch.device("cpu") if self.mapped else self.device

    def __len__(self) -> int:
        return len(self.pixels if self.rows is None else self.rows)

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        """uint8 images of shape (len(chosen), channels, H, W) on the compute device."""
        if self.rows is not None:
            chosen = self.rows[chosen.cpu() if isinstance(chosen, Tensor) else chosen]
        if isinstance(chosen, Tensor):
            return moved(self.pixels.index_select(0, chosen.to(self.pixels.device)), self.device)
        return moved(self.pixels[chosen], self.device)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size.

    `train_images`, `test_images`: uint8 of shape (N, channels, H, W), H = W. Labels: int64 of shape (N,), in [0, classes).
    `mean`, `std`: float32 of shape (channels,), of pixels in [0, 1].

    Images of a set that is too large for the memory stay in a file (`train_file`, `test_file`), which `train_images` and
    `test_images` map; `train_rows` and `test_rows` are then the choice of them that the labels belong to. So read images with
    `take`, or through `train` and `test`: they work for both kinds.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    split: str = "published"
    """How training and test images were told apart."""
    ignored_files: int = 0
    """Files that are not images, or lie outside the class folders."""
    identity: str = ""
    """What tells these data apart beyond pixels and labels; hashed into the digest."""
    train_file: Path | None = None
    test_file: Path | None = None
    train_rows: Tensor | None = None
    test_rows: Tensor | None = None

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("training", self.train, self.train_labels),
            ("test", self.test, self.test_labels),
        ):
            if images.pixels.dtype != torch.uint8 or images.pixels.ndim != 4:
                found = f"{images.pixels.dtype} of shape {tuple(images.pixels.shape)}"
                hint = "Dataset.from_tensors takes floats in [0, 1] as well."
                raise _wrong(self.name, f"{part} images must be uint8 of shape (N, channels, H, W), not {found}", hint)
            _, channels, height, width = images.pixels.shape
            if height != width:
                hint = "Scale and cut them to one size."
                raise _wrong(self.name, f"{part} images of {height}x{width} pixels are not square", hint)
            if channels not in CHANNELS:
                hint = "Give grey ones (1 channel) or colour ones (3)."
                raise _wrong(self.name, f"{part} images have {channels} channels", hint)
            _check_labels(labels, part, self.name)
            if labels.dtype != torch.int64:
                raise _wrong(self.name, f"{part} labels must be int64, not {labels.dtype}", "Convert them.")
            if len(images) != len(labels):
                raise _wrong(self.name, f"{len(images)} {part} images have {len(labels)} labels", "Give one for each.")
        shapes = [tuple(images.pixels.shape[1:]) for images in (self.train, self.test)]
        if shapes[0] != shapes[1]:
            message = f"training images have the shape {shapes[0]}, test images {shapes[1]}"
            raise _wrong(self.name, message, "Bring them to one size and one number of channels.")

    @classmethod
    def from_tensors(
        cls, name: str, *, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], class_names: Sequence[str]
    ) -> Dataset:
        """A data set of one's own, with the statistics of its training pixels.

        Args:
            name: for people.
            train: images of shape (N, channels, H, W), uint8 or float in [0, 1], and their labels of shape (N,).
            test: the same.
            class_names: in the order of the labels.

        Raises:
            DatasetError: they are no tensors, pixels are not finite or not in [0, 1], images are not square, not all of one shape
                or of neither 1 nor 3 channels, or labels are not whole numbers, or do not fit the images or the classes.
        """
        for part, pair in (("training", train), ("test", test)):
            _check_tensors(pair, part, name)
            _check_labels(pair[1], part, name)
        (train_images, train_labels), (test_images, test_labels) = (
            (as_bytes(images, name), labels.to(torch.int64)) for images, labels in (train, test)
        )
        mean, std = statistics(train_images) if train_images.ndim == 4 else (torch.zeros(1), torch.ones(1))
        dataset = cls(
            name=name,
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
            class_names=tuple(class_names),
            mean=mean,
            std=std,
            identity=identity(name, class_names),
        )
        dataset.check_labels()
        return dataset

    def check_labels(self) -> None:
        """See that there are classes, and images of each.

        Raises:
            DatasetError: it is not so.
        """
        if self.num_classes < 2:
            raise _wrong(self.name, f"{self.num_classes} class: there is nothing to tell apart", "Give two or more.")
        for part, labels in (("training", self.train_labels), ("test", self.test_labels)):
            if not len(labels):
                raise _wrong(self.name, f"there are no {part} images", "Give some of every class.")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                message = f"{part} labels run from {low} to {high}, but there are {self.num_classes} classes"
                raise _wrong(self.name, message, f"Number the classes 0 to {self.num_classes - 1}.")
        if 0 in self.class_counts:
            empty = self.class_names[self.class_counts.index(0)]
            raise _wrong(self.name, f"class {shorten(empty)} has no training images", "Add some, or leave it out.")

    def check_ipc(self, ipc: int) -> None:
        """See that every class has so many training images.

        Raises:
            SpecError: one has fewer, or they are none at all.
        """
        smallest = min(self.class_counts)
        if not 1 <= ipc <= smallest:
            message = (
                "no images per class" if ipc < 1 else "more images per class than the smallest class has to choose from"
            )
            raise SpecError.of("ipc", ipc, message, f"Choose 1 to {smallest}.")

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
        """Where labels are and where `take` puts images."""
        return self.train_labels.device

    @property
    def train(self) -> Images:
        """The training images, in the order of their labels."""
        return Images(self.train_images, self.train_rows, self.device, self.train_file is not None)

    @property
    def test(self) -> Images:
        """The test images, in the order of their labels."""
        return Images(self.test_images, self.test_rows, self.device, self.test_file is not None)

    def take(self, indices: Tensor) -> Tensor:
        """Training images by index.

        Args:
            indices: int64 of shape (n,), on any device.

        Returns:
            uint8 of shape (n, channels, H, W), on the compute device.
        """
        return self.train[indices]

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Training images of each class."""
        return tuple(self.train_labels.bincount(minlength=self.num_classes).tolist())

    @cached_property
    def digest(self) -> str:
        """sha256 over the decoded images and labels in order, whatever the files looked like, as `sha256:...`."""
        digest = hashlib.sha256()
        parts: tuple[Images | Tensor, ...] = (self.train, self.train_labels, self.test, self.test_labels)
        for part in parts:
            shape = (len(part), *(part.pixels.shape[1:] if isinstance(part, Images) else ()))
            digest.update(f"{part[:1].cpu().numpy().dtype.str}{shape}".encode())
            for start in range(0, len(part), CHUNK):
                digest.update(part[start : start + CHUNK].cpu().contiguous().numpy().data)
        digest.update(self.identity.encode())
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def members(self) -> Tensor:
        """Indices of the training images by class, int64 of shape (classes, largest class), padded with -1."""
        labels = self.train_labels.cpu()
        order = labels.argsort(stable=True)
        counts = torch.tensor(self.class_counts)
        place = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        table = torch.full((self.num_classes, max(self.class_counts)), -1, dtype=torch.int64)
        table[labels[order], place] = order
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
        """The same data for another compute device; images in a file stay there."""
        names = ["train_labels", "test_labels", "mean", "std"]
        names += [f"{part}_images" for part in ("train", "test") if getattr(self, f"{part}_file") is None]
        there = replace(self, **{name: getattr(self, name).to(device) for name in names})
        # What was found out already is true wherever the data are.
        found = (name for name in ("class_counts", "members", "digest") if name in self.__dict__)
        there.__dict__.update({name: self.__dict__[name] for name in found})
        return there

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
        parts: dict[str, Any] = {}
        for part, mask in (("train", ~held), ("test", held)):
            parts[f"{part}_labels"] = self.train_labels[mask.to(self.device)]
            parts[f"{part}_file"] = self.train_file
            if self.train_file is None:
                parts |= {f"{part}_images": self.train_images[mask.to(self.device)], f"{part}_rows": None}
            else:
                rows = mask.nonzero().squeeze(1)
                rows = rows if self.train_rows is None else self.train_rows[rows]
                parts |= {f"{part}_images": self.train_images, f"{part}_rows": rows}
        return replace(self, name=f"{self.name}-validation", **parts)

    def describe(self, facts: DatasetFacts) -> DatasetFacts:
        """What the catalog says of these data, completed and corrected by what was read."""
        channels, image_size, _ = self.image_shape
        return replace(
            facts,
            num_classes=self.num_classes,
            channels=channels,
            image_size=image_size,
            num_train=len(self.train_labels),
            num_test=len(self.test_labels),
            smallest_class=min(self.class_counts),
            mean=facts.mean or tuple(round(value, DECIMALS) for value in self.mean.tolist()),
            std=facts.std or tuple(round(value, DECIMALS) for value in self.std.tolist()),
            class_names=self.class_names,
            split=self.split,
            assumed=False,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Mapped images travel as the path of their file, which every node must be able to read."""
        state = dict(self.__dict__)
        for part in ("train", "test"):
            if state[f"{part}_file"] is not None:
                state[f"{part}_images"] = tuple(state[f"{part}_images"].shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for part in ("train", "test"):
            if state[f"{part}_file"] is not None:
                state[f"{part}_images"] = map_pixels(state[f"{part}_file"], state[f"{part}_images"])
        self.__dict__.update(state)


def identity(name: str, class_names: Sequence[str]) -> str:
    """What is hashed beside pixels and labels of data that have no entry of their own in the catalog.

    Their class names are published, and their statistics are taken from the pixels, by a rule that has the version 1.
    """
    return json.dumps([name, "statistics 1", list(class_names)])


def _check_tensors(pair: object, part: str, name: str) -> None:
    """See that they are images and labels, both tensors.

    Raises:
        DatasetError: it is not so.
    """
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        message = f"{part} data are not images and labels, but {type(pair).__name__}"
        raise _wrong(name, message, "Give a pair: (images, labels).")
    for what, given in zip(("images", "labels"), pair, strict=True):
        if isinstance(given, Tensor):
            continue
        hint = "Convert them: torch.from_numpy(...)."
        if isinstance(given, list | tuple):
            hint = "Convert them: torch.tensor(labels)."
            if what == "images":
                hint = "Bring them to one size and stack them: torch.stack(images)."
        raise _wrong(name, f"{part} {what} are {type(given).__name__} {shorten(given)}, not a tensor", hint)


def _check_labels(labels: Tensor, part: str, name: str) -> None:
    """See that they are whole numbers in a row.

    Raises:
        DatasetError: it is not so.
    """
    if labels.ndim != 1:
        hint = "Give one number for each image: labels.flatten(), or labels.argmax(1) of one-hot ones."
        raise _wrong(name, f"{part} labels must be of shape (N,), not {tuple(labels.shape)}", hint)
    if labels.is_floating_point() or labels.is_complex():
        raise _wrong(
            name, f"{part} labels are {labels.dtype}, not whole numbers", "Convert them, as labels.to(torch.int64)."
        )


def _wrong(name: str, message: str, hint: str) -> DatasetError:
    return DatasetError.of("dataset.name", name, message, hint)
