"""The border of one attempt: whatever happens inside becomes its result document."""

from __future__ import annotations

import logging
import time

from ncfm_core.errors import DatasetError, NcfmError, Problem, ResourcesError, SpecError, shorten
from worker.driver.attempt import Assignment, Attempt, Outcome
from worker.driver.board import Board, StatusWriter
from worker.driver.live import Tracker
from worker.driver.log import DriverLog
from worker.driver.reporter import Reporter
from worker.records import AttemptResult, ErrorRecord, attempt_path, now, spec_path
from worker.settings import Surroundings
from worker.storage import Storage

log = logging.getLogger(__name__)

USER_ERRORS = (SpecError, DatasetError, ResourcesError)
"""What another attempt would only meet again."""


def drive(
    assignment: Assignment, surroundings: Surroundings, storage: Storage, tracker: Tracker | None, board: Board
) -> AttemptResult:
    """Carry an attempt to its end and write `result.json`; a failure is a result like any other.

    This process must be connected to a cluster. A signal that ends it leaves no result: that is a lost attempt.
    """
    started = time.monotonic()
    document = assignment.spec.model_dump_json(indent=1).encode() + b"\n"
    storage.create(spec_path(assignment.job_id), document)
    with DriverLog(storage, assignment.job_id, assignment.attempt) as kept, StatusWriter(board, storage, kept.flush):
        result = _attempted(assignment, surroundings, storage, tracker, board)
        if tracker is not None:
            tracker.close("FINISHED" if result.outcome == "succeeded" else "FAILED")
        total = round(time.monotonic() - started, 2)
        result = result.model_copy(update={"seconds": result.seconds | {"total": total}, "finished_at": now()})
        log.info("%s after %.1f s", result.outcome, total)
    # Last of all: whoever sees the result finds the final status and the whole log.
    path = attempt_path(assignment.job_id, assignment.attempt, "result.json")
    storage.create_record(path, result)
    return result


def refuse(assignment: Assignment, storage: Storage, error: NcfmError) -> AttemptResult:
    """Write the result of an attempt that could not even begin."""
    result = _failed(Board(assignment.job_id, assignment.attempt), error)
    storage.create_record(attempt_path(assignment.job_id, assignment.attempt, "result.json"), result)
    return result


def _attempted(
    assignment: Assignment, surroundings: Surroundings, storage: Storage, tracker: Tracker | None, board: Board
) -> AttemptResult:
    try:
        reporter = Reporter(board, tracker)
        if tracker is None:
            reporter.warn("no MLflow server is named (NCFM_MLFLOW_URL or --mlflow): nothing is tracked")
        return _succeeded(board, Attempt(assignment, surroundings, storage, reporter, tracker).run())
    except NcfmError as error:
        log.error("failed: %s", error)
        return _failed(board, error)
    except Exception as error:  # the border of the job: whatever went wrong becomes its result
        log.exception("failed on an error of our own")
        problem = Problem("", "", f"{type(error).__name__}: {shorten(str(error))}", "The log of the driver has it all.")
        return _failed(board, NcfmError(problem), code="internal")


def _succeeded(board: Board, outcome: Outcome) -> AttemptResult:
    return _result(board).model_copy(
        update={
            "outcome": "succeeded",
            "figures": outcome.evidence.figures(outcome.spec),
            "evaluations": outcome.evidence.entries(outcome.spec),
            "artifacts": outcome.files,
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
    )
