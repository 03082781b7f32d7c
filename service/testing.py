"""Twins for tests: a cluster in memory and a driver that only says what a real one would say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ncfm_core.errors import Problem
from service.cluster import Capacity, ClusterUnreachable, RayJob, Status, SubmissionRefused
from service.jobs import Job
from worker.records import (
    Accuracy,
    AttemptResult,
    AttemptStatus,
    ErrorRecord,
    Figures,
    StageName,
    attempt_path,
    now,
)
from worker.storage import Storage


@dataclass(frozen=True, slots=True)
class Submission:
    """What a driver was started with."""

    entrypoint: str
    env: Mapping[str, str]
    metadata: Mapping[str, str]


@dataclass
class InMemoryCluster:
    """Stands in for service.cluster.Cluster: the test says what its drivers do."""

    cpus: float = 2.0
    gpus: float = 0.0
    is_away: bool = False
    """Whether Ray cannot be asked."""
    refuses: bool = False
    """Whether Ray refuses submissions."""
    stops_at_once: bool = True
    submissions: dict[str, Submission] = field(default_factory=dict)
    """Every driver that was ever started, by submission id."""
    jobs: dict[str, RayJob] = field(default_factory=dict)
    """What Ray knows now."""
    stops: list[str] = field(default_factory=list)
    """Every request to stop."""
    left: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Processes that outlive their driver, by submission id."""

    def submit(
        self, submission_id: str, entrypoint: str, *, env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        self._ask()
        if self.refuses:
            raise SubmissionRefused.of("entrypoint", entrypoint, "Ray refuses it: no such runtime_env")
        if submission_id not in self.jobs:
            self.submissions[submission_id] = Submission(entrypoint, dict(env), dict(metadata))
            self.jobs[submission_id] = RayJob("PENDING", "", None)

    def find(self, submission_id: str) -> RayJob | None:
        self._ask()
        return self.jobs.get(submission_id)

    def stop(self, submission_id: str) -> None:
        self._ask()
        self.stops.append(submission_id)
        if self.stops_at_once and submission_id in self.jobs and not self.jobs[submission_id].is_terminal:
            self.end(submission_id, "STOPPED", exit_code=None)

    def remains(self, submission_id: str) -> tuple[str, ...]:
        self._ask()
        return self.left.get(submission_id, ()) if submission_id in self.jobs else ()

    def capacity(self) -> Capacity:
        self._ask()
        return Capacity(self.cpus, self.gpus)

    def logs(self, submission_id: str) -> str:
        self._ask()
        return f"log of {submission_id}\n" if submission_id in self.jobs else ""

    def start(self, submission_id: str) -> None:
        """The driver's process begins."""
        self.jobs[submission_id] = RayJob("RUNNING", "", None)

    def end(
        self, submission_id: str, status: Status = "FAILED", *, exit_code: int | None = 137, message: str = ""
    ) -> None:
        """The driver's process has ended."""
        self.jobs[submission_id] = RayJob(status, message, exit_code)

    def restart(self) -> None:
        """A new head that knows nothing of the old one's jobs."""
        self.jobs.clear()

    def _ask(self) -> None:
        if self.is_away:
            raise ClusterUnreachable.of("NCFM_RAY_URL", "memory", "Ray cannot be asked")


@dataclass(frozen=True, slots=True)
class FakeDriver:
    """Writes the documents of one attempt."""

    storage: Storage
    job: Job

    def beat(
        self,
        completed: int = 1,
        *,
        stage: StageName = "distill",
        message: str = "",
        kept: int = 0,
        stages: Mapping[str, str] | None = None,
    ) -> None:
        """Report progress, with a new heartbeat."""
        status = AttemptStatus(
            job_id=self.job.id,
            attempt=self.job.attempt,
            stage=stage,
            completed=completed,
            total=10,
            unit="step",
            message=message,
            stages={"inspect": "done", stage: "running"} if stages is None else dict(stages),
            heartbeat_at=now(),
            mlflow_run_id="run-1",
            mlflow_url="http://mlflow/run-1",
            kept=kept,
        )
        self.storage.put_record(attempt_path(self.job.id, self.job.attempt, "status.json"), status)

    def succeed(self, files: Mapping[str, bytes] | None = None) -> AttemptResult:
        """Leave a set and the figures."""
        names = {"distilled/preview.png": b"\x89PNG"} if files is None else files
        artifacts = self.storage.write_files(f"objects/{self.job.id}-{self.job.attempt}/publish-x", names)
        accuracy = Accuracy(mean=87.0, std=1.5, n=5, best_mean=88.0, values=(86.0, 88.0))
        figures = Figures(distilled=accuracy, random_real=accuracy, full=accuracy)
        return self._end(AttemptResult.model_validate(self._last_word() | {"figures": figures, "artifacts": artifacts}))

    def fail(self, code: str, message: str, *, retryable: bool = False) -> AttemptResult:
        """Leave an error."""
        error = ErrorRecord(code=code, problems=(Problem("dataset", "", message).as_dict(),))
        word = self._last_word() | {"outcome": "failed", "error": error, "retryable": retryable}
        return self._end(AttemptResult.model_validate(word))

    def stopped(self) -> AttemptResult:
        """Leave word that it ended because it was asked to."""
        return self._end(
            AttemptResult.model_validate(self._last_word() | {"outcome": "stopped", "publication": "done"})
        )

    def _last_word(self) -> dict[str, object]:
        return {
            "job_id": self.job.id,
            "attempt": self.job.attempt,
            "outcome": "succeeded",
            "error": None,
            "retryable": False,
            "figures": None,
            "evaluations": (),
            "seconds": {"total": 12.5},
            "artifacts": (),
            "mlflow_run_id": "run-1",
            "mlflow_url": "http://mlflow/run-1",
            "warnings": ("the driver's warning",),
            "finished_at": now(),
        }

    def _end(self, result: AttemptResult) -> AttemptResult:
        self.storage.put_record(attempt_path(self.job.id, self.job.attempt, "result.json"), result)
        return result
