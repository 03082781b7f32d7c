"""Tells everyone who listens what an attempt does: the board (status.json), the log and, live, the tracker."""

from __future__ import annotations

import logging
import time

from ncfm_core.errors import NcfmError
from ncfm_core.progress import Progress
from worker.driver.board import Board
from worker.driver.live import Tracker
from worker.driver.story import metric_prefix
from worker.evidence import accuracy_in, in_words
from worker.history import Event, Notice, Picture, row_of
from worker.plan import Build
from worker.records import StageName, StageResult

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0
"""Between two lines of progress of one build."""


class Reporter:
    """The observer of the pool."""

    def __init__(self, board: Board, tracker: Tracker | None) -> None:
        self.board, self._tracker = board, tracker
        self._logged_at: dict[str, float] = {}
        self._waits: dict[str, str] = {}
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
        self._waits.pop(build.label, None)
        self.begin(build.stage, build.label)
        self.say(f"{build.label} runs")

    def happened(self, build: Build, event: Event) -> None:
        if isinstance(event, Notice):
            self.say(event.message)
        elif isinstance(event, Picture):
            if self._tracker is not None:
                self._tracker.offer_picture(event)
        else:
            self._progressed(build, event)

    def waits(self, build: Build, holder: str) -> None:
        if self._waits.get(build.label) != holder:
            self._waits[build.label] = holder
            self.say(f"waits for {build.label}, built by {holder}")

    def lost(self, build: Build, error: NcfmError) -> None:
        self.warn(f"{build.label} is begun again: {error.problems[0].message}")

    def finished(self, build: Build, result: StageResult, *, cached: bool) -> None:
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
