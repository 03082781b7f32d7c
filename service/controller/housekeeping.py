"""What the active controller removes once an hour, on a thread of its own: jobs never wait for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ncfm_core.errors import NcfmError
from service.leases import FencedError
from service.retention import Limits, tidy
from service.store import Store
from worker.records import now
from worker.storage import Storage

logger = logging.getLogger("ncfm.controller")

FIRST_AFTER_S = 60.0
"""A service that has just started has better things to do."""
EVERY_S = 3600.0


def keep_house(
    store: Store,
    storage: Storage,
    limits: Limits,
    *,
    is_active: Callable[[], bool],
    stop: threading.Event,
    first_after_s: float = FIRST_AFTER_S,
    every_s: float = EVERY_S,
) -> None:
    """Remove what is older than its limits, again and again, until `stop` is set.

    Args:
        store: fenced, so that a controller that has lost its lease removes nothing.
        storage: the storage root.
        limits: how long what is kept.
        is_active: whether this controller is the active one.
        stop: ends it.
        first_after_s: seconds before the first time.
        every_s: seconds between two times.
    """
    pause_s = first_after_s
    while not stop.wait(pause_s):
        pause_s = every_s
        if not is_active():
            continue
        try:
            removed = tidy(store, storage, now(), limits)
        except FencedError:
            continue
        except NcfmError as error:
            logger.warning("not all that is old could be removed: %s", error, extra={"action": "tidy"})
            continue
        if removed.counts:
            said = ", ".join(f"{count} {kind}" for kind, count in removed.counts.items())
            logger.info("removed %s", said, extra={"action": "tidy"})
