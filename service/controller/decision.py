"""What a decision is made from, and what it can be. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import JsonValue

from service.cluster import Capacity, RayJob
from service.jobs import Job, Reason, State
from worker.records import AttemptResult, AttemptStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits that decisions keep."""

    max_running_jobs: int
    max_infra_retries: int
    heartbeat_s: float = 3.0
    """A driver that lives gives a sign at least this often (it means to every 2 s)."""
    silence_s: float = 10.0
    """Without a sign for this long, a driver that Ray does not know is taken for gone."""
    first_backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    def backoff(self, losses: int) -> timedelta:
        """Pause before the attempt that follows the given number of losses: each twice the one before."""
        return timedelta(seconds=min(self.max_backoff_s, self.first_backoff_s * 2.0 ** min(losses - 1, 30)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What is known of an active job's current attempt."""

    job: Job
    ray: RayJob | None
    """Ray's word, asked before the documents were read; None where Ray knows none of it."""
    status: AttemptStatus | None
    result: AttemptResult | None
    silent_s: float
    """Since the driver's heartbeat last changed, by our own clock; infinite where there was none."""
    is_readable: bool = True
    """False where storage could not be read: then nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a round looks at."""

    now: datetime
    capacity: Capacity | None
    """Totals of the cluster; None where Ray cannot be asked: then no attempt's `ray` means anything."""
    attempts: tuple[Attempt, ...]
    queued: tuple[Job, ...]
    """Oldest first."""


@dataclass(frozen=True, slots=True)
class Move:
    """Move a job to another state."""

    job: Job
    to: State
    reason: Reason | None = None
    message: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wait:
    """Say why a job waits."""

    job: Job
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """Pass on what the driver says of itself."""

    job: Job
    changes: Mapping[str, Any]
    event: Mapping[str, JsonValue] | None
    """Set where a stage has begun or ended."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Hand the current attempt to Ray; handing it over twice starts one."""

    job: Job


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask Ray to end the current attempt."""

    job: Job


Action = Move | Wait | Report | Submit | Stop
