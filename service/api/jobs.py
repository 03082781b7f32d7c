"""Routes: submit, list, look at and cancel jobs; their events and logs."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from ncfm_core.submission import resolve
from service.api.advice import warnings_for
from service.api.context import CallerDep, JobDep, StorageDep, StoreDep, may_change
from service.api.errors import InvalidParameter
from service.api.models import EventList, JobBody, JobList
from service.api.openapi import SUBMISSION, problems
from service.api.sources import SourcesDep
from service.api.submission import SubmissionDep
from service.jobs import Job, Reason, State, cancel_move, new_job_id
from service.store import Actor, Filter, Store
from worker.records import attempt_path, now

router = APIRouter(tags=["jobs"])

Limit = Annotated[int, Query(ge=1, le=200, description="Most items of the page.")]


@router.post(
    "/jobs", status_code=201, responses=problems(400, 413, 415, 422, 503), openapi_extra=SUBMISSION, summary="Submit"
)
def submit_job(
    document: SubmissionDep, store: StoreDep, caller: CallerDep, sources: SourcesDep, response: Response
) -> JobBody:
    """Keep a new job. Everything left out is filled in from the preset, now and for good."""
    sources.check(document)
    spec = resolve(document)
    job = store.add(
        Job(
            id=new_job_id(),
            requested=document,
            spec=spec.document(),
            warnings=warnings_for(spec, store.sighting()),
            created_at=now(),
            owner=caller.owner,
        ),
        actor=caller.actor,
    )
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobBody.of(job)


@router.get("/jobs", responses=problems(422, 503), summary="List")
def list_jobs(
    store: StoreDep,
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before.")] = None,
    state: Annotated[list[State] | None, Query(description="Only jobs in this state; may be given twice.")] = None,
) -> JobList:
    """Jobs, newest first. New jobs never shift the pages that follow."""
    before = None if cursor is None else _job_before(cursor)
    found = store.page(limit=limit + 1, before=before, wanted=Filter(states=state or ()))
    page = found[:limit]
    return JobList(
        items=[JobBody.of(job) for job in page], next=_cursor(page[-1].id) if len(found) > len(page) else None
    )


@router.get("/jobs/{id}", responses=problems(404, 503), summary="Look at")
def get_job(job: JobDep) -> JobBody:
    """The job as it stands."""
    return JobBody.of(job)


@router.post(
    "/jobs/{id}/cancel",
    status_code=202,
    responses=problems(404, 409, 503)
    | {200: {"description": "It is cancelled or being cancelled already", "model": JobBody}},
    summary="Cancel",
)
def cancel_job(job: JobDep, store: StoreDep, caller: CallerDep, response: Response) -> JobBody:
    """Ask for the end of a job. It is `cancelled` once its driver is known to be gone."""
    may_change(caller, job)
    moved = _cancelled(store, job, caller.actor)
    if moved is None:
        response.status_code = 200
    return JobBody.of(moved or job)


@router.get("/jobs/{id}/events", responses=problems(404, 422, 503), summary="Events")
def list_events(
    job: JobDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=0, le=2**53, description="Only events with a higher `seq`.")] = 0,
    limit: Limit = 50,
) -> EventList:
    """What happened to the job: `seq` counts 1, 2, 3, ... without gaps."""
    found = store.events(job.id, after=after, limit=limit + 1)
    page = found[:limit]
    return EventList(items=page, next=page[-1].seq if len(found) > len(page) else None)


@router.get(
    "/jobs/{id}/logs",
    responses=problems(404, 422, 503) | {200: {"content": {"text/plain": {}}, "description": "The log so far"}},
    response_class=Response,
    summary="Log",
)
def get_logs(
    job: JobDep,
    storage: StorageDep,
    request: Request,
    attempt: Annotated[int | None, Query(ge=1, le=2**31, description="The last attempt, unless given.")] = None,
    after: Annotated[int, Query(ge=0, le=2**53, description="Leave out this many bytes.")] = 0,
) -> Response:
    """The driver's log as plain text; empty before the driver has written any."""
    if attempt is not None and attempt > job.attempt:
        hint = f"It has made {job.attempt} so far."
        raise InvalidParameter.of("attempt", attempt, "the job has not made this attempt", hint)
    path = attempt_path(job.id, attempt or job.attempt, "driver.log")
    size = storage.size(path) or 0
    length = max(0, size - after)
    chunks: Iterator[bytes] = iter(())
    if length and not request.state.is_head:
        chunks = storage.stream(path, start=after, end=size)
    headers = {"Content-Length": str(length)}
    return StreamingResponse(chunks, media_type="text/plain; charset=utf-8", headers=headers)


def _cancelled(store: Store, job: Job, actor: Actor) -> Job | None:
    """Move a job towards its end, however often the controller moves it meanwhile; None where it is under way already."""
    current: Job | None = job
    while current is not None:
        to = cancel_move(current)
        if to is None:
            return None
        moved = store.move(current, to, reason=Reason.REQUESTED, message="cancelled by request", actor=actor)
        if moved is not None:
            return moved
        current = store.get(job.id)
    return None


def _cursor(job_id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps({"before": job_id}).encode()).decode().rstrip("=")


def _job_before(cursor: str) -> str:
    try:
        document = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        before = document["before"]
        if not isinstance(before, str) or _cursor(before) != cursor:
            raise ValueError(cursor)
    except (ValueError, TypeError, KeyError, binascii.Error):
        hint = "Pass `next` of the page before as it is, or nothing."
        raise InvalidParameter.of("cursor", cursor, "not a cursor of this list", hint) from None
    return before
