"""What the API answers with."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from service.jobs import AttemptRecord, CancelRequest, Event, Job, Reason, State
from service.reports import Progress, Result
from worker.records import ErrorRecord


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Links(Body):
    """Where the rest of a job is: paths of this API, and MLflow's page."""

    self: str
    events: str
    logs: str
    metrics: str
    attempts: str
    artifacts: str
    archive: str
    """All artifacts in one zip."""
    cancel: str
    rerun: str
    parent: str | None
    """The job that this one is a rerun of."""
    mlflow: str | None
    """Page of the run, once there is one."""


class ProgressBody(Body):
    """How far the current stage is, and the whole job."""

    stage: str | None
    """The stage that runs, or null between two."""
    completed: int
    total: int
    unit: str
    """What is counted: `step`, `student`; `part` (its results) before one has begun; `%` where they count differently."""
    percent: float | None
    """Of this stage; null where the total is not known."""
    eta_seconds: float | None
    """Until the end of this stage, at its rate so far; null before that is known."""
    job_percent: float | None
    """Of the whole job, by what its results roughly cost; never falls within an attempt. Null before they are known."""
    job_eta_seconds: float | None
    """Until the end of the whole job, at the rate of this attempt so far; null before that is known."""
    updated_at: datetime | None
    """When the driver last got further."""

    @classmethod
    def of(cls, progress: Progress) -> ProgressBody:
        return cls(**{name: getattr(progress, name) for name in cls.model_fields})


class QueueBody(Body):
    """Where a queued job stands."""

    position: int
    """1 goes next."""
    reason: Reason | None
    """Why it waits."""
    message: str
    """The same in a sentence."""


Verb = Literal["cancel", "priority", "labels", "rerun", "delete"]


class JobBody(Body):
    """A job."""

    id: str
    state: State
    reason: Reason | None
    """Why it waits or ended; null while all goes well."""
    message: str
    """The same in a sentence."""
    spec: dict[str, JsonValue]
    """The resolved spec: every default filled in when it was posted, and never changed since."""
    requested: dict[str, JsonValue]
    """The submission as it was posted, without priority and labels."""
    warnings: tuple[str, ...]
    owner: str
    """Id of the API key that it was posted with; `local` where none is needed."""
    priority: int
    """0 to 100."""
    labels: dict[str, str]
    parent_id: str | None
    """The job that this one is a rerun of."""
    queue: QueueBody | None
    """Null once it has left the queue."""
    attempt: int
    """Number of the current or last attempt; 0 before the first."""
    progress: ProgressBody | None
    """Of the current stage and of the whole job; null before the first report."""
    stages: dict[str, str]
    """Stage to `pending`, `running`, `cached` or `done`."""
    result: Result | None
    """The figures, once it has succeeded."""
    error: ErrorRecord | None
    """Why it failed."""
    cancel: CancelRequest | None
    """How it was asked to end."""
    publication: Literal["none", "pending", "done", "error"]
    """Where its MLflow run stands: `pending` until the run holds all that the job found and how it ended."""
    mlflow_run_id: str | None
    mlflow_url: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    actions: list[Verb]
    """What may be done with it now."""
    links: Links

    @classmethod
    def of(cls, job: Job, *, position: int | None = None) -> JobBody:
        """A job as it is shown.

        Args:
            job: as it was read.
            position: its place in the queue, from 1; None where it waits in none.
        """
        derived = ("links", "queue", "progress", "actions")
        shown = {name: getattr(job, name) for name in cls.model_fields if name not in derived}
        root = f"/jobs/{job.id}"
        links = Links(
            self=root,
            events=f"{root}/events",
            logs=f"{root}/logs",
            metrics=f"{root}/metrics",
            attempts=f"{root}/attempts",
            artifacts=f"{root}/artifacts",
            archive=f"{root}/artifacts.zip",
            cancel=f"{root}/cancel",
            rerun=f"{root}/rerun",
            parent=None if job.parent_id is None else f"/jobs/{job.parent_id}",
            mlflow=job.mlflow_url,
        )
        return cls(
            **shown,
            queue=None if position is None else QueueBody(position=position, reason=job.reason, message=job.message),
            progress=None if job.progress is None else ProgressBody.of(job.progress),
            actions=legal_actions(job.state),
            links=links,
        )


def legal_actions(state: State) -> list[Verb]:
    """What may be done with a job in this state."""
    if state.is_terminal:
        return ["labels", "rerun", "delete"]
    return ["cancel", "priority", "labels", "rerun"] if state is State.QUEUED else ["cancel", "labels", "rerun"]


class Mean(Body):
    """Test accuracy in percent over fresh students, of the last epoch."""

    mean: float
    std: float | None
    """Over students, ddof 1; null for one student."""
    n: int


class JobSummary(Body):
    """A job as lists have it."""

    id: str
    state: State
    reason: Reason | None
    message: str
    dataset: str
    ipc: int
    method: str
    owner: str
    priority: int
    labels: dict[str, str]
    progress: ProgressBody | None
    accuracy: Mean | None
    """Of the distilled set; null before there is one."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobList(Body):
    """A page of jobs."""

    items: list[JobSummary]
    next: str | None
    """Cursor of the next page, or null on the last one."""


class EventList(Body):
    """Events of a job, oldest first."""

    items: list[Event]
    next: int | None
    """`after` for what follows, or null where this was all so far."""


class LogLines(Body):
    """A page of a job's log, oldest lines first."""

    attempt: int
    """Whose log it is."""
    items: list[str]
    """Lines without their ends. A line of more than 256 KiB comes in pieces; one that is not whole yet comes later."""
    position: str
    """The place behind the last line, `<attempt>:<bytes>`: `after` for what is still to be written."""
    next: str | None
    """`after` for what follows, also in the log of the next attempt; null where this was all so far."""


class AttemptList(Body):
    """Attempts at a job, oldest first."""

    items: list[AttemptRecord]
    next: str | None = None


class Artifact(Body):
    """One file of the distilled set."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    href: str
    """Where to download it."""


class ArtifactList(Body):
    """The files of the distilled set; empty before the job has succeeded."""

    items: list[Artifact]
    next: str | None = None


class Health(Body):
    """Whether the service can do its work."""

    status: str
    """`ok`, or `degraded` where something else than the database is away: jobs are accepted and wait."""
    checks: dict[str, str]
    """What was looked at, with `ok` or what is wrong."""
