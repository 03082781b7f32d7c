"""Route: what happens to a job, as pages or as a stream (`Accept: text/event-stream`)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from service.api.context import CallerDep, JobDep, StoreDep, StreamsDep
from service.api.listing import Limit
from service.api.models import EventList
from service.api.openapi import problems
from service.api.sse import HEADERS, MEDIA_TYPE, EventStream, event_stream

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
    if wants_stream(request):
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


def wants_stream(request: Request) -> bool:
    """Whether a stream of messages is asked for."""
    return MEDIA_TYPE in request.headers.get("accept", "").lower()
