"""Between the driver and MLflow: a thread that sends what is offered to it, and may fail. Light.

What happens while a job runs waits in a bounded spool until the server takes it. At the end `complete` fills in whatever is
missing from the stored results, for a bounded time; a server that is away then gets it later (`worker.driver.publishing`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from pydantic import JsonValue

from ncfm_core.errors import TrackingError
from ncfm_core.spec import DatasetSpec, JobSpec
from worker.environment import code_version
from worker.history import Picture, Row

log = logging.getLogger(__name__)

RUN_STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""What MLflow calls the outcomes of an attempt."""
FLUSH_S = 1.0
MAX_BACKOFF_S = 30.0
MAX_ROWS = 20_000
MAX_PICTURES = 100
"""Rows and pictures kept for a server that is away; older ones are dropped."""
PATIENCE_S = 15.0
"""How long a server may fail while the end is sent."""
CLOSE_WAIT_S = 10.0
"""How long it may be silent while the run is closed."""
CALL_LIMIT_S = 300.0
"""Longest single call that is not taken for a failure: an upload may take its time."""
WAIT_S = 0.1

Rows = list[tuple[str, Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """Which run it is and what it begins with."""

    job_id: str
    experiment: str
    name: str
    params: Mapping[str, JsonValue]
    tags: Mapping[str, str]


def identity_of(spec: JobSpec, job_id: str, attempt: int) -> RunIdentity:
    """The run of a job."""
    return RunIdentity(
        job_id=job_id,
        experiment=spec.experiment,
        name=f"{spec.dataset.name}-ipc{spec.ipc}-{job_id[-6:].lower()}",
        params=flatten(spec.document()),
        tags={
            "ncfm.spec_digest": spec.digest(),
            "ncfm.code_version": code_version(),
            "ncfm.attempt": str(attempt),
        },
    )


def flatten(document: JsonValue, prefix: str = "") -> dict[str, JsonValue]:
    """Nested objects as dotted names; a list of objects is numbered, any other list stays one value."""
    if isinstance(document, dict) and document:
        items = list(document.items())
    elif isinstance(document, list) and any(isinstance(each, dict) for each in document):
        items = [(str(index), each) for index, each in enumerate(document)]
    else:
        return {prefix: document}
    return {
        name: value
        for key, child in items
        for name, value in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One trial of a search."""

    index: int
    params: Mapping[str, JsonValue]
    rows: Sequence[Row]
    finished: bool
    """False for one that the scheduler stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """All that the run should hold, from the stored results."""

    rows: Rows
    pictures: Sequence[Picture]
    trials: Sequence[TrialRecord]
    files: Mapping[str, bytes]
    tags: Mapping[str, str]


class Run(Protocol):
    """A run that is open (`tracking.MlflowRun`, or a twin in memory); every method raises TrackingError when it cannot."""

    run_id: str
    url: str

    def log_data(self, dataset: DatasetSpec, digest: str, facts: Mapping[str, JsonValue]) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_rows(self, rows: Rows) -> None: ...

    def log_pictures(self, pictures: Sequence[Picture]) -> None: ...

    def log_trials(self, trials: Sequence[TrialRecord]) -> None: ...

    def log_files(self, files: Mapping[str, bytes]) -> None: ...

    def close(self, status: str) -> None: ...


@dataclass(slots=True)
class _Waiting:
    """What was offered and not sent yet, bounded: what is dropped, the end fills in from the stored results."""

    rows: Rows = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def bounded(self) -> _Waiting:
        del self.rows[:-MAX_ROWS], self.pictures[:-MAX_PICTURES]
        return self

    def before(self, later: _Waiting) -> _Waiting:
        """Both, in their order."""
        rows, pictures = self.rows + later.rows, self.pictures + later.pictures
        return _Waiting(rows, pictures, self.trials | later.trials, self.tags | later.tags).bounded()


class Tracker:
    """The driver's side of a run. Only its thread talks to the server, and nobody waits for it for long."""

    def __init__(
        self,
        connect: Callable[[], Run],
        *,
        on_open: Callable[[str, str], None] = lambda run_id, url: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """
        Args:
            connect: finds or makes the run; called on the thread, again and again until it works.
            on_open: told the id and the page of the run once there is one.
            patience_s: how long a server may stay silent while the end is sent.
        """
        self._connect, self._on_open, self._patience_s = connect, on_open, patience_s
        self._run: Run | None = None
        self._data: tuple[DatasetSpec, str, Mapping[str, JsonValue]] | None = None
        self._data_logged = False
        self._waiting = _Waiting()
        self._story: Story | None = None
        self._status = ""
        self._given_up = False
        self._answered_at = self._failed_at = float("-inf")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def describe_data(self, dataset: DatasetSpec, digest: str, facts: Mapping[str, JsonValue]) -> None:
        self._data = (dataset, digest, facts)

    def offer_row(self, prefix: str, row: Row) -> None:
        with self._changed:
            self._waiting.rows.append((prefix, row))
            self._waiting.bounded()

    def offer_picture(self, picture: Picture) -> None:
        with self._changed:
            self._waiting.pictures.append(picture)
            self._waiting.bounded()

    def offer_trials(self, trials: Sequence[TrialRecord]) -> None:
        with self._changed:
            self._waiting.trials |= {trial.index: trial for trial in trials}

    def offer_tags(self, tags: Mapping[str, str]) -> None:
        with self._changed:
            self._waiting.tags |= tags

    def complete(self, story: Story) -> bool:
        """Bring the run to where it holds the whole story; whether it does.

        A server that is away is waited for as long as the patience lasts: what it lacks then is published later.
        """
        with self._changed:
            self._story = story
            self._changed.notify_all()
            return self._wait(lambda: self._story is None, self._patience_s, call_limit_s=CALL_LIMIT_S)

    def close(self, status: str, *, wait_s: float = CLOSE_WAIT_S) -> bool:
        """End the run as FINISHED, FAILED or KILLED, and the thread; whether the server has taken it."""
        with self._changed:
            if self._given_up:
                return False
            self._status = status
            self._changed.notify_all()
            is_closed = self._wait(lambda: not self._status, wait_s, call_limit_s=wait_s)
            self._given_up = True
            self._changed.notify_all()
        if not is_closed:
            log.warning("the MLflow run could not be closed as %s: it is left to a later publication", status)
        return is_closed

    def _wait(self, done: Callable[[], bool], patience_s: float, *, call_limit_s: float) -> bool:
        """Wait for the thread, unless the server fails it for the time of the patience, or is silent for that of a call."""
        began = time.monotonic()
        while not done():
            self._changed.wait(WAIT_S)
            silent_s = time.monotonic() - max(began, self._answered_at)
            failing = self._failed_at > max(began, self._answered_at) or silent_s >= call_limit_s
            if not done() and ((failing and silent_s >= patience_s) or not self._thread.is_alive()):
                self._given_up = True
                log.warning("MLflow is away: what it lacks is published later")
                break
        return done()

    def _work(self) -> None:
        """The thread: send what waits, and leave a server alone for longer each time that it fails."""
        pause_s = 0.0
        while not self._given_up:
            waiting = self._take()
            try:
                self._send(waiting)
                self._finish()
                pause_s = FLUSH_S
            except TrackingError as error:
                if pause_s <= FLUSH_S:
                    log.warning("MLflow is away, its run is completed later: %s", error)
                with self._changed:
                    self._failed_at = time.monotonic()
                    self._waiting = waiting.before(self._waiting)
                pause_s = min(MAX_BACKOFF_S, 2 * max(pause_s, FLUSH_S))
            self._rest(pause_s)

    def _rest(self, pause_s: float) -> None:
        """Wait for the next flush; while somebody waits for the end, not for long."""
        end = time.monotonic() + pause_s
        with self._changed:
            while not self._given_up and (left := end - time.monotonic()) > 0:
                ending = self._story is not None or bool(self._status)
                if ending and self._failed_at <= self._answered_at:
                    return
                self._changed.wait(min(left, FLUSH_S) if ending else left)
                if ending:
                    return

    def _take(self) -> _Waiting:
        with self._changed:
            taken, self._waiting = self._waiting, _Waiting()
        return taken

    def _answered(self) -> None:
        with self._changed:
            self._answered_at = time.monotonic()

    def _send(self, waiting: _Waiting) -> None:
        run = self._opened()
        if waiting.tags:
            run.set_tags(waiting.tags)
        if waiting.rows:
            run.log_rows(waiting.rows)
        if waiting.pictures:
            run.log_pictures(waiting.pictures)
        if waiting.trials:
            run.log_trials(list(waiting.trials.values()))
        self._answered()

    def _finish(self) -> None:
        """Send the end, if it has come to that."""
        run, story = self._opened(), self._story
        if story is not None:
            for send in parts_of(run, story):
                send()
                self._answered()
            with self._changed:
                self._story = None
                self._changed.notify_all()
        with self._changed:
            # What was offered since this turn began goes first: the next turn sends it, and then closes.
            status = self._status if self._waiting == _Waiting() else ""
        if status:
            run.close(status)
            with self._changed:
                self._answered_at, self._status, self._given_up = time.monotonic(), "", True
                self._changed.notify_all()

    def _opened(self) -> Run:
        if self._run is None:
            self._run = self._connect()
            self._on_open(self._run.run_id, self._run.url)
        if self._data is not None and not self._data_logged:
            self._run.log_data(*self._data)
            self._data_logged = True
        return self._run


def parts_of(run: Run, story: Story) -> Iterator[Callable[[], None]]:
    """The calls that bring a run to where it holds a story; each may be made again."""
    yield lambda: run.log_rows(story.rows)
    yield lambda: run.log_pictures(story.pictures)
    yield lambda: run.log_trials(story.trials)
    for name, data in story.files.items():
        yield partial(run.log_files, {name: data})
    yield lambda: run.set_tags(story.tags)
