"""What a driver tells, as its job keeps it: progress and result. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from pydantic import BaseModel, ConfigDict, JsonValue

from worker.records import Accuracy, AttemptResult, AttemptStatus


class Value(BaseModel):
    """Base of what a job is made of: frozen; what a later release adds is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Progress(Value):
    """How far the current stage is, and the whole job."""

    stage: str | None
    """The stage that runs, or null between two."""
    completed: int
    total: int
    unit: str
    """What is counted: `step`, `epoch`, `student`."""
    updated_at: datetime | None = None
    """When the driver last got further."""
    since: datetime | None = None
    """When this stage was first seen, or began again after a loss."""
    since_completed: int = 0
    """What was completed then: a stage that goes on from a checkpoint does not begin at zero."""
    job_percent: float | None = None
    """Of the whole job, as its driver says; None before it knows what there is to do."""
    job_eta_seconds: float | None = None
    """Until the end of the whole job, as its driver says; None before that is known."""

    @property
    def percent(self) -> float | None:
        """Of this stage; None where the total is not known."""
        return round(100 * min(1.0, self.completed / self.total), 1) if self.total > 0 else None

    @property
    def eta_seconds(self) -> float | None:
        """What is left of this stage at its rate so far; None before a rate is known."""
        if self.updated_at is None or self.since is None or self.total <= 0:
            return None
        elapsed, done = (self.updated_at - self.since).total_seconds(), self.completed - self.since_completed
        if elapsed <= 0 or done <= 0:
            return None
        return round(max(0, self.total - self.completed) * elapsed / done, 1)


class Result(Value):
    """What a job found: accuracies in percent, of the last epoch, over fresh students."""

    distilled: Accuracy | None
    random_real: Accuracy | None
    """Random real images at the same IPC under the same protocol."""
    full: Accuracy | None
    """The full training set under its own recipe."""
    herding: Accuracy | None = None
    """Real images chosen by herding under the same protocol, where asked for."""
    k_center: Accuracy | None = None
    """Real images chosen by k-center under the same protocol, where asked for."""
    label_robust_score: float | None = None
    """DD-Ranking's score in [0, 1]: how much is the images' own doing."""
    evaluations: tuple[dict[str, JsonValue], ...]
    """Every evaluation of the spec."""
    seconds: dict[str, float]
    """Wall time by stage of the last attempt, and `total`."""


def progress_of(status: AttemptStatus, before: Progress | None = None) -> Progress:
    """What a driver's status says of the current stage.

    Args:
        status: the newest one.
        before: the progress so far: it holds since when the stage runs.
    """
    job = (status.job_percent, status.job_eta_seconds)
    counted = (status.stage, status.total, status.unit)
    goes_on = before is not None and counted == (before.stage, before.total, before.unit)
    if before is not None and goes_on and before.completed == status.completed:
        # Another stage beside this one may have brought the job further.
        told = {"job_percent": job[0], "job_eta_seconds": job[1], "updated_at": status.heartbeat_at}
        return before if job == (before.job_percent, before.job_eta_seconds) else before.model_copy(update=told)
    goes_on = goes_on and before is not None and before.completed <= status.completed
    since, base = (before.since, before.since_completed) if before and goes_on else (None, 0)
    if since is None:
        since, base = status.heartbeat_at, status.completed
    return Progress(
        stage=status.stage,
        completed=status.completed,
        total=status.total,
        unit=status.unit,
        updated_at=status.heartbeat_at,
        since=since,
        since_completed=base,
        job_percent=status.job_percent,
        job_eta_seconds=status.job_eta_seconds,
    )


def changed_stages(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, JsonValue]:
    """Stages that stand otherwise than they did."""
    return {name: state for name, state in after.items() if before.get(name) != state}


def result_of(attempt: AttemptResult) -> Result:
    figures = attempt.figures
    return Result(
        distilled=figures.distilled if figures else None,
        random_real=figures.random_real if figures else None,
        full=figures.full if figures else None,
        herding=figures.herding if figures else None,
        k_center=figures.k_center if figures else None,
        label_robust_score=figures.label_robust_score if figures else None,
        evaluations=attempt.evaluations,
        seconds=attempt.seconds,
    )
