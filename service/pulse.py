"""How many jobs stand, in one cheap query: what those who follow jobs ask again and again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from service.database import Database
from service.jobs import State
from service.reports import Progress
from service.tables import jobs

BATCH = 500
"""Ids in one query: engines bound the number of parameters."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """Where a job stands."""

    state: State
    version: int
    seq: int
    """Of its last event."""
    attempt: int
    progress: Progress | None


def pulses(database: Database, job_ids: Iterable[str]) -> dict[str, Pulse]:
    """The pulse of each job that exists and is not deleted."""
    wanted, found = list(job_ids), dict[str, Pulse]()
    columns = (jobs.c.id, jobs.c.state, jobs.c.version, jobs.c.event_seq, jobs.c.attempt, jobs.c.progress)
    for start in range(0, len(wanted), BATCH):
        some = wanted[start : start + BATCH]
        query = select(*columns).where(jobs.c.id.in_(some), jobs.c.deleted_at.is_(None))
        with database.reading() as connection:
            found |= {row.id: _pulse(row) for row in connection.execute(query)}
    return found


def _pulse(row: Any) -> Pulse:
    progress = None if row.progress is None else Progress.model_validate(row.progress)
    return Pulse(State(row.state), row.version, row.event_seq, row.attempt, progress)
