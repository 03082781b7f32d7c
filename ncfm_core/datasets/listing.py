"""Image files with their labels, before any of them is read, and their way into arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ncfm_core.datasets.converted import Converted, Space, convert
from ncfm_core.datasets.decoding import CHANNELS, decode_all
from ncfm_core.datasets.sources import Source

Entry = tuple[str, int]
"""Path in the source, and label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What becomes a data set."""

    source: Source
    class_names: tuple[str, ...]
    train: Sequence[Entry]
    test: Sequence[Entry]
    """In the order of the images."""
    split: str = "published"
    ignored_files: int = 0


def read_listing(listing: Listing, *, name: str, image_size: int, space: Space) -> Converted:
    """Decode all of its images.

    Args:
        listing: which.
        name: of the data set.
        image_size: height and width that they are brought to.
        space: where they may go.

    Raises:
        DatasetError: a file is damaged (it is named), or the images find no room.
    """

    def fill(train: np.ndarray, test: np.ndarray) -> None:
        rows = {path: row for row, (path, _) in enumerate((*listing.train, *listing.test))}
        for path, pixels in decode_all(listing.source.read(rows), image_size):
            row = rows[path]
            if row < len(train):
                train[row] = pixels
            else:
                test[row - len(train)] = pixels

    chosen = hashlib.sha256(listing.source.listing.encode())
    for part in (listing.train, listing.test):
        for path, label in part:
            chosen.update(path.encode(errors="surrogateescape") + f"\0{label}\n".encode())
        chosen.update(b"\n")
    return convert(
        space,
        name=name,
        listing=chosen.hexdigest(),
        image_shape=(CHANNELS, image_size, image_size),
        labels=lambda: (_labels(listing.train), _labels(listing.test)),
        fill=fill,
    )


def _labels(entries: Sequence[Entry]) -> np.ndarray:
    return np.array([label for _, label in entries], dtype=np.int64)
