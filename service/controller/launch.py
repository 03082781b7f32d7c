"""How drivers and publishers are handed to Ray: the spec in the storage root, the command line, the environment."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from service.cluster import Capacity, RayJob
from service.controller.crash_points import reached
from service.jobs import Job, State
from service.settings import Settings
from worker.records import spec_path
from worker.storage import Storage

RUN_STATUS = {State.SUCCEEDED: "FINISHED", State.FAILED: "FAILED", State.CANCELLED: "KILLED"}
"""What MLflow calls the end of a run."""


class Muscle(Protocol):
    """What the controller needs of a cluster (service.cluster.Cluster)."""

    def submit(
        self, submission_id: str, entrypoint: str, *, env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None: ...
    def find(self, submission_id: str) -> RayJob | None: ...
    def stop(self, submission_id: str) -> None: ...
    def remains(self, submission_id: str) -> tuple[str, ...]: ...
    def capacity(self) -> Capacity: ...
    def logs(self, submission_id: str) -> str: ...


def submission_id(job: Job, attempt: int | None = None) -> str:
    """Ray's name for the current attempt, or another one: made from ours, so that it is found again after any restart."""
    return f"{job.id}-{job.attempt if attempt is None else attempt}"


def publisher_id(job: Job) -> str:
    """Ray's name for the current publisher, or the next one where none runs."""
    return f"{job.id}-publish-{job.publish_tries + 1}"


@dataclass(frozen=True, slots=True)
class Launch:
    """What all drivers share."""

    python: str
    """The interpreter, as found on the cluster's nodes."""
    env: Mapping[str, str]
    """The surroundings of a driver."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Launch:
        storage = settings.storage_url
        if "://" not in storage:
            storage = str(Path(storage).expanduser().absolute())
        env = {
            "NCFM_HOME": str(settings.home),
            "NCFM_STORAGE": storage,
            "NCFM_MLFLOW_URL": settings.mlflow_url,
            "NCFM_MLFLOW_PUBLIC_URL": settings.mlflow_public_url,
            "NCFM_DATA_DIR": str(settings.data_dir),
            "NCFM_DATA_ROOTS": ",".join(str(root) for root in settings.data_roots or ()),
            "NCFM_DATA_BUCKETS": ",".join(settings.data_buckets),
            "NCFM_ALLOW_DOWNLOAD": str(settings.allow_download).lower(),
            "NCFM_CACHE_DIR": str(settings.data_access["cache_dir"]),
            "NCFM_DATA_MEMORY_GIB": str(settings.data_memory_gib),
        }
        return cls(settings.worker_python, env)

    def entrypoint(self, job: Job, *, gpus: float | None = None) -> str:
        """The command line of the driver, as a shell reads it.

        Args:
            job: whose current attempt.
            gpus: what `gpus: auto` stands for; None for what the driver finds.
        """
        started = [] if job.started_at is None else ["--started-at", job.started_at.isoformat()]
        given = [] if gpus is None else ["--gpus", f"{gpus:g}"]
        return self._command("run", job, *started, *given)

    def publisher(self, job: Job) -> str:
        """The command line of the publisher of an ended job."""
        return self._command("publish", job, "--status", RUN_STATUS[job.state])

    def submit(self, job: Job, storage: Storage, cluster: Muscle, *, gpus: float | None = None) -> None:
        """Write the spec and start the driver; doing it again changes nothing."""
        storage.put(spec_path(job.id), json.dumps(job.spec, indent=1).encode())
        reached("after_spec_written")
        metadata = {"job_id": job.id, "attempt": str(job.attempt)}
        cluster.submit(submission_id(job), self.entrypoint(job, gpus=gpus), env=self.env, metadata=metadata)

    def publish(self, job: Job, cluster: Muscle) -> None:
        """Start the publisher; doing it again changes nothing."""
        metadata = {"job_id": job.id, "publish": str(job.publish_tries + 1)}
        cluster.submit(publisher_id(job), self.publisher(job), env=self.env, metadata=metadata)

    def _command(self, name: str, job: Job, *options: str) -> str:
        spec = f"storage:{spec_path(job.id)}"
        arguments = ["-m", "worker", name, spec, "--job-id", job.id, "--attempt", str(job.attempt), *options]
        return shlex.join([self.python, *arguments])
