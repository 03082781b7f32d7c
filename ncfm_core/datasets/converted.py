"""Where converted images go: into memory, or, where they are too many, into files below a cache folder that are mapped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ncfm_core.datasets.pixels import map_pixels
from ncfm_core.errors import DatasetError

FORMAT = 1
"""Of the cache, and of how images are converted: another one is converted anew."""
TRAIN, TEST, DONE = "train.bin", "test.bin", "set.json"


@dataclass(frozen=True, slots=True)
class Space:
    """How much memory the images of a set may take, and the folder for larger ones."""

    memory_bytes: int
    cache_dir: Path | None


@dataclass(frozen=True, slots=True)
class Converted:
    """Images and labels of both parts; `*_file` is where images lie that are not in memory."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train_file: Path | None = None
    test_file: Path | None = None


Labels = tuple[np.ndarray, np.ndarray]
Fill = Callable[[np.ndarray, np.ndarray], None]


def convert(
    space: Space,
    *,
    name: str,
    listing: str,
    image_shape: tuple[int, int, int],
    labels: Callable[[], Labels],
    fill: Fill,
) -> Converted:
    """Images of a set, converted once.

    Args:
        space: where they may go.
        name: of the set.
        listing: digest of the files they come from: other files, another conversion.
        image_shape: (channels, H, W).
        labels: gives the int64 labels of training and test images, and with them how many there are.
        fill: writes the uint8 images into two arrays of shape (N, channels, H, W), in the order of the labels.

    Raises:
        DatasetError: they fit neither the memory bound nor the disk, or the folder cannot be written.
    """
    key = hashlib.sha256(f"{FORMAT}\0{name}\0{listing}\0{image_shape}".encode()).hexdigest()
    folder = space.cache_dir / f"{name}-{key[:32]}" if space.cache_dir is not None else None
    if folder is not None and (folder / DONE).is_file():
        return _mapped(folder)
    found = labels()
    shapes = [(len(each), *image_shape) for each in found]
    needed = sum(math.prod(shape) for shape in shapes)
    if needed <= space.memory_bytes:
        arrays = [np.empty(shape, dtype=np.uint8) for shape in shapes]
        fill(*arrays)
        (train, test), (train_labels, test_labels) = map(torch.from_numpy, arrays), map(torch.from_numpy, found)
        return Converted(train, train_labels, test, test_labels)
    if folder is None:
        message = f"its {needed / 2**30:.1f} GiB are more than the bound of {space.memory_bytes / 2**30:.1f} GiB"
        raise DatasetError.of("dataset.name", name, message, "Name a cache folder with NCFM_CACHE_DIR.")
    try:
        _write(folder, needed, shapes, found, fill)
    except OSError as error:
        hint = "Name a folder with room for it, and that can be written, with NCFM_CACHE_DIR."
        raise DatasetError.of(
            "dataset.name", name, f"cannot be converted into {folder.parent}: {error}", hint
        ) from None
    return _mapped(folder)


def _write(folder: Path, needed: int, shapes: Sequence[tuple[int, ...]], labels: Labels, fill: Fill) -> None:
    """Fill a new folder and give it its name at the end, so that it is never seen half done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise OSError(f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        arrays = [
            np.memmap(partial / file, dtype=np.uint8, mode="w+", shape=shape)
            for file, shape in zip((TRAIN, TEST), shapes, strict=True)
        ]
        fill(*arrays)
        for array in arrays:
            array.flush()
        for file, values in zip((TRAIN, TEST), labels, strict=True):
            np.save(partial / f"{file}.labels.npy", values, allow_pickle=False)
        (partial / DONE).write_text(json.dumps({"format": FORMAT, "shapes": shapes}))
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process was first: its files are the same.
            if not (folder / DONE).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _mapped(folder: Path) -> Converted:
    try:
        shapes = json.loads((folder / DONE).read_text())["shapes"]
        train_labels, test_labels = (
            torch.from_numpy(np.load(folder / f"{file}.labels.npy", allow_pickle=False)) for file in (TRAIN, TEST)
        )
        train, test = (
            map_pixels(folder / file, tuple(shape)) for file, shape in zip((TRAIN, TEST), shapes, strict=True)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"the converted set {folder} is damaged: {error}"
        raise DatasetError.of("dataset.name", None, message, "Delete it: it is made again.") from None
    return Converted(train, train_labels, test, test_labels, folder / TRAIN, folder / TEST)
