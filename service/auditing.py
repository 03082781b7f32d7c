"""Who changed what: one row for each request that changes something, and for each change of a key."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import JsonValue
from sqlalchemy import Connection, insert, select

from service.database import Database, StoreError
from service.tables import audit
from worker.records import now

MAX_WAITING = 10_000
"""Rows that wait while the database is away; beyond it the oldest are given up."""
MAX_BATCH = 500
FLUSH_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One thing that was done or tried."""

    actor: str
    """`local`, `key:<id>`, or `cli` for who has the database itself."""
    action: str = ""
    """Method and route, such as `POST /jobs/{id}/cancel`; of keys `keys.create`, `keys.revoke`, `keys.rotate`."""
    target: str = ""
    """Id of what it was done to; empty where nothing came of it."""
    request_id: str = ""
    address: str = ""
    """Where it came from."""
    data: Mapping[str, JsonValue] = field(default_factory=dict)
    at: datetime = field(default_factory=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow(AuditEntry):
    """An entry as it is kept."""

    id: int


def append(connection: Connection, entry: AuditEntry) -> None:
    """Keep an entry, in the transaction that is open."""
    connection.execute(insert(audit).values(_values(entry)))


def page(database: Database, *, limit: int, before: int | None) -> list[AuditRow]:
    """Entries, newest first; only those before an id where one is given."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    with database.reading() as connection:
        return [AuditRow(**row._asdict()) for row in connection.execute(query)]


class Recorder:
    """Keeps entries in batches from a thread of its own, so that no request waits for a second commit.

    What a killed process had not kept yet (`FLUSH_S`) is lost here; the events of jobs, which are kept with the change itself,
    name actor and request too.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[AuditEntry] = deque(maxlen=MAX_WAITING)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def note(self, entry: AuditEntry) -> None:
        self._waiting.append(entry)

    def close(self) -> None:
        """Keep what waits, and end."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._ended.wait(FLUSH_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        """Keep what waits; where the database is away, it goes on waiting."""
        while batch := [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]:
            try:
                with self._database.writing() as connection:
                    connection.execute(insert(audit), [_values(entry) for entry in batch])
            except StoreError:
                self._waiting.extendleft(reversed(batch))
                return


def _values(entry: AuditEntry) -> dict[str, object]:
    return {
        "at": entry.at,
        "actor": _fitting(entry.actor, 80),
        "action": _fitting(entry.action, 64),
        "target": _fitting(entry.target, 128),
        "request_id": _fitting(entry.request_id, 64),
        "address": _fitting(entry.address, 64),
        "data": dict(entry.data),
    }


def _fitting(text: str, length: int) -> str:
    """Text that a column takes: what a stranger put into a path must not keep the rows behind it from being written."""
    return "".join(char if char.isprintable() else "?" for char in text[:length])
