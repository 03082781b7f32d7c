"""What to do next, decided from a snapshot and nothing else: no clock, no network, no database.

The rules in short. A result document decides what became of an attempt, whatever Ray says. Where Ray cannot be asked nothing is
decided. An attempt is lost when Ray has seen its driver end without a result, or when Ray does not know it and it has given no
sign of life for a while. A job is cancelled when nothing of it is known to be left, not before (`cancelling.py`).
"""

from __future__ import annotations

from pydantic import JsonValue

from service.controller.admission import admit, automatic, hold_all, lacks, wait
from service.controller.cancelling import cancelling, is_gone
from service.controller.decision import Action, Attempt, Move, Policy, Report, Snapshot, Stop, Submit
from service.controller.endings import ended, lost, said
from service.controller.publishing import publish
from service.jobs import Reason, State
from service.reports import changed_stages


def decide(snapshot: Snapshot, policy: Policy) -> list[Action]:
    """Everything to do now: at most one action for each job."""
    followed = [_follow(attempt, snapshot, policy) for attempt in snapshot.attempts]
    admitted = hold_all(snapshot) if snapshot.capacity is None else admit(snapshot, snapshot.capacity, policy)
    return [action for action in (*followed, *admitted, *publish(snapshot, policy)) if action is not None]


def _follow(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    if not attempt.is_readable:
        message = f"waits for the storage root, which cannot be read: {attempt.trouble}"
        return wait(attempt.job, _kept_reason(attempt) or Reason.STORAGE_UNAVAILABLE, message)
    match attempt.job.state:
        case State.STARTING:
            return _starting(attempt, snapshot, policy)
        case State.RUNNING:
            return _running(attempt, snapshot, policy)
        case State.RECOVERING:
            return _recovering(attempt, snapshot, policy)
        case State.CANCELLING:
            return cancelling(attempt, snapshot, policy)
        case _:
            return None


def _kept_reason(attempt: Attempt) -> Reason | None:
    """What says how the last attempt was lost, or that the user wants its end, stands above what it waits for."""
    return attempt.job.reason if attempt.job.state in (State.RECOVERING, State.CANCELLING) else None


def _starting(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    if attempt.result is not None and attempt.result.outcome == "failed":
        return ended(attempt, attempt.result, snapshot, policy)
    if attempt.status is not None or attempt.result is not None:
        return Move(attempt.job, State.RUNNING, changes=said(attempt))
    if snapshot.capacity is None:
        return None
    if attempt.ray is None:
        # Also after a crash between the move and the submission: an attempt's id is taken once, so nothing starts twice.
        gpus = automatic(snapshot.capacity, awaits_gpus=snapshot.awaits_gpus, kept=attempt.gpus)
        return Submit(attempt.job, gpus if gpus and attempt.job.demand.gpus == "auto" else None)
    return lost(attempt, snapshot, policy) if attempt.ray.is_terminal else None


def _running(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    if attempt.result is not None:
        return ended(attempt, attempt.result, snapshot, policy)
    if snapshot.capacity is not None and is_gone(attempt, policy, known_gone_after_s=0):
        return lost(attempt, snapshot, policy)
    return _report(attempt)


def _recovering(attempt: Attempt, snapshot: Snapshot, policy: Policy) -> Action | None:
    job = attempt.job
    if snapshot.capacity is None or (job.retry_at is not None and snapshot.now < job.retry_at):
        return None
    if attempt.ray is not None and not attempt.ray.is_terminal:
        return Stop(job)
    if not is_gone(attempt, policy, known_gone_after_s=0):
        return None
    gpus = automatic(snapshot.capacity, awaits_gpus=snapshot.awaits_gpus, kept=attempt.gpus)
    lacking = lacks(job, snapshot.capacity, automatic=gpus)
    if lacking:
        # The reason stays: it says how the last attempt was lost.
        return wait(job, job.reason or Reason.WORKER_LOST, lacking)
    return Move(job, State.STARTING, changes={"attempt": job.attempt + 1, "retry_at": None})


def _report(attempt: Attempt) -> Report | None:
    if attempt.status is None:
        return None
    job = attempt.job
    # A reason is what it waited for, such as storage: it has gone on.
    told = said(attempt) | {"message": attempt.status.message, "reason": None}
    changes = {name: value for name, value in told.items() if getattr(job, name) != value}
    if not changes:
        return None
    stages = changed_stages(job.stages, attempt.status.stages)
    event: dict[str, JsonValue] | None = {"attempt": job.attempt, "stages": stages} if stages else None
    return Report(job, changes, event)
