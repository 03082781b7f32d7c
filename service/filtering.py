"""Which jobs a list has, and the query that finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select

from service.jobs import State, earliest_id, latest_id
from service.tables import jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which jobs a list has: all of what is set must hold."""

    states: Sequence[State] = ()
    owner: str | None = None
    dataset: str | None = None
    method: str | None = None
    labels: Mapping[str, str] | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


def filtered(query: Select[Any], wanted: Filter) -> Select[Any]:
    """A query of jobs, narrowed to the wanted ones that are not deleted."""
    query = query.where(jobs.c.deleted_at.is_(None))
    if wanted.states:
        query = query.where(jobs.c.state.in_(wanted.states))
    for name in ("owner", "dataset", "method"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(jobs.c[name] == value)
    for label, value in (wanted.labels or {}).items():
        query = query.where(jobs.c.labels[label].as_string() == value)
    if wanted.created_after is not None:
        query = query.where(jobs.c.created_at > wanted.created_after, jobs.c.id >= earliest_id(wanted.created_after))
    if wanted.created_before is not None:
        query = query.where(jobs.c.created_at < wanted.created_before, jobs.c.id < latest_id(wanted.created_before))
    return query
