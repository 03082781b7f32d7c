"""What the API answers with."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, JsonValue

from service.jobs import Event, Job, Progress, Reason, Result, State
from worker.records import ErrorRecord


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Links(Body):
    """Where the rest of a job is: paths of this API, and MLflow's page."""

    self: str
    events: str
    logs: str
    artifacts: str
    archive: str
    """All artifacts in one zip."""
    cancel: str
    mlflow: str | None
    """Page of the run, once there is one."""


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
    """The submission as it was posted."""
    warnings: tuple[str, ...]
    attempt: int
    """Number of the current or last attempt; 0 before the first."""
    progress: Progress | None
    """Of the current stage; null before the first report."""
    stages: dict[str, str]
    """Stage to `pending`, `running`, `cached` or `done`."""
    result: Result | None
    """The figures, once it has succeeded."""
    error: ErrorRecord | None
    """Why it failed."""
    mlflow_run_id: str | None
    mlflow_url: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: Links

    @classmethod
    def of(cls, job: Job) -> JobBody:
        shown = {name: getattr(job, name) for name in cls.model_fields if name != "links"}
        root = f"/jobs/{job.id}"
        links = Links(
            self=root,
            events=f"{root}/events",
            logs=f"{root}/logs",
            artifacts=f"{root}/artifacts",
            archive=f"{root}/artifacts.zip",
            cancel=f"{root}/cancel",
            mlflow=job.mlflow_url,
        )
        return cls(**shown, links=links)


class JobList(Body):
    """A page of jobs, newest first."""

    items: list[JobBody]
    next: str | None
    """Cursor of the next page, or null on the last one."""


class EventList(Body):
    """Events of a job, oldest first."""

    items: list[Event]
    next: int | None
    """`after` for what follows, or null where this was all so far."""


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
