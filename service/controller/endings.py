"""What the end of an attempt makes of its job, decided from what is known of it and nothing else.

There are two budgets. An attempt that is lost with its driver, its node or its cluster is nobody's error; one that ends with an
error which may pass is the attempt's own. Neither uses up the other's, and a full storage root uses up none. Losses count in a
row: an attempt that has put something new in store before it was lost begins the count anew, so that a job of many days may be
lost any number of times as long as it gets further.
"""

from __future__ import annotations

from datetime import timedelta

from ncfm_core.errors import Problem
from service.controller.decision import Attempt, Move, Policy, Snapshot
from service.jobs import Job, Reason, State
from service.reports import progress_of, result_of
from worker.records import EXIT_USER_ERROR, AttemptResult, AttemptStatus, ErrorRecord

MAX_CAUSE_CHARS = 300
STORAGE_FULL = "storage_full"
NO_ROOM = "no_node"
"""Codes of an attempt's error (ncfm_core.errors)."""
RETRIED_AS = {
    STORAGE_FULL: Reason.STORAGE_FULL,
    "worker_lost": Reason.WORKER_LOST,
    "cluster_unreachable": Reason.CLUSTER_LOST,
}
"""Why the next attempt follows. What a driver has lost and lived to tell is nobody's error either."""


def ended(attempt: Attempt, result: AttemptResult, snapshot: Snapshot, policy: Policy) -> Move:
    """What the last word of an attempt makes of its job."""
    job = attempt.job
    if result.outcome == "stopped":
        # Nobody who cancels it asked for that: somebody else did, past the service.
        cause = f"attempt {job.attempt} was stopped by hand"
        return _retry(attempt, Reason.WORKER_LOST, cause, None, snapshot=snapshot, policy=policy)
    changes = said(attempt) | last_words(job, result)
    if result.outcome == "succeeded":
        changes |= {"result": result_of(result), "artifacts": result.artifacts, "error": None}
        return Move(job, State.SUCCEEDED, changes=changes | {"publication": result.publication})
    error = result.error or _error("internal", "the attempt failed and did not say why")
    message = "; ".join(problem.get("message", "") for problem in error.problems)
    if result.retryable:
        reason = RETRIED_AS.get(error.code, Reason.ATTEMPT_FAILED)
        return _retry(attempt, reason, message, error, snapshot=snapshot, policy=policy)
    if error.code == NO_ROOM:
        # Nodes come and go: the user is told, and it waits (`admission.lacks`).
        pause = timedelta(seconds=policy.room_pause_s)
        waiting = f"waits for room on the cluster: {message}"
        changes |= {"retry_at": snapshot.now + pause}
        return Move(job, State.RECOVERING, Reason.EXCEEDS_CLUSTER, waiting, changes)
    reason = Reason.INTERNAL if error.code == "internal" else Reason.USER_ERROR
    return Move(
        job,
        State.FAILED,
        reason,
        message,
        changes | {"error": error, "publication": publication(job, result, attempt.status)},
    )


def lost(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Move:
    """The driver has ended without a last word."""
    job, ray = attempt.job, attempt.ray
    if ray is None:
        cause = f"attempt {job.attempt} is not known to Ray any more"
        return _retry(attempt, Reason.CLUSTER_LOST, cause, None, snapshot=snapshot, policy=policy)
    # Ray puts the end of the log behind its own words; the whole log is kept beside them anyway.
    words = " ".join(ray.message.partition(", last available logs")[0].split())
    heard = words[:MAX_CAUSE_CHARS] or f"Ray says {ray.status}"
    cause = f"attempt {job.attempt} ended without a result: {heard}"
    if ray.exit_code == EXIT_USER_ERROR:
        # The driver has judged its demand before it could write anything: another attempt would judge the same.
        ends = {"error": _error(Reason.USER_ERROR, cause), "publication": publication(job, None, attempt.status)}
        return Move(job, State.FAILED, Reason.USER_ERROR, cause, said(attempt) | ends)
    return _retry(attempt, Reason.WORKER_LOST, cause, None, snapshot=snapshot, policy=policy)


def _retry(
    attempt: Attempt, reason: Reason, cause: str, error: ErrorRecord | None, *, snapshot: Snapshot, policy: Policy
) -> Move:
    """Another attempt after a while, or the end where there were too many of its kind."""
    job, told = attempt.job, said(attempt)
    following = f"attempt {job.attempt + 1} follows in"
    if reason is Reason.STORAGE_FULL:
        pause = timedelta(seconds=policy.storage_pause_s)
        message = f"waits for room in the storage root: {cause}; {following} {pause.total_seconds():g} s"
        return Move(job, State.RECOVERING, reason, message, told | {"retry_at": snapshot.now + pause})
    if reason is Reason.ATTEMPT_FAILED:
        budget, tries, most, what = "failures", job.failures + 1, policy.max_error_retries, "failed"
    else:
        before = 0 if has_progressed(attempt) else job.losses
        budget, tries, most, what = "losses", before + 1, policy.max_infra_retries, "were lost without progress"
    if tries > most:
        message = f"{cause}; {tries} attempts {what}, and no more are made"
        ends = {"error": error or _error(reason, message), "publication": publication(job, None, attempt.status)}
        return Move(job, State.FAILED, reason, message, told | ends | {budget: tries})
    pause = policy.backoff(tries)
    message = f"{cause}; {following} {pause.total_seconds():g} s"
    return Move(job, State.RECOVERING, reason, message, told | {budget: tries, "retry_at": snapshot.now + pause})


def has_progressed(attempt: Attempt) -> bool:
    """Whether the attempt has put something in store from which the next one goes on further than it could itself."""
    return attempt.status is not None and attempt.status.kept > 0


def publication(job: Job, result: AttemptResult | None, status: AttemptStatus | None = None) -> str:
    """Where the MLflow run of a job stands that ends without a set: whoever has begun one must close it.

    A driver that died, or that MLflow did not answer, may have begun one that nobody knows: the publisher looks for it.
    """
    if result is not None and result.publication == "done":
        return "done"
    told = [each.mlflow_run_id for each in (status, result) if each is not None]
    has_run = job.mlflow_run_id or any(told) or (status is not None and status.is_tracked)
    return "pending" if has_run else "none"


def said(attempt: Attempt) -> dict[str, object]:
    """What the driver's last status sets in its job."""
    status = attempt.status
    if status is None:
        return {}
    return {
        "progress": progress_of(status, attempt.job.progress),
        "stages": dict(status.stages),
        "mlflow_run_id": status.mlflow_run_id or attempt.job.mlflow_run_id,
        "mlflow_url": status.mlflow_url or attempt.job.mlflow_url,
    }


def last_words(job: Job, result: AttemptResult) -> dict[str, object]:
    """What any result sets in its job."""
    return {
        "mlflow_run_id": result.mlflow_run_id or job.mlflow_run_id,
        "mlflow_url": result.mlflow_url or job.mlflow_url,
        "warnings": tuple(dict.fromkeys((*job.warnings, *result.warnings))),
    }


def _error(code: str, message: str) -> ErrorRecord:
    hint = "GET the job's logs; submit it again once the cause is gone."
    return ErrorRecord(code=code, problems=(Problem("", "", message, hint).as_dict(),))
