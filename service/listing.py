"""Lists of jobs as summaries: only the columns that a list shows are read, by ranges of the primary key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import JsonValue
from sqlalchemy import Select, select

from service.database import Database
from service.filtering import Filter, filtered
from service.tables import jobs

Order = Literal["newest", "oldest"]

COLUMNS = (
    "id",
    "state",
    "reason",
    "message",
    "dataset",
    "method",
    "owner",
    "priority",
    "labels",
    "progress",
    "created_at",
    "started_at",
    "finished_at",
)


def summaries(
    database: Database, *, limit: int, wanted: Filter, order: Order = "newest", beyond: str | None = None
) -> list[dict[str, Any]]:
    """Rows of a list: `COLUMNS`, with `ipc` and `accuracy`.

    Args:
        database: that holds the jobs.
        limit: most rows to return.
        wanted: which jobs.
        order: which end comes first; jobs are in the order of their posting.
        beyond: id of the last job of the page before.
    """
    columns = [jobs.c[name] for name in COLUMNS]
    ipc = jobs.c.spec["ipc"].as_integer().label("ipc")
    accuracy = jobs.c.result["distilled"].label("accuracy")
    query = filtered(select(*columns, ipc, accuracy), wanted).limit(limit)
    query = query.order_by(jobs.c.id.desc() if order == "newest" else jobs.c.id)
    if beyond is not None:
        query = query.where(jobs.c.id < beyond if order == "newest" else jobs.c.id > beyond)
    with database.reading() as connection:
        return [row._asdict() for row in connection.execute(query)]


def same_data(database: Database, name: str, *, limit: int) -> Iterator[tuple[str, int, dict[str, JsonValue]]]:
    """Jobs that got as far as an attempt on a data set of that name, newest first: id, attempt, spec."""
    query: Select[Any] = (
        select(jobs.c.id, jobs.c.attempt, jobs.c.spec)
        .where(jobs.c.dataset == name, jobs.c.state == "succeeded")
        .order_by(jobs.c.id.desc())
        .limit(limit)
    )
    with database.reading() as connection:
        rows = connection.execute(query).all()
    for row in rows:
        yield row.id, row.attempt, row.spec
