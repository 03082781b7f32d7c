"""A data set by its spec: from scikit-learn, torchvision's files, image files or batches of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ncfm_core.catalog import DatasetFacts, dataset_facts
from ncfm_core.datasets.converted import Converted, Space
from ncfm_core.datasets.dataset import Dataset, identity
from ncfm_core.datasets.downsampled import read_downsampled
from ncfm_core.datasets.imagefolder import list_imagefolder
from ncfm_core.datasets.listing import Listing, read_listing
from ncfm_core.datasets.pixels import statistics
from ncfm_core.datasets.torchvision_files import TORCHVISION, Part, read_torchvision
from ncfm_core.datasets.trees import list_imagenet, list_tiny_imagenet, missing
from ncfm_core.errors import SpecError
from ncfm_core.spec import DatasetSpec

DEFAULT_MEMORY_BYTES = 2 << 30
"""Larger sets stay in a file."""


def load_dataset(
    dataset: DatasetSpec | str,
    *,
    data_dir: Path,
    allow_download: bool = False,
    cache_dir: Path | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Dataset:
    """Read a data set.

    Args:
        dataset: which; its name alone will do, but for `imagefolder`.
        data_dir: folder in torchvision's layout (docs/datasets.md); `digits` needs none.
        allow_download: whether torchvision may fetch what is missing.
        cache_dir: where the converted images of a set go that is larger than the bound; None refuses such a set.
        memory_bytes: the bound: images that take more stay in a file and are read as they are taken.

    Raises:
        SpecError: the name is unknown.
        DatasetError: files are missing or damaged, or there is no room for them.
    """
    spec = _named(dataset) if isinstance(dataset, str) else dataset
    facts, space = spec.facts, Space(memory_bytes, cache_dir)
    if facts.name == "digits":
        return _published(facts, _digits(), facts.class_names)
    if facts.name in TORCHVISION:
        parts, names = read_torchvision(facts, data_dir, allow_download)
        return _published(facts, parts, names)
    if facts.name == "imagenet" and (downsampled := read_downsampled(facts, data_dir, space)) is not None:
        converted, names = downsampled
        return _dataset(facts, converted, names)
    if spec.uri is not None:
        listing = list_imagefolder(spec.uri, data_dir)
    elif facts.name == "tiny-imagenet":
        listing = list_tiny_imagenet(facts, data_dir)
    else:
        listing = _some(list_imagenet(facts, data_dir), facts, data_dir)
    converted = read_listing(listing, name=facts.name, image_size=facts.image_size, space=space)
    return _dataset(facts, converted, listing.class_names, listing.split, listing.ignored_files)


def _named(name: str) -> DatasetSpec:
    facts = dataset_facts(name)
    if facts.name == "imagefolder":
        raise SpecError.of("dataset", name, "needs uri and image_size", "Give a DatasetSpec.")
    return DatasetSpec(name=facts.name)


def _some(listing: Listing | None, facts: DatasetFacts, data_dir: Path) -> Listing:
    if listing is None:
        raise missing(facts, data_dir)
    return listing


def _published(facts: DatasetFacts, parts: Iterator[Part], names: tuple[str, ...]) -> Dataset:
    (train_images, train_labels), (test_images, test_labels) = (
        (torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in parts
    )
    return _dataset(facts, Converted(train_images, train_labels, test_images, test_labels), names, facts.split)


def _dataset(
    facts: DatasetFacts,
    converted: Converted,
    class_names: tuple[str, ...],
    split: str = "published",
    ignored_files: int = 0,
) -> Dataset:
    mean, std = (
        (torch.tensor(facts.mean), torch.tensor(facts.std)) if facts.mean else statistics(converted.train_images)
    )
    dataset = Dataset(
        name=facts.name,
        train_images=converted.train_images,
        train_labels=converted.train_labels,
        test_images=converted.test_images,
        test_labels=converted.test_labels,
        class_names=class_names,
        mean=mean,
        std=std,
        split=split,
        ignored_files=ignored_files,
        identity="" if facts.class_names else identity(facts.name, class_names),
        train_file=converted.train_file,
        test_file=converted.test_file,
    )
    dataset.check_labels()
    return dataset


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
