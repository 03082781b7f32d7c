"""Whose checkpoints a job may go on from where it has none of its own: the one rule, for stages and for the driver. Light."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from pydantic import JsonValue

from ncfm_core.errors import StorageError
from worker.records import CheckpointRecord, checkpoint_folder, resumable_folder, resumable_path
from worker.storage import Storage


def checkpoint_paths(storage: Storage, key: str, job_ids: Iterable[str]) -> list[tuple[int, str, str]]:
    """Step, path of the record, and job of each checkpoint that some jobs have of a result; the newest first."""
    found = [
        (int(PurePosixPath(path).stem), path, job_id)
        for job_id in job_ids
        for path in storage.list(checkpoint_folder(job_id, key))
        if path.endswith(".json")
    ]
    return sorted(found, reverse=True)


def left_by_others(
    storage: Storage, key: str, *, job_id: str, environment: Mapping[str, JsonValue]
) -> Iterator[tuple[str, CheckpointRecord]]:
    """The checkpoints of other jobs that one may go on from, each with its job, the newest first; their files are not read.

    Those count that were made as this job would make them (`is_like`): a checkpoint carries the size of its pieces and its number
    of threads on, which another job's `resources` may not allow, and which move the last bits.
    """
    marked = [PurePosixPath(mark).name for mark in storage.list(resumable_folder(key))]
    for _, path, other in checkpoint_paths(storage, key, (job for job in marked if job != job_id)):
        try:
            record = storage.get_record(path, CheckpointRecord)
        except StorageError:
            continue
        if record is not None and record.key == key and is_like(record.environment, environment):
            yield other, record


def is_like(there: Mapping[str, JsonValue], here: Mapping[str, JsonValue]) -> bool:
    """Whether two environments have the same kind of device, number of threads and memory limit."""
    return _conditions(there) == _conditions(here)


def _conditions(environment: Mapping[str, JsonValue]) -> tuple[JsonValue, ...]:
    kind = str(environment.get("device")).partition(":")[0]
    return kind, environment.get("threads"), environment.get("memory_limit")


def marks_of(job_id: str, checkpoints: Iterable[str]) -> list[str]:
    """The marks that lead other jobs to these files below `checkpoint_root` of a job: they go with them."""
    return sorted({resumable_path(PurePosixPath(path).parts[2], job_id) for path in checkpoints})
