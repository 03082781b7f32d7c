"""What to do next, decided from a snapshot and nothing else: no clock, no network, no database.

The rules in short. A result document decides what became of an attempt, whatever Ray says. Where Ray cannot be asked nothing is
decided. An attempt is lost when Ray has seen its driver end without a result, or when Ray does not know it and it has given no
sign of life for a while. A job is cancelled when its driver is known to be gone, not before.
"""

from __future__ import annotations

from pydantic import JsonValue

from ncfm_core.errors import Problem
from service.controller.admission import admit, hold_all, lacks, wait
from service.controller.decision import Action, Attempt, Move, Policy, Report, Snapshot, Stop, Submit
from service.jobs import Job, Reason, State, progress_of, result_of
from worker.records import EXIT_USER_ERROR, AttemptResult, ErrorRecord

MAX_CAUSE_CHARS = 300


def decide(snapshot: Snapshot, policy: Policy) -> list[Action]:
    """Everything to do now: at most one action for each job."""
    followed = [_follow(attempt, snapshot, policy) for attempt in snapshot.attempts if attempt.is_readable]
    admitted = hold_all(snapshot) if snapshot.capacity is None else admit(snapshot, snapshot.capacity, policy)
    return [action for action in (*followed, *admitted) if action is not None]


def _follow(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    match attempt.job.state:
        case State.STARTING:
            return _starting(attempt, snapshot, policy)
        case State.RUNNING:
            return _running(attempt, snapshot, policy)
        case State.RECOVERING:
            return _recovering(attempt, snapshot, policy)
        case State.CANCELLING:
            return _cancelling(attempt, snapshot, policy)
        case _:
            return None


def _starting(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    if attempt.result is not None and attempt.result.outcome == "failed":
        return _ended(attempt, attempt.result, snapshot, policy)
    if attempt.status is not None or attempt.result is not None:
        return Move(attempt.job, State.RUNNING, changes=_said(attempt))
    if snapshot.capacity is None:
        return None
    if attempt.ray is None:
        # Also after a crash between the move and the submission: an attempt's id is taken once, so nothing starts twice.
        return Submit(attempt.job)
    return _lost(attempt, snapshot, policy) if attempt.ray.is_terminal else None


def _running(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    if attempt.result is not None:
        return _ended(attempt, attempt.result, snapshot, policy)
    if snapshot.capacity is not None and _is_gone(attempt, policy, known_gone_after_s=0):
        return _lost(attempt, snapshot, policy)
    return _report(attempt)


def _recovering(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    job = attempt.job
    if snapshot.capacity is None or (job.retry_at is not None and snapshot.now < job.retry_at):
        return None
    if attempt.ray is not None and not attempt.ray.is_terminal:
        return Stop(job)
    if not _is_gone(attempt, policy, known_gone_after_s=0):
        return None
    lacking = lacks(job, snapshot.capacity)
    if lacking:
        # The reason stays: it says how the last attempt was lost.
        return wait(job, job.reason or Reason.WORKER_LOST, lacking)
    return Move(job, State.STARTING, changes={"attempt": job.attempt + 1, "retry_at": None})


def _cancelling(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    if attempt.result is not None and attempt.result.outcome == "succeeded":
        # The set was there before the driver could be stopped: one commit decides the race.
        return _ended(attempt, attempt.result, snapshot, policy)
    if snapshot.capacity is None:
        return None
    if attempt.ray is not None and not attempt.ray.is_terminal:
        return Stop(attempt.job)
    if not _is_gone(attempt, policy, known_gone_after_s=policy.heartbeat_s):
        return None
    return Move(attempt.job, State.CANCELLED, Reason.REQUESTED, "cancelled by request; its driver is gone")


def _is_gone(attempt: Attempt, policy: Policy, *, known_gone_after_s: float) -> bool:
    """Whether the driver has ended: by Ray's word, or, where Ray does not know it, by its long silence."""
    if attempt.ray is None:
        return attempt.silent_s >= policy.silence_s
    return attempt.ray.is_terminal and attempt.silent_s >= known_gone_after_s


def _ended(attempt: Attempt, result: AttemptResult, snapshot: Snapshot, policy: Policy) -> Move:
    """What the last word of an attempt makes of its job."""
    job = attempt.job
    changes = _said(attempt) | {
        "mlflow_run_id": result.mlflow_run_id or job.mlflow_run_id,
        "mlflow_url": result.mlflow_url or job.mlflow_url,
        "warnings": tuple(dict.fromkeys((*job.warnings, *result.warnings))),
    }
    if result.outcome == "succeeded":
        changes |= {"result": result_of(result), "artifacts": result.artifacts, "error": None}
        return Move(job, State.SUCCEEDED, changes=changes)
    error = result.error or _error("internal", "the attempt failed and did not say why")
    message = "; ".join(problem.get("message", "") for problem in error.problems)
    if result.retryable:
        return _retry(job, Reason.ATTEMPT_FAILED, message, error, snapshot=snapshot, policy=policy)
    reason = Reason.INTERNAL if error.code == "internal" else Reason.USER_ERROR
    return Move(job, State.FAILED, reason, message, changes | {"error": error})


def _lost(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Move:
    """The driver has ended without a last word."""
    job, ray = attempt.job, attempt.ray
    if ray is None:
        cause = f"attempt {job.attempt} is not known to Ray any more"
        return _retry(job, Reason.CLUSTER_LOST, cause, None, snapshot=snapshot, policy=policy)
    # Ray puts the end of the log behind its own words; the whole log is kept beside them anyway.
    words = " ".join(ray.message.partition(", last available logs")[0].split())
    said = words[:MAX_CAUSE_CHARS] or f"Ray says {ray.status}"
    cause = f"attempt {job.attempt} ended without a result: {said}"
    if ray.exit_code == EXIT_USER_ERROR:
        # The driver has judged its demand before it could write anything: another attempt would judge the same.
        error = _error(Reason.USER_ERROR, cause)
        return Move(job, State.FAILED, Reason.USER_ERROR, cause, {"error": error})
    return _retry(job, Reason.WORKER_LOST, cause, None, snapshot=snapshot, policy=policy)


def _retry(
    job: Job, reason: Reason, cause: str, error: ErrorRecord | None, *, snapshot: Snapshot, policy: Policy
) -> Move:
    """Another attempt after a while, or the end where there were too many."""
    losses = job.losses + 1
    if losses > policy.max_infra_retries:
        message = f"{cause}; {losses} attempts were lost, and no more are made"
        changes = {"losses": losses, "error": error or _error(reason, message)}
        return Move(job, State.FAILED, reason, message, changes)
    retry_at = snapshot.now + policy.backoff(losses)
    return Move(job, State.RECOVERING, reason, cause, {"losses": losses, "retry_at": retry_at})


def _error(code: str, message: str) -> ErrorRecord:
    hint = "GET the job's logs; submit it again once the cause is gone."
    return ErrorRecord(code=code, problems=(Problem("", "", message, hint).as_dict(),))


def _said(attempt: Attempt) -> dict[str, object]:
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


def _report(attempt: Attempt) -> Report | None:
    if attempt.status is None:
        return None
    job = attempt.job
    said = _said(attempt) | {"message": attempt.status.message}
    changes = {name: value for name, value in said.items() if getattr(job, name) != value}
    if not changes:
        return None
    stages = {name: state for name, state in attempt.status.stages.items() if job.stages.get(name) != state}
    event: dict[str, JsonValue] | None = {"attempt": job.attempt, "stages": dict(stages)} if stages else None
    return Report(job, changes, event)
