"""Whole attempts without Ray, for tests: a driver of one job on the stand-in for Ray (conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Protocol

from ncfm_core.spec import JobSpec
from worker.driver.attempt import Assignment
from worker.driver.board import Board
from worker.driver.border import drive
from worker.records import AttemptResult, StageResult, StopRequest, attempt_path, now, set_folder
from worker.settings import Surroundings
from worker.storage import Storage


class InProcess(Protocol):
    """The stand-in for Ray (conftest.py)."""

    held: dict[str, str]
    started: list[str]
    cancelled: list[str]
    before: Callable[[str], None]


class Driver:
    """Attempts at one job."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.board = Board("J", 1)

    def __call__(
        self, spec: JobSpec, attempt: int = 1, *, job_id: str = "J", started_at: datetime | None = None
    ) -> AttemptResult:
        assignment = Assignment(spec=spec, job_id=job_id, attempt=attempt, started_at=started_at or now())
        self.board = Board(job_id, attempt)
        surroundings = Surroundings(storage=self.storage.url, data_dir=Path("unused"))
        result = drive(assignment, surroundings, self.storage, None, self.board)
        assert self.storage.get_record(attempt_path(job_id, attempt, "result.json"), AttemptResult) == result
        return result

    def results(self, stage: str) -> list[StageResult]:
        found = [self.storage.get_record(path, StageResult) for path in self.storage.list("results")]
        return [each for each in found if each is not None and each.stage == stage]

    def images(self, job_id: str = "J") -> bytes:
        data = self.storage.get(f"{set_folder(job_id)}/images.safetensors")
        assert data is not None
        return data


def at_turn(in_process: InProcess, label: str, turn: int, do: Callable[[], object]) -> None:
    """Have something happen before a task's nth turn."""
    turns = 0

    def before(each: str) -> None:
        nonlocal turns
        turns += each == label
        if each == label and turns == turn:
            do()

    in_process.before = before


def ask(storage: Storage, attempt: int, *, checkpoint: bool) -> None:
    request = StopRequest(checkpoint=checkpoint, requested_at=now())
    storage.put_record(attempt_path("J", attempt, "stop.json"), request)
