"""The tracker against a server that comes and goes: nothing lost, nothing twice, never waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
from pydantic import JsonValue

from ncfm_core.errors import TrackingError
from ncfm_core.spec import DatasetSpec
from worker.driver import live
from worker.driver.live import Rows, Story, Tracker, TrialRecord
from worker.history import Picture, Row


class MemoryRun:
    """A run in memory on a server that can be taken away."""

    run_id = "run"
    url = "memory://run"

    def __init__(self) -> None:
        self.rows: Rows = []
        self.pictures: list[int] = []
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.data: list[str] = []
        self.trials: list[int] = []
        self.status = "RUNNING"
        self.away, self.stuck = threading.Event(), threading.Event()

    def connect(self) -> MemoryRun:
        self._ask()
        return self

    def _ask(self) -> None:
        while self.stuck.is_set():
            time.sleep(0.05)
        if self.away.is_set():
            raise TrackingError.of("mlflow_url", "memory://", "away", "")

    def log_data(self, dataset: DatasetSpec, digest: str, facts: Mapping[str, JsonValue]) -> None:
        self._ask()
        self.data.append(dataset.name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._ask()
        self.tags |= tags

    def log_rows(self, rows: Rows) -> None:
        self._ask()
        there = {(prefix, row["step"]) for prefix, row in self.rows}
        self.rows += [(prefix, row) for prefix, row in rows if (prefix, row["step"]) not in there]

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        self._ask()
        self.pictures += [each.step for each in pictures if each.step not in self.pictures]

    def log_trials(self, trials: Sequence[TrialRecord]) -> None:
        self._ask()
        self.trials += [each.index for each in trials if each.index not in self.trials]

    def log_files(self, files: Mapping[str, bytes]) -> None:
        self._ask()
        self.files |= files

    def close(self, status: str) -> None:
        self._ask()
        self.status = status


def row(step: int) -> Row:
    return {"step": float(step), "time": 0.0, "loss": 1.0 / step}


STORY = Story(
    rows=[("distill/", row(step)) for step in range(1, 11)],
    pictures=[Picture(0, b"a"), Picture(10, b"b")],
    trials=[TrialRecord(index=0, params={}, rows=[], finished=True)],
    files={"distilled/preview.png": b"png"},
    tags={"ncfm.stage": "publish"},
)


def eventually(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FLUSH_S", 0.05)
    monkeypatch.setattr(live, "MAX_BACKOFF_S", 0.1)


def test_rows_arrive_while_the_job_runs() -> None:
    run, opened = MemoryRun(), []
    tracker = Tracker(run.connect, on_open=lambda run_id, url: opened.append((run_id, url)))
    tracker.describe_data(DatasetSpec(name="digits"), "sha256:0", {})
    tracker.offer_row("distill/", row(1))
    tracker.offer_picture(Picture(0, b"a"))
    tracker.offer_tags({"ncfm.stage": "distill"})
    eventually(lambda: bool(run.rows and run.pictures and run.data))
    tracker.close("FINISHED")
    assert opened == [("run", "memory://run")]
    assert run.tags == {"ncfm.stage": "distill"}
    assert run.status == "FINISHED"


def test_completion_fills_in_what_is_missing_without_repeating() -> None:
    run = MemoryRun()
    tracker = Tracker(run.connect)
    tracker.offer_row("distill/", row(3))
    eventually(lambda: bool(run.rows))
    tracker.complete(STORY)
    assert sorted(each["step"] for _, each in run.rows) == list(range(1, 11))
    assert run.pictures == [0, 10]
    assert run.files == STORY.files
    assert run.trials == [0]


def test_outage_in_the_middle_costs_nothing() -> None:
    run = MemoryRun()
    tracker = Tracker(run.connect)
    tracker.offer_row("distill/", row(1))
    eventually(lambda: bool(run.rows))
    run.away.set()
    started = time.monotonic()
    for step in range(2, 11):
        tracker.offer_row("distill/", row(step))
    assert time.monotonic() - started < 3, "a call that waits for the server would take as long as it is away"
    time.sleep(0.3)
    run.away.clear()
    tracker.complete(STORY)
    tracker.close("FINISHED")
    assert sorted(each["step"] for _, each in run.rows) == list(range(1, 11))
    assert run.status == "FINISHED"


def test_what_waited_for_a_server_is_sent_when_it_is_back() -> None:
    """Also of a job that never comes to its end."""
    run = MemoryRun()
    run.away.set()
    tracker = Tracker(run.connect)
    for step in range(1, 6):
        tracker.offer_row("distill/", row(step))
        tracker.offer_picture(Picture(step, b"a"))
        time.sleep(0.05)
    tracker.offer_trials(STORY.trials)
    run.away.clear()
    eventually(lambda: len(run.rows) == 5 and len(run.pictures) == 5 and run.trials == [0])
    assert tracker.close("FAILED")
    assert [each["step"] for _, each in run.rows] == [1, 2, 3, 4, 5]


def test_server_that_comes_back_during_completion_is_waited_for() -> None:
    run = MemoryRun()
    run.away.set()
    tracker = Tracker(run.connect, patience_s=30.0)
    threading.Timer(0.5, run.away.clear).start()
    assert tracker.complete(STORY)
    assert run.files == STORY.files


def test_server_that_stays_away_is_left_to_a_later_publication() -> None:
    run = MemoryRun()
    run.away.set()
    tracker = Tracker(run.connect, patience_s=0.5)
    started = time.monotonic()
    assert not tracker.complete(STORY)
    assert not tracker.close("FINISHED")
    assert time.monotonic() - started < 15, "not a call's own time-out"
    assert run.status == "RUNNING"


def test_server_that_never_answers_holds_nobody_up() -> None:
    run = MemoryRun()
    run.stuck.set()
    tracker = Tracker(run.connect)
    started = time.monotonic()
    for step in range(1, 1000):
        tracker.offer_row("distill/", row(step))
    assert not tracker.close("FAILED", wait_s=0.5)
    assert time.monotonic() - started < 15, "the server never answers: whoever waited for it would still wait"
    run.stuck.clear()


def test_slow_upload_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    run = MemoryRun()
    monkeypatch.setattr(run, "log_files", lambda files: time.sleep(1.0) or run.files.update(files))  # type: ignore[func-returns-value]
    tracker = Tracker(run.connect, patience_s=0.2)
    assert tracker.complete(STORY)
    assert tracker.close("FINISHED")
    assert (run.files, run.status) == (STORY.files, "FINISHED")


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_ROWS", 5)
    monkeypatch.setattr(live, "MAX_PICTURES", 2)
    run = MemoryRun()
    run.away.set()
    tracker = Tracker(run.connect)
    for step in range(1, 100):
        tracker.offer_row("distill/", row(step))
        tracker.offer_picture(Picture(step, b"a"))
    time.sleep(0.3)
    run.away.clear()
    eventually(lambda: len(run.rows) == 5 and len(run.pictures) == 2)
    assert [each["step"] for _, each in run.rows] == [95, 96, 97, 98, 99]
    assert run.pictures == [98, 99]
    tracker.close("FAILED")


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_what_was_offered_during_the_last_call_goes_before_the_close(
    status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of an attempt comes right after its last rows, while the thread is busy with those before."""
    run, busy, free = MemoryRun(), threading.Event(), threading.Event()

    def set_tags(tags: Mapping[str, str]) -> None:
        busy.set()
        free.wait(10)

    monkeypatch.setattr(run, "set_tags", set_tags)
    tracker = Tracker(run.connect)
    tracker.offer_tags({"ncfm.stage": "distill"})
    assert busy.wait(10)
    tracker.offer_row("distill/", row(7))
    tracker.offer_picture(Picture(7, b"a"))
    threading.Timer(0.3, free.set).start()
    assert tracker.close(status)
    assert ([each["step"] for _, each in run.rows], run.pictures, run.status) == ([7], [7], status)
