"""The driver's log: put beside the attempt's other documents, part by part; the part that grows is kept in memory."""

from __future__ import annotations

import logging
import threading

from ncfm_core.errors import StorageError
from worker import logs
from worker.records import attempt_path
from worker.storage import Storage

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MAX_BYTES = 2_000_000
"""Beyond this, while storage takes nothing, the oldest lines that nobody can have read are dropped."""

worker_log = logging.getLogger("worker")


class DriverLog(logging.Handler):
    """Collects the records of the package `worker` while it is open."""

    def __init__(self, storage: Storage, job_id: str, attempt: int) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self._storage, self._path = storage, attempt_path(job_id, attempt, "driver.log")
        self._part = 0
        self._lines: list[bytes] = []
        """Of the part that grows, and what has come since it was written."""
        self._num_sent = 0
        """Lines of these that a reader may have seen: their places must stay."""
        self._bytes = 0
        self._new = False
        self._writing, self._keeping = threading.Lock(), threading.Lock()

    def __enter__(self) -> DriverLog:
        worker_log.setLevel(logging.INFO)
        worker_log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        worker_log.removeHandler(self)
        self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode(errors="replace")
        with self._keeping:
            self._lines.append(line)
            self._bytes += len(line)
            while self._bytes > MAX_BYTES and len(self._lines) > self._num_sent + 1:
                self._bytes -= len(self._lines.pop(self._num_sent))
            self._new = True

    def flush(self) -> None:
        """Write the part that grows if there is something new; a storage that is away is tried again at the next flush."""
        with self._writing:
            while self._new:
                data = self._due()
                try:
                    self._storage.put(logs.part_path(self._path, self._part), data)
                except StorageError:
                    self._new = True
                    return
                self._written(len(data))

    def _due(self) -> bytes:
        """The part with as many of the new lines as it holds; from here on they may have been read."""
        with self._keeping:
            size = num_sent = 0
            while num_sent < len(self._lines) and size < logs.PART_BYTES:
                size += len(self._lines[num_sent])
                num_sent += 1
            self._num_sent, self._new = num_sent, False
            return b"".join(self._lines[:num_sent])

    def _written(self, size: int) -> None:
        """Begin the next part where this one is full."""
        if size < logs.PART_BYTES:
            return
        with self._keeping:
            del self._lines[: self._num_sent]
            self._bytes -= size
            self._part, self._num_sent, self._new = self._part + 1, 0, bool(self._lines)
