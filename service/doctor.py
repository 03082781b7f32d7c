"""Whether database, storage root and disk agree: looks at everything and changes nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import func, select

from ncfm_core.errors import StorageError
from service.database import Database, NoDatabase, open_unchecked, sqlite_file
from service.jobs import FORMER_MOVES, MOVES, State
from service.retention import TERMINAL, temporary_files
from service.rows import UnreadableJob, workable_job_of
from service.schema import state_of
from service.tables import attempts, events, jobs
from worker.records import AttemptResult, FileRecord, StageResult, attempt_path, now
from worker.storage import Storage

LOW_BYTES = 2 << 30
LOW_SHARE = 0.05
"""Less free space than the larger of the two is said; less than a tenth of it is a fault."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be, or is worth knowing."""

    level: Literal["error", "note"]
    check: str
    subject: str
    """What it is about: a job's id, a path."""
    message: str
    hint: str = ""


def diagnose(database_url: str, storage_url: str, *, deep: bool = False) -> Iterator[Finding]:
    """`examine`, or what is not there to be examined; neither is made."""
    missing: list[Finding] = []
    try:
        storage = Storage(storage_url, is_look=True)
    except StorageError as error:
        missing = [Finding("error", "storage", each.value, each.message, each.hint) for each in error.problems]
    try:
        database = open_unchecked(database_url, is_look=True)
    except NoDatabase as error:
        missing += [Finding("error", "schema", each.value, each.message, each.hint) for each in error.problems]
    if missing:
        # One of the two alone has nothing to agree with.
        yield from missing
        return
    with database:
        yield from examine(database, storage, deep=deep)


def examine(database: Database, storage: Storage, *, deep: bool = False) -> Iterator[Finding]:
    """Everything that is wrong or worth knowing; nothing where all is well.

    Args:
        database: of any schema.
        storage: its storage root.
        deep: whether files are read to their end and their sums compared.
    """
    with database.reading() as connection:
        state = state_of(connection)
    if state.problem:
        # The other questions are put to tables that may not be there.
        yield Finding("error", "schema", database.shown_url, state.problem, state.hint)
    else:
        for check in (_rows, _events, _paths, _attempts, _publications):
            yield from check(database)
        yield from _artifacts(database, storage, deep=deep)
        yield from _untaken(database, storage)
    yield from _results(storage, deep=deep)
    yield from _disk(database, storage)


def _rows(database: Database) -> Iterator[Finding]:
    """Jobs that this release cannot read: the controller and the lists pass them over."""
    with database.reading() as connection:
        for row in connection.execution_options(yield_per=200).execute(select(jobs).where(jobs.c.deleted_at.is_(None))):
            try:
                workable_job_of(row)
            except UnreadableJob as error:
                hint = "Use the release that kept it, or restore the last backup."
                yield Finding("error", "rows", row.id, error.problems[0].message, hint)


def _events(database: Database) -> Iterator[Finding]:
    """1, 2, 3, ... up to the job's own count; old ones of a job that has ended may be gone, from the front."""
    lowest, highest, count = func.min(events.c.seq), func.max(events.c.seq), func.count(events.c.seq)
    query = (
        select(jobs.c.id, jobs.c.state, jobs.c.event_seq, lowest.label("low"), highest.label("high"), count.label("n"))
        .outerjoin(events, events.c.job_id == jobs.c.id)
        .group_by(jobs.c.id, jobs.c.state, jobs.c.event_seq)
    )
    with database.reading() as connection:
        for row in connection.execute(query):
            if row.n == 0 or row.high != row.event_seq or row.n != row.high - row.low + 1:
                message = f"has {row.n} events from {row.low} to {row.high} and counts {row.event_seq}"
                yield Finding("error", "events", row.id, message, "Restore the last backup, or delete the job.")
            elif row.low != 1 and row.state not in TERMINAL:
                yield Finding("error", "events", row.id, "its first events are gone though it has not ended")


def _paths(database: Database) -> Iterator[Finding]:
    """Each job went from state to state as the table has it, ended once, and is where its last event says."""
    query = (
        select(events.c.job_id, events.c.seq, events.c.data, jobs.c.state)
        .join(jobs, jobs.c.id == events.c.job_id)
        .where(events.c.type == "state")
        .order_by(events.c.job_id, events.c.seq)
    )
    with database.reading() as connection:
        rows = connection.execution_options(yield_per=1000).execute(query)
        for job_id, moves in groupby(rows, key=lambda row: str(row.job_id)):
            yield from _path(job_id, list(moves))


def _path(job_id: str, moves: Sequence[Any]) -> Iterator[Finding]:
    legal = {str(state): {str(to) for to in after} for state, after in MOVES.items()}
    for former, after in FORMER_MOVES:
        legal[str(former)].add(str(after))
    # Where the first events are gone, only the terminal one is left.
    is_trimmed = len(moves) == 1 and not legal.get(str(moves[0].data["to"]))
    at = str(moves[0].data["from"]) if is_trimmed else str(State.QUEUED)
    for move in moves:
        origin, to = str(move.data["from"]), str(move.data["to"])
        if origin != at or to not in legal.get(at, ()):
            yield Finding("error", "moves", job_id, f"event {move.seq} goes from {origin} to {to} where it was {at}")
        at = to
    if at != moves[-1].state:
        yield Finding("error", "moves", job_id, f"it is {moves[-1].state} and its last event says {at}")


def _attempts(database: Database) -> Iterator[Finding]:
    is_open = func.count().filter(attempts.c.ended_at.is_(None))
    query = (
        select(
            jobs.c.id, jobs.c.state, jobs.c.attempt, func.max(attempts.c.number).label("last"), is_open.label("open")
        )
        .join(attempts, attempts.c.job_id == jobs.c.id)
        .group_by(jobs.c.id, jobs.c.state, jobs.c.attempt)
    )
    with database.reading() as connection:
        for row in connection.execute(query):
            if row.last != row.attempt:
                message = f"its last attempt is {row.last} and it counts {row.attempt}"
                yield Finding("error", "attempts", row.id, message)
            if row.open > 1 or (row.open and row.state in TERMINAL):
                yield Finding("error", "attempts", row.id, f"{row.open} attempts of a {row.state} job have not ended")


def _publications(database: Database) -> Iterator[Finding]:
    query = select(jobs.c.publication, func.count()).where(jobs.c.state.in_(TERMINAL)).group_by(jobs.c.publication)
    with database.reading() as connection:
        counts = {str(name): int(count) for name, count in connection.execute(query)}
    if counts.get("pending"):
        yield Finding("note", "mlflow", f"{counts['pending']} jobs", "their MLflow runs wait to be completed")
    if counts.get("error"):
        hint = "The log of the controller says why."
        yield Finding("note", "mlflow", f"{counts['error']} jobs", "their MLflow runs could not be completed", hint)


def _artifacts(database: Database, storage: Storage, *, deep: bool) -> Iterator[Finding]:
    """The files of each job that succeeded."""
    query = select(jobs.c.id, jobs.c.artifacts).where(jobs.c.state == State.SUCCEEDED, jobs.c.deleted_at.is_(None))
    with database.reading() as connection:
        for row in connection.execution_options(yield_per=200).execute(query):
            for file in row.artifacts:
                problem = _problem_of(storage, FileRecord.model_validate(file), deep=deep)
                if problem:
                    hint = "Restore the storage root, or post the job again: what is whole is not built twice."
                    yield Finding("error", "artifacts", f"{row.id} {file['name']}", problem, hint)


def _untaken(database: Database, storage: Storage) -> Iterator[Finding]:
    """Last words of drivers that the database does not know of, as after a restore."""
    query = select(jobs.c.id, jobs.c.state, jobs.c.attempt).where(jobs.c.state.not_in(TERMINAL))
    with database.reading() as connection:
        rows = connection.execute(query).all()
    for row in rows:
        number = max(row.attempt, 1)
        try:
            while storage.size(attempt_path(row.id, number + 1, "status.json")) is not None:
                number += 1
            result = storage.get_record(attempt_path(row.id, number, "result.json"), AttemptResult)
        except StorageError as error:
            yield Finding("error", "attempts", row.id, str(error))
            continue
        if result is not None:
            message = f"attempt {number} has {result.outcome}, and the job is {row.state}"
            yield Finding("note", "untaken", row.id, message, "The controller takes it as soon as it runs.")


def _results(storage: Storage, *, deep: bool) -> Iterator[Finding]:
    """The files of each committed stage result."""
    hint = "It is built again by the next job that needs it."
    for path in storage.list("results"):
        try:
            result = storage.get_record(path, StageResult)
        except StorageError as error:
            yield Finding("error", "results", path, "; ".join(each.message for each in error.problems), hint)
            continue
        for file in result.files if result else ():
            problem = _problem_of(storage, file, deep=deep)
            if problem:
                yield Finding("error", "results", path, f"{file.name}: {problem}", hint)


def _problem_of(storage: Storage, file: FileRecord, *, deep: bool) -> str:
    size = storage.size(file.path)
    if size is None:
        return f"{file.path} is missing"
    if size != file.size:
        return f"{file.path} has {size} bytes and not {file.size}"
    if deep:
        digest = hashlib.sha256()
        for chunk in storage.stream(file.path):
            digest.update(chunk)
        if digest.hexdigest() != file.sha256:
            return f"{file.path} is damaged: its sha256 differs"
    return ""


def _disk(database: Database, storage: Storage) -> Iterator[Finding]:
    folders = {"storage": Path(storage.url).expanduser()} if "://" not in storage.url else {}
    if (file := sqlite_file(database.engine)) is not None:
        folders["database"] = file.parent
    for name, folder in folders.items():
        usage = shutil.disk_usage(folder)
        low = max(LOW_BYTES, int(LOW_SHARE * usage.total))
        if usage.free < low:
            message = f"{usage.free / 2**30:.1f} GiB of {usage.total / 2**30:.1f} GiB are free"
            level: Literal["error", "note"] = "error" if usage.free < low / 10 else "note"
            yield Finding(level, "disk", f"{name}: {folder}", message, "Make room; `ncfm gc` tells what it could free.")
    left = list(temporary_files(storage, now() - timedelta(days=1)))
    if left:
        hint = "`ncfm gc` removes them."
        yield Finding("note", "temporary", str(left[0]), f"{len(left)} files were begun and never finished", hint)
