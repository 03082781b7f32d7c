"""Tells everyone who listens what an attempt does: the board (status.json), the log and, live, the tracker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ncfm_core.errors import DamagedError, NcfmError
from ncfm_core.progress import Progress
from worker.driver.board import Board
from worker.driver.live import Tracker
from worker.driver.story import metric_prefix
from worker.evidence import accuracy_in, in_words
from worker.history import Event, Kept, Notice, Picture, Trouble, row_of
from worker.patience import when_there_is_room
from worker.plan import Build
from worker.records import StageName, StageResult

T = TypeVar("T")

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0
"""Between two lines of progress of one build, or of one trouble."""


class Reporter:
    """The observer of the pool."""

    def __init__(self, board: Board, tracker: Tracker | None) -> None:
        self.board, self._tracker = board, tracker
        self._logged_at: dict[str, float] = {}
        self._waits: dict[str, str] = {}
        self._troubles: set[tuple[str, str]] = set()
        self._stage: StageName | None = None

    def say(self, message: str) -> None:
        """One line for a person."""
        self.board.message = message
        log.info("%s", message)

    def warn(self, message: str) -> None:
        """Say it, and keep it in the result."""
        self.board.warnings.append(message)
        self.say(message)

    def begin(self, stage: StageName, part: str) -> None:
        self.board.started(stage, part)
        if self._tracker is not None and stage != self._stage:
            self._stage = stage
            self._tracker.offer_tags({"ncfm.stage": stage})

    def submitted(self, build: Build) -> None:
        self.board.message = f"{build.label} waits for its resources"

    def started(self, build: Build) -> None:
        self._no_longer_waits(build)
        self.begin(build.stage, build.label)
        self.say(f"{build.label} runs")

    def happened(self, build: Build, event: Event) -> None:
        if isinstance(event, Notice):
            self.say(event.message)
        elif isinstance(event, Trouble):
            self.trouble(event)
        elif isinstance(event, Kept):
            self.board.kept()
        elif isinstance(event, Picture):
            if self._tracker is not None:
                self._tracker.offer_picture(event)
        else:
            self._progressed(build, event)

    def trouble(self, trouble: Trouble) -> None:
        """Show it while it lasts; the first of its kind is also kept in the result."""
        self.board.note(trouble.topic, trouble.message)
        if not trouble.message:
            log.info("the trouble with the %s is over", trouble.topic)
            return
        kind = (trouble.topic, trouble.message.partition(":")[0])
        if kind not in self._troubles:
            self._troubles.add(kind)
            self.board.warnings.append(trouble.message)
        if time.monotonic() - self._logged_at.get(trouble.topic, float("-inf")) >= LOG_EVERY_S:
            self._logged_at[trouble.topic] = time.monotonic()
            log.warning("%s", trouble.message)

    def patiently(self, write: Callable[[], T], what: str) -> T:
        """Write to the storage root, and say so where it is full for a while.

        Raises:
            StorageError: it cannot be written.
        """
        tries = when_there_is_room(write, what)
        while True:
            try:
                self.trouble(next(tries))
            except StopIteration as stop:
                value: T = stop.value
                return value

    def waits(self, build: Build, holder: str | None) -> None:
        if self._waits.get(build.label) != (holder or ""):
            self._waits[build.label] = holder or ""
            told = f"job {holder.rpartition('-')[0]}" if holder else "another job"
            message = f"waits for {build.label}, which {told} builds"
            self.board.note(f"wait/{build.label}", message)
            log.info("%s", message)

    def _no_longer_waits(self, build: Build) -> None:
        if self._waits.pop(build.label, None) is not None:
            self.board.note(f"wait/{build.label}", "")

    def damaged(self, build: Build, error: DamagedError) -> None:
        problem = error.problems[0]
        self.warn(f"{build.label} is built again: {problem.message} ({problem.field})")

    def begins_again(self, build: Build) -> None:
        self.board.reopened(build.stage, build.label)

    def stops(self) -> None:
        self.say("stops as asked")

    def lost(self, build: Build, error: NcfmError) -> None:
        self.warn(f"{build.label} is begun again: {error.problems[0].message}")

    def finished(self, build: Build, result: StageResult, *, cached: bool) -> None:
        self._no_longer_waits(build)
        self.board.keys[result.key] = None
        if not cached:
            self.board.kept()
        self.board.finished(build.stage, build.label, cached=cached)
        found = result.figures.get("accuracy")
        accuracy = ""
        if isinstance(found, dict):
            accuracy = f": {in_words(accuracy_in(result))}"
        elif isinstance(found, float):
            accuracy = f": {found:.1f} %"
        how = f"is there, built by {result.built_by}" if cached else f"done in {result.seconds:.1f} s"
        self.say(f"{build.label} {how}{accuracy}")

    def _progressed(self, build: Build, progress: Progress) -> None:
        self.board.progressed(build.stage, build.label, progress)
        if self._tracker is not None and progress.metrics:
            self._tracker.offer_row(metric_prefix(build), row_of(progress))
        at = time.monotonic()
        if at - self._logged_at.get(build.label, 0.0) >= LOG_EVERY_S:
            self._logged_at[build.label] = at
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
            log.info("%s: %s %d of %d  %s", build.label, progress.unit, progress.completed, progress.total, metrics)
