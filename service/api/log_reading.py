"""Logs of a job's attempts: places in them, and pages of lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from service.api.errors import InvalidParameter
from service.jobs import Job, State
from worker.logs import log_bytes, log_size
from worker.records import attempt_path
from worker.storage import Storage

MAX_LINES = 1000
"""Of one page."""
READ_BYTES = 1 << 18
"""Of one page; a longer line comes in pieces."""
TAIL_BYTES = 1 << 20
"""How far back the last lines are looked for."""
PIECE_BYTES = 1 << 16
"""A line that has come to be this long is not waited for any longer."""
POSITION = r"^([0-9]{1,10}:)?[0-9]{1,15}$"
_MAX_ATTEMPT = 2**31


class Position(NamedTuple):
    """A place in the logs of a job; compares as what comes earlier and later."""

    attempt: int
    offset: int
    """Bytes before it."""

    def __str__(self) -> str:
        return f"{self.attempt}:{self.offset}"

    def beyond(self, data: bytes) -> Position:
        return Position(self.attempt, self.offset + len(data))


@dataclass(frozen=True, slots=True)
class Lines:
    """A page of a log."""

    data: bytes
    end: Position
    """Behind the last of them."""
    is_all: bool
    """Whether there are no further ones so far."""

    @property
    def items(self) -> list[str]:
        """The lines without their ends."""
        whole = self.data.removesuffix(b"\n").split(b"\n") if self.data else []
        return [line.removesuffix(b"\r").decode("utf-8", errors="replace") for line in whole]


def log_path(job_id: str, attempt: int) -> str:
    """Where the log of an attempt is, below the storage root."""
    return attempt_path(job_id, attempt, "driver.log")


def last_attempt(job: Job) -> int:
    """The attempt whose log is shown unless another is asked for: also the first one before it has begun."""
    return max(1, job.attempt)


def is_over(state: State, last: int, attempt: int, *, pinned: bool) -> bool:
    """Whether nothing more comes of an attempt's log.

    Args:
        state: of the job.
        last: the job's last attempt.
        attempt: whose log it is.
        pinned: whether only this one is followed; the others are left when the next attempt begins.
    """
    return state.is_terminal or last > attempt or (pinned and state is State.RECOVERING)


def check_attempt(job: Job, attempt: int | None) -> None:
    """
    Raises:
        InvalidParameter: the job has not made this attempt.
    """
    if attempt is not None and attempt > last_attempt(job):
        raise InvalidParameter.of("attempt", attempt, "the job has not made this attempt", _made(job))


def position_in(job: Job, given: str, *, field: str, attempt: int | None, otherwise: int) -> Position:
    """The place that a parameter or header names.

    Args:
        job: whose logs it is about.
        given: `<attempt>:<offset>`, or an offset alone.
        field: name of the parameter.
        attempt: the only one that is wanted; None for any.
        otherwise: whose offset it is where neither names an attempt.

    Raises:
        InvalidParameter: it is no place in the logs of this job.
    """
    if not re.fullmatch(POSITION, given):
        hint = (
            "Write it as <attempt>:<bytes>, as ids of a stream and `next` of a page have it, or as a number of bytes."
        )
        raise InvalidParameter.of(field, given, "not a place in a log", hint)
    named, colon, offset = given.rpartition(":")
    number = int(named) if colon else attempt or otherwise
    if not 1 <= number <= min(last_attempt(job), _MAX_ATTEMPT):
        raise InvalidParameter.of(field, given, "the job has not made this attempt", _made(job))
    if attempt is not None and number != attempt:
        hint = f"Leave out `attempt`, or begin in it: {attempt}:0."
        raise InvalidParameter.of(
            field, given, f"lies in attempt {number}, and only attempt {attempt} is asked for", hint
        )
    return Position(number, int(offset))


def read_lines(storage: Storage, job: Job, begin: Position, *, limit: int) -> Lines:
    """A page of whole lines; the last one of a log that is over may lack its end."""
    path = log_path(job.id, begin.attempt)
    size = log_size(storage, path)
    stop = min(size, begin.offset + READ_BYTES)
    data = b"".join(log_bytes(storage, path, start=begin.offset, end=stop)) if begin.offset < stop else b""
    may_grow = not is_over(job.state, job.attempt, begin.attempt, pinned=True)
    whole = data if stop == size and not may_grow else data[: data.rfind(b"\n") + 1]
    if not whole and len(data) >= PIECE_BYTES:
        whole = data
    kept = b"".join(line + b"\n" for line in whole.split(b"\n", limit)[:limit])[: len(whole)]
    return Lines(kept, begin.beyond(kept), is_all=kept == whole and stop == size)


def tail_of(storage: Storage, job: Job, attempt: int, *, lines: int) -> Position:
    """Where the last lines of a log begin: so many, or those in its last MiB."""
    path = log_path(job.id, attempt)
    size = log_size(storage, path)
    first = max(0, size - TAIL_BYTES)
    data = b"".join(log_bytes(storage, path, start=first, end=size)) if size else b""
    if not is_over(job.state, job.attempt, attempt, pinned=True):
        data = data[: data.rfind(b"\n") + 1]
    before, *rest = data.removesuffix(b"\n").rsplit(b"\n", lines)
    if len(rest) == lines:
        return Position(attempt, first + len(before) + 1)
    # All of what was looked at; it may begin in the middle of a line.
    return Position(attempt, first + (data.find(b"\n") + 1 if first else 0))


def _made(job: Job) -> str:
    return f"It has made {job.attempt} so far." if job.attempt else "It has made none so far."
