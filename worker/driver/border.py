"""The border of one attempt: whatever happens inside becomes its result document."""

from __future__ import annotations

import logging
import time

from ncfm_core.errors import (
    DatasetError,
    LimitError,
    NcfmError,
    Problem,
    ResourcesError,
    SpecError,
    StoppedError,
    StorageError,
    shorten,
)
from worker.driver.attempt import Assignment, Attempt, Outcome
from worker.driver.board import Board, StatusWriter
from worker.driver.live import CLOSE_WAIT_S, RUN_STATUS, Tracker
from worker.driver.log import DriverLog
from worker.driver.reporter import Reporter
from worker.records import AttemptResult, ErrorRecord, attempt_path, checkpoint_root, now, spec_path
from worker.resuming import marks_of
from worker.settings import Surroundings
from worker.stopping import StopWatch
from worker.storage import Storage

STOP_WAIT_S = 5.0
"""How long an attempt that was asked to stop waits for MLflow."""

log = logging.getLogger(__name__)

USER_ERRORS = (SpecError, DatasetError, ResourcesError, LimitError)
"""What another attempt would only meet again."""


def drive(
    assignment: Assignment, surroundings: Surroundings, storage: Storage, tracker: Tracker | None, board: Board
) -> AttemptResult:
    """Carry an attempt to its end and write `result.json`; a failure is a result like any other.

    This process must be connected to a cluster. A signal that ends it leaves no result: that is a lost attempt.
    """
    started = time.monotonic()
    document = assignment.spec.model_dump_json(indent=1).encode() + b"\n"
    # Said from the first status on: also of an attempt that is lost before it has seen the cluster.
    board.gpus, board.is_tracked = assignment.gpus, tracker is not None
    reporter = Reporter(board, tracker)
    with DriverLog(storage, assignment.job_id, assignment.attempt) as kept, StatusWriter(board, storage, kept.flush):
        if tracker is None:
            reporter.warn("no MLflow server is named (NCFM_MLFLOW_URL or --mlflow): nothing is tracked")
        reporter.patiently(lambda: storage.create(spec_path(assignment.job_id), document), "the spec")
        with StopWatch(storage, assignment.job_id, assignment.attempt) as watch:
            attempt = Attempt(assignment, surroundings, storage, reporter, tracker=tracker, watch=watch)
            result, is_told = _attempted(attempt, board)
        if tracker is not None:
            result = _closed(result, tracker, is_told, board)
        total = round(time.monotonic() - started, 2)
        result = result.model_copy(update={"seconds": result.seconds | {"total": total}, "finished_at": now()})
        log.info("%s after %.1f s", result.outcome, total)
    # Last of all: whoever sees the result finds the final status and the whole log.
    path = attempt_path(assignment.job_id, assignment.attempt, "result.json")
    reporter.patiently(lambda: storage.create_record(path, result), "the result")
    if result.outcome == "succeeded":
        _drop_checkpoints(storage, assignment.job_id)
    return result


def _closed(result: AttemptResult, tracker: Tracker, is_told: bool, board: Board) -> AttemptResult:
    """The result with whether MLflow has it, its run having been ended."""
    wait_s = STOP_WAIT_S if result.outcome == "stopped" else CLOSE_WAIT_S
    is_closed = tracker.close(RUN_STATUS[result.outcome], wait_s=wait_s)
    # The run of an attempt that ended early may have been made only now.
    run = {"mlflow_run_id": board.mlflow_run_id, "mlflow_url": board.mlflow_url}
    return result.model_copy(update=run | {"publication": "done" if is_told and is_closed else "pending"})


def _drop_checkpoints(storage: Storage, job_id: str) -> None:
    """What every attempt left to go on from: nothing will."""
    try:
        paths = storage.list(checkpoint_root(job_id))
        storage.delete([*paths, *marks_of(job_id, paths)])
    except StorageError as error:
        log.warning("checkpoints are left behind: %s", error)


def refuse(assignment: Assignment, storage: Storage, error: NcfmError) -> AttemptResult:
    """Write the result of an attempt that could not even begin."""
    result = _failed(Board(assignment.job_id, assignment.attempt), error)
    storage.create_record(attempt_path(assignment.job_id, assignment.attempt, "result.json"), result)
    return result


def _attempted(attempt: Attempt, board: Board) -> tuple[AttemptResult, bool]:
    """What became of it, and whether MLflow has all that it should have, but for the run's end."""
    try:
        outcome = attempt.run()
        return _succeeded(board, outcome), outcome.is_published
    except StoppedError:
        return _result(board).model_copy(update={"outcome": "stopped"}), True
    except NcfmError as error:
        log.error("failed: %s", error)
        return _failed(board, error), True
    except Exception as error:  # the border of the job: whatever went wrong becomes its result
        log.exception("failed on an error of our own")
        problem = Problem("", "", f"{type(error).__name__}: {shorten(str(error))}", "The log of the driver has it all.")
        return _failed(board, NcfmError(problem), code="internal"), True


def _succeeded(board: Board, outcome: Outcome) -> AttemptResult:
    return _result(board).model_copy(
        update={
            "outcome": "succeeded",
            "figures": outcome.evidence.figures(outcome.spec),
            "evaluations": outcome.evidence.entries(outcome.spec),
            "artifacts": outcome.files,
            "shortened": outcome.evidence.shortened,
        }
    )


def _failed(board: Board, error: NcfmError, code: str = "") -> AttemptResult:
    problems = tuple(problem.as_dict() for problem in error.problems)
    return _result(board).model_copy(
        update={
            "error": ErrorRecord(code=code or error.code, problems=problems),
            "retryable": not isinstance(error, USER_ERRORS),
        }
    )


def _result(board: Board) -> AttemptResult:
    return AttemptResult(
        job_id=board.job_id,
        attempt=board.attempt,
        outcome="failed",
        error=None,
        retryable=False,
        figures=None,
        evaluations=(),
        seconds=board.seconds(),
        artifacts=(),
        mlflow_run_id=board.mlflow_run_id,
        mlflow_url=board.mlflow_url,
        warnings=tuple(board.warnings),
        finished_at=now(),
        keys=tuple(board.keys),
        data=board.data,
    )
