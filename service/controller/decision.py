"""What a decision is made from, and what it can be. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from pydantic import JsonValue

from service.cluster import SUBMIT_TIMEOUT_S, Capacity, RayJob
from service.jobs import CancelRequest, Job, Reason, State
from worker.records import AttemptResult, AttemptStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits that decisions keep."""

    max_running_jobs: int
    max_infra_retries: int
    max_error_retries: int = 3
    max_running_per_owner: int | None = None
    heartbeat_s: float = 3.0
    """A driver that lives gives a sign at least this often (it means to every 2 s)."""
    silence_s: float = 10.0
    """Without a sign for this long, a driver that Ray does not know is taken for gone."""
    submitted_s: float = SUBMIT_TIMEOUT_S + 10.0
    """A submission whose answer was lost is known to Ray within this time, or has not reached it."""
    first_backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    storage_pause_s: float = 30.0
    """Between two attempts while the storage root is full."""
    room_pause_s: float = 30.0
    """Before the attempt that follows one whose driver found no node to hold it."""
    cleanup_limit_s: float = 300.0
    """A cancelled job whose end cannot be verified is given up on this long after its driver should have gone."""
    min_cleanup_s: float = 60.0
    """It is not given up on before its end was sought this long without a break, however long nobody could seek it."""
    max_publishers: int = 2
    publisher_limit_s: float = 900.0
    """A publisher that takes longer is stopped, and tried again later."""
    first_publish_backoff_s: float = 5.0
    max_publish_backoff_s: float = 300.0

    def backoff(self, tries: int) -> timedelta:
        """Pause before the attempt that follows so many that ended alike: each twice the one before."""
        return _doubled(self.first_backoff_s, tries, self.max_backoff_s)

    def publish_backoff(self, tries: int) -> timedelta:
        """Pause before the publisher that follows so many in vain."""
        return _doubled(self.first_publish_backoff_s, tries, self.max_publish_backoff_s)


def _doubled(first_s: float, tries: int, most_s: float) -> timedelta:
    return timedelta(seconds=min(most_s, first_s * 2.0 ** min(tries - 1, 30)))


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
    trouble: str = ""
    """Why storage could not be read."""
    has_stop_request: bool = False
    """Whether the driver has been asked to end of itself."""
    unknown_s: float = 0.0
    """Since Ray was first found not to know a driver that is being cancelled, by our own clock."""
    sought_s: float = 0.0
    """Since when its end could be sought without a break, where it is being cancelled: Ray and its documents were there."""
    has_checkpoints: bool | None = None
    """Whether there are checkpoints to go on from, where it is being cancelled with the wish for one."""
    remains: tuple[str, ...] | None = None
    """Processes of it that still live by Ray's account; None where that was not asked."""
    gpus: float | None = None
    """What each task of the last attempt that said so takes or took; None where none did, or where nobody needs it now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """An ended job whose MLflow run is to be completed."""

    job: Job
    ray: RayJob | None
    """Ray's word on the current publisher; None where there is none yet."""
    running_s: float = 0.0
    """Since it was first seen to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a round looks at."""

    now: datetime
    capacity: Capacity | None
    """Totals of the cluster; None where Ray cannot be asked: then no attempt's `ray` means anything."""
    attempts: tuple[Attempt, ...]
    queued: tuple[Job, ...]
    """In the order in which they may start."""
    awaits_gpus: bool = False
    """Whether the cluster has no GPU, but had some until a few minutes ago."""
    publications: tuple[Publication, ...] = ()
    mlflow_error: str = ""
    """Why MLflow could not be reached when it was last asked."""


@dataclass(frozen=True, slots=True)
class Move:
    """Move a job to another state."""

    job: Job
    to: State
    reason: Reason | None = None
    message: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    detail: Mapping[str, JsonValue] = field(default_factory=dict)
    """More for the event's data."""


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
    gpus: float | None = None
    """What `gpus: auto` stands for; None for what the driver finds."""


@dataclass(frozen=True, slots=True)
class RequestStop:
    """Ask the driver of the current attempt to end of itself."""

    job: Job
    request: CancelRequest


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask Ray to end the current attempt."""

    job: Job


@dataclass(frozen=True, slots=True)
class Publish:
    """Start the next publisher of an ended job; starting it twice starts one."""

    job: Job


@dataclass(frozen=True, slots=True)
class StopPublisher:
    """Ask Ray to end the current publisher."""

    job: Job


@dataclass(frozen=True, slots=True)
class Published:
    """A publisher has ended."""

    job: Job
    publication: Literal["done", "pending", "error"]
    publish_at: datetime | None
    """When the next one may start."""
    message: str


Action = Move | Wait | Report | Submit | RequestStop | Stop | Publish | StopPublisher | Published
OnRay = Submit | Stop | Publish | StopPublisher
"""Actions that are carried out by Ray."""
OnStorage = Submit | RequestStop
"""Actions that write to the storage root."""
