"""What a storage root holds that nothing needs any more: listed here, deleted by whoever decides to. Light, and read-only.

A listing is of a moment in which jobs go on. What it names was not needed when it was made, as long as `keep` had every job that
may still run: those write files before the results that refer to them.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from worker.records import FileRecord, StageResult, checkpoint_root
from worker.storage import Storage


@dataclass(frozen=True, slots=True)
class Leftover:
    """One object."""

    path: str
    """Below the storage root."""
    size: int
    """Bytes."""


def checkpoints_of(storage: Storage, job_id: str) -> list[Leftover]:
    """All checkpoints of a job: of use only to a further attempt at it."""
    return _listed(storage.sizes(checkpoint_root(job_id)))


def unreferenced_objects(storage: Storage, keep: AbstractSet[str]) -> list[Leftover]:
    """Files of stage results that no result refers to: of attempts that were lost, came second, or were damaged.

    Args:
        storage: the root.
        keep: ids of jobs that are not over.

    Raises:
        StorageError: a result cannot be read: then nobody knows what it refers to.
    """
    # The objects first: what is committed meanwhile is then among the results.
    found = storage.sizes("objects")
    needed = {file.path for path in storage.sizes("results") for file in _files(storage, path)}
    return _listed({path: size for path, size in found.items() if path not in needed and _job_of(path) not in keep})


def checkpoints_without_job(storage: Storage, keep: AbstractSet[str]) -> list[Leftover]:
    """Checkpoints of all jobs but those of `keep`."""
    found = storage.sizes("checkpoints")
    return _listed({path: size for path, size in found.items() if path.split("/")[1] not in keep})


def partial_files(storage: Storage) -> list[Leftover]:
    """Files that were begun and never renamed (`.partial`), wherever they are."""
    return _listed({path: size for path, size in storage.sizes().items() if path.endswith(".partial")})


def damaged_results(storage: Storage) -> list[Leftover]:
    """Records of results that were set aside (`Storage.set_aside`)."""
    return _listed(storage.sizes("damaged"))


def _files(storage: Storage, path: str) -> tuple[FileRecord, ...]:
    """Those of a result; one that is gone by now refers to none."""
    result = storage.get_record(path, StageResult)
    return result.files if result else ()


def _job_of(path: str) -> str:
    """The job of `objects/<job>-<attempt>/...`."""
    return path.split("/")[1].rpartition("-")[0]


def _listed(sizes: dict[str, int]) -> list[Leftover]:
    return [Leftover(path, size) for path, size in sorted(sizes.items())]
