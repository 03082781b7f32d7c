"""What is kept how long. Deletes in small transactions, so that nobody waits long; doing it again does no harm."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

from pydantic import ValidationError
from sqlalchemy import Select, Table, delete, func, select, tuple_

from ncfm_core.errors import StorageError
from service.database import Database
from service.jobs import ACTIVE, State
from service.settings import Settings
from service.tables import audit, events, idempotency, jobs, uploads
from service.uploads import remove_unnamed
from worker.records import AttemptResult, FileRecord, StageResult, attempt_path, object_mark, result_path
from worker.storage import Storage

logger = logging.getLogger("ncfm.retention")

BATCH = 500
"""Rows of one transaction."""
TERMINAL = tuple(state for state in State if state.is_terminal)
_TEMPORARY = re.compile(r"(#\d+|\.partial|\.part)$")
"""Names that files have while they are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long things are kept once nobody needs them."""

    events: timedelta = timedelta(days=30)
    deleted: timedelta = timedelta(days=7)
    checkpoints: timedelta = timedelta(days=7)
    idempotency: timedelta = timedelta(hours=72)
    audit: timedelta = timedelta(days=90)
    temporary: timedelta = timedelta(days=1)
    cache: timedelta | None = None
    """None for ever."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Limits:
        cache = settings.keep_cache_days
        return cls(
            events=timedelta(days=settings.keep_events_days),
            deleted=timedelta(days=settings.keep_deleted_days),
            checkpoints=timedelta(days=settings.keep_checkpoints_days),
            idempotency=timedelta(hours=settings.keep_keys_hours),
            audit=timedelta(days=settings.keep_audit_days),
            temporary=timedelta(days=settings.keep_temporary_days),
            cache=None if cache is None else timedelta(days=cache),
        )


@dataclass(slots=True)
class Removed:
    """What was removed, or would be, by kind."""

    counts: dict[str, int] = field(default_factory=dict)
    """Rows or files."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of files."""

    def add(self, kind: str, count: int, size: int = 0) -> None:
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.sizes[kind] = self.sizes.get(kind, 0) + size


def tidy(store: Database, storage: Storage, now: datetime, limits: Limits, *, dry_run: bool = False) -> Removed:
    """The part for every hour: old rows, deleted jobs with their files, and checkpoints that nobody shall go on from.

    Args:
        store: database of the jobs.
        storage: its storage root.
        now: the time.
        limits: how long what is kept.
        dry_run: only count.

    Raises:
        StoreError, StorageError: what was removed before stays so; the rest is left for the next time.
    """
    removed = Removed()
    _trim_events(store, now - limits.events, removed, dry_run=dry_run)
    for table, column, limit in (
        (idempotency, "created_at", limits.idempotency),
        (audit, "at", limits.audit),
    ):
        _delete_older(store, table, column, now - limit, removed, dry_run=dry_run)
    # Before the rows of deleted jobs: a job that the database does not know is taken for a run by hand.
    _remove_checkpoints(store, storage, now, limits, removed, dry_run=dry_run)
    _remove_deleted(store, storage, now - limits.deleted, removed, dry_run=dry_run)
    return removed


def sweep_storage(store: Database, storage: Storage, now: datetime, limits: Limits, *, dry_run: bool) -> Removed:
    """The part for every now and then: results that nobody needs, objects that nothing refers to, temporary files.

    It reads every manifest of the storage root.
    """
    removed = Removed()
    manifests, unreadable = _manifests(storage)
    kept_files = {file.path for file in _artifacts(store)}
    if limits.cache is not None and not _is_busy(store):
        awaited = _awaited(store, storage)
        for path, result in list(manifests.items()):
            if path in awaited:
                continue
            if result.created_at < now - limits.cache and not kept_files & {file.path for file in result.files}:
                removed.add("results", 1)
                del manifests[path]
                if not dry_run:
                    storage.delete([path])
    kept_files |= {file.path for result in manifests.values() for file in result.files}
    live = set(_ids(store, lambda after: select(jobs.c.id).where(jobs.c.state.not_in(TERMINAL), jobs.c.id > after)))
    for kind, folder in (("unreferenced objects", "objects"), ("damaged results", "damaged")):
        for path, size, changed_at in storage.entries(folder):
            # Files of a job that is not over are written before the result that refers to them.
            is_needed = path in kept_files or path.split("/")[1].rpartition("-")[0] in live
            is_needed = is_needed or any(object_mark(key) in path for key in unreadable)
            if not is_needed and changed_at < now - limits.temporary:
                removed.add(kind, 1, size)
                if not dry_run:
                    storage.delete([path])
    _sweep_uploads(store, storage, now - limits.temporary, removed, dry_run=dry_run)
    for file in temporary_files(storage, now - limits.temporary):
        removed.add("temporary files", 1, file.stat().st_size)
        if not dry_run:
            file.unlink(missing_ok=True)
    return removed


def _sweep_uploads(store: Database, storage: Storage, before: datetime, removed: Removed, *, dry_run: bool) -> None:
    """Archives that no upload names: left by a process that died between the bytes and the row, or the other way round."""
    found = [entry for entry in storage.entries("uploads") if entry[2] < before]
    with store.reading() as connection:
        named = {str(row.id) for row in connection.execute(select(uploads.c.id).where(uploads.c.deleted_at.is_(None)))}
    for path, size, _ in found:
        upload_id = path.split("/")[1].partition(".")[0]
        # One may have come back since the list was read: the last look is under its lock.
        if upload_id not in named and (dry_run or remove_unnamed(store, storage, upload_id, path)):
            removed.add("uploads without a name", 1, size)


def temporary_files(storage: Storage, before: datetime) -> Iterator[Path]:
    """Files that somebody began to write long ago, where the storage root is a folder."""
    if "://" in storage.url:
        return
    for file in Path(storage.url).expanduser().rglob("*"):
        if _TEMPORARY.search(file.name) and file.is_file():
            if datetime.fromtimestamp(file.stat().st_mtime, UTC) < before:
                yield file


def _trim_events(store: Database, before: datetime, removed: Removed, *, dry_run: bool) -> None:
    """All but the terminal event, and what came after it: the sequence has no gaps from there on."""
    first = select(events.c.seq).where(events.c.job_id == jobs.c.id, events.c.seq == 1).exists()
    old = (jobs.c.finished_at < before, jobs.c.state.in_(TERMINAL), first)
    last = events.alias("last")
    ended = (
        select(func.max(last.c.seq)).where(last.c.job_id == events.c.job_id, last.c.type == "state").scalar_subquery()
    )
    cursor = ""
    while True:
        with store.reading() as connection:
            query = select(jobs.c.id).where(*old, jobs.c.id > cursor).order_by(jobs.c.id).limit(BATCH // 10)
            found = [str(row.id) for row in connection.execute(query)]
            trimmed = (events.c.job_id.in_(found), events.c.seq < ended)
            count = connection.execute(select(func.count()).select_from(events).where(*trimmed)).scalar_one()
        if not found:
            return
        cursor = found[-1]
        removed.add("events", int(count))
        if not dry_run:
            with store.writing() as connection:
                connection.execute(delete(events).where(*trimmed))


def _delete_older(
    store: Database, table: Table, column: str, before: datetime, removed: Removed, *, dry_run: bool
) -> None:
    old = table.c[column] < before
    if dry_run:
        with store.reading() as connection:
            count = connection.execute(select(func.count()).select_from(table).where(old)).scalar_one()
        removed.add(table.name, int(count))
        return
    key = tuple_(*table.primary_key.columns)
    statement = delete(table).where(key.in_(select(*table.primary_key.columns).where(old).limit(BATCH)))
    while True:
        with store.writing() as connection:
            count = connection.execute(statement).rowcount
        removed.add(table.name, count)
        if count < BATCH:
            return


def _remove_deleted(store: Database, storage: Storage, before: datetime, removed: Removed, *, dry_run: bool) -> None:
    """Files first, the row last: whoever is killed between them finds the job again. Results stay: others may use them."""
    gone = (jobs.c.deleted_at < before, jobs.c.state.in_(TERMINAL), jobs.c.publication != "pending")
    for job_id in _ids(store, lambda after: select(jobs.c.id).where(*gone, jobs.c.id > after)):
        for path, size, _ in list(storage.entries(f"jobs/{job_id}")):
            removed.add("files of deleted jobs", 1, size)
            if not dry_run:
                storage.delete([path])
        removed.add("deleted jobs", 1)
        if not dry_run:
            with store.writing() as connection:
                # A key that named it would be answered with a job that is not there.
                connection.execute(delete(idempotency).where(idempotency.c.job_id == job_id))
                connection.execute(delete(jobs).where(jobs.c.id == job_id, *gone))


def _remove_checkpoints(
    store: Database, storage: Storage, now: datetime, limits: Limits, removed: Removed, *, dry_run: bool
) -> None:
    """Those of jobs that have ended, but for jobs that were cancelled to be gone on from; of jobs that the database does not
    know, such as runs by hand, only old ones."""
    found = list(storage.entries("checkpoints"))
    needed = _wanted_checkpoints(store, sorted({path.split("/")[1] for path, _, _ in found}), now - limits.checkpoints)
    kept: set[tuple[str, ...]] = set()
    for path, size, changed_at in found:
        job_id, key = (*path.split("/"), "")[1:3]
        if needed.get(job_id, changed_at >= now - limits.temporary):
            kept.add((key, job_id))
            continue
        removed.add("checkpoints", 1, size)
        if not dry_run:
            storage.delete([path])
    # Marks of what is gone; a checkpoint may have come since the look at them, so a new mark stays.
    for path, _, changed_at in list(storage.entries("resumable")):
        if not dry_run and tuple(path.split("/")[1:3]) not in kept and changed_at < now - limits.temporary:
            storage.delete([path])


def _wanted_checkpoints(store: Database, named: list[str], cancelled_after: datetime) -> dict[str, bool]:
    """Whether the checkpoints of each job that the database knows are for somebody to go on from."""
    wanted: dict[str, bool] = {}
    columns = (jobs.c.id, jobs.c.state, jobs.c.cancel, jobs.c.finished_at, jobs.c.deleted_at)
    for start in range(0, len(named), BATCH):
        with store.reading() as connection:
            rows = connection.execute(select(*columns).where(jobs.c.id.in_(named[start : start + BATCH]))).all()
        for row in rows:
            is_saved = (
                row.state == State.CANCELLED and bool((row.cancel or {}).get("checkpoint")) and not row.deleted_at
            )
            is_new = row.finished_at is not None and row.finished_at >= cancelled_after
            wanted[str(row.id)] = row.state not in TERMINAL or (is_saved and is_new)
    return wanted


def _ids(store: Database, query: Callable[[str], Select[tuple[str]]]) -> Iterator[str]:
    """Ids in batches, each read anew: what is deleted meanwhile is not met again."""
    after = ""
    while True:
        with store.reading() as connection:
            found = [str(row[0]) for row in connection.execute(query(after).order_by(jobs.c.id).limit(BATCH))]
        yield from found
        if not found:
            return
        after = found[-1]


def _artifacts(store: Database) -> Iterator[FileRecord]:
    """Files of every job whose row is there."""
    for job_id in _ids(store, lambda after: select(jobs.c.id).where(jobs.c.id > after)):
        with store.reading() as connection:
            row = connection.execute(select(jobs.c.artifacts).where(jobs.c.id == job_id)).one_or_none()
        for file in row.artifacts if row is not None else ():
            yield FileRecord.model_validate(file)


def _is_busy(store: Database) -> bool:
    """Whether a driver may be about to read a result."""
    with store.reading() as connection:
        return bool(connection.execute(select(jobs.c.id).where(jobs.c.state.in_(ACTIVE)).limit(1)).first())


def _awaited(store: Database, storage: Storage) -> set[str]:
    """Paths of the results that a publisher is yet to read, for runs of MLflow that are not complete."""
    pending = (jobs.c.publication == "pending", jobs.c.attempt > 0)
    found: set[str] = set()
    for job_id in _ids(store, lambda after: select(jobs.c.id).where(*pending, jobs.c.id > after)):
        with store.reading() as connection:
            attempt = connection.execute(select(jobs.c.attempt).where(jobs.c.id == job_id)).scalar_one_or_none()
        data = None if attempt is None else storage.get(attempt_path(job_id, attempt, "result.json"))
        try:
            keys = () if data is None else AttemptResult.model_validate_json(data).keys
        except ValidationError:
            # Nor can the publisher read it.
            continue
        found |= {result_path(key) for key in keys}
    return found


def _manifests(storage: Storage) -> tuple[dict[str, StageResult], set[str]]:
    """Every committed result by its path, and the keys of those that cannot be read, as a power cut may leave one.

    Whoever needs one of these sets it aside and builds it again; what files it named is not known, so all of its key stay.

    Raises:
        StorageError: storage is away, or a result went away meanwhile: then nobody knows which objects it needs.
    """
    found: dict[str, StageResult] = {}
    unreadable: set[str] = set()
    for path in storage.list("results"):
        data = storage.get(path)
        if data is None:
            raise StorageError.of("storage", path, "a result went away while it was read", "Run it again.")
        try:
            found[path] = StageResult.model_validate_json(data)
        except ValidationError:
            unreadable.add(PurePosixPath(path).stem)
            logger.warning("%s is not a readable result: its files are kept", path, extra={"action": "unreadable"})
    return found, unreadable
