"""Sets in torchvision's layout: MNIST and Fashion-MNIST, as they are or compressed; CIFAR and SVHN, through torchvision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ncfm_core.catalog import DatasetFacts
from ncfm_core.datasets.idx import present, read_idx
from ncfm_core.errors import DatasetError, Problem

TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
"""Names of torchvision's classes."""
IDX = ("mnist", "fashion-mnist")

Part = tuple[np.ndarray, np.ndarray]
"""uint8 images of shape (N, channels, H, W) and int64 labels of shape (N,)."""


def read_torchvision(
    facts: DatasetFacts, data_dir: Path, allow_download: bool
) -> tuple[Iterator[Part], tuple[str, ...]]:
    """Training and test part, and the names of the classes.

    Args:
        facts: of one of `TORCHVISION`.
        data_dir: with the files in torchvision's layout.
        allow_download: whether torchvision may fetch them where one is missing.

    Raises:
        DatasetError: files are missing or damaged.
    """
    absent = [file for file in facts.files if not present(data_dir / file, compressed=facts.name in IDX)]
    if absent and not allow_download:
        raise DatasetError(
            Problem(
                "dataset.name",
                repr(facts.name),
                f"no data below {data_dir}: looked for {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''}",
                "Put the files there in torchvision's layout, name another folder with NCFM_DATA_DIR, "
                "or allow the download with NCFM_ALLOW_DOWNLOAD=true.",
            )
        )
    if facts.name in IDX:
        if absent:
            _read(facts, data_dir, train=True, download=True)
        return iter([_of_idx(facts, data_dir, part) for part in ("train", "t10k")]), facts.class_names
    train = _read(facts, data_dir, train=True, download=bool(absent))
    test = _read(facts, data_dir, train=False, download=bool(absent))
    names = facts.class_names or tuple(str(name) for name in train.classes)
    return iter([_arrays(train), _arrays(test)]), names


def _of_idx(facts: DatasetFacts, data_dir: Path, part: str) -> Part:
    images, labels = (
        read_idx(data_dir / next(file for file in facts.files if f"/{part}-{kind}-idx" in file), dimensions)
        for kind, dimensions in (("images", 3), ("labels", 1))
    )
    return images[:, None], labels.astype(np.int64)


def _read(facts: DatasetFacts, data_dir: Path, *, train: bool, download: bool) -> Any:
    # Imported here: it takes a second, and `digits` does without it.
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[facts.name])
    part: dict[str, Any] = {"split": "train" if train else "test"} if facts.name == "svhn" else {"train": train}
    # torchvision compares CIFAR's and SVHN's files with their known sums before it reads them.
    try:
        return kind(str(data_dir), download=download, **part)
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
        if damaged := _damaged(kind, data_dir):
            raise DatasetError(*damaged) from error
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DatasetError.of(
            "dataset.name", facts.name, f"the files below {data_dir} cannot be read: {reason}", "Fetch them again."
        ) from error


def _damaged(kind: Any, data_dir: Path) -> list[Problem]:
    """The files of a set whose sums are not the published ones."""
    listed = [*getattr(kind, "train_list", ()), *getattr(kind, "test_list", ())]
    listed += [(meta["filename"], meta["md5"])] if (meta := getattr(kind, "meta", None)) else []
    listed += [entry[1:] for entry in getattr(kind, "split_list", {}).values() if len(entry) == 3]
    problems = []
    for name, wanted in listed:
        path = data_dir / getattr(kind, "base_folder", "") / name
        if not path.is_file():
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != wanted:
            size = path.stat().st_size
            message = f"cannot be read: its {size} bytes have the md5 sum {found}, published is {wanted}"
            hint = "It is cut off, damaged or another file: fetch it again."
            problems.append(Problem("dataset.name", repr(str(path)), message, hint))
    return problems


def _arrays(read: Any) -> Part:
    images = np.asarray(read.data)
    if images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    labels = read.labels if hasattr(read, "labels") else read.targets
    return np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)
