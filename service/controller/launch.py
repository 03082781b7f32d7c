"""How an attempt is handed to Ray: its spec in the storage root, its command line, its environment."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from service.jobs import Job
from service.settings import Settings
from worker.records import spec_path
from worker.storage import Storage


class Submitter(Protocol):
    def submit(
        self, submission_id: str, entrypoint: str, *, env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None: ...


def submission_id(job: Job) -> str:
    """Ray's name for the current attempt: made from ours, so that it is found again after any restart."""
    return f"{job.id}-{job.attempt}"


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
            "NCFM_ALLOW_DOWNLOAD": str(settings.allow_download).lower(),
            "NCFM_CACHE_DIR": str(settings.data_access["cache_dir"]),
            "NCFM_DATA_MEMORY_GIB": str(settings.data_memory_gib),
        }
        return cls(settings.worker_python, env)

    def entrypoint(self, job: Job) -> str:
        """The command line of the driver, as a shell reads it."""
        spec = f"storage:{spec_path(job.id)}"
        arguments = ["-m", "worker", "run", spec, "--job-id", job.id, "--attempt", str(job.attempt)]
        return shlex.join([self.python, *arguments])

    def submit(self, job: Job, storage: Storage, cluster: Submitter) -> None:
        """Write the spec and start the driver; doing it again changes nothing."""
        storage.put(spec_path(job.id), json.dumps(job.spec, indent=1).encode())
        metadata = {"job_id": job.id, "attempt": str(job.attempt)}
        cluster.submit(submission_id(job), self.entrypoint(job), env=self.env, metadata=metadata)
