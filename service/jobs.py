"""A job: what was asked, where it stands, and which moves are legal. Pure: no clock, no database, no network.

`MOVES` is the one table of legal moves; the store refuses all others, the tests walk it, and the API's description prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field, JsonValue
from ulid import ULID

from ncfm_core.errors import NcfmError
from ncfm_core.spec import digest
from service.reports import Progress, Result, Value
from worker.records import ErrorRecord, FileRecord


class State(StrEnum):
    """Where a job stands. The set is closed; a reason says why."""

    QUEUED = "queued"
    """Accepted, not yet on the cluster."""
    STARTING = "starting"
    """An attempt is being handed to Ray, or waits there for its driver."""
    RUNNING = "running"
    """The attempt has reported itself."""
    RECOVERING = "recovering"
    """The attempt was lost; a new one will go on from its results and checkpoints."""
    CANCELLING = "cancelling"
    """The user wants its end; it is cancelled once its driver is known to be gone."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not MOVES[self]


MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.STARTING, State.CANCELLED}),
    State.STARTING: frozenset({State.RUNNING, State.RECOVERING, State.CANCELLING, State.FAILED}),
    State.RUNNING: frozenset({State.RECOVERING, State.CANCELLING, State.SUCCEEDED, State.FAILED}),
    State.RECOVERING: frozenset({State.STARTING, State.CANCELLING, State.FAILED}),
    State.CANCELLING: frozenset({State.CANCELLED, State.SUCCEEDED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""From each state, the states that a job may move to; none from a terminal one."""

FORMER_MOVES: frozenset[tuple[State, State]] = frozenset({(State.RECOVERING, State.CANCELLED)})
"""Moves that are not made any more, but stand in the histories of older jobs."""

ACTIVE = tuple(state for state in State if state is not State.QUEUED and not state.is_terminal)
"""States of a job that holds its share of the cluster."""


class Reason(StrEnum):
    """Why a job waits or ended. The set may grow: a reader takes an unknown one as text."""

    WAITING_FOR_CLUSTER = "waiting_for_cluster"
    """In the queue; the controller has not placed it yet."""
    OWNER_LIMIT = "owner_limit"
    """As many jobs of this owner run as may."""
    CLUSTER_FULL = "cluster_full"
    """Others hold what it needs, or as many jobs run as may."""
    EXCEEDS_CLUSTER = "exceeds_cluster"
    """It demands more than the cluster has in all."""
    CLUSTER_UNREACHABLE = "cluster_unreachable"
    """Ray cannot be asked."""
    USER_ERROR = "user_error"
    """Its spec, its data or its demand is at fault."""
    WORKER_LOST = "worker_lost"
    """The driver ended without a result."""
    CLUSTER_LOST = "cluster_lost"
    """Ray has forgotten the attempt, as after a restart of its head."""
    ATTEMPT_FAILED = "attempt_failed"
    """The attempt failed for a cause that may pass, such as storage that was away."""
    STORAGE_FULL = "storage_full"
    """There is no room in the storage root; it goes on once there is."""
    STORAGE_UNAVAILABLE = "storage_unavailable"
    """The storage root cannot be read or written."""
    INTERNAL = "internal"
    """Our own fault."""
    REQUESTED = "requested"
    """The user asked for it."""


EventType = Literal["created", "state", "waiting", "stage", "changed", "published"]

ID_MARGIN_S = 60.0
"""Most that the time in a job's id and that of its creation beside it may differ: two looks at one clock."""
PRIORITY = 50
"""The usual one, of 0 to 100."""
AGEING_S = 60.0
"""A point of priority is worth this long a wait: all jobs age alike, so their order never changes by itself."""


class IllegalMove(NcfmError):
    """A job may not go where it was asked to go."""

    code = "illegal_move"


class Demand(Value):
    """What a job takes of the cluster while it runs."""

    cpus: int
    gpus: float | Literal["auto"]
    """`auto`: one where the cluster has any."""


class CancelRequest(Value):
    """How a job shall end."""

    mode: Literal["graceful", "force"] = "graceful"
    """`graceful` lets the driver end at its next step; `force` has Ray stop it at once."""
    checkpoint: bool = False
    """Whether a checkpoint is taken before, and kept for a while: a rerun of the job goes on from it."""
    grace_seconds: float = 30.0
    """How long a graceful end may take before Ray stops the driver."""
    requested_at: datetime


class AttemptRecord(Value):
    """One attempt, as the database holds it."""

    number: int
    fence: int
    """Token of the controller that started it."""
    started_at: datetime
    ended_at: datetime | None
    outcome: str | None
    """`succeeded`, `failed`, `lost` or `cancelled`; null while it is the current one."""
    reason: str | None
    message: str


class Job(Value):
    """A job as the database holds it. `spec` stays a plain document, so that no later release can fail to read it."""

    id: str
    version: int = 0
    """Counts moves and notes: whoever holds an older one may not change the job."""
    event_seq: int = 0
    """Sequence number of the last event."""
    state: State = State.QUEUED
    reason: Reason | None = Reason.WAITING_FOR_CLUSTER
    message: str = ""
    requested: dict[str, JsonValue]
    spec: dict[str, JsonValue]
    warnings: tuple[str, ...] = ()
    attempt: int = 0
    """Number of the current or last attempt; 0 before the first."""
    losses: int = 0
    """Attempts lost in a row with their driver or their cluster; one that had made progress is the first of a new row."""
    failures: int = 0
    """Attempts that ended with an error which may pass."""
    retry_at: datetime | None = None
    progress: Progress | None = None
    stages: dict[str, str] = Field(default_factory=dict)
    result: Result | None = None
    error: ErrorRecord | None = None
    artifacts: tuple[FileRecord, ...] = ()
    mlflow_run_id: str | None = None
    mlflow_url: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    owner: str = "local"
    """Id of the API key that it was posted with; `local` where none is needed."""
    priority: int = PRIORITY
    """0 to 100: higher ones go first, as if they had been posted earlier (AGEING_S a point)."""
    labels: dict[str, str] = Field(default_factory=dict)
    parent_id: str | None = None
    """The job that this one is a rerun of."""
    cancel: CancelRequest | None = None
    publication: Literal["none", "pending", "done", "error"] = "none"
    """Where its MLflow run stands: `pending` until the run holds all that the job found and how it ended."""
    publish_tries: int = 0
    publish_at: datetime | None = None
    """Not before."""
    deleted_at: datetime | None = None

    @property
    def rank(self) -> float:
        """Place in the queue, lower first: the time of its posting, earlier by its priority."""
        return self.created_at.timestamp() - AGEING_S * self.priority

    @property
    def dataset(self) -> str:
        return _name(self.spec.get("dataset"))

    @property
    def method(self) -> str:
        return _name(self.spec.get("method"))

    @property
    def spec_digest(self) -> str:
        """sha256 of the resolved spec."""
        return digest(self.spec)

    @property
    def demand(self) -> Demand:
        return Demand.model_validate(self.spec["resources"])


class Event(Value):
    """One thing that happened to a job."""

    seq: int
    """1, 2, 3, ... within the job, without gaps."""
    at: datetime
    type: EventType
    data: dict[str, JsonValue]
    actor: str = "controller"
    """Who did it: `controller`, `local`, or `key:<id>`."""
    request_id: str = ""
    """Of the request that did it."""


def _name(part: JsonValue) -> str:
    return str(part.get("name", "")) if isinstance(part, dict) else ""


def new_job_id() -> str:
    """A ULID in lower case: sorts by the time it was made, and is fit for paths and for Ray's submission ids."""
    return str(ULID()).lower()


def first_id_at(at: datetime, later_s: float = 0.0) -> str:
    """The bound between ids made before a time, or some seconds later, and those made then or after.

    With it a list by time reads a short range of the key instead of all jobs.
    """
    milliseconds = int(1000 * (at.timestamp() + later_s))
    return str(ULID.from_int(min(max(milliseconds, 0), 2**48 - 1) << 80)).lower()


def earliest_id(at: datetime) -> str:
    """No job that was created at that time or later has a smaller id."""
    return first_id_at(at, -ID_MARGIN_S)


def latest_id(at: datetime) -> str:
    """Every job that was created before that time has a smaller id."""
    return first_id_at(at, ID_MARGIN_S)


def check_move(job: Job, to: State) -> None:
    """Refuse what the table does not have.

    Raises:
        IllegalMove: the job may not go from its state to `to`.
    """
    if to not in MOVES[job.state]:
        raise IllegalMove.of("state", str(job.state), f"a {job.state} job cannot become {to}", legal_moves(job.state))


def cancel_move(job: Job) -> State | None:
    """The state that a request to cancel leads to, or None where it is cancelled or being cancelled already.

    A job that was never handed to Ray is cancelled at once. However an attempt was lost, its driver or a stage of it may live on:
    that is looked into before the job is cancelled.

    Raises:
        IllegalMove: the job has ended in another way.
    """
    if job.state in (State.CANCELLING, State.CANCELLED):
        return None
    if job.state is State.QUEUED:
        return State.CANCELLED
    if State.CANCELLING not in MOVES[job.state]:
        raise IllegalMove.of("state", str(job.state), f"a {job.state} job cannot be cancelled", legal_moves(job.state))
    return State.CANCELLING


def legal_moves(state: State) -> str:
    """A sentence on where a job in this state may go."""
    if state.is_terminal:
        return f"{state} is final: submit a new job instead."
    return f"From {state} a job may become: {', '.join(to for to in State if to in MOVES[state])}."


def moves_table() -> str:
    """The table of legal moves in Markdown."""
    rows = [f"| {state} | {', '.join(to for to in State if to in MOVES[state]) or 'final'} |" for state in State]
    return "\n".join(["| from | to |", "|---|---|", *rows])
