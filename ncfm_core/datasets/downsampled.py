"""ImageNet at 64 pixels as its authors publish it: batches of rows of bytes (Chrabaszcz et al., arXiv 1707.08819).

Ten training batches and one of validation images, as `.npz` or as pickles. A pickle can run any code when it is read plainly:
here it may build arrays, numbers, text and containers of them, and nothing else.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ncfm_core.catalog import DatasetFacts
from ncfm_core.datasets.converted import Converted, Space, convert
from ncfm_core.errors import DatasetError

FOLDER = "imagenet64"
TRAIN_BATCHES = tuple(f"train_data_batch_{number}" for number in range(1, 11))
TEST_BATCH = "val_data"
NAMES = "map_clsloc.txt"
"""Lines `<wnid> <label from 1> <name>`; optional."""
_DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, MemoryError, zlib.error)


def read_downsampled(facts: DatasetFacts, data_dir: Path, space: Space) -> tuple[Converted, tuple[str, ...]] | None:
    """The set and the names of its classes; None where the first batch is not there.

    Raises:
        DatasetError: a batch is missing or damaged.
    """
    folder = data_dir / FOLDER
    if _file(folder, TRAIN_BATCHES[0]) is None:
        return None
    paths = {name: _file(folder, name) for name in (*TRAIN_BATCHES, TEST_BATCH)}
    found = [path for path in paths.values() if path is not None]
    if len(found) < len(paths):
        lacking = next(name for name, path in paths.items() if path is None)
        raise DatasetError.of("dataset.name", facts.name, f"{folder / lacking}[.npz] is not there", facts.origin)
    train, test = [_Batch(path, facts) for path in found[:-1]], [_Batch(found[-1], facts)]
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}\n".encode())

    def fill(train_images: np.ndarray, test_images: np.ndarray) -> None:
        for batches, images in ((train, train_images), (test, test_images)):
            row = 0
            for batch in batches:
                rows = batch.images()
                images[row : row + len(rows)] = rows
                row += len(rows)

    converted = convert(
        space,
        name=facts.name,
        listing=digest.hexdigest(),
        image_shape=(facts.channels, facts.image_size, facts.image_size),
        labels=lambda: (_labels(train), _labels(test)),
        fill=fill,
    )
    return converted, _names(folder, facts.num_classes)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.npz", folder / name) if path.is_file()), None)


def _labels(batches: Sequence[_Batch]) -> np.ndarray:
    return np.concatenate([batch.labels() for batch in batches])


class _Batch:
    """One file: `data` of shape (N, 3 * 64 * 64), a row an image, its channels one after the other; `labels` from 1."""

    def __init__(self, path: Path, facts: DatasetFacts) -> None:
        self._path, self._facts = path, facts

    def labels(self) -> np.ndarray:
        return self._checked(self._read("labels")[0])

    def _checked(self, found: Any) -> np.ndarray:
        labels = np.asarray(found)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
            raise self._damaged("its labels are not whole numbers")
        if labels.min() < 1 or labels.max() > self._facts.num_classes:
            raise self._damaged(f"labels run from {labels.min()} to {labels.max()}")
        return labels.astype(np.int64) - 1

    def images(self) -> np.ndarray:
        (data, labels), size = self._read("data", "labels"), self._facts.image_size
        width = self._facts.channels * size**2
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != width:
            raise self._damaged(f"its data are not rows of {width} bytes")
        if len(data) != len(self._checked(labels)):
            raise self._damaged(f"{len(data)} images have {len(labels)} labels")
        return data.reshape(-1, self._facts.channels, size, size)

    def _read(self, *names: str) -> list[Any]:
        try:
            with self._path.open("rb") as file:
                if self._path.suffix == ".npz":
                    archive = np.load(file, allow_pickle=False)
                    return [archive[name] for name in names]
                document = _ArraysOnly(file, encoding="latin1").load()
                return [document[name] for name in names]
        except (*_DAMAGED, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise self._damaged(str(error) or type(error).__name__) from None

    def _damaged(self, reason: str) -> DatasetError:
        message = f"{self._path} cannot be read: {reason}"
        return DatasetError.of("dataset.name", self._facts.name, message, "Fetch it again.")


def _latin1(text: str, encoding: str) -> bytes:
    """How a pickle of protocol 2 writes bytes; any other encoding is none of its business."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Refuses every name but those that numpy arrays of bytes and numbers are made with."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        # numpy 2 moved what pickles of numpy 1 name.
        place = (module.replace("numpy._core", "numpy.core", 1), name)
        if place not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch of images does not need")
        return _ALLOWED[place]


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """An empty array, which its state is then put into."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("not an array")
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """How a pickle of protocol 5 holds an array."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
}


def _names(folder: Path, num_classes: int) -> tuple[str, ...]:
    """`<wnid>-<name>` in the order of the labels, or numbers where the file with the names is not there."""
    names = {label: f"class-{label + 1:04d}" for label in range(num_classes)}
    if (folder / NAMES).is_file():
        for line in (folder / NAMES).read_text(errors="replace").splitlines():
            wnid, _, rest = line.strip().partition(" ")
            number, _, name = rest.partition(" ")
            if number.isdecimal() and int(number) - 1 in names:
                names[int(number) - 1] = f"{wnid}-{name.replace('_', '-').replace('/', '-').lower()}"
    return tuple(names.values())
