"""The status of an attempt."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ncfm_core.errors import StorageFullError
from ncfm_core.progress import Progress
from worker.driver import board as board_module
from worker.driver.board import Board, StatusWriter
from worker.records import AttemptStatus, attempt_path
from worker.storage import Storage


@pytest.fixture
def board() -> Board:
    board = Board("J", 1)
    board.expect(["inspect", "teachers", "teachers", "distill", "evaluate", "evaluate", "publish"])
    board.started("inspect", "data")
    board.finished("inspect", "data", cached=False)
    return board


def test_stage_is_the_first_that_is_not_complete(board: Board) -> None:
    assert board.status().stage == "teachers"
    board.finished("teachers", "teacher 0", cached=True)
    board.finished("teachers", "teacher 1", cached=True)
    assert board.status().stage == "distill"


def test_progress_is_summed_over_parts(board: Board) -> None:
    board.started("teachers", "teacher 0")
    board.progressed("teachers", "teacher 0", Progress(50, 220, "step"))
    status = board.status()
    assert (status.completed, status.total, status.unit) == (50, 440, "step")
    board.finished("teachers", "teacher 0", cached=False)
    status = board.status()
    assert (status.completed, status.total, status.unit) == (220, 440, "step")


def test_stage_of_which_nothing_has_begun_counts_its_parts(board: Board) -> None:
    status = board.status()
    assert (status.stage, status.completed, status.total, status.unit) == ("teachers", 0, 2, "part")


def test_status_tells_of_the_whole_job_once_its_parts_are_weighed(board: Board) -> None:
    assert (board.status().job_percent, board.status().job_eta_seconds) == (None, None)
    board.weigh({("teachers", "teacher 0"): 1.0, ("teachers", "teacher 1"): 1.0, ("distill", "distill"): 2.0})
    board.started("teachers", "teacher 0")
    board.finished("teachers", "teacher 0", cached=False)
    assert board.status().job_percent == 25.0
    board.started("distill", "distill")
    board.progressed("distill", "distill", Progress(50, 100, "step", {"loss": 1.0}))
    assert board.status().job_percent == 50.0
    board.reopened("teachers", "teacher 0")
    assert board.status().job_percent == 50.0, "it never falls"


def test_seconds_count_what_still_runs(board: Board) -> None:
    board.started("teachers", "teacher 0")
    time.sleep(0.1)
    assert board.seconds()["teachers"] >= 0.1


def test_parts_of_several_units_count_in_percent(board: Board) -> None:
    for name in ("teacher 0", "teacher 1"):
        board.finished("teachers", name, cached=True)
    board.finished("distill", "distill", cached=True)
    board.progressed("evaluate", "evaluation 0", Progress(1, 2, "student"))
    board.progressed("evaluate", "full data", Progress(0, 300, "epoch"))
    status = board.status()
    assert (status.stage, status.completed, status.total, status.unit) == ("evaluate", 25, 100, "%")


def test_states_say_what_was_cached(board: Board) -> None:
    board.finished("teachers", "teacher 0", cached=True)
    board.started("teachers", "teacher 1")
    assert board.status().stages["teachers"] == "running"
    board.finished("teachers", "teacher 1", cached=True)
    board.started("distill", "distill")
    board.finished("distill", "distill", cached=False)
    states = board.status().stages
    assert states == {
        "inspect": "done",
        "teachers": "cached",
        "distill": "done",
        "evaluate": "pending",
        "publish": "pending",
    }


def test_seconds_count_overlapping_parts_once(board: Board) -> None:
    board.started("evaluate", "evaluation 0")
    board.started("evaluate", "full data")
    began = time.monotonic()
    time.sleep(0.2)
    board.finished("evaluate", "evaluation 0", cached=False)
    board.finished("evaluate", "full data", cached=False)
    assert 0.15 < board.seconds()["evaluate"] < time.monotonic() - began + 0.15, "not the sum of both"
    assert board.seconds()["teachers"] == 0.0


def test_status_is_written_at_once_and_at_the_end(board: Board) -> None:
    storage, flushed = Storage("memory://"), []
    with StatusWriter(board, storage, lambda: flushed.append(True)):
        first = storage.get_record(attempt_path("J", 1, "status.json"), AttemptStatus)
        board.message = "last words"
    last = storage.get_record(attempt_path("J", 1, "status.json"), AttemptStatus)
    assert first is not None
    assert last is not None
    assert last.message == "last words"
    assert flushed


def test_heartbeat_goes_on_while_nothing_moves(board: Board) -> None:
    storage = Storage("memory://")
    path = attempt_path("J", 1, "status.json")
    with StatusWriter(board, storage, lambda: None):
        first = storage.get_record(path, AttemptStatus)
        time.sleep(3.3)
        later = storage.get_record(path, AttemptStatus)
    assert first is not None
    assert later is not None
    assert (later.heartbeat_at - first.heartbeat_at).total_seconds() >= 1.5


def test_notes_stand_before_the_message_until_they_are_taken_away(board: Board) -> None:
    board.message = "distill runs"
    board.note("storage", "storage is full: the checkpoint at step 20 is left out")
    board.note("wait/teacher 3", "waits for teacher 3, which job X builds")
    board.note("storage", "storage is full: the checkpoint at step 40 is left out")
    assert board.status().message == (
        "waits for teacher 3, which job X builds; storage is full: the checkpoint at step 40 is left out; distill runs"
    )
    board.note("storage", "")
    board.note("wait/teacher 3", "")
    assert board.status().message == "distill runs"


def test_status_counts_what_is_new_in_store(board: Board) -> None:
    assert board.status().kept == 0, "an inspection is made again by every attempt"
    board.kept()
    board.kept()
    assert board.status().kept == 2


def test_part_that_is_made_again_opens_its_stage(board: Board) -> None:
    board.finished("teachers", "teacher 0", cached=True)
    board.finished("teachers", "teacher 1", cached=True)
    board.reopened("teachers", "teacher 0")
    assert board.status().stages["teachers"] == "pending"
    board.started("teachers", "teacher 0")
    board.finished("teachers", "teacher 0", cached=False)
    assert board.status().stages["teachers"] == "done"


def test_full_storage_has_room_to_say_so(
    board: Board, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "EVERY_S", 0.02)
    disk = small_disk("512k")
    storage = Storage(str(disk))
    with StatusWriter(board, storage, lambda: None):
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(512))
        with pytest.raises(StorageFullError):
            storage.put("large", bytes(8192))
        for number in range(5):
            board.message = str(number)
            deadline = time.monotonic() + 10
            while _said(storage) != str(number):
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert storage.list("jobs") == [attempt_path("J", 1, "status.json")]


def _said(storage: Storage) -> str:
    status = storage.get_record(attempt_path("J", 1, "status.json"), AttemptStatus)
    return "" if status is None else status.message


def test_status_that_cannot_be_written_is_told_once_and_ends_nothing(
    board: Board, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(board_module, "EVERY_S", 0.02)
    storage, refused = Storage("memory://"), list[str]()

    def refuse(path: str, record: object) -> None:
        refused.append(path)
        raise StorageFullError.of("storage", path, "full", "")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "put_record", refuse)
        with StatusWriter(board, storage, lambda: None):
            deadline = time.monotonic() + 10
            while len(refused) < 5:
                assert time.monotonic() < deadline
                board.message = str(len(refused))
                time.sleep(0.01)
            board.message = "4"
            patched.undo()
    assert len(refused) > 2
    assert len(caplog.records) == 1
    last = storage.get_record(attempt_path("J", 1, "status.json"), AttemptStatus)
    assert last is not None and last.message == "4"
