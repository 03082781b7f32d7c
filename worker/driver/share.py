"""How far a whole job is: the parts of all stages by what they roughly cost."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ncfm_core.progress import Progress
from worker.records import StageName

Part = tuple[StageName, str]
"""A stage, and the name of one of its parts."""
LEAST_S = 1.0
"""Time of computing before which nothing is said of the rest."""


class JobShare:
    """Progress of an attempt as one number. It never falls: what has to be made again only keeps it where it is for a while.

    Stored results weigh nothing once they are found, so that the number tells of the work of this attempt.
    """

    def __init__(self) -> None:
        self.percent: float | None = None
        """None before the parts are known."""
        self.eta_seconds: float | None = None
        """At the rate of what was computed so far, as of the last progress; None before that is known."""
        self._weights: dict[Part, float] = {}
        self._done: dict[Part, float] = {}
        """Share of each part, in [0, 1]."""
        self._began_at: dict[Part, float] = {}
        """Share that a part began with: what its checkpoint had done says nothing of the rate."""
        self._found: set[Part] = set()
        self._since: float | None = None

    def weigh(self, weights: Mapping[Part, float]) -> None:
        """What each part roughly takes, in any unit; in the place of what was said before."""
        self._weights = dict(weights)
        self._tell()

    def started(self, part: Part) -> None:
        if self._since is None and part in self._weights:
            self._since = time.monotonic()

    def progressed(self, part: Part, progress: Progress) -> None:
        if progress.total > 0:
            self._done[part] = min(1.0, progress.completed / progress.total)
            # Without figures it is no step of its own, but where the part goes on from.
            self._began_at.setdefault(part, 0.0 if progress.metrics else self._done[part])
        self._tell()

    def finished(self, part: Part, *, cached: bool) -> None:
        self._done[part] = 1.0
        if cached:
            self._found.add(part)
        self._tell()

    def reopened(self, part: Part) -> None:
        self._done[part] = self._began_at[part] = 0.0
        self._found.discard(part)
        self._tell()

    def _tell(self) -> None:
        ours = {part: weight for part, weight in self._weights.items() if part not in self._found}
        whole = sum(ours.values())
        left = sum(weight * (1.0 - self._done.get(part, 0.0)) for part, weight in ours.items())
        if not self._weights:
            return
        now_percent = round(100 * (1.0 - left / whole), 1) if whole else 100.0
        self.percent = max(self.percent or 0.0, now_percent)
        computed = whole - left - sum(weight * self._began_at.get(part, 0.0) for part, weight in ours.items())
        elapsed = 0.0 if self._since is None else time.monotonic() - self._since
        if left <= 0:
            self.eta_seconds = 0.0
        elif computed > 0 and elapsed >= LEAST_S:
            self.eta_seconds = round(left * elapsed / computed, 1)
