"""Server-sent events: what a stream of events or of a log sends, and how it ends.

Every stream ends with `event: end`, which says the job's state: one that breaks off without it has not ended. What has an `id`
can be gone on from (`Last-Event-ID`); progress has none and is not sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ncfm_core.errors import NcfmError
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
    """Its last attempt: a log of an earlier one ends when the next begins."""


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


async def log_stream(streams: Streams, job_id: str, *, attempt: int, path: str, after: int) -> AsyncIterator[bytes]:
    """The lines of an attempt's log beyond byte `after`, and its end."""
    at = after
    with streams.watch(job_id) as feed, streams.watch_log(feed, path) as log:
        while not streams.is_closing:
            changed = feed.changed
            is_over = feed.is_gone or (log.size is not None and _is_over(feed, attempt))
            try:
                while log.size is not None and (data := await streams.log(log, at)):
                    # Whole lines, while more may come.
                    whole = data if is_over and at + len(data) >= log.size else data[: data.rfind(b"\n") + 1]
                    if not whole and len(data) < 65_536:
                        break
                    at += len(whole or data)
                    yield lines(whole or data, number=at)
            except NcfmError:
                await asyncio.sleep(AWAY_S)
                continue
            if is_over and at >= (log.size or 0):
                yield message("end", _end(feed))
                return
            if not await until_changed(changed, PING_S):
                yield _PING


def message(kind: str, data: BaseModel, *, number: int | None = None) -> bytes:
    """One message, whose data is one line of JSON."""
    mark = "" if number is None else f"id: {number}\n"
    return f"{mark}event: {kind}\ndata: {data.model_dump_json()}\n\n".encode()


def lines(data: bytes, *, number: int) -> bytes:
    """Lines of a log as one message: one `data` for each, whatever ends it."""
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    body = "".join(f"data: {line}\n" for line in text.split("\n"))
    return f"id: {number}\n{body}\n".encode()


def _is_over(feed: Feed, attempt: int) -> bool:
    """Whether nothing more comes of an attempt's log."""
    pulse = feed.pulse
    return pulse is not None and (pulse.state.is_terminal or pulse.attempt > attempt)


def _end(feed: Feed) -> End:
    if feed.is_gone or feed.pulse is None:
        return End(state=None, attempt=0)
    return End(state=feed.pulse.state, attempt=feed.pulse.attempt)


__all__ = ["HEADERS", "MEDIA_TYPE", "End", "EventStream", "Feed", "LogFeed", "event_stream", "log_stream"]
