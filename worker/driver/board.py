"""What an attempt says of itself while it runs: progress by stage, kept in memory and written to `status.json` by a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import JsonValue

from ncfm_core.errors import StorageError, StorageFullError
from ncfm_core.progress import Progress
from worker.driver.share import JobShare, Part
from worker.records import STAGES, AttemptStatus, StageName, attempt_path, now
from worker.storage import Storage

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""Between two writes of the status while something moves."""
HEARTBEAT_S = 2.0
"""Between two writes while nothing does."""
STOP_WAIT_S = 5.0
RESERVE_BYTES = 65_536
"""Kept for the status of an attempt whose storage is full."""
RESERVE_AGAIN_S = 10.0


@dataclass(slots=True)
class _StageState:
    """Progress of one stage over all of its builds."""

    expected: int = 1
    state: str = "pending"
    parts: dict[str, Progress] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    finished: int = 0
    built: int = 0
    busy_since: float = 0.0
    seconds: float = 0.0
    """Time in which at least one of its builds ran."""

    def progress(self) -> tuple[int, int, str]:
        """Completed, total and unit; in percent where the parts do not count alike."""
        known = list(self.parts.values())
        if not known:
            return 0, self.expected, "part"
        if len({(part.unit, part.total) for part in known}) == 1 and known[0].total:
            total = known[0].total * max(self.expected, len(known))
            return sum(part.completed for part in known), total, known[0].unit
        share = sum(part.completed / part.total if part.total else 1.0 for part in known)
        return round(100 * share / max(self.expected, len(known), 1)), 100, "%"


class Board:
    """Progress of an attempt; safe to use from several threads."""

    def __init__(self, job_id: str, attempt: int) -> None:
        self.message = ""
        self.warnings: list[str] = []
        self.mlflow_run_id: str | None = None
        self.mlflow_url: str | None = None
        self.is_tracked = False
        """Whether there is an MLflow server to write to."""
        self.data: dict[str, JsonValue] | None = None
        """What the inspection found."""
        self.gpus: float | None = None
        """What each task takes, once that is known."""
        self.keys: dict[str, None] = {}
        """Of the results so far, in order."""
        self.job_id, self.attempt = job_id, attempt
        self._stages: dict[StageName, _StageState] = {}
        self._share = JobShare()
        self._notes: dict[str, str] = {}
        self._kept = 0
        self._lock = threading.Lock()

    def tracked(self, run_id: str, url: str) -> None:
        """There is an MLflow run."""
        self.mlflow_run_id, self.mlflow_url = run_id, url

    def kept(self) -> None:
        """Something new is in store: whoever comes next goes on from there."""
        with self._lock:
            self._kept += 1

    def note(self, topic: str, text: str) -> None:
        """Keep a line in front of the message until it is replaced, or taken away by an empty one."""
        with self._lock:
            self._notes.pop(topic, None)
            if text:
                self._notes[topic] = text

    def has_begun(self, stage: StageName) -> bool:
        """Whether anything of a stage runs or is done."""
        with self._lock:
            return stage in self._stages and self._stages[stage].state != "pending"

    def weigh(self, weights: Mapping[Part, float]) -> None:
        """Say how long each part will roughly take, in any unit: what the progress of the whole job rests on."""
        with self._lock:
            self._share.weigh(weights)

    def reopened(self, stage: StageName, part: str) -> None:
        """A part that was finished has to be made again."""
        with self._lock:
            self._share.reopened((stage, part))
            self._stages[stage].finished -= 1
            self._stages[stage].state = "pending"

    def expect(self, stages: Iterable[StageName]) -> None:
        """Say what is to come: a stage as often as it has parts."""
        counts = Counter(stages)
        with self._lock:
            for stage, count in counts.items():
                self._stages.setdefault(stage, _StageState()).expected = count

    def started(self, stage: StageName, part: str) -> None:
        with self._lock:
            state = self._stages.setdefault(stage, _StageState())
            if not state.running:
                state.busy_since = time.monotonic()
            state.running.add(part)
            state.state = "running"
            self._share.started((stage, part))

    def progressed(self, stage: StageName, part: str, progress: Progress) -> None:
        with self._lock:
            self._stages[stage].parts[part] = progress
            self._share.progressed((stage, part), progress)

    def finished(self, stage: StageName, part: str, *, cached: bool) -> None:
        with self._lock:
            state = self._stages.setdefault(stage, _StageState())
            last = state.parts.get(part) or next(iter(state.parts.values()), Progress(1, 1, "part"))
            state.parts[part] = Progress(last.total, last.total, last.unit)
            if part in state.running:
                state.running.remove(part)
                state.seconds += 0.0 if state.running else time.monotonic() - state.busy_since
            self._share.finished((stage, part), cached=cached)
            state.finished += 1
            state.built += not cached
            if state.finished >= state.expected:
                state.state = "done" if state.built else "cached"

    def seconds(self) -> dict[str, float]:
        """Wall time by stage so far, with what still runs."""
        with self._lock:
            now_s = time.monotonic()
            return {
                stage: round(state.seconds + (now_s - state.busy_since if state.running else 0.0), 2)
                for stage, state in self._stages.items()
            }

    def status(self) -> AttemptStatus:
        """The document as of now; its stage is the first one that is not complete."""
        with self._lock:
            active = [stage for stage in STAGES if stage in self._stages]
            open_stages = [stage for stage in active if self._stages[stage].state in ("pending", "running")]
            stage = open_stages[0] if open_stages else (active[-1] if active else None)
            completed, total, unit = self._stages[stage].progress() if stage else (0, 0, "")
            return AttemptStatus(
                job_id=self.job_id,
                attempt=self.attempt,
                stage=stage,
                completed=completed,
                total=total,
                unit=unit,
                message="; ".join([*self._notes.values(), *([self.message] if self.message else [])]),
                stages={name: self._stages[name].state for name in active},
                job_percent=self._share.percent,
                job_eta_seconds=self._share.eta_seconds,
                heartbeat_at=now(),
                mlflow_run_id=self.mlflow_run_id,
                mlflow_url=self.mlflow_url,
                kept=self._kept,
                gpus=self.gpus,
                is_tracked=self.is_tracked,
            )


class StatusWriter:
    """Writes the board's status from a thread of its own, so that a silent stage or a slow server does not look like a death."""

    def __init__(self, board: Board, storage: Storage, also: Callable[[], None]) -> None:
        """
        Args:
            board: what to write.
            storage: where to.
            also: called after each write, such as to keep the log.
        """
        self._board, self._storage, self._also = board, storage, also
        self._path = attempt_path(board.job_id, board.attempt, "status.json")
        self._reserve = attempt_path(board.job_id, board.attempt, "reserve")
        self._is_failing = self._is_reserved = False
        self._reserve_tried_at = float("-inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> StatusWriter:
        self._write(self._board.status())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(STOP_WAIT_S)
        with suppress(StorageError):
            self._storage.delete([self._reserve])

    def _run(self) -> None:
        written, written_at = self._board.status(), time.monotonic()
        while not self._stop.wait(EVERY_S):
            status = self._board.status()
            moved = status.model_copy(update={"heartbeat_at": written.heartbeat_at}) != written
            if moved or time.monotonic() - written_at >= HEARTBEAT_S - EVERY_S / 2:
                self._write(status)
                written, written_at = status, time.monotonic()
        self._write(self._board.status())

    def _write(self, status: AttemptStatus) -> None:
        try:
            self._put(status)
            self._is_failing = False
        except StorageError as error:
            if not self._is_failing:
                log.warning("the status cannot be written: %s", error)
            self._is_failing = True
        self._also()

    def _put(self, status: AttemptStatus) -> None:
        """Write it; in the place of the reserve where there is no other."""
        try:
            self._storage.put_record(self._path, status)
        except StorageFullError:
            if not self._is_reserved:
                raise
            self._is_reserved = False
            self._storage.delete([self._reserve])
            self._storage.put_record(self._path, status)
        if not self._is_reserved and time.monotonic() - self._reserve_tried_at >= RESERVE_AGAIN_S:
            self._reserve_tried_at = time.monotonic()
            with suppress(StorageFullError):
                self._storage.put(self._reserve, bytes(RESERVE_BYTES))
                self._is_reserved = True
