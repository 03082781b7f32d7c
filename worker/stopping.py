"""Whether an attempt was asked to stop: `stop.json`, looked for on a thread of its own so that no step waits for it. Light."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ncfm_core.errors import StoppedError, StorageError
from worker.history import Stage, Trouble
from worker.records import StageResult, StopRequest, attempt_path
from worker.storage import Storage

LOOK_EVERY_S = 1.0
JOIN_S = 1.0


def nobody() -> StopRequest | None:
    """The answer where nobody can ask for a stop."""
    return None


def stopped() -> StoppedError:
    """What ends a stage, and then the attempt."""
    return StoppedError.of("", None, "stopped as asked", "")


def in_trouble_no_longer(stage: Stage, asked: Callable[[], StopRequest | None]) -> Stage:
    """The stage, ended while it waits in some trouble once there is a request: it may be for long, and nothing is lost.

    Raises:
        StoppedError: it was ended.
    """
    while True:
        try:
            event = next(stage)
        except StopIteration as stop:
            result: StageResult = stop.value
            return result
        yield event
        if isinstance(event, Trouble) and event.message and asked():
            stage.close()
            raise stopped()


class StopWatch:
    """Looks for a request while it is open; a storage that cannot be read decides nothing."""

    def __init__(self, storage: Storage, job_id: str, attempt: int) -> None:
        self._storage, self._path = storage, attempt_path(job_id, attempt, "stop.json")
        self._asked: StopRequest | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stop", daemon=True)

    def __enter__(self) -> StopWatch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(JOIN_S)

    def asked(self) -> StopRequest | None:
        """The request, once there is one."""
        return self._asked

    def now(self) -> StopRequest | None:
        """The request, looked for once more."""
        if self._asked is None:
            self._look()
        return self._asked

    def check(self) -> None:
        """
        Raises:
            StoppedError: there is a request.
        """
        if self._asked is not None:
            raise stopped()

    def _run(self) -> None:
        while self._asked is None and not self._closed.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        try:
            self._asked = self._storage.get_record(self._path, StopRequest)
        except StorageError:
            return
