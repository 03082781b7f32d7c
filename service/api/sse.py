"""Server-sent events: what a stream of events or of a log sends, and how it ends.

Every stream ends with `event: end`, which says the job's state: one that breaks off without it has not ended. What has an `id`
can be gone on from (`Last-Event-ID`); progress has none and is not sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ncfm_core.errors import NcfmError
from service.api.log_reading import PIECE_BYTES, Position, is_over
from service.api.models import ProgressBody
from service.api.streams import AWAY_S, Feed, LogFeed, Streams, until_changed
from service.jobs import State

PING_S = 15.0
MEDIA_TYPE = "text/event-stream"
_PING = b": ping\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class End(BaseModel):
    """Data of `event: end`."""

    state: State | None
    """Of the job; null where it has been deleted."""
    attempt: int
    """Its last attempt."""


class EventStream(StreamingResponse):
    """A stream that gives its slot back when it is over, however it ends."""

    media_type = MEDIA_TYPE

    def __init__(self, content: AsyncIterator[bytes], *, give_back: Callable[[], None]) -> None:
        super().__init__(content, headers=HEADERS, media_type=MEDIA_TYPE)
        self._give_back = give_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._give_back()


async def event_stream(streams: Streams, job_id: str, after: int) -> AsyncIterator[bytes]:
    """The events of a job beyond `after`, its progress as it changes, and its end."""
    seq, shown = after, None
    with streams.watch(job_id) as feed:
        while not streams.is_closing:
            changed, pulse = feed.changed, feed.pulse
            if feed.is_gone:
                yield message("end", End(state=None, attempt=0))
                return
            if pulse is not None:
                try:
                    while seq < pulse.seq:
                        some = await streams.events(feed, seq)
                        for event in some:
                            yield message(event.type, event, number=event.seq)
                        seq = some[-1].seq if some else pulse.seq
                except NcfmError:
                    await asyncio.sleep(AWAY_S)
                    continue
                if pulse.progress != shown and pulse.progress is not None:
                    shown = pulse.progress
                    yield message("progress", ProgressBody.of(shown))
                if pulse.state.is_terminal:
                    yield message("end", End(state=pulse.state, attempt=pulse.attempt))
                    return
            if not await until_changed(changed, PING_S):
                yield _PING


async def log_stream(
    streams: Streams, job_id: str, *, begin: Position, pinned: bool, path_of: Callable[[int], str]
) -> AsyncIterator[bytes]:
    """What a job's attempts print beyond a place, and its end.

    Args:
        streams: of the process.
        job_id: of the job.
        begin: where to begin.
        pinned: whether the log of that one attempt is all that is wanted.
        path_of: where an attempt's log is, by the attempt's number.
    """
    at = begin
    # Without data, so that no reader takes it for a line: whoever loses the connection before the first line goes on here.
    yield f"id: {at}\n\n".encode()
    with streams.watch(job_id) as feed:
        while True:
            with streams.watch_log(feed, path_of(at.attempt)) as log:
                async with aclosing(_attempt_log(streams, feed, log, at, pinned=pinned)) as messages:
                    async for behind, chunk in messages:
                        at = behind
                        yield chunk
            if streams.is_closing:
                return
            if pinned or feed.is_gone or feed.pulse is None or feed.pulse.attempt <= at.attempt:
                yield message("end", _end(feed), number=at)
                return
            at = Position(at.attempt + 1, 0)


async def _attempt_log(
    streams: Streams, feed: Feed, log: LogFeed, begin: Position, *, pinned: bool
) -> AsyncGenerator[tuple[Position, bytes]]:
    """Messages of one attempt's log until it is over, each with the place behind it."""
    at = begin
    while not streams.is_closing:
        # The pulse of the last look at the log: the whole log of a job that had ended then is there.
        changed, pulse = feed.changed, log.pulse
        is_ended = pulse is not None and is_over(pulse.state, pulse.attempt, at.attempt, pinned=pinned)
        is_final = log.size is not None and (log.is_gone or is_ended)
        try:
            while log.size is not None and (data := await streams.log(log, at.offset)):
                # Whole lines, while more may come.
                whole = data if is_final and at.offset + len(data) >= log.size else data[: data.rfind(b"\n") + 1]
                if not whole and len(data) < PIECE_BYTES:
                    break
                at = at.beyond(whole or data)
                yield at, lines(whole or data, number=at)
        except NcfmError:
            await asyncio.sleep(AWAY_S)
            continue
        if is_final and at.offset >= (log.size or 0):
            return
        if not await until_changed(changed, PING_S):
            yield at, _PING


def message(kind: str, data: BaseModel, *, number: int | Position | None = None) -> bytes:
    """One message, whose data is one line of JSON."""
    mark = "" if number is None else f"id: {number}\n"
    return f"{mark}event: {kind}\ndata: {data.model_dump_json()}\n\n".encode()


def lines(data: bytes, *, number: Position) -> bytes:
    """Lines of a log as one message: one `data` for each, whatever ends it."""
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    body = "".join(f"data: {line}\n" for line in text.split("\n"))
    return f"id: {number}\n{body}\n".encode()


def _end(feed: Feed) -> End:
    if feed.is_gone or feed.pulse is None:
        return End(state=None, attempt=0)
    return End(state=feed.pulse.state, attempt=feed.pulse.attempt)


__all__ = ["HEADERS", "MEDIA_TYPE", "End", "EventStream", "Feed", "LogFeed", "event_stream", "log_stream"]
