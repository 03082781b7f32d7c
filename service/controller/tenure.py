"""Whether this controller is the active one: its hold on the lease that all controllers of a database share."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable

from ulid import ULID

from service.leases import FencedError, acquire, release
from service.store import Store

logger = logging.getLogger("ncfm.controller")

RENEW_BELOW = 2 / 3
"""Share of the lease's time that is left when the loop renews it: after a third of it."""
ACT_BELOW = 1 / 2
"""The same before a side effect on Ray, which the database cannot take back."""
NO_TOKEN = 0
"""No lease has it: a store that is fenced with it writes nothing."""


def new_holder() -> str:
    """A name that no other process ever has."""
    return f"{socket.gethostname()[:64]}:{os.getpid()}:{ULID()}"


class Tenure:
    """One process's hold on the lease; the store's writes are fenced with it.

    Time left is counted by our own clock from before the lease was asked for, so it is never overrated.
    """

    def __init__(
        self, store: Store, *, seconds: float, holder: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._seconds, self._clock = store, seconds, clock
        self.holder = holder or new_holder()
        self.token = store.fence = NO_TOKEN
        self.other = ""
        """Who holds it instead of us, when it was last asked for."""
        self._ends_at = float("-inf")
        self._seen: tuple[float, float] | None = None
        """When another's lease ends by the database's clock, and since when by ours it has done so."""

    @property
    def standby_s(self) -> float:
        """Between two looks at a lease that another one holds."""
        return min(1.0, self._seconds / 2)

    def keep(self, *, below: float = RENEW_BELOW) -> bool:
        """Take the lease, or renew it where less than a share of its time is left; whether it is ours.

        Raises:
            StoreError: the database cannot be asked.
        """
        if self._ends_at - self._clock() > below * self._seconds:
            return True
        asked_at = self._clock()
        seen = self._seen
        unrenewed = seen[0] if seen is not None and asked_at - seen[1] >= self._seconds else None
        lease = acquire(self._store, self.holder, seconds=self._seconds, unrenewed=unrenewed)
        if lease.holder != self.holder:
            if seen is None or seen[0] != lease.expires_at:
                # By a later look at our clock than when it was asked for: never taken for longer than it is.
                self._seen = lease.expires_at, self._clock()
            self.lose()
            self.other = lease.holder
            return False
        self._seen = None
        if lease.token != self.token:
            logger.info("this controller is the active one (fence %d)", lease.token, extra={"action": "lease"})
        self._ends_at, self.other = asked_at + self._seconds, ""
        self.token = self._store.fence = lease.token
        return True

    def is_held(self) -> bool:
        """Whether the lease is ours as far as we know, without asking."""
        return self._ends_at > self._clock()

    def check(self) -> None:
        """Make sure that the lease holds long enough for a side effect.

        Raises:
            FencedError: another controller has taken over.
        """
        if not self.keep(below=ACT_BELOW):
            raise FencedError.of("lease", self.holder, f"{self.other} has taken over", "This one stands by.")

    def lose(self) -> None:
        """Write nothing more until the lease is ours again."""
        self._ends_at = float("-inf")
        self.token = self._store.fence = NO_TOKEN

    def release(self) -> None:
        """Let another controller take over at once."""
        release(self._store, self.holder)
        self.lose()
