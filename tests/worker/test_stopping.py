"""How a request to stop is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ncfm_core.errors import StoppedError, StorageError
from worker import stopping
from worker.records import StopRequest, attempt_path, now
from worker.stopping import StopWatch
from worker.storage import Storage

REQUEST = StopRequest(checkpoint=True, requested_at=now())


def eventually(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_request_is_noticed_while_open() -> None:
    storage = Storage("memory://")
    with StopWatch(storage, "J", 2) as watch:
        watch.check()
        storage.put_record(attempt_path("J", 1, "stop.json"), REQUEST)
        assert watch.now() is None
        storage.put_record(attempt_path("J", 2, "stop.json"), REQUEST)
        started = time.monotonic()
        eventually(watch.asked)
        assert time.monotonic() - started < 10
        assert watch.asked() == REQUEST
        with pytest.raises(StoppedError):
            watch.check()


def test_request_that_was_there_before_is_known_at_once() -> None:
    storage = Storage("memory://")
    storage.put_record(attempt_path("J", 1, "stop.json"), REQUEST)
    with StopWatch(storage, "J", 1) as watch:
        assert watch.asked() == REQUEST


def test_storage_that_is_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.01)
    storage = Storage("memory://")

    def away(*_: object) -> None:
        raise StorageError.of("storage", "", "away", "")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "get", away)
        with StopWatch(storage, "J", 1) as watch:
            time.sleep(0.1)
            assert watch.asked() is None
            patched.undo()
            storage.put_record(attempt_path("J", 1, "stop.json"), REQUEST)
            eventually(watch.asked)
