"""Routes: what happens to a job, and what its driver prints, as pages or as streams (`Accept: text/event-stream`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from service.api.context import CallerDep, JobDep, StorageDep, StoreDep, StreamsDep
from service.api.errors import InvalidParameter
from service.api.listing import Limit
from service.api.models import EventList
from service.api.openapi import problems
from service.api.sse import HEADERS, MEDIA_TYPE, EventStream, event_stream, log_stream
from service.jobs import Job
from worker.records import attempt_path

router = APIRouter(tags=["jobs"])

_FAR = 2**53
LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=0, le=_FAR, description="`id` of the last message: a stream goes on behind it."),
]
_STREAM: dict[str, Any] = {"schema": {"type": "string"}}
_OVER = {204: {"description": "The job has ended and Last-Event-ID was the last message: there is no more to come"}}


@router.get(
    "/jobs/{id}/events",
    responses=problems(404, 422, 429, 503)
    | _OVER
    | {200: {"description": "A page, or a stream of messages", "content": {MEDIA_TYPE: _STREAM}}},
    response_model=EventList,
    summary="Events",
)
async def list_events(
    job: JobDep,
    store: StoreDep,
    streams: StreamsDep,
    caller: CallerDep,
    request: Request,
    after: Annotated[int, Query(ge=0, le=_FAR, description="Only events with a higher `seq`.")] = 0,
    limit: Limit = 50,
    last_event_id: LastEventId = None,
) -> Response:
    """What happened to the job: `seq` counts 1, 2, 3, ... without gaps.

    A stream has the events as messages whose `id` is `seq`, progress as messages without one, and ends with `event: end`.
    """
    if _wants_stream(request):
        after = after if last_event_id is None else last_event_id
        if last_event_id is not None and job.state.is_terminal and job.event_seq <= after:
            return Response(status_code=204)
        if request.state.is_head:
            return Response(headers=HEADERS, media_type=MEDIA_TYPE)
        give_back = streams.take_slot(caller.owner)
        return EventStream(event_stream(streams, job.id, after), give_back=give_back)
    found = await run_in_threadpool(store.events, job.id, after=after, limit=limit + 1)
    page = found[:limit]
    body = EventList(items=page, next=page[-1].seq if len(found) > len(page) else None)
    return Response(body.model_dump_json(), media_type="application/json")


@router.get(
    "/jobs/{id}/logs",
    responses=problems(404, 422, 429, 503)
    | _OVER
    | {200: {"content": {"text/plain": _STREAM, MEDIA_TYPE: _STREAM}, "description": "The log so far, or a stream"}},
    response_class=Response,
    summary="Log",
)
async def get_logs(
    job: JobDep,
    storage: StorageDep,
    streams: StreamsDep,
    caller: CallerDep,
    request: Request,
    attempt: Annotated[int | None, Query(ge=1, le=2**31, description="The last attempt, unless given.")] = None,
    after: Annotated[int, Query(ge=0, le=_FAR, description="Leave out this many bytes.")] = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """The driver's log as plain text; empty before the driver has written any.

    A stream has lines as messages whose `id` is the offset behind them, and ends with `event: end` when the attempt is over.
    """
    if _wants_stream(request):
        number = attempt or max(1, job.attempt)
        _check_attempt(job, number, most=max(1, job.attempt))
        path = attempt_path(job.id, number, "driver.log")
        after = after if last_event_id is None else last_event_id
        if last_event_id is not None and job.state.is_terminal:
            size = await run_in_threadpool(storage.size, path)
            if (size or 0) <= after:
                return Response(status_code=204)
        if request.state.is_head:
            return Response(headers=HEADERS, media_type=MEDIA_TYPE)
        give_back = streams.take_slot(caller.owner)
        return EventStream(log_stream(streams, job.id, attempt=number, path=path, after=after), give_back=give_back)
    _check_attempt(job, attempt or 0, most=job.attempt)
    path = attempt_path(job.id, attempt or job.attempt, "driver.log")
    size = await run_in_threadpool(storage.size, path) or 0
    length = max(0, size - after)
    chunks: Iterator[bytes] = iter(())
    if length and not request.state.is_head:
        chunks = storage.stream(path, start=after, end=size)
    headers = {"Content-Length": str(length)}
    return StreamingResponse(chunks, media_type="text/plain; charset=utf-8", headers=headers)


def _wants_stream(request: Request) -> bool:
    return MEDIA_TYPE in request.headers.get("accept", "").lower()


def _check_attempt(job: Job, number: int, *, most: int) -> None:
    if number > most:
        hint = f"It has made {job.attempt} so far."
        raise InvalidParameter.of("attempt", number, "the job has not made this attempt", hint)
