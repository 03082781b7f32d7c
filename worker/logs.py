"""The log of an attempt as one run of bytes, kept in parts: `driver.log`, `driver.log.1`, ... Light.

An object cannot be added to, so the last part is written anew as it grows, up to PART_BYTES; those before it never change. A
place in the log is a number of bytes from its beginning, and stays that for as long as the log is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from worker.storage import Storage

PART_BYTES = 1_000_000
"""A part of this size is the last one no more: the log goes on in the next. Also of logs that are there; never lower it."""


def part_path(path: str, number: int) -> str:
    """Where a part of the log at `path` is, counted from 0."""
    return f"{path}.{number}" if number else path


def log_size(storage: Storage, path: str) -> int:
    """Bytes of all parts; 0 where there is no log."""
    return sum(size for _, size in _parts(storage, path))


def log_bytes(storage: Storage, path: str, *, start: int, end: int) -> Iterator[bytes]:
    """Bytes [start, end) of the log in chunks; less where it has less."""
    before = 0
    for part, size in _parts(storage, path):
        if start < before + size and before < end:
            yield from storage.stream(part, start=max(0, start - before), end=min(size, end - before))
        before += size
        if before >= end:
            return


def _parts(storage: Storage, path: str) -> Iterator[tuple[str, int]]:
    """Paths and sizes; a part that is not full is the last one, so a short log takes one look."""
    for number in count():
        part = part_path(path, number)
        size = storage.size(part)
        if size is None:
            return
        yield part, size
        if size < PART_BYTES:
            return
