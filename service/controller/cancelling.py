"""The ladder of a cancellation: ask the driver, have Ray stop it, see that nothing of it is left. Only then is a job cancelled.

Pure. A driver that has never reported itself, or whose cluster has forgotten it, has nothing to save or cannot be stopped by Ray:
the ladder begins or ends at another rung, but each end says what was checked. One that nobody knows may be about to start,
when the answer to its submission was lost: it finds the request to stop, and Ray is given the time that a submission may take.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import JsonValue

from service.controller.admission import wait
from service.controller.decision import Action, Attempt, Move, Policy, RequestStop, Snapshot, Stop
from service.controller.endings import ended, last_words, publication, said
from service.jobs import CancelRequest, Reason, State

DONE = "cancelled by request; nothing of it is left running"
FORGOTTEN = "what its driver may have left running: Ray does not know the driver any more"
KEPT = "a rerun goes on from its checkpoints"
NOT_KEPT = "it left no checkpoint: no stage had got so far, or none could save itself in the time that it had"
MAX_NAMED = 5


def cancelling(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    """The next rung for a job that is being cancelled."""
    job, result = attempt.job, attempt.result
    if result is not None and result.outcome == "succeeded":
        # The set was there before the driver could be stopped: one commit decides the race.
        return ended(attempt, result, snapshot, policy)
    if snapshot.capacity is None:
        return wait(job, Reason.REQUESTED, "being cancelled; Ray cannot be asked whether its driver is gone")
    if attempt.ray is not None and not attempt.ray.is_terminal:
        return _driver_lives(attempt, snapshot, policy)
    pending = _pending(attempt, policy)
    if not pending:
        if attempt.ray is None and attempt.status is not None:
            # A new head sees no process of the old one's jobs, and waiting longer would not change that.
            message = f"cancelled by request; its driver is silent, but nobody can say {FORGOTTEN}"
            detail: dict[str, JsonValue] = {"cleanup": "unverified", "pending": FORGOTTEN}
            return _end(attempt, message, detail | {"checked": _checked(attempt)})
        return _end(attempt, DONE, {"cleanup": "verified", "checked": _checked(attempt)})
    is_over = _is_over(attempt, snapshot.now, policy)
    # A storage root that takes no request is tried for a while, also where all the time was over before anybody looked.
    if attempt.ray is None and _may_ask(attempt, policy) and not (is_over and attempt.unknown_s >= policy.submitted_s):
        # Ray has forgotten a driver that still gives signs of life, or may start one yet: it can still be told.
        return RequestStop(job, job.cancel or CancelRequest(requested_at=snapshot.now))
    if is_over:
        return _unverified(attempt, pending)
    # A moment of silence after the end of a driver is not worth a word.
    is_long = attempt.remains or _is_unborn(attempt)
    return wait(job, Reason.REQUESTED, f"being cancelled; waits for {pending}") if is_long else None


def is_gone(attempt: Attempt, policy: Policy, *, known_gone_after_s: float) -> bool:
    """Whether the driver has ended: by Ray's word, or, where Ray does not know it, by its long silence."""
    if attempt.ray is None:
        return attempt.silent_s >= policy.silence_s
    return attempt.ray.is_terminal and attempt.silent_s >= known_gone_after_s


def _driver_lives(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    job, request = attempt.job, attempt.job.cancel
    if _is_over(attempt, snapshot.now, policy):
        return _unverified(attempt, "its driver, which Ray has not stopped")
    # A driver that has not reported itself has nothing to end in good order.
    if request is None or attempt.status is None or snapshot.now >= force_at(request):
        return Stop(job)
    return None if attempt.has_stop_request else RequestStop(job, request)


def force_at(request: CancelRequest) -> datetime:
    """When asking the driver is over and Ray stops it."""
    grace_s = request.grace_seconds if request.mode == "graceful" else 0.0
    return request.requested_at + timedelta(seconds=grace_s)


def _may_ask(attempt: Attempt, policy: Policy) -> bool:
    is_alive = attempt.status is not None and attempt.silent_s < policy.silence_s
    return (is_alive or _is_unborn(attempt)) and not attempt.has_stop_request


def _is_unborn(attempt: Attempt) -> bool:
    """Whether neither Ray nor the driver has said a word of it: nobody knows whether Ray was asked to start it."""
    return attempt.ray is None and attempt.status is None and attempt.result is None


def _is_over(attempt: Attempt, at: datetime, policy: Policy) -> bool:
    """Whether its end has been waited for long enough, and sought long enough by somebody who could do so."""
    request = attempt.job.cancel
    is_late = request is not None and at >= force_at(request) + timedelta(seconds=policy.cleanup_limit_s)
    return is_late and attempt.sought_s >= policy.min_cleanup_s


def _pending(attempt: Attempt, policy: Policy) -> str:
    """What is not known to be gone; nothing where all is."""
    if attempt.remains:
        named = ", ".join(attempt.remains[:MAX_NAMED]) + (", ..." if len(attempt.remains) > MAX_NAMED else "")
        return f"what its driver left running: {named}"
    if _is_unborn(attempt) and not (attempt.has_stop_request and attempt.unknown_s >= policy.submitted_s):
        return "Ray, which may be about to start its driver"
    stopped = attempt.result is not None and attempt.result.outcome == "stopped"
    if not is_gone(attempt, policy, known_gone_after_s=0.0 if stopped else policy.heartbeat_s):
        return "its driver to be silent"
    if attempt.ray is not None and attempt.remains is None:
        return "Ray's account of its processes"
    return ""


def _checked(attempt: Attempt) -> list[JsonValue]:
    """What the end of a cancelled job rests on."""
    job = attempt.job
    if attempt.ray is None:
        silence = "no driver has ever reported" if attempt.status is None else f"silent for {attempt.silent_s:.0f} s"
        known: list[JsonValue] = ["Ray knows no such driver", silence]
        if _is_unborn(attempt):
            known.append("one that starts yet finds the request to stop, and ends at once")
        return [*known, "no worker or actor of an earlier attempt lives by Ray's account"] if job.attempt > 1 else known
    checked: list[JsonValue] = [f"Ray says {attempt.ray.status}", "no worker or actor of it lives by Ray's account"]
    if attempt.result is not None:
        checked.append(f"its driver left a result: {attempt.result.outcome}")
    return checked


def _unverified(attempt: Attempt, pending: str) -> Move:
    message = f"cancelled by request; its end could not be verified, it still waited for {pending}"
    return _end(attempt, message, {"cleanup": "unverified", "pending": pending})


def _end(attempt: Attempt, message: str, detail: dict[str, JsonValue]) -> Move:
    job, result = attempt.job, attempt.result
    changes = said(attempt) | ({} if result is None else last_words(job, result))
    run = changes.get("mlflow_run_id")
    with_run = job if run is None else job.model_copy(update={"mlflow_run_id": run})
    stopped = result if result is not None and result.outcome == "stopped" else None
    changes["publication"] = publication(with_run, stopped, attempt.status)
    if attempt.has_checkpoints is not None:
        message = f"{message}; {KEPT if attempt.has_checkpoints else NOT_KEPT}"
        detail = detail | {"checkpoint": "kept" if attempt.has_checkpoints else "none"}
    return Move(job, State.CANCELLED, Reason.REQUESTED, message, changes, detail)
