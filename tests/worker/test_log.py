"""The log that a driver leaves: whoever follows it by the number of bytes gets every line, however long it grows."""

from __future__ import annotations

import logging

import pytest

from ncfm_core.errors import StorageError
from worker import logs
from worker.driver import log as driver_log
from worker.driver.log import DriverLog
from worker.logs import log_bytes, log_size
from worker.records import attempt_path
from worker.storage import Storage

PATH = attempt_path("J", 1, "driver.log")
logger = logging.getLogger("worker.test")


def read(storage: Storage, start: int = 0) -> list[str]:
    return b"".join(log_bytes(storage, PATH, start=start, end=log_size(storage, PATH))).decode().splitlines()


def test_log_that_grows_beyond_a_part_can_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 1000)
    storage, at, got = Storage("memory://"), 0, list[str]()
    with DriverLog(storage, "J", 1) as kept:
        for n in range(60):
            logger.info("line %03d %s \u00e9", n, "x" * (n % 7))
            if n % 3:
                kept.flush()
            size = log_size(storage, PATH)
            got += b"".join(log_bytes(storage, PATH, start=at, end=size)).decode().splitlines()
            at = size
        assert kept._bytes < 1100, "parts that are full are not held"
    got += read(storage, at)
    assert [line.split()[4] for line in got] == [f"{n:03}" for n in range(60)]
    assert got == read(storage)
    assert f"{PATH}.2" in storage.list("jobs")


def test_log_that_comes_at_once_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 100)
    storage = Storage("memory://")
    with DriverLog(storage, "J", 1):
        for n in range(30):
            logger.info("line %03d", n)
    assert [line.split()[4] for line in read(storage)] == [f"{n:03}" for n in range(30)]
    assert all(storage.size(path) < 200 for path in storage.list("jobs"))  # type: ignore[operator]


def test_log_while_storage_is_away_keeps_what_was_read_and_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_log, "MAX_BYTES", 1000)
    storage = Storage("memory://")

    def away(path: str, data: bytes) -> None:
        raise StorageError.of("storage", path, "cannot be written", "")

    with DriverLog(storage, "J", 1) as kept:
        logger.info("the first")
        kept.flush()
        before = read(storage)
        with monkeypatch.context() as patched:
            patched.setattr(storage, "put", away)
            for n in range(100):
                logger.info("line %03d", n)
                if n == 5:
                    kept.flush()
        assert kept._bytes <= 1000
    assert read(storage)[:1] == before
    assert read(storage)[-1].endswith("line 099")
