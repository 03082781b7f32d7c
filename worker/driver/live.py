"""Between the driver and MLflow: live metrics on a thread that may fail, and one completion at the end that may not. Light.

What happens while a job runs is offered and forgotten: the thread sends it when the server is there and drops it when it is
not. At the end `complete` fills in whatever is missing from the stored results, for a bounded time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue

from ncfm_core.errors import TrackingError
from ncfm_core.spec import DatasetSpec
from worker.history import Picture, Row

log = logging.getLogger(__name__)

FLUSH_S = 1.0
MAX_BACKOFF_S = 30.0
MAX_WAITING = 20_000
"""Rows kept for a server that is away; older ones are dropped, since the end fills them in."""
PATIENCE_S = 60.0
"""How long the completion tries before the attempt gives up."""
JOIN_S = 30.0

Rows = list[tuple[str, Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """Which run it is and what it begins with."""

    job_id: str
    experiment: str
    name: str
    params: Mapping[str, JsonValue]
    tags: Mapping[str, str]


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
    """What was offered and not sent yet."""

    rows: Rows = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    trials: list[TrialRecord] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


class Tracker:
    """The driver's side of a run."""

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
            patience_s: how long `complete` tries.
        """
        self._connect, self._on_open, self._patience_s = connect, on_open, patience_s
        self._run: Run | None = None
        self._data: tuple[DatasetSpec, str, Mapping[str, JsonValue]] | None = None
        self._data_logged = False
        self._waiting = _Waiting()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_live, name="tracker", daemon=True)
        self._thread.start()

    def describe_data(self, dataset: DatasetSpec, digest: str, facts: Mapping[str, JsonValue]) -> None:
        self._data = (dataset, digest, facts)

    def offer_row(self, prefix: str, row: Row) -> None:
        with self._lock:
            self._waiting.rows.append((prefix, row))
            del self._waiting.rows[:-MAX_WAITING]

    def offer_picture(self, picture: Picture) -> None:
        with self._lock:
            self._waiting.pictures.append(picture)

    def offer_trials(self, trials: Sequence[TrialRecord]) -> None:
        with self._lock:
            self._waiting.trials.extend(trials)

    def offer_tags(self, tags: Mapping[str, str]) -> None:
        with self._lock:
            self._waiting.tags |= tags

    def _send_live(self) -> None:
        """The thread: send what waits, and leave a server alone for longer each time that it fails."""
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            try:
                self._send(self._take())
                pause_s = FLUSH_S
            except TrackingError as error:
                if pause_s <= FLUSH_S:
                    log.warning("MLflow is away, its run is completed later: %s", error)
                pause_s = min(MAX_BACKOFF_S, 2 * max(pause_s, FLUSH_S))

    def _take(self) -> _Waiting:
        with self._lock:
            taken, self._waiting = self._waiting, _Waiting()
        return taken

    def _send(self, waiting: _Waiting) -> None:
        run = self._opened()
        if waiting.tags:
            run.set_tags(waiting.tags)
        if waiting.rows:
            run.log_rows(waiting.rows)
        if waiting.pictures:
            run.log_pictures(waiting.pictures)
        if waiting.trials:
            run.log_trials(waiting.trials)

    def _opened(self) -> Run:
        if self._run is None:
            self._run = self._connect()
            self._on_open(self._run.run_id, self._run.url)
        if self._data is not None and not self._data_logged:
            self._run.log_data(*self._data)
            self._data_logged = True
        return self._run

    def _halt(self, wait_s: float = JOIN_S) -> None:
        """End the thread; afterwards only the caller uses the run."""
        self._stop.set()
        self._thread.join(wait_s)
        if self._thread.is_alive():
            raise TrackingError.of(
                "mlflow_url", None, "MLflow does not answer", "The next attempt publishes the result."
            )

    def complete(self, story: Story) -> None:
        """Bring the run to where it holds the whole story.

        Raises:
            TrackingError: the server stayed away for too long; the results stay, and a new attempt publishes them.
        """
        self._halt()
        end, pause_s = time.monotonic() + self._patience_s, 1.0
        while True:
            try:
                self._tell(story)
                return
            except TrackingError as error:
                if time.monotonic() + pause_s > end:
                    raise
                log.warning("MLflow is away, trying again in %.0f s: %s", pause_s, error)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 15.0)

    def _tell(self, story: Story) -> None:
        run = self._opened()
        run.log_rows(story.rows)
        run.log_pictures(story.pictures)
        run.log_trials(story.trials)
        run.log_files(story.files)
        run.set_tags(story.tags)

    def close(self, status: str, *, wait_s: float = JOIN_S) -> None:
        """End the run if there is one; a server that is away is only noted."""
        try:
            self._halt(wait_s)
            if self._run is not None:
                self._run.close(status)
        except TrackingError as error:
            log.warning("the MLflow run could not be closed as %s: %s", status, error)
