"""Databases of many jobs, made in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, insert, select

from ncfm_core.submission import resolve
from service.jobs import Job, Reason, State, first_id_at, new_job_id
from service.reports import Result
from service.store import Store
from service.tables import events, jobs
from worker.records import Accuracy, FileRecord, now

SPEC = resolve({"dataset": "digits", "ipc": 1}).document()
BATCH = 2000


def sample_job(state: State = State.SUCCEEDED) -> Job:
    """A job as a run leaves it, with figures and a manifest."""
    accuracy = Accuracy(mean=87.0, std=1.5, n=5, best_mean=88.0, values=(86.0, 88.0, 87.0, 86.5, 87.5))
    result = Result(
        distilled=accuracy, random_real=accuracy, full=accuracy, evaluations=({"score": 87.0},), seconds={"total": 9.0}
    )
    files = tuple(
        FileRecord(name=f"distilled/{n}.bin", path=f"objects/x-1/publish-x/{n}.bin", size=1000, sha256=f"{n:064d}")
        for n in range(10)
    )
    is_done = state is State.SUCCEEDED
    return Job(
        id=new_job_id(),
        state=state,
        reason=None if is_done else Reason.WAITING_FOR_CLUSTER,
        requested={"dataset": "digits", "ipc": 1},
        spec=SPEC,
        attempt=1 if is_done else 0,
        result=result if is_done else None,
        artifacts=files if is_done else (),
        created_at=now(),
        started_at=now() if is_done else None,
        finished_at=now() if is_done else None,
    )


def fill(store: Store, count: int, *, state: State = State.SUCCEEDED) -> None:
    """Add many jobs in the order of their ids, one after the other in time, each with two events."""
    model = store.add(sample_job(state))
    with store.reading() as connection:
        template = connection.execute(select(jobs).where(jobs.c.id == model.id)).one()._asdict()
    with store.writing() as connection:
        connection.execute(delete(jobs).where(jobs.c.id == model.id))
    for start in range(0, count, BATCH):
        rows = list(_rows(template, range(start, min(start + BATCH, count)), count))
        happened = [
            {"job_id": row["id"], "seq": seq, "at": row["created_at"], "type": "waiting", "data": {}}
            for row in rows
            for seq in (1, 2)
        ]
        with store.writing() as connection:
            connection.execute(insert(jobs), rows)
            connection.execute(insert(events), happened)


def _rows(template: dict[str, Any], numbers: range, count: int) -> Iterator[dict[str, Any]]:
    end = datetime.now(UTC)
    for n in numbers:
        at = end - timedelta(seconds=count - n)
        yield template | {"id": first_id_at(at), "created_at": at, "rank": at.timestamp() - 3000, "event_seq": 2}
