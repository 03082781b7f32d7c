"""Following jobs: one poller in the process for everybody who follows something, however many they are.

The poller asks the database once a tick for the pulses of all jobs that are followed, reads the events of those that moved, and
wakes whoever waits. Logs have a poller and threads of their own: a storage root that hangs holds up no event. No stream holds a
thread or a connection. A server that shall end calls `close_all`, from any thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from types import MappingProxyType
from typing import TypeVar

from ncfm_core.errors import NcfmError
from service.api.errors import ApiError
from service.jobs import Event, Job
from service.pulse import Pulse, pulses
from service.store import Store
from worker.logs import log_bytes, log_size
from worker.storage import Storage

logger = logging.getLogger("ncfm.api")

POLL_S = 0.1
LOG_TICKS = 5
"""A log is looked at in one of so many ticks."""
AWAY_S = 1.0
"""Pause after a tick that could not read."""
KEPT_EVENTS = 256
KEPT_LOG_BYTES = 1 << 20
READ_BYTES = 1 << 18

T = TypeVar("T")


class TooManyStreams(ApiError):
    """As many streams are open as may be."""

    code = "too_many_streams"
    status = HTTPStatus.TOO_MANY_REQUESTS
    headers: Mapping[str, str] = MappingProxyType({"Retry-After": "5"})


class ShuttingDown(ApiError):
    """The service is about to end."""

    code = "shutting_down"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    headers: Mapping[str, str] = MappingProxyType({"Retry-After": "2"})


@dataclass(slots=True, eq=False)
class Feed:
    """What is known of one job that is followed."""

    job_id: str
    pulse: Pulse | None = None
    """None before the first tick."""
    is_gone: bool = False
    """Whether it has been deleted."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once, at the next change; then there is a new one."""
    watchers: int = 0
    recent: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    logs: dict[str, LogFeed] = field(default_factory=dict)

    def wake(self) -> None:
        woken, self.changed = self.changed, asyncio.Event()
        woken.set()

    def held(self, after: int) -> list[Event] | None:
        """Events beyond `after`, if all of them are at hand."""
        if not self.recent or self.recent[0].seq > after + 1:
            return None
        return [event for event in self.recent if event.seq > after]


@dataclass(slots=True, eq=False)
class LogFeed:
    """The end of one log that is followed."""

    path: str
    watchers: int = 0
    size: int | None = None
    """Bytes that are there; None before the first look."""
    tail: bytes = b""
    """The last of them."""
    pulse: Pulse | None = None
    """The job's when it was last looked at: whoever sees the end of the job here finds the whole log."""
    is_gone: bool = False
    """Whether the job had been deleted then."""

    @property
    def tail_start(self) -> int:
        return (self.size or 0) - len(self.tail)


class Streams:
    """All streams of one process."""

    max_streams = 1000
    """Open at once, over all callers."""
    max_streams_per_owner = 100

    def __init__(self, store: Store, storage: Storage) -> None:
        self._store, self._storage = store, storage
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="streams")
        self._log_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="logs")
        self._feeds: dict[str, Feed] = {}
        self._open: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pollers: list[asyncio.Task[None]] = []
        self.is_closing = False

    def close_all(self) -> None:
        """End every stream and long poll soon, and refuse new ones; from a signal handler or another thread too."""
        self.is_closing = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake_all)

    def shut(self) -> None:
        """Let the threads go, once nothing is served any more."""
        self.close_all()
        for threads in (self._threads, self._log_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def num_open(self) -> int:
        return self._open.total()

    def take_slot(self, owner: str) -> Callable[[], None]:
        """Count a stream; what is returned, called once or more, gives its slot back.

        Raises:
            TooManyStreams: there are too many.
            ShuttingDown: the service is about to end.
        """
        if self.is_closing:
            raise ShuttingDown.of("", None, "the service is about to end", "Try again in a moment.")
        for count, most, whose in (
            (self._open[owner], self.max_streams_per_owner, "your"),
            (self.num_open, self.max_streams, "all"),
        ):
            if count >= most:
                hint = "Close one, or ask without waiting."
                raise TooManyStreams.of("", None, f"{whose} {most} streams are in use", hint)
        self._open[owner] += 1
        taken = [owner]

        def give_back() -> None:
            while taken:
                self._open[taken.pop()] -= 1
                self._open += Counter()

        return give_back

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Feed]:
        """The feed of a job, kept fresh for as long as somebody watches it."""
        feed = self._feeds.setdefault(job_id, Feed(job_id))
        feed.watchers += 1
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._pollers = loop, []
        polled = {task.get_name() for task in self._pollers if not task.done()}
        rounds = {"streams": self._tick, "logs": self._tick_logs}
        self._pollers = [task for task in self._pollers if not task.done()]
        self._pollers += [
            loop.create_task(self._poll(name, tick), name=name) for name, tick in rounds.items() if name not in polled
        ]
        try:
            yield feed
        finally:
            feed.watchers -= 1
            if feed.watchers == 0:
                self._feeds.pop(job_id, None)

    @contextmanager
    def watch_log(self, feed: Feed, path: str) -> Iterator[LogFeed]:
        """A log beside the job that it belongs to."""
        log = feed.logs.setdefault(path, LogFeed(path))
        log.watchers += 1
        try:
            yield log
        finally:
            log.watchers -= 1
            if log.watchers == 0:
                feed.logs.pop(path, None)

    async def wait(self, job: Job, seconds: float, is_due: Callable[[Pulse], bool]) -> None:
        """Until the job's pulse is due, the time is over, the job is gone or the service ends."""
        try:
            async with asyncio.timeout(seconds):
                with self.watch(job.id) as feed:
                    while not (self.is_closing or feed.is_gone or (feed.pulse is not None and is_due(feed.pulse))):
                        await feed.changed.wait()
        except TimeoutError:
            pass

    async def events(self, feed: Feed, after: int) -> list[Event]:
        """Some events beyond `after`, in order: at hand, or read."""
        held = feed.held(after)
        if held is not None:
            return held
        return await self._read(lambda: self._store.events(feed.job_id, after=after, limit=KEPT_EVENTS))

    async def log(self, log: LogFeed, start: int) -> bytes:
        """Some bytes of a log from `start` on: at hand, or read."""
        end = log.size or 0
        if start >= log.tail_start:
            return log.tail[start - log.tail_start :]
        end = min(end, start + READ_BYTES)
        return await self._read_log(lambda: b"".join(log_bytes(self._storage, log.path, start=start, end=end)))

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _read_log(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._log_threads, work)

    async def _poll(self, name: str, tick: Callable[[int], Awaitable[None]]) -> None:
        number, is_away = 0, False
        while self._feeds and not self.is_closing:
            pause = POLL_S
            try:
                await tick(number)
                is_away = False
            except NcfmError as error:
                # Streams stay open: they go on when it is back.
                if not is_away:
                    logger.warning("%s wait: %s", name, error, extra={"action": f"{name}_wait"})
                is_away, pause = True, AWAY_S
            except Exception:
                # The border of the poller: without it every stream would wait for ever.
                logger.exception("%s wait", name, extra={"action": f"{name}_wait"})
                pause = AWAY_S
            number += 1
            await asyncio.sleep(pause)

    async def _tick(self, _: int) -> None:
        feeds = list(self._feeds.values())
        found = await self._read(lambda: pulses(self._store, [feed.job_id for feed in feeds]))
        for feed in feeds:
            pulse = found.get(feed.job_id)
            is_changed = pulse != feed.pulse or (pulse is None) != feed.is_gone
            if pulse is not None and is_changed:
                await self._keep_events(feed, pulse)
            # Last: whoever sees the end of a job finds all of its events.
            feed.pulse, feed.is_gone = pulse or feed.pulse, pulse is None
            if is_changed:
                feed.wake()

    async def _tick_logs(self, number: int) -> None:
        for feed in list(self._feeds.values()):
            pulse, is_gone, has_news = feed.pulse, feed.is_gone, False
            if pulse is None and not is_gone:
                # Nobody knows yet whether more is to come.
                continue
            for log in list(feed.logs.values()):
                is_changed = (pulse, is_gone) != (log.pulse, log.is_gone)
                if number % LOG_TICKS == 0 or is_changed or log.size is None:
                    has_news = await self._look_at(log) or is_changed or has_news
                    log.pulse, log.is_gone = pulse, is_gone
            if has_news:
                feed.wake()

    async def _keep_events(self, feed: Feed, pulse: Pulse) -> None:
        known = feed.recent[-1].seq if feed.recent else max(0, pulse.seq - KEPT_EVENTS)
        while known < pulse.seq:
            some = await self._read(partial(self._store.events, feed.job_id, after=known, limit=KEPT_EVENTS))
            if not some:
                break
            feed.recent.extend(some)
            known = some[-1].seq

    async def _look_at(self, log: LogFeed) -> bool:
        """Whether the log has grown, or is seen for the first time."""
        before = log.size
        size = await self._read_log(lambda: log_size(self._storage, log.path))
        if size == before:
            return False
        if before is None or size < before:
            log.size, log.tail = size, b""
            return True
        start = max(before, size - KEPT_LOG_BYTES)
        more = await self._read_log(lambda: b"".join(log_bytes(self._storage, log.path, start=start, end=size)))
        log.tail = (log.tail + more if start == before else more)[-KEPT_LOG_BYTES:]
        log.size = start + len(more)
        return True

    def _wake_all(self) -> None:
        for feed in self._feeds.values():
            feed.wake()


async def until_changed(changed: asyncio.Event, seconds: float) -> bool:
    """Whether the event came in time."""
    try:
        async with asyncio.timeout(seconds):
            await changed.wait()
    except TimeoutError:
        return False
    return True
