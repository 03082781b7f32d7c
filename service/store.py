"""What is kept in the database of jobs: they, their attempts and events.

A change of a job is one transaction: compare-and-set on its version, and one event with the next sequence number. Whoever
loses the race gets None and looks again. A controller writes through a store that is fenced: once another one has taken its
place, nothing of it is applied.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from ncfm_core.errors import NcfmError
from service.database import StoreError
from service.jobs import ACTIVE, AttemptRecord, Event, EventType, Job, Reason, State, check_move
from service.leases import check_fence
from service.reports import changed_stages
from service.rows import UnreadableJob, as_row, job_of, workable_job_of
from service.sightings import Sighting, Sightings
from service.tables import attempts, events, idempotency, jobs
from worker.records import now

logger = logging.getLogger("ncfm.store")

__all__ = ["CONTROLLER", "Actor", "IdempotencyKey", "KeyReused", "Sighting", "Store"]


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes something, for the record."""

    name: str
    """`controller`, `local`, or `key:<id>`."""
    request_id: str = ""


CONTROLLER = Actor("controller")


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """What makes a repeated request the same request."""

    owner: str
    operation: str
    """Method and path."""
    key: str
    fingerprint: str
    """sha256 of what was asked, in hex."""


class KeyReused(NcfmError):
    """An idempotency key came again with another request."""

    code = "idempotency_key_reused"


class Store(Sightings):
    """The jobs of one database.

    Raises:
        StoreError: by every method, when the database cannot be used.
        FencedError: by every method that writes, where `fence` is set and another controller has taken over.
    """

    def __init__(self, url: str, *, fence: int | None = None) -> None:
        """Open it; an empty one gets its tables.

        Args:
            url: SQLAlchemy URL.
            fence: token of the lease that every write must still hold; None for writers that need none.
        """
        # An empty database gets its tables first, the lease's among them.
        self.fence: int | None = None
        self._unreadable: set[tuple[str, str]] = set()
        """Jobs, each with what is wrong with its row, that were told to be so."""
        super().__init__(url)
        self.fence = fence

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with super().writing() as connection:
            if self.fence is not None:
                check_fence(connection, self.fence)
            yield connection

    def add(self, job: Job, *, actor: Actor = CONTROLLER) -> Job:
        """Keep a new job, with its first event."""
        return self.add_once(job, None, actor=actor)[0]

    def add_once(self, job: Job, key: IdempotencyKey | None, *, actor: Actor = CONTROLLER) -> tuple[Job, bool]:
        """Keep a new job, unless one was kept under the same key: in one transaction.

        Returns:
            The job of the key, and whether it is the new one.

        Raises:
            KeyReused: the key was used for another request.
        """
        job = job.model_copy(update={"version": 1, "event_seq": 1})
        made = None if key is None else self.made_by(key)
        if made is not None:
            return made, False
        try:
            with self.writing() as connection:
                if key is not None:
                    row = asdict(key) | {"job_id": job.id, "created_at": job.created_at}
                    connection.execute(insert(idempotency).values(row))
                connection.execute(insert(jobs).values(as_row(job)))
                _append(connection, job, "created", {"state": str(job.state)}, job.created_at, actor)
            return job, True
        except StoreError as error:
            # Somebody sent the same key at the same moment, and was first; else another try would fail again.
            made = self.made_by(key) if key and isinstance(error.__cause__, IntegrityError) else None
            if made is None:
                raise
            return made, False

    def made_by(self, key: IdempotencyKey) -> Job | None:
        """The job that was made under a key; None where there is none yet.

        Raises:
            KeyReused: the key was used for another request.
        """
        known = self._known(key)
        if known is None:
            return None
        if known.fingerprint != key.fingerprint:
            raise KeyReused.of(
                "Idempotency-Key",
                key.key,
                f"was used for another request, which made job {known.job_id}",
                "Send a new key with a new request.",
            )
        return self.get(known.job_id, deleted=True)

    def _known(self, key: IdempotencyKey) -> Row[Any] | None:
        with self.reading() as connection:
            return connection.execute(
                select(idempotency).where(
                    idempotency.c.owner == key.owner,
                    idempotency.c.operation == key.operation,
                    idempotency.c.key == key.key,
                )
            ).one_or_none()

    def get(self, job_id: str, *, deleted: bool = False) -> Job | None:
        """A job; None where there is none.

        Raises:
            UnreadableJob: its row is damaged, or of a later release.
        """
        query = select(jobs).where(jobs.c.id == job_id)
        if not deleted:
            query = query.where(jobs.c.deleted_at.is_(None))
        with self.reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else job_of(row)

    def queue(self, *, limit: int, except_owners: Collection[str] = ()) -> list[Job]:
        """Queued jobs in the order of their rank.

        Those that exceed the cluster have a window of their own, so that however many there are, the others get past.

        Args:
            limit: of each window.
            except_owners: whose jobs are left out, since they may not start now.
        """
        query = select(jobs).where(jobs.c.state == State.QUEUED).order_by(jobs.c.rank, jobs.c.id).limit(limit)
        if except_owners:
            query = query.where(jobs.c.owner.not_in(except_owners))
        with self.reading() as connection:
            exceeds = jobs.c.reason.is_not_distinct_from(Reason.EXCEEDS_CLUSTER)
            # By id, since a job may change between the two.
            rows = {row.id: row for each in (~exceeds, exceeds) for row in connection.execute(query.where(each))}
        return sorted(self._readable(rows.values()), key=lambda job: (job.rank, job.id))

    def position(self, job: Job) -> int:
        """How many queued jobs go before this one."""
        ahead = (jobs.c.rank < job.rank) | ((jobs.c.rank == job.rank) & (jobs.c.id < job.id))
        query = select(func.count()).select_from(jobs).where(jobs.c.state == State.QUEUED, ahead)
        with self.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state that this release knows."""
        query = select(jobs.c.state, func.count()).where(jobs.c.deleted_at.is_(None)).group_by(jobs.c.state)
        with self.reading() as connection:
            found = {str(state): int(count) for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in State}

    def active(self) -> list[Job]:
        """Jobs that hold a share of the cluster, oldest first."""
        query = select(jobs).where(jobs.c.state.in_(ACTIVE)).order_by(jobs.c.id)
        with self.reading() as connection:
            return self._readable(connection.execute(query))

    def unpublished(self, *, limit: int, at: datetime) -> list[Job]:
        """Ended jobs whose MLflow run is due to be completed, oldest first."""
        due = jobs.c.publish_at.is_(None) | (jobs.c.publish_at <= at)
        ended = jobs.c.state.in_([state for state in State if state.is_terminal])
        query = select(jobs).where(jobs.c.publication == "pending", ended, due).order_by(jobs.c.id).limit(limit)
        with self.reading() as connection:
            return self._readable(connection.execute(query))

    def _readable(self, rows: Iterable[Row[Any]]) -> list[Job]:
        """The jobs that the controller can work on: one row that is damaged, or of a later release, must not stop the others."""
        found = []
        for row in rows:
            try:
                found.append(workable_job_of(row))
            except UnreadableJob as error:
                self.leave_out(row.id, error.problems[0].message)
        return found

    def leave_out(self, job_id: str, fault: str) -> None:
        """Log, once for each fault, that a job is passed over since its row cannot be read."""
        if (job_id, fault) not in self._unreadable:
            self._unreadable.add((job_id, fault))
            logger.error("job %s is left as it is: %s", job_id, fault)

    def attempts(self, job_id: str) -> list[AttemptRecord]:
        query = select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number)
        with self.reading() as connection:
            return [AttemptRecord.model_validate(row._asdict()) for row in connection.execute(query)]

    def move(
        self,
        job: Job,
        to: State,
        *,
        reason: Reason | None = None,
        message: str = "",
        actor: Actor = CONTROLLER,
        detail: Mapping[str, JsonValue] | None = None,
        **changes: object,
    ) -> Job | None:
        """Move a job, unless somebody changed it since it was read.

        Args:
            job: as it was read.
            to: a state that the table of legal moves has for it.
            reason: why.
            message: a sentence for a person.
            actor: who moves it.
            detail: more for the event's data.
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
            **(detail or {}),
        }
        # What no event tells, nobody who follows the events learns: a driver's last status comes with the end itself.
        if stages := changed_stages(job.stages, moved.stages):
            data["stages"] = stages
        return self._change(moved, "state", data, at, actor)

    def note(
        self,
        job: Job,
        kind: EventType,
        data: Mapping[str, JsonValue],
        *,
        actor: Actor = CONTROLLER,
        **changes: object,
    ) -> Job | None:
        """Write an event without a move, and fields with it, unless somebody changed the job since it was read."""
        assert "state" not in changes
        return self._change(job.model_copy(update=changes), kind, data, now(), actor)

    def report(self, job: Job, **changes: object) -> None:
        """Set fields that make no event, such as progress; nothing happens where somebody changed the job meanwhile.

        The version stays, so that a report never makes somebody's move fail.
        """
        assert "state" not in changes
        changed = as_row(job.model_copy(update=changes))
        statement = (
            update(jobs)
            .where(jobs.c.id == job.id, jobs.c.version == job.version)
            .values({name: changed[name] for name in changes})
        )
        with self.writing() as connection:
            connection.execute(statement)

    def events(self, job_id: str, *, after: int, limit: int) -> list[Event]:
        query = select(events).where(events.c.job_id == job_id, events.c.seq > after).order_by(events.c.seq)
        with self.reading() as connection:
            return [Event.model_validate(row._asdict()) for row in connection.execute(query.limit(limit))]

    def _change(
        self, job: Job, kind: EventType, data: Mapping[str, JsonValue], at: datetime, actor: Actor
    ) -> Job | None:
        """Compare-and-set on the version that was read, and one event."""
        changed = job.model_copy(update={"version": job.version + 1, "event_seq": job.event_seq + 1})
        statement = update(jobs).where(jobs.c.id == job.id, jobs.c.version == job.version).values(as_row(changed))
        with self.writing() as connection:
            if connection.execute(statement).rowcount != 1:
                return None
            _append(connection, changed, kind, data, at, actor)
            if kind == "state":
                _keep_attempt(connection, changed, at, self.fence or 0)
        return changed


def _keep_attempt(connection: Connection, job: Job, at: datetime, fence: int) -> None:
    """The row of the attempt that a move began or ended."""
    if job.state is State.STARTING:
        row = {"job_id": job.id, "number": job.attempt, "fence": fence, "started_at": at, "message": ""}
        connection.execute(insert(attempts).values(row))
    elif job.state is State.RECOVERING or job.state.is_terminal:
        outcome = "lost" if job.state is State.RECOVERING else str(job.state)
        connection.execute(
            update(attempts)
            .where(attempts.c.job_id == job.id, attempts.c.number == job.attempt, attempts.c.ended_at.is_(None))
            .values(ended_at=at, outcome=outcome, reason=job.reason, message=as_row(job)["message"])
        )


def _append(
    connection: Connection, job: Job, kind: EventType, data: Mapping[str, JsonValue], at: datetime, actor: Actor
) -> None:
    connection.execute(
        insert(events).values(
            job_id=job.id,
            seq=job.event_seq,
            at=at,
            type=kind,
            data=dict(data),
            actor=actor.name,
            request_id=actor.request_id,
        )
    )
