"""Route: lists of jobs, filtered and paged."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import ValidationError

from ncfm_core.errors import Problem, shorten
from service.api.context import StoreDep
from service.api.errors import InvalidParameter
from service.api.faults import LABEL, NO_NUL
from service.api.models import JobList, JobSummary, Mean, ProgressBody
from service.api.openapi import problems
from service.filtering import Filter
from service.jobs import State
from service.listing import Order, summaries
from service.reports import Progress
from service.rows import what_is_wrong
from service.store import Store

router = APIRouter(tags=["jobs"])

MAX_LIMIT = 200
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Most items of the page.")]
_Text = Query(max_length=128, pattern=NO_NUL)
_Time = Query(
    max_length=64,
    json_schema_extra={"format": "date-time"},
    description="Such as 2026-01-31T12:00:00Z; UTC where no zone is given.",
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_Label = Annotated[str, Query(pattern=LABEL)]


@router.get("/jobs", responses=problems(422, 503), summary="List")
def list_jobs(
    store: StoreDep,
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before.")] = None,
    state: Annotated[list[State] | None, Query(description="Only jobs in this state; may be given twice.")] = None,
    dataset: Annotated[str | None, _Text] = None,
    method: Annotated[str | None, _Text] = None,
    owner: Annotated[str | None, _Text] = None,
    label: Annotated[
        list[_Label] | None,
        Query(max_length=8, description="Only jobs with this label, `key:value`; may be given twice."),
    ] = None,
    created_after: Annotated[str | None, _Time] = None,
    created_before: Annotated[str | None, _Time] = None,
    order: Annotated[Order, Query(description="Which end comes first.")] = "newest",
) -> JobList:
    """Jobs in the order of their posting, as summaries. New jobs never shift the pages that follow."""
    wanted = Filter(
        states=sorted(set(state or ())),
        owner=owner,
        dataset=dataset,
        method=method,
        labels=_labels(label or []),
        created_after=_utc("created_after", created_after),
        created_before=_utc("created_before", created_before),
    )
    mark = _fingerprint(wanted, order)
    beyond = None if cursor is None else _read_cursor(cursor, mark)
    rows = summaries(store, limit=limit + 1, wanted=wanted, order=order, beyond=beyond)
    following = _cursor(str(rows[limit - 1]["id"]), mark) if len(rows) > limit else None
    return JobList(items=list(_readable(store, rows[:limit])), next=following)


def _readable(store: Store, rows: list[dict[str, object]]) -> Iterator[JobSummary]:
    """Without those that are damaged, or of a later release: they must not hide the others."""
    for row in rows:
        try:
            yield _summary(row)
        except ValidationError as error:
            store.leave_out(str(row["id"]), f"its row cannot be read: {what_is_wrong(error)}")


def _summary(row: dict[str, object]) -> JobSummary:
    progress, accuracy = row.pop("progress"), row.pop("accuracy")
    return JobSummary.model_validate(
        row
        | {
            "progress": None if progress is None else ProgressBody.of(Progress.model_validate(progress)),
            "accuracy": None if accuracy is None else Mean.model_validate(accuracy),
        }
    )


def _labels(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        key, _, value = each.partition(":")
        if found.setdefault(key, value) != value:
            raise InvalidParameter.of("label", each, "no job has two values of one label", "Ask for one of them.")
    return dict(sorted(found.items()))


def _utc(name: str, given: str | None) -> datetime | None:
    if given is None:
        return None
    try:
        if not _DATE.match(given):
            raise ValueError(given)
        # In a query, the plus of a zone is often sent as it is, and read as a space.
        time = datetime.fromisoformat(given.upper().replace(" ", "+") if given.count(":") == 3 else given.upper())
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        hint = "Choose a time such as 2026-01-31T12:00:00Z."
        raise InvalidParameter(Problem(name, shorten(given), "not a time, or out of range", hint)) from None


def _fingerprint(wanted: Filter, order: Order) -> str:
    """Of what a list is about: a cursor goes on in the same list alone."""
    return hashlib.sha256(f"{wanted} {order}".encode()).hexdigest()[:16]


def _cursor(job_id: str, mark: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([job_id, mark]).encode()).decode().rstrip("=")


def _read_cursor(cursor: str, mark: str) -> str:
    try:
        job_id, found = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if not (isinstance(job_id, str) and isinstance(found, str) and _cursor(job_id, found) == cursor):
            raise ValueError(cursor)
        if "\0" in job_id:
            raise ValueError(cursor)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        hint = "Pass `next` of the page before as it is, or nothing."
        raise InvalidParameter.of("cursor", cursor, "not a cursor of this list", hint) from None
    if found != mark:
        hint = "Keep filters and order as they were, or leave the cursor out."
        raise InvalidParameter.of("cursor", cursor, "belongs to a list with other filters", hint)
    return job_id
