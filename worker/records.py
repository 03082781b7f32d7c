"""The JSON documents of the storage root: the one channel from a job's driver to the controller, and the manifests of results.

jobs/<job>/spec.json                         the resolved spec, written by whoever starts the job
jobs/<job>/attempts/<n>/status.json          AttemptStatus, rewritten at least every 2 s while something moves
jobs/<job>/attempts/<n>/result.json          AttemptResult, once, at the end
jobs/<job>/attempts/<n>/driver.log           what the driver logged; goes on in driver.log.1, driver.log.2, ... (worker/logs.py)
jobs/<job>/attempts/<n>/reserve              room that a running attempt gives up to say that the storage is full
jobs/<job>/attempts/<n>/stop.json            StopRequest, written by whoever wants the attempt to end
jobs/<job>/set/<name>                        a plain copy of the published set, for people
objects/<job>-<n>/<stage>-<key>-<try>/<name> files of stage results, immutable
results/<key>.json                           StageResult, created only if absent: the commit
damaged/<key>-<n>.json                       a StageResult whose files were found missing or damaged, out of the way
checkpoints/<job>/<key>/<n>/<step>.safetensors   with <step>.json (CheckpointRecord) as its commit
resumable/<key>/<job>                        that this job left checkpoints of the key, for other jobs to find

Readers ignore keys that they do not know, so that an older controller can follow a newer driver. Light: no torch, no ray.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, field_validator, model_validator

from worker.redaction import redact

StageName = Literal["inspect", "teachers", "search", "distill", "evaluate", "publish"]
STAGES: tuple[StageName, ...] = ("inspect", "teachers", "search", "distill", "evaluate", "publish")

EXIT_USER_ERROR = 2
"""Exit code of a driver whose spec, data or demand is at fault; any other non-zero one is ours or the machine's."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


class ErrorRecord(Record):
    """Why it failed, for a person."""

    code: str
    """Stable name, such as `invalid_spec` or `internal`."""
    problems: tuple[dict[str, str], ...]
    """Each with field, value, message and hint (ncfm_core.errors.Problem), secrets masked."""

    @field_validator("problems")
    @classmethod
    def _without_secrets(cls, problems: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
        return tuple({name: redact(text) for name, text in problem.items()} for problem in problems)


class Accuracy(Record):
    """Test accuracy in percent over fresh students."""

    mean: float
    """Of the last epochs."""
    std: float | None
    """Over students, ddof 1; None for one student, who has none."""
    n: int
    """Students."""
    best_mean: float
    """Of each student's best look at the test set: kept apart, never the headline."""
    values: tuple[float, ...]
    """Last-epoch accuracy of each student."""

    @model_validator(mode="before")
    @classmethod
    def _one_student_has_none(cls, values: Any) -> Any:
        """Results from before that was said have a 0 there."""
        return values | {"std": None} if isinstance(values, dict) and values.get("n") == 1 else values


class Figures(Record):
    """The headline figures: the first evaluation of the spec."""

    distilled: Accuracy
    random_real: Accuracy
    """Random real images at the same IPC under the same protocol."""
    full: Accuracy
    """The full training set under its own recipe."""
    herding: Accuracy | None = None
    """Real images chosen by herding under the same protocol, where asked for."""
    k_center: Accuracy | None = None
    """Real images chosen by k-center under the same protocol, where asked for."""
    label_robust_score: float | None = None
    """DD-Ranking's score, in [0, 1] (ncfm_core.ranking)."""


class FileRecord(Record):
    """One immutable file of a result."""

    name: str
    """Path inside the result, such as `distilled/preview.png`."""
    path: str
    """Path below the storage root."""
    size: int
    """Bytes."""
    sha256: str
    """Hex digest."""


class StageResult(Record):
    """A committed stage result: `results/<key>.json`."""

    version: Literal[1] = 1
    key: str
    stage: StageName
    built_by: str
    """`<job>-<attempt>`."""
    created_at: datetime
    files: tuple[FileRecord, ...]
    figures: dict[str, JsonValue]
    """What the stage found, as plain values (accuracies, last losses), and how it was computed (compiled, pieces, halvings)."""
    seconds: float
    """Time it took to build."""
    environment: dict[str, JsonValue]
    """Device, threads, memory limit (MiB), versions, commit: recorded, never part of the key."""


class CheckpointRecord(Record):
    """The commit of one checkpoint file."""

    version: Literal[1] = 1
    key: str
    step: int
    file: FileRecord
    environment: dict[str, JsonValue]
    """As that of a result; threads are kept on resume, and other jobs go on from it only under the same conditions."""


class AttemptStatus(Record):
    """What an attempt says of itself while it runs."""

    version: Literal[1] = 1
    job_id: str
    attempt: int
    stage: StageName | None
    completed: int
    total: int
    unit: str
    message: str
    """One line for a person, such as what it waits for."""
    stages: dict[str, str]
    """Stage name to `pending`, `running`, `cached` or `done`."""
    heartbeat_at: datetime
    mlflow_run_id: str | None
    mlflow_url: str | None
    job_percent: float | None = None
    """Of the whole job, by what its parts roughly cost; never falls within an attempt."""
    job_eta_seconds: float | None = None
    """Until the end of the whole job, as of the last progress."""
    kept: int = 0
    """How often it has put in store what no attempt before it had: a stage result, or a checkpoint further than all others."""
    gpus: float | None = None
    """What each task takes; None before that is known."""
    is_tracked: bool = False
    """Whether it writes to an MLflow server, which may have a run of it that nobody was told of yet."""


class StopRequest(Record):
    """Asks a running attempt to end of itself."""

    version: Literal[1] = 1
    checkpoint: bool
    """Whether what runs saves itself first, so that a later attempt goes on from there."""
    requested_at: datetime


class Shortened(Record):
    """How far a distillation came that ended when the job's wall time was over."""

    step: int
    """Updates of the images that the set has had."""
    steps: int
    """Those that were asked for."""
    wall_seconds: float
    """The limit."""


class AttemptResult(Record):
    """The last word of an attempt."""

    version: Literal[1] = 1
    job_id: str
    attempt: int
    outcome: Literal["succeeded", "failed", "stopped"]
    """`stopped`: it ended because it was asked to (StopRequest)."""
    error: ErrorRecord | None
    """Set when it failed."""
    retryable: bool
    """A failed attempt whose cause is not the user's: the controller may try again."""
    figures: Figures | None
    evaluations: tuple[dict[str, JsonValue], ...]
    """Every evaluation: protocol, model, score, and the accuracies of distilled and baselines."""
    seconds: dict[str, float]
    """Wall time by stage of this attempt, and `total`."""
    artifacts: tuple[FileRecord, ...]
    """Files of the published set."""
    mlflow_run_id: str | None
    mlflow_url: str | None
    warnings: tuple[str, ...]
    finished_at: datetime
    shortened: Shortened | None = None
    """Set where the distillation ended early for want of time."""
    publication: Literal["done", "pending", "none"] = "none"
    """Whether MLflow has all of it; `pending`: it was away (`python -m worker publish`), `none`: there is none."""
    keys: tuple[str, ...] = ()
    """Of all stage results that the attempt made or found."""
    data: dict[str, JsonValue] | None = None
    """What the inspection found (worker.site.DataFacts); None where it did not come so far."""


def job_root(job_id: str) -> str:
    return f"jobs/{job_id}"


def spec_path(job_id: str) -> str:
    return f"{job_root(job_id)}/spec.json"


Document = Literal["status.json", "result.json", "driver.log", "stop.json", "reserve"]


def attempt_path(job_id: str, attempt: int, document: Document) -> str:
    return f"{job_root(job_id)}/attempts/{attempt}/{document}"


def result_path(key: str) -> str:
    return f"results/{key.removeprefix('sha256:')}.json"


def damaged_path(key: str, number: int) -> str:
    """Where the record of a result goes that was found damaged, for the nth time."""
    return f"damaged/{key.removeprefix('sha256:')}-{number}.json"


def object_folder(built_by: str, stage: StageName, key: str) -> str:
    """Where an attempt (`<job>-<attempt>`) puts the files of one result: another folder at each call.

    A task may be lost after its commit: the one that follows must not write over files that a result already names.
    """
    return f"objects/{built_by}/{stage}{object_mark(key)}{secrets.token_hex(4)}"


def object_mark(key: str) -> str:
    """What the folder of every file of a result has in its name."""
    return f"-{key.removeprefix('sha256:')[:12]}-"


def checkpoint_root(job_id: str) -> str:
    """All checkpoints of a job."""
    return f"checkpoints/{job_id}"


def checkpoint_folder(job_id: str, key: str, attempt: int | None = None) -> str:
    """The checkpoints of one result: of one attempt, or of all attempts of the job."""
    folder = f"{checkpoint_root(job_id)}/{key.removeprefix('sha256:')}"
    return folder if attempt is None else f"{folder}/{attempt}"


def resumable_folder(key: str) -> str:
    """Marks of all jobs that have left checkpoints of a result."""
    return f"resumable/{key.removeprefix('sha256:')}"


def resumable_path(key: str, job_id: str) -> str:
    """The mark of one job. It may outlive its checkpoints; no checkpoint is without it for long."""
    return f"{resumable_folder(key)}/{job_id}"


def set_folder(job_id: str) -> str:
    """A plain copy of the published set, for people who look into the storage root."""
    return f"{job_root(job_id)}/set"
