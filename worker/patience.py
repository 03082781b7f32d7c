"""Writing to a storage root that may be full: wait for room for a while, and say so. Light."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

from ncfm_core.errors import StorageFullError
from worker.history import Trouble

T = TypeVar("T")

ROOM_LIMIT_S = 600.0
"""How long a result waits for room."""
ROOM_POLL_S = 2.0
"""Between two tries."""
TOPIC = "storage"


def when_there_is_room(write: Callable[[], T], what: str) -> Generator[Trouble, None, T]:
    """Write; where the storage is full, again and again until there is room.

    Args:
        write: may be called several times.
        what: is written, for a person.

    Yields:
        That it waits, before every further try, and once that it no longer does.

    Raises:
        StorageFullError: there was no room for `ROOM_LIMIT_S`.
        StorageError: it cannot be written for another reason.
    """
    end, waited = time.monotonic() + ROOM_LIMIT_S, False
    while True:
        try:
            value = write()
        except StorageFullError:
            if time.monotonic() >= end:
                raise
            waited = True
            yield Trouble(TOPIC, f"storage is full: {what} waits for room")
            time.sleep(ROOM_POLL_S)
        else:
            if waited:
                yield Trouble(TOPIC, "")
            return value
