"""What an attempt makes of mishaps: lost tasks, memory that runs out, errors of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ncfm_core.errors import OutOfMemoryError, StorageError
from ncfm_core.spec import JobSpec
from tests.worker.driving import Driver, InProcess, ask, at_turn
from worker import stages
from worker.building import Building
from worker.checkpoints import Checkpoints
from worker.driver import pool
from worker.driver.attempt import Assignment
from worker.driver.board import Board
from worker.driver.border import drive
from worker.records import AttemptStatus, StageResult, attempt_path, now
from worker.settings import Surroundings
from worker.site import Site
from worker.storage import Storage
from worker.tasks import WorkerLostError, _run_stage


def test_task_that_is_lost_after_its_commit_is_not_begun_again(
    driver: Driver, in_process: InProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last word did not arrive: the result is there all the same, and whole."""
    events, lost = cast(Any, pool).events, list[str]()

    def lose_the_last_word(task: Any) -> Iterator[Any]:
        for event in events(task):
            if isinstance(event, StageResult) and event.stage == "distill" and not lost:
                lost.append(event.key)
                raise WorkerLostError.of("", None, "a process of the cluster was lost", "")
            yield event

    monkeypatch.setattr(pool, "events", lose_the_last_word)
    result = driver(spec)
    assert result.outcome == "succeeded" and lost
    assert in_process.started.count("distill") == 1
    assert driver.storage.find_result(lost[0], read=True) is not None


def test_two_tries_at_a_result_write_into_folders_of_their_own(storage: Storage, spec: JobSpec) -> None:
    """Also in one attempt: what came second must not touch what the first has committed."""
    site = Site(
        job_id="J",
        attempt=1,
        storage_url=storage.url,
        device="cpu",
        threads=1,
        checkpoint=spec.checkpoint,
        code_version="test",
    )

    def build(payload: bytes) -> StageResult:
        making = Building(site, storage, "teacher", "sha256:" + "a" * 64).commit({"history.jsonl": payload}, {})
        while True:
            try:
                next(making)
            except StopIteration as stop:
                result: StageResult = stop.value
                return result

    first = build(b"one")
    assert build(b"two") == first
    assert storage.find_result(first.key, read=True) == first


def test_attempt_that_is_stopped_is_stopped_whatever_its_tasks_fail_of(
    driver: Driver, in_process: InProcess, spec: JobSpec
) -> None:
    """The one teacher ends as asked, and the other fails while that is waited for."""
    failed = list[str]()

    def fail_then() -> None:
        ask(driver.storage, 1, checkpoint=True)
        in_process.before = fail

    def fail(label: str) -> None:
        if driver.board.message == "stops as asked":
            failed.append(label)
            raise RuntimeError("a CUDA error")

    at_turn(in_process, "teacher 1", 2, fail_then)
    assert driver(spec).outcome == "stopped"
    assert failed


def test_memory_that_runs_out_in_a_stage_leaves_its_task_as_an_error_that_names_the_way_out(
    storage: Storage, site_of: Callable[[int], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the stage; so nothing else has to know the error of torch."""

    def run_out(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(stages, "publish", run_out)
    with pytest.raises(OutOfMemoryError, match="the stage publish does not fit the memory of cpu"):
        list(_run_stage("publish", site_of(1), None, {}))


def test_checkpoints_that_cannot_be_removed_fail_no_result(
    driver: Driver, in_process: InProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoints: Checkpoints) -> None:
        raise StorageError.of("storage", "checkpoints", "cannot be removed: denied", "")

    monkeypatch.setattr(Checkpoints, "clear", refuse)
    assert driver(spec).outcome == "succeeded"


def test_attempt_says_what_each_of_its_tasks_takes(driver: Driver, in_process: InProcess, spec: JobSpec) -> None:
    driver(spec)
    status = driver.storage.get_record(attempt_path("J", 1, "status.json"), AttemptStatus)
    assert status is not None and status.gpus == 0
    board, assignment = Board("J", 2), Assignment(spec=spec, job_id="J", attempt=2, started_at=now(), gpus=1.0)
    surroundings = Surroundings(storage=driver.storage.url, data_dir=Path("unused"))
    result = drive(assignment, surroundings, driver.storage, None, board)
    assert result.error is not None and result.error.code == "no_node"
    assert board.status().gpus == 1, "the next attempt is to have the same"
