"""What is kept in the database: jobs, their events, and what the controller last saw of the cluster.

A change of a job is one transaction: compare-and-set on its version, and one event with the next sequence number. Whoever
loses the race gets None and looks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from service.database import UtcDateTime, cluster, events, jobs, metadata, open_engine, unavailable
from service.jobs import ACTIVE, Event, EventType, Job, Reason, State, check_move
from worker.records import now


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the controller last saw: how the API knows where a job would run without asking anybody."""

    cpus: float | None = None
    """Totals of the cluster; None before it was first seen."""
    gpus: float | None = None
    seen_at: datetime | None = None
    """When Ray last answered."""
    checked_at: datetime
    """When the controller last looked."""
    ray_error: str = ""
    mlflow_error: str = ""


class Store:
    """The database behind one URL.

    Raises:
        StoreError: by every method, when the database cannot be used.
    """

    def __init__(self, url: str) -> None:
        """Open it, creating the file and the tables where they are missing."""
        self._engine = open_engine(url)
        self._writer = self._engine.execution_options(ncfm_write=True)
        with self._transaction() as connection:
            # Migrations will take the place of this line: nothing else makes tables.
            metadata.create_all(connection)

    def close(self) -> None:
        self._engine.dispose()

    def add(self, job: Job) -> Job:
        """Keep a new job, with its first event."""
        job = job.model_copy(update={"version": 1, "event_seq": 1})
        with self._transaction() as connection:
            connection.execute(insert(jobs).values(_row(job)))
            _append(connection, job, "created", {"state": str(job.state)}, job.created_at)
        return job

    def get(self, job_id: str) -> Job | None:
        with self._reading() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()
        return None if row is None else _job(row)

    def page(self, *, limit: int, before: str | None = None, states: Sequence[State] = ()) -> list[Job]:
        """Jobs from the newest to the oldest, those older than the job `before`: new ones never shift a page."""
        query = select(jobs).order_by(jobs.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(jobs.c.id < before)
        if states:
            query = query.where(jobs.c.state.in_(states))
        with self._reading() as connection:
            return [_job(row) for row in connection.execute(query)]

    def queue(self, *, limit: int) -> list[Job]:
        """Queued jobs from the oldest to the newest.

        Those that exceed the cluster have a window of their own, so that however many there are, the others get past.
        """
        query = select(jobs).where(jobs.c.state == State.QUEUED).order_by(jobs.c.id).limit(limit)
        with self._reading() as connection:
            rows = [
                row
                for condition in (jobs.c.reason != Reason.EXCEEDS_CLUSTER, jobs.c.reason == Reason.EXCEEDS_CLUSTER)
                for row in connection.execute(query.where(condition))
            ]
        return sorted((_job(row) for row in rows), key=lambda job: job.id)

    def active(self) -> list[Job]:
        """Jobs that hold a share of the cluster, oldest first."""
        query = select(jobs).where(jobs.c.state.in_(ACTIVE)).order_by(jobs.c.id)
        with self._reading() as connection:
            return [_job(row) for row in connection.execute(query)]

    def move(
        self, job: Job, to: State, *, reason: Reason | None = None, message: str = "", **changes: object
    ) -> Job | None:
        """Move a job, unless somebody changed it since it was read.

        Args:
            job: as it was read.
            to: a state that the table of legal moves has for it.
            reason: why.
            message: a sentence for a person.
            changes: other fields of the job to set in the same transaction.

        Returns:
            The job as it now is, or None where somebody else was first.

        Raises:
            IllegalMove: the table does not have this move.
        """
        check_move(job, to)
        at = now()
        if to is State.STARTING and job.started_at is None:
            changes["started_at"] = at
        if to.is_terminal:
            changes["finished_at"] = at
        moved = job.model_copy(update=changes | {"state": to, "reason": reason, "message": message})
        data: dict[str, JsonValue] = {
            "from": str(job.state),
            "to": str(to),
            "reason": str(reason) if reason else None,
            "message": message,
            "attempt": moved.attempt,
        }
        return self._change(moved, "state", data, at)

    def note(self, job: Job, kind: EventType, data: Mapping[str, JsonValue], **changes: object) -> Job | None:
        """Write an event without a move, and fields with it, unless somebody changed the job since it was read."""
        assert "state" not in changes
        return self._change(job.model_copy(update=changes), kind, data, now())

    def report(self, job: Job, **changes: object) -> None:
        """Set fields that make no event, such as progress; nothing happens where somebody changed the job meanwhile.

        The version stays, so that a report never makes somebody's move fail.
        """
        assert "state" not in changes
        changed = _row(job.model_copy(update=changes))
        statement = (
            update(jobs)
            .where(jobs.c.id == job.id, jobs.c.version == job.version)
            .values({name: changed[name] for name in changes})
        )
        with self._transaction() as connection:
            connection.execute(statement)

    def events(self, job_id: str, *, after: int, limit: int) -> list[Event]:
        query = select(events).where(events.c.job_id == job_id, events.c.seq > after).order_by(events.c.seq)
        with self._reading() as connection:
            return [Event.model_validate(row._asdict()) for row in connection.execute(query.limit(limit))]

    def see(self, sighting: Sighting) -> None:
        """Replace what is known of the cluster; totals that are None leave the last ones standing."""
        with self._transaction() as connection:
            row = connection.execute(select(cluster)).one_or_none()
            if sighting.cpus is None and row is not None:
                sighting = replace(sighting, cpus=row.cpus, gpus=row.gpus, seen_at=row.seen_at)
            connection.execute(
                insert(cluster).values(id=1, **asdict(sighting))
                if row is None
                else update(cluster).values(asdict(sighting))
            )

    def sighting(self) -> Sighting | None:
        with self._reading() as connection:
            row = connection.execute(select(cluster)).one_or_none()
        if row is None:
            return None
        fields = row._asdict()
        del fields["id"]
        return Sighting(**fields)

    def check_writable(self) -> None:
        """Prove that a write would be taken, leaving nothing behind."""
        with self._translated(), self._writer.connect() as connection:
            connection.execute(update(cluster).values(id=cluster.c.id))
            connection.rollback()

    def _change(self, job: Job, kind: EventType, data: Mapping[str, JsonValue], at: datetime) -> Job | None:
        """Compare-and-set on the version that was read, and one event."""
        changed = job.model_copy(update={"version": job.version + 1, "event_seq": job.event_seq + 1})
        statement = update(jobs).where(jobs.c.id == job.id, jobs.c.version == job.version).values(_row(changed))
        with self._transaction() as connection:
            if connection.execute(statement).rowcount != 1:
                return None
            _append(connection, changed, kind, data, at)
        return changed

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._translated(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._translated(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise unavailable(self._engine.url.render_as_string(), error) from error


def _row(job: Job) -> dict[str, Any]:
    """A job as column values: JSON columns get plain JSON, times stay times."""
    plain, python = job.model_dump(mode="json"), job.model_dump()
    return {
        column.name: (python if isinstance(column.type, UtcDateTime) else plain)[column.name] for column in jobs.columns
    }


def _job(row: Row[Any]) -> Job:
    return Job.model_validate(row._asdict())


def _append(connection: Connection, job: Job, kind: EventType, data: Mapping[str, JsonValue], at: datetime) -> None:
    connection.execute(insert(events).values(job_id=job.id, seq=job.event_seq, at=at, type=kind, data=dict(data)))
