"""Whole attempts without Ray: what stops them, what shortens them, what they mend, and what they leave."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ncfm_core.errors import StorageFullError
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from tests.worker.driving import Driver, InProcess, ask, at_turn
from worker import patience
from worker.driver.pool import MAX_LOSSES
from worker.records import (
    AttemptResult,
    AttemptStatus,
    attempt_path,
    damaged_path,
    now,
    result_path,
    set_folder,
)
from worker.site import Site
from worker.storage import Storage
from worker.tasks import WorkerLostError

Change = Callable[..., JobSpec]


@pytest.fixture
def changed(submission: dict[str, Any]) -> Change:
    return lambda **parts: resolve(submission | parts)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps what the first job left, for the tests after the first that asks for it."""
    return tmp_path_factory.mktemp("shelf") / "storage"


@pytest.fixture
def after_first(driver: Driver, in_process: InProcess, spec: JobSpec, shelf: Path) -> Driver:
    """A driver on a storage root where a job `first` has left all of its results."""
    if shelf.exists():
        shutil.copytree(shelf, driver.storage.url, dirs_exist_ok=True)
    else:
        driver(spec, job_id="first")
        shutil.copytree(driver.storage.url, shelf)
    in_process.started.clear()
    return driver


def test_attempt_that_succeeds_names_its_results_and_leaves_no_checkpoint(driver: Driver, spec: JobSpec) -> None:
    driver.storage.put("checkpoints/J/0123/9/0000000020.json", b"of an earlier attempt")
    result = driver(spec)
    assert (result.outcome, result.publication, result.shortened) == ("succeeded", "none", None)
    assert {result_path(key) for key in result.keys} == set(driver.storage.list("results"))
    assert result.data is not None and result.data["num_train"] == 1297
    assert (driver.board.status().job_percent, driver.board.status().job_eta_seconds) == (100.0, 0.0)
    assert driver.storage.list("checkpoints") == []


def test_stopped_attempt_saves_itself_and_goes_on_to_the_same_bits(
    after_first: Driver, in_process: InProcess, spec: JobSpec
) -> None:
    driver = after_first
    undisturbed = driver.storage.get_record(attempt_path("first", 1, "result.json"), AttemptResult)
    assert undisturbed is not None
    for result in driver.results("distill") + driver.results("publish") + driver.results("evaluate"):
        driver.storage.delete([result_path(result.key)])
    at_turn(in_process, "distill", 6, lambda: ask(driver.storage, 1, checkpoint=True))
    stopped = driver(spec)
    assert (stopped.outcome, stopped.error, stopped.retryable) == ("stopped", None, False)
    saved = [path for path in driver.storage.list("checkpoints/J") if path.endswith(".json")]
    assert len(saved) == 1
    assert in_process.held == {}
    shares: list[float | None] = []
    in_process.before = lambda label: shares.append(driver.board.status().job_percent)
    again = driver(spec, 2)
    assert again.figures == undisturbed.figures
    told = [share for share in shares if share is not None]
    assert told == sorted(told) and 0 <= told[0] < 50 < told[-1] <= 100
    assert driver.images("J") == driver.images("first")
    assert driver.results("distill")[0].figures["steps"] == 60


def stopped_in_distillation(driver: Driver, in_process: InProcess, spec: JobSpec) -> None:
    """Job J is begun again, with its teachers alone, and stopped once its distillation can save itself."""
    for stage in ("distill", "publish", "evaluate"):
        driver.storage.delete([result_path(result.key) for result in driver.results(stage)])
    at_turn(in_process, "distill", 6, lambda: ask(driver.storage, 1, checkpoint=True))
    assert driver(spec).outcome == "stopped"


def test_second_job_goes_on_where_a_cancelled_one_saved_itself_to_the_same_bits(
    after_first: Driver, in_process: InProcess, spec: JobSpec, caplog: pytest.LogCaptureFixture
) -> None:
    driver = after_first
    stopped_in_distillation(driver, in_process, spec)
    saved = {path: driver.storage.get(path) for path in driver.storage.list("checkpoints/J")}
    (step,) = {int(Path(path).stem) for path in saved}
    in_process.before = lambda label: None
    with caplog.at_level("INFO"):
        again = driver(spec, job_id="rerun")
    assert f"the distillation goes on from step {step} of job J" in caplog.messages
    assert again.outcome == "succeeded"
    assert driver.images("rerun") == driver.images("first")
    assert {path: driver.storage.get(path) for path in driver.storage.list("checkpoints")} == saved


def test_attempt_counts_what_no_attempt_before_it_had(driver: Driver, in_process: InProcess, spec: JobSpec) -> None:
    """Results that it built and checkpoints that are new; not what it found, nor what every attempt does again."""
    at_turn(in_process, "distill", 2, lambda: ask(driver.storage, 1, checkpoint=False))
    assert driver(spec).outcome == "stopped"
    built = len(driver.storage.list("results"))
    assert driver.board.status().kept >= built > 0
    assert driver.storage.list("checkpoints") == []
    at_turn(in_process, "distill", 2, lambda: ask(driver.storage, 2, checkpoint=False))
    assert driver(spec, 2).outcome == "stopped"
    assert driver.board.status().kept == len(driver.storage.list("results")) - built
    at_turn(in_process, "distill", 6, lambda: ask(driver.storage, 3, checkpoint=True))
    assert driver(spec, 3).outcome == "stopped"
    assert driver.board.status().kept > len(driver.storage.list("results")) - built, "a checkpoint counts too"


@pytest.mark.parametrize("gets_further", [True, False])
def test_stage_that_is_lost_again_and_again_is_begun_again_as_long_as_it_gets_further(
    after_first: Driver, in_process: InProcess, changed: Change, gets_further: bool
) -> None:
    driver, losses, turns, reached = after_first, MAX_LOSSES + 2, 0, 0
    for stored in driver.results("distill"):
        driver.storage.delete([result_path(stored.key)])

    def lose(label: str) -> None:
        """After each new checkpoint, or after a few turns where there are none."""
        nonlocal losses, turns, reached
        turns += label == "distill"
        paths = [path for path in driver.storage.list("checkpoints/J") if path.endswith(".json")]
        furthest = max((int(Path(path).stem) for path in paths), default=0)
        if label == "distill" and losses and (furthest > reached if gets_further else turns % 3 == 0):
            losses, reached = losses - 1, furthest
            raise WorkerLostError.of("", None, "a process of the cluster was lost", "")

    in_process.before = lose
    result = driver(changed(checkpoint={"every_steps": 10 if gets_further else 1000, "every_seconds": 3600.0}))
    assert (result.outcome, losses) == (("succeeded", 0) if gets_further else ("failed", 1))
    assert driver.board.status().kept >= 5 * gets_further


def test_stopped_attempt_saves_nothing_where_that_is_not_asked_for(
    driver: Driver, in_process: InProcess, changed: Change
) -> None:
    spec = changed(checkpoint={"every_steps": 1000, "every_seconds": 3600.0})
    at_turn(in_process, "distill", 6, lambda: ask(driver.storage, 1, checkpoint=False))
    assert driver(spec).outcome == "stopped"
    assert driver.storage.list("checkpoints") == []
    assert in_process.held == {}


def test_attempt_that_was_stopped_before_it_began_computes_nothing(
    driver: Driver, in_process: InProcess, spec: JobSpec
) -> None:
    ask(driver.storage, 1, checkpoint=True)
    assert driver(spec).outcome == "stopped"
    assert in_process.started == []


def over_at(in_process: InProcess, monkeypatch: pytest.MonkeyPatch, turn: int) -> datetime:
    """A job's first start such that its wall time is over once the distillation has had so many turns."""
    over = list[bool]()
    at_turn(in_process, "distill", turn, lambda: over.append(True))
    monkeypatch.setattr(Site, "time_is_over", lambda site: site.deadline is not None and bool(over))
    return now()


def test_distillation_ends_when_the_wall_time_is_over(
    driver: Driver, in_process: InProcess, changed: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = changed(limits={"wall_seconds": 1000.0})
    over_at(in_process, monkeypatch, 6)
    result = driver(spec)
    assert result.outcome == "succeeded"
    assert result.shortened is not None
    step = result.shortened.step
    assert 0 < step < 60
    assert (result.shortened.steps, result.shortened.wall_seconds) == (60, 1000.0)
    sentence = f"ended at step {step} of 60, when the job's wall time of 1000 s was over"
    assert any(sentence in warning for warning in result.warnings)
    told = {name: driver.storage.get(f"{set_folder('J')}/{name}") or b"" for name in ("README.md", "evaluation.json")}
    assert sentence in told["README.md"].decode().replace("\n", " ")
    assert json.loads(told["evaluation.json"])["shortened"]["step"] == step
    assert driver.storage.list("checkpoints") == []

    # The whole job finds its teachers and baselines, and nothing of the set that was cut.
    in_process.started.clear()
    whole = driver(changed(), job_id="W")
    assert whole.shortened is None
    assert in_process.started == ["distill", "evaluation 0", "publish"]
    assert len(driver.results("distill")) == 2

    # And the limited one takes the whole one, however late.
    in_process.started.clear()
    late = driver(spec, job_id="L", started_at=now() - timedelta(days=1))
    assert (late.outcome, late.shortened, in_process.started) == ("succeeded", None, [])


def test_retry_of_a_distillation_that_was_cut_takes_the_same_set(
    driver: Driver, in_process: InProcess, changed: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = changed(limits={"wall_seconds": 1000.0})
    started_at, in_time = over_at(in_process, monkeypatch, 6), in_process.before

    def lose_in_evaluation(label: str) -> None:
        if label == "evaluation 0":
            raise KeyboardInterrupt
        in_time(label)

    in_process.before = lose_in_evaluation
    with pytest.raises(KeyboardInterrupt):
        driver(spec, started_at=started_at)
    (made,) = driver.results("distill")
    in_process.held.clear()
    in_process.before = lambda label: None
    retried = driver(spec, 2, started_at=started_at - timedelta(days=1))
    assert retried.outcome == "succeeded"
    assert retried.shortened is not None and retried.shortened.step == made.figures["steps"]
    assert driver.results("distill") == [made]


def test_time_that_is_over_before_the_first_step_is_the_users(
    driver: Driver, in_process: InProcess, changed: Change
) -> None:
    result = driver(changed(limits={"wall_seconds": 10.0}), started_at=now() - timedelta(seconds=11))
    assert (result.outcome, result.retryable) == ("failed", False)
    assert result.error is not None and result.error.code == "limit_reached"
    (problem,) = result.error.problems
    assert (problem["field"], problem["value"]) == ("limits.wall_seconds", "10.0")
    assert "it took: waiting and starting 11 s" in problem["message"]
    assert problem["hint"] == "Allow more: waiting and starting took most."


@pytest.mark.parametrize("left", ["all", "the mark", "of another memory limit"])
def test_job_whose_time_is_over_goes_on_for_a_checkpoint_of_another_job_alone_that_it_can_take(
    after_first: Driver, in_process: InProcess, spec: JobSpec, changed: Change, left: str
) -> None:
    driver = after_first
    stopped_in_distillation(driver, in_process, spec)
    assert driver.storage.list("resumable") != []
    if left == "the mark":
        driver.storage.delete(driver.storage.list("checkpoints"))
    driver.storage.delete([result_path(result.key) for result in driver.results("teachers")])
    limit = 64 if left == "of another memory limit" else None
    late = changed(limits={"wall_seconds": 10.0}, resources={"cpus": 1, "memory_limit": limit})
    in_process.before = lambda label: None
    result = driver(late, job_id="rerun", started_at=now() - timedelta(seconds=11))
    if left == "all":
        assert result.outcome == "succeeded" and result.shortened is not None
        return
    assert result.error is not None and result.error.code == "limit_reached"
    assert driver.results("teachers") == [], "none is trained for nothing"


def test_time_that_a_running_stage_used_up_is_said_to_be_its(
    driver: Driver, in_process: InProcess, changed: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.driver import attempt

    over = list[bool]()

    def pass_the_time() -> None:
        time.sleep(2.0)
        over.append(True)

    at_turn(in_process, "teacher 0", 3, pass_the_time)
    monkeypatch.setattr(attempt.Attempt, "_is_late", lambda self: bool(over))
    result = driver(changed(limits={"wall_seconds": 10.0}))
    assert result.error is not None
    (problem,) = result.error.problems
    assert re.search(r"it took: .*teachers [2-9] s", problem["message"]), problem
    assert problem["hint"] == "Allow more, or ask for fewer teachers or epochs of them."


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_result_is_built_again_by_the_job_that_meets_it(
    after_first: Driver, in_process: InProcess, changed: Change, damage: str
) -> None:
    driver = after_first
    teacher = driver.results("teachers")[0]
    path = next(file.path for file in teacher.files if file.name == "weights.safetensors")
    data = driver.storage.get(path)
    assert data is not None
    driver.storage.delete([path])
    if damage != "gone":
        driver.storage.put(path, data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    result = driver(changed(seed=1))
    assert result.outcome == "succeeded"
    assert any("is built again: a committed file is" in warning and path in warning for warning in result.warnings)
    assert sum(label.startswith("teacher") for label in in_process.started) == 1
    assert driver.storage.find_result(teacher.key, read=True) is not None
    assert driver.storage.list("damaged") == [damaged_path(teacher.key, 1)]


def test_damaged_set_is_built_again_when_it_is_published(
    after_first: Driver, in_process: InProcess, spec: JobSpec
) -> None:
    driver = after_first
    (published,) = driver.results("publish")
    file = next(each for each in published.files if each.name == "distilled/README.md")
    driver.storage.put(file.path, b"x" * file.size)
    result = driver(spec)
    assert result.outcome == "succeeded"
    assert in_process.started == ["publish"]
    assert any(file.path in warning for warning in result.warnings)


def test_wait_for_another_jobs_build_is_shown_and_ends_with_the_builder(
    after_first: Driver, in_process: InProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder dies: its reservation goes with it, and who waited builds."""
    driver = after_first
    (made,) = driver.results("distill")
    driver.storage.delete([result_path(made.key)])
    in_process.held[made.key] = "other-job-2"
    seen: list[str] = []

    def die_after_a_while(asked: str) -> str | None:
        seen.append(driver.board.status().message)
        if len(seen) == 3:
            del in_process.held[asked]
        return in_process.held.get(asked, "other-job-2")

    monkeypatch.setattr("worker.driver.pool.builder_of", die_after_a_while)
    result = driver(spec)
    assert result.outcome == "succeeded"
    assert "waits for distill, which job other-job builds" in seen[-1]
    assert "waits" not in driver.board.status().message
    assert in_process.held == {}


class Full:
    """A storage root that is full from a moment on, for objects of some kinds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *folders: str) -> None:
        self.is_full, self.refused = False, 0
        self._folders, put, create = folders, Storage.put, Storage.create
        monkeypatch.setattr(Storage, "put", lambda root, path, data: put(root, self._admit(path), data))
        monkeypatch.setattr(Storage, "create", lambda root, path, data: create(root, self._admit(path), data))

    def _admit(self, path: str) -> str:
        if self.is_full and path.startswith(self._folders):
            self.refused += 1
            raise StorageFullError.of("storage", path, "cannot be written: the storage is full", "")
        return path


def test_checkpoint_without_room_is_left_out(
    driver: Driver, in_process: InProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(monkeypatch, "checkpoints")
    full.is_full = True
    result = driver(spec)
    assert result.outcome == "succeeded"
    assert full.refused >= 2
    assert any("storage is full: the checkpoint at step" in warning for warning in result.warnings)


def test_job_waits_for_room_and_says_so(
    driver: Driver, in_process: InProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ROOM_POLL_S", 0.01)
    full, seen = Full(monkeypatch, "objects", "results", "jobs"), list[str]()

    def before(label: str) -> None:
        seen.append(driver.board.status().message)
        full.is_full = label == "distill" and full.refused < 50

    in_process.before = before
    result = driver(spec)
    assert result.outcome == "succeeded"
    assert any(message.startswith("storage is full: the result of distill waits for room") for message in seen)
    assert "full" not in driver.board.status().message
    status = driver.storage.get_record(attempt_path("J", 1, "status.json"), AttemptStatus)
    assert status is not None and status.stages["publish"] == "done"


def test_job_that_finds_no_room_can_be_tried_again(
    driver: Driver, in_process: InProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ROOM_POLL_S", 0.01)
    monkeypatch.setattr(patience, "ROOM_LIMIT_S", 0.2)
    full = Full(monkeypatch, "objects")
    at_turn(in_process, "distill", 2, lambda: setattr(full, "is_full", True))
    result = driver(spec)
    assert (result.outcome, result.retryable) == ("failed", True)
    assert result.error is not None and result.error.code == "storage_full"
    full.is_full, in_process.before = False, lambda label: None
    assert driver(spec, 2).outcome == "succeeded"


def test_job_that_waits_for_room_can_be_stopped(
    driver: Driver, in_process: InProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ROOM_POLL_S", 0.01)
    full = Full(monkeypatch, "objects")

    def before(label: str) -> None:
        full.is_full = label == "distill"
        if full.refused == 20:
            ask(driver.storage, 1, checkpoint=True)

    in_process.before = before
    assert driver(spec).outcome == "stopped"
    assert full.refused < 100
