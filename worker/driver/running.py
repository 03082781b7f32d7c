"""From a command line to an attempt: asks whether everything answers, then drives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pydantic import JsonValue
from ulid import ULID

from ncfm_core.errors import NcfmError
from ncfm_core.spec import CORESETS, JobSpec
from worker.driver.attempt import Assignment
from worker.driver.board import Board
from worker.driver.border import drive, refuse
from worker.driver.live import Run, Tracker, identity_of
from worker.driver.probe import probe_mlflow, probe_ray
from worker.records import Accuracy, AttemptResult, set_folder
from worker.settings import Surroundings, prepare_tracking, ray_address
from worker.storage import Storage
from worker.tasks import connected

log = logging.getLogger(__name__)

STAGE_SECONDS = ("teachers", "distill", "evaluate")
KILLED_WAIT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for."""

    spec: JobSpec
    job_id: str | None
    """Given by a controller, which then waits for a result document whatever happens; None for a person's run."""
    attempt: int
    started_at: datetime
    """When the job was first started."""
    gpus: float | None = None
    """What `resources.gpus: auto` stands for; None for what the cluster has."""


def run(
    asked: Request, surroundings: Surroundings, *, on_connected: Callable[[], None]
) -> tuple[AttemptResult, dict[str, JsonValue]]:
    """One attempt, to its result and the figures to show.

    Args:
        asked: by the command line.
        surroundings: storage root, MLflow, data folder.
        on_connected: called once Ray is connected, which sets signal handlers of its own.

    Raises:
        NcfmError: it could not begin, and nothing was written but, for a controller, the result that says so.
    """
    storage = Storage(surroundings.storage_url)
    assignment = Assignment(
        spec=asked.spec,
        job_id=asked.job_id or str(ULID()).lower(),
        attempt=asked.attempt,
        started_at=asked.started_at,
        gpus=asked.gpus,
    )
    address = ray_address()
    try:
        if address is not None:
            probe_ray(address)
        if surroundings.mlflow_url and asked.job_id is None:
            probe_mlflow(surroundings.mlflow_url)
        with connected(address):
            on_connected()
            result = _track_and_drive(assignment, surroundings, storage)
    except NcfmError as error:
        if asked.job_id is not None:
            refuse(assignment, storage, error)
        raise
    return result, headline(assignment, result, storage)


def _track_and_drive(assignment: Assignment, surroundings: Surroundings, storage: Storage) -> AttemptResult:
    log.info("job %s, attempt %d, results in %s", assignment.job_id, assignment.attempt, storage.url)
    board = Board(assignment.job_id, assignment.attempt)
    tracker = _tracker(assignment, surroundings, board) if surroundings.mlflow_url else None
    try:
        return drive(assignment, surroundings, storage, tracker, board)
    except BaseException:
        # Ended from outside, with three seconds left: say so in MLflow if that is quickly done.
        if tracker is not None:
            tracker.close("KILLED", wait_s=KILLED_WAIT_S)
        raise


def _tracker(assignment: Assignment, surroundings: Surroundings, board: Board) -> Tracker:
    prepare_tracking()
    url, identity = surroundings.mlflow_url, identity_of(assignment.spec, assignment.job_id, assignment.attempt)

    def connect() -> Run:
        from worker.tracking import MlflowRun  # on the tracker's thread: MLflow takes three seconds to import

        return MlflowRun(url, surroundings.mlflow_public_url or url, identity)

    return Tracker(connect, on_open=board.tracked)


def headline(assignment: Assignment, result: AttemptResult, storage: Storage) -> dict[str, JsonValue]:
    """The figures of an attempt as one flat document; empty for one that failed."""
    if result.figures is None:
        return {}
    folder = f"{storage.url.rstrip('/')}/{set_folder(assignment.job_id)}"
    return {
        "job_id": assignment.job_id,
        "dataset": assignment.spec.dataset.name,
        "ipc": assignment.spec.ipc,
        "distilled": _short(result.figures.distilled),
        "random_real": _short(result.figures.random_real),
        "full": _short(result.figures.full),
        **{name: _short(accuracy) for name in CORESETS if (accuracy := getattr(result.figures, name)) is not None},
        "label_robust_score": result.figures.label_robust_score,
        "seconds": {**dict.fromkeys(STAGE_SECONDS, 0.0), **result.seconds},
        "mlflow_run_id": result.mlflow_run_id,
        "mlflow_url": result.mlflow_url,
        "preview": f"{folder}/preview.png",
        "set_path": folder,
    }


def _short(accuracy: Accuracy) -> dict[str, JsonValue]:
    std = None if accuracy.std is None else round(accuracy.std, 4)
    return {"mean": round(accuracy.mean, 4), "std": std, "n": accuracy.n}
