"""Routes: submit a job and look at it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import JsonValue
from starlette.concurrency import run_in_threadpool

from ncfm_core.submission import resolve
from service.api.advice import awaited_by_new, warnings_for
from service.api.context import Caller, CallerDep, JobDep, StoreDep, StreamsDep
from service.api.envelope import merged, split
from service.api.looking import JOB_PATH, IfNoneMatch, etag_of, names, show
from service.api.models import AttemptList, JobBody
from service.api.once import REPLAYED, IdempotencyHeader, idempotency_key
from service.api.openapi import SUBMISSION, problems
from service.api.sources import Sources, SourcesDep
from service.api.submission import SubmissionDep
from service.jobs import PRIORITY, Job, new_job_id
from service.pulse import Pulse
from service.store import IdempotencyKey, Store
from worker.records import now

router = APIRouter(tags=["jobs"])

MAX_WAIT_S = 60.0
MADE: dict[int | str, dict[str, Any]] = {
    201: {
        "description": "The job; under a key that was used before, the one that it made",
        "headers": {
            "Location": {"schema": {"type": "string"}},
            REPLAYED: {"schema": {"type": "string", "enum": ["true"]}, "description": "Only of a job that was there"},
        },
    }
}


@router.post(
    "/jobs",
    status_code=201,
    responses=problems(400, 413, 415, 422, 503, 507) | MADE,
    openapi_extra=SUBMISSION,
    summary="Submit",
)
def submit_job(
    document: SubmissionDep,
    store: StoreDep,
    caller: CallerDep,
    sources: SourcesDep,
    response: Response,
    key: IdempotencyHeader = None,
) -> JobBody:
    """Keep a new job. Everything left out is filled in from the preset, now and for good."""
    once = idempotency_key(key, owner=caller.owner, operation="POST /jobs", document=document)
    if once is not None and (made := store.made_by(once)) is not None:
        return answered(store, made, response, is_new=False)
    envelope, requested = split(document)
    sources.check(document)
    return keep_new(
        store,
        caller,
        requested,
        sources=sources,
        once=once,
        priority=PRIORITY if envelope.priority is None else envelope.priority,
        labels=merged({}, envelope.labels or {}),
        response=response,
    )


def keep_new(
    store: Store,
    caller: Caller,
    requested: dict[str, JsonValue],
    *,
    sources: Sources,
    once: IdempotencyKey | None,
    priority: int,
    labels: dict[str, str],
    response: Response,
    parent_id: str | None = None,
) -> JobBody:
    """Keep a job of a submission, unless its key has made one, and answer with the job."""
    spec, sighting = resolve(requested), store.sighting()
    new = Job(
        id=new_job_id(),
        requested=requested,
        spec=spec.document(),
        message=awaited_by_new(sighting),
        warnings=warnings_for(spec, sources.facts(spec), sighting),
        created_at=now(),
        owner=caller.owner,
        priority=priority,
        labels=labels,
        parent_id=parent_id,
    )
    job, is_new = store.add_once(new, once, actor=caller.actor)
    return answered(store, job, response, is_new=is_new)


def answered(store: Store, job: Job, response: Response, *, is_new: bool) -> JobBody:
    """The answer with a job that was made, now or by the same request before."""
    response.headers["Location"] = f"/jobs/{job.id}"
    if not is_new:
        response.headers[REPLAYED] = "true"
    return show(store, job)


@router.get(
    JOB_PATH,
    responses=problems(404, 422, 429, 503)
    | {
        200: {"description": "The job", "headers": {"ETag": {"schema": {"type": "string"}}}},
        304: {"description": "The ETag in If-None-Match still holds"},
    },
    response_model=JobBody,
    summary="Look at",
)
async def get_job(
    job: JobDep,
    store: StoreDep,
    streams: StreamsDep,
    caller: CallerDep,
    request: Request,
    if_none_match: IfNoneMatch = None,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the job, at most; 0 answers at once.")
    ] = 0.0,
    until: Annotated[
        Literal["terminal", "change"], Query(description="What is waited for: the job's end, or any change.")
    ] = "terminal",
) -> Response:
    """The job as it stands, or as it stands after a wait."""
    body = await run_in_threadpool(show, store, job)
    etag = etag_of(job, body)
    is_known = if_none_match is None or names(if_none_match, etag)
    if wait > 0 and not request.state.is_head and not job.state.is_terminal and (is_known or until == "terminal"):
        seen = job

        def is_due(pulse: Pulse) -> bool:
            is_changed = until == "change" and (pulse.version, pulse.progress) != (seen.version, seen.progress)
            return pulse.state.is_terminal or is_changed

        give_back = streams.take_slot(caller.owner)
        try:
            await streams.wait(job, wait, is_due)
        finally:
            give_back()
        job = await run_in_threadpool(lambda: store.get(seen.id) or seen)
        body = await run_in_threadpool(show, store, job)
        etag = etag_of(job, body)
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if names(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    return Response(body.model_dump_json(), media_type="application/json", headers=headers)


@router.get("/jobs/{id}/attempts", responses=problems(404, 422, 503), summary="Attempts")
def list_attempts(job: JobDep, store: StoreDep) -> AttemptList:
    """Every attempt at the job, and how it ended."""
    return AttemptList(items=store.attempts(job.id))
