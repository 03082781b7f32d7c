"""The driver's log: kept in memory, bounded, and put beside the attempt's other documents."""

from __future__ import annotations

import logging
import threading

from ncfm_core.errors import StorageError
from worker.records import attempt_path
from worker.storage import Storage

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MAX_CHARS = 1_000_000
"""Older lines are dropped beyond this."""

worker_log = logging.getLogger("worker")


class DriverLog(logging.Handler):
    """Collects the records of the package `worker` while it is open."""

    def __init__(self, storage: Storage, job_id: str, attempt: int) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self._storage, self._path = storage, attempt_path(job_id, attempt, "driver.log")
        self._lines: list[str] = []
        self._chars = 0
        self._new = False
        self._writing = threading.Lock()

    def __enter__(self) -> DriverLog:
        worker_log.setLevel(logging.INFO)
        worker_log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        worker_log.removeHandler(self)
        self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        self._lines.append(line)
        self._chars += len(line)
        while self._chars > MAX_CHARS:
            self._chars -= len(self._lines.pop(0))
        self._new = True

    def flush(self) -> None:
        """Write the whole log if there is something new; a storage that is away is tried again at the next flush."""
        with self._writing:
            if self._new:
                self._new = False
                try:
                    self._storage.put(self._path, "".join(list(self._lines)).encode())
                except StorageError:
                    self._new = True
