"""What the HTTP API answers, as its client sees it. Readers ignore what a later server adds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ncfm_core.errors import NcfmError, Problem

FINAL = frozenset({"succeeded", "failed", "cancelled"})


class Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Accuracy(Reply):
    """Test accuracy in percent over fresh students, last epoch."""

    mean: float
    std: float | None = None
    """Over students; None for one."""
    n: int


class Progress(Reply):
    stage: str | None = None
    completed: int = 0
    total: int = 0
    unit: str = ""
    percent: float | None = None
    eta_seconds: float | None = None
    """Until the end of the stage; None where it is not known."""
    job_percent: float | None = None
    """Of the whole job; None where it is not known."""
    job_eta_seconds: float | None = None
    """Until the end of the whole job; None where it is not known."""

    @property
    def count(self) -> str:
        """How far the stage is, as `300/1000 steps` or `30 %`."""
        if self.unit == "%":
            return f"{self.completed} %"
        return f"{self.completed}/{self.total} {self.unit}{'' if self.total == 1 else 's'}"

    @property
    def job_count(self) -> str:
        """How far the whole job is, as `42 %, about 30 s left`; empty where it is not known."""
        if self.job_percent is None:
            return ""
        left = f", about {self.job_eta_seconds:.0f} s left" if self.job_eta_seconds is not None else ""
        return f"{self.job_percent:.0f} %{left}"


class Queue(Reply):
    """Where a queued job stands."""

    position: int
    """1 goes next."""
    reason: str | None = None
    message: str = ""


class Result(Reply):
    distilled: Accuracy | None = None
    random_real: Accuracy | None = None
    full: Accuracy | None = None
    herding: Accuracy | None = None
    k_center: Accuracy | None = None
    label_robust_score: float | None = None
    seconds: dict[str, float] = Field(default_factory=dict)


class JobHead(Reply):
    """What a job and its summary have in common."""

    id: str
    state: str
    reason: str | None = None
    message: str = ""
    owner: str = ""
    priority: int = 50
    labels: dict[str, str] = Field(default_factory=dict)
    progress: Progress | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


class JobSummary(JobHead):
    """A job as lists have it."""

    dataset: str = ""
    ipc: int | None = None
    method: str = ""
    accuracy: Accuracy | None = None

    @property
    def title(self) -> str:
        """Data set and IPC, as `digits ipc 1`."""
        return f"{self.dataset} ipc {self.ipc}"


class Job(JobHead):
    """A job as the API shows it."""

    spec: dict[str, JsonValue] = Field(default_factory=dict)
    requested: dict[str, JsonValue] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    attempt: int = 0
    parent_id: str | None = None
    queue: Queue | None = None
    stages: dict[str, str] = Field(default_factory=dict)
    """Stage name to `pending`, `running`, `cached` or `done`."""
    result: Result | None = None
    error: dict[str, JsonValue] | None = None
    mlflow_run_id: str | None = None
    mlflow_url: str | None = None
    actions: tuple[str, ...] = ()
    links: dict[str, str | None] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """Data set and IPC, as `digits ipc 1`."""
        dataset = self.spec.get("dataset", self.requested.get("dataset"))
        name = dataset.get("name") if isinstance(dataset, dict) else dataset
        return f"{name} ipc {self.spec.get('ipc', self.requested.get('ipc'))}"

    @property
    def complaint(self) -> str:
        """Why it failed, in words."""
        return str(NcfmError(*problems_of(self.error))) if self.error else self.message or (self.reason or "")


class Event(Reply):
    seq: int
    at: datetime
    type: str
    data: dict[str, JsonValue] = Field(default_factory=dict)


class Artifact(Reply):
    """One file of the published set."""

    name: str
    """Path inside the set, such as `distilled/preview.png`."""
    size: int
    sha256: str


class Attempt(Reply):
    """One attempt at a job."""

    number: int
    started_at: datetime
    ended_at: datetime | None = None
    outcome: str | None = None
    reason: str | None = None
    message: str = ""


class StageForecast(Reply):
    stage: str
    name: str
    key: str | None = None
    state: str
    """`cached`, `missing` or `unknown`."""
    why: str = ""


class Estimate(Reply):
    available: bool
    seconds: float | None = None
    text: str = ""
    basis: str = ""
    reason: str = ""
    """Why there is none."""


class Forecast(Reply):
    """What would become of a submission."""

    spec: dict[str, JsonValue]
    digest: str
    stages: tuple[StageForecast, ...]
    estimate: Estimate
    warnings: tuple[str, ...] = ()


class AttemptPage(Reply):
    items: tuple[Attempt, ...]


class Upload(Reply):
    """An uploaded archive of images."""

    id: str
    name: str
    uri: str
    """What `dataset.uri` of a submission is set to."""
    owners: tuple[str, ...] = ()
    """Everybody who sent these bytes and has not removed them."""
    size: int
    num_classes: int
    num_train: int
    num_test: int
    smallest_class: int
    """Training images of the smallest class: the greatest `ipc` that is possible."""
    created_at: datetime


class UploadPage(Reply):
    items: tuple[Upload, ...]
    next: str | None = None


class JobPage(Reply):
    items: tuple[JobSummary, ...]
    next: str | None = None


class EventPage(Reply):
    items: tuple[Event, ...]
    next: int | None = None


class ArtifactPage(Reply):
    items: tuple[Artifact, ...]


def problems_of(document: Mapping[str, Any]) -> list[Problem]:
    """The problems of an error document, or its summary where it lists none."""
    listed = [
        Problem(*(str(each.get(key, "")) for key in ("field", "value", "message", "hint")))
        for each in document.get("errors") or document.get("problems") or ()
    ]
    summary = str(document.get("detail") or document.get("title") or document.get("code") or "no reason given")
    return listed or [Problem("", "", summary.rstrip("."))]
