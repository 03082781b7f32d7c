"""Route: what a job's drivers print, as text, as pages of lines or as a stream."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from service.api.context import CallerDep, JobDep, StorageDep, StreamsDep
from service.api.errors import InvalidParameter
from service.api.following import wants_stream
from service.api.log_reading import (
    MAX_LINES,
    POSITION,
    Position,
    check_attempt,
    is_over,
    last_attempt,
    log_path,
    position_in,
    read_lines,
    tail_of,
)
from service.api.models import LogLines
from service.api.openapi import problems
from service.api.sse import HEADERS, MEDIA_TYPE, EventStream, log_stream
from service.api.streams import Streams
from service.jobs import Job
from worker.logs import log_bytes, log_size
from worker.storage import Storage

router = APIRouter(tags=["jobs"])

PAGE_LINES = 200
JSON = "application/json"
TEXT = "text/plain"
_TEXT_SCHEMA: dict[str, Any] = {"schema": {"type": "string"}}
_POSITION: dict[str, Any] = {"pattern": POSITION}
_OVER = {204: {"description": "All was sent up to Last-Event-ID, and no more can come"}}


@router.get(
    "/jobs/{id}/logs",
    responses=problems(404, 422, 429, 503)
    | _OVER
    | {
        200: {
            "content": {TEXT: _TEXT_SCHEMA, MEDIA_TYPE: _TEXT_SCHEMA},
            "description": "Text, unless Accept asks for a page (application/json) or a stream (text/event-stream)",
        }
    },
    response_model=LogLines,
    summary="Log",
)
async def get_logs(
    job: JobDep,
    storage: StorageDep,
    streams: StreamsDep,
    caller: CallerDep,
    request: Request,
    attempt: Annotated[
        int | None, Query(ge=1, le=2**31, description="Only the log of this one; the last attempt's, unless given.")
    ] = None,
    after: Annotated[
        str | None,
        Query(
            json_schema_extra=_POSITION,
            description="Begin behind this place: `<attempt>:<bytes>`, as `next` of a page has it, or bytes alone.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        Query(
            ge=1, le=MAX_LINES, description="Most lines of a page (200, unless given) or of the text; not of a stream."
        ),
    ] = None,
    tail: Annotated[
        int | None, Query(ge=1, le=MAX_LINES, description="Begin with the last lines, so many; not beside `after`.")
    ] = None,
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            json_schema_extra=_POSITION,
            description="`id` of the last message, `<attempt>:<bytes>`: a stream goes on behind it. "
            "Bytes alone count in `attempt`, else in the first one.",
        ),
    ] = None,
) -> Response:
    """The driver's log: text; with `Accept: application/json` a page of lines; empty before the driver has written any.

    A stream has lines as messages whose `id` is the place behind them. It goes on through all further attempts, and ends with
    `event: end` when the job has ended; with `attempt` it ends when that attempt has.
    """
    check_attempt(job, attempt)
    if after is not None and tail is not None:
        raise InvalidParameter.of("tail", tail, "has a beginning of its own beside `after`", "Leave one of them out.")
    number = attempt or last_attempt(job)
    begin = Position(number, 0)
    if after is not None:
        begin = position_in(job, after, field="after", attempt=attempt, otherwise=number)
    sent: Position | None = None
    if last_event_id is not None:
        sent = position_in(job, last_event_id, field="Last-Event-ID", attempt=attempt, otherwise=1)
    is_stream, is_pinned = wants_stream(request), attempt is not None
    if is_stream and sent is not None:
        if await run_in_threadpool(_is_all, storage, job, sent, pinned=is_pinned):
            return Response(status_code=204)
        # Whoever comes back asks with the same query as before.
        begin = sent
    elif tail is not None:
        begin = await run_in_threadpool(tail_of, storage, job, number, lines=tail)
    if is_stream:
        return _stream(request, streams, job, begin, owner=caller.owner, pinned=is_pinned)
    if not _wants_page(request):
        return await run_in_threadpool(_text, request, storage, job, begin, limit)
    read = partial(read_lines, limit=limit or tail or PAGE_LINES)
    lines = await run_in_threadpool(read, storage, job, begin)
    following = None if lines.is_all else lines.end
    if lines.is_all and attempt is None and begin.attempt < job.attempt:
        following = Position(begin.attempt + 1, 0)
    body = LogLines(
        attempt=begin.attempt,
        items=lines.items,
        position=str(lines.end),
        next=None if following is None else str(following),
    )
    return Response(body.model_dump_json(), media_type=JSON)


def _is_all(storage: Storage, job: Job, sent: Position, *, pinned: bool) -> bool:
    """Whether nothing is left to send behind a place, and nothing will be."""
    if not is_over(job.state, job.attempt, sent.attempt, pinned=pinned):
        return False
    if not pinned and sent.attempt < job.attempt:
        # The `end` has the place behind the last log as its id: it has not been heard yet.
        return False
    return log_size(storage, log_path(job.id, sent.attempt)) <= sent.offset


def _stream(request: Request, streams: Streams, job: Job, begin: Position, *, owner: str, pinned: bool) -> Response:
    if request.state.is_head:
        return Response(headers=HEADERS, media_type=MEDIA_TYPE)
    give_back = streams.take_slot(owner)
    path_of = partial(log_path, job.id)
    return EventStream(log_stream(streams, job.id, begin=begin, pinned=pinned, path_of=path_of), give_back=give_back)


def _text(request: Request, storage: Storage, job: Job, begin: Position, limit: int | None) -> Response:
    """The log as it is from a place on: all of it, or so many lines."""
    media_type = f"{TEXT}; charset=utf-8"
    if limit is not None:
        return Response(read_lines(storage, job, begin, limit=limit).data, media_type=media_type)
    path = log_path(job.id, begin.attempt)
    size = log_size(storage, path)
    length = max(0, size - begin.offset)
    is_sent = length and not request.state.is_head
    chunks = log_bytes(storage, path, start=begin.offset, end=size) if is_sent else iter(())
    return StreamingResponse(chunks, media_type=media_type, headers={"Content-Length": str(length)})


def _wants_page(request: Request) -> bool:
    """Whether JSON is asked for by name, and not after text."""
    named = [part.partition(";")[0].strip() for part in request.headers.get("accept", "").lower().split(",")]
    if JSON not in named:
        return False
    return TEXT not in named or named.index(JSON) < named.index(TEXT)
