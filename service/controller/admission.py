"""Which queued jobs may start, decided from a snapshot and nothing else."""

from __future__ import annotations

from service.cluster import Capacity
from service.controller.decision import Action, Move, Policy, Snapshot, Wait
from service.jobs import Job, Reason, State


def hold_all(snapshot: Snapshot) -> list[Action | None]:
    """Start nothing: nobody knows what would fit."""
    message = "Ray cannot be asked; the job starts once it answers"
    return [wait(job, Reason.CLUSTER_UNREACHABLE, message) for job in snapshot.queued]


def admit(snapshot: Snapshot, capacity: Capacity, policy: Policy) -> list[Action | None]:
    """Start queued jobs, oldest first, as long as they fit beside what runs.

    Our own account counts, not Ray's usage, which lags. A job that must wait keeps its place before all younger ones, or a large
    one would wait for ever; one that can never fit holds up nobody.
    """
    running = len(snapshot.attempts)
    cpus = sum(_demand(attempt.job, capacity).cpus for attempt in snapshot.attempts)
    gpus = sum(_demand(attempt.job, capacity).gpus for attempt in snapshot.attempts)
    actions: list[Action | None] = []
    is_full = False
    for job in snapshot.queued:
        demand = _demand(job, capacity)
        lacking = lacks(job, capacity)
        if lacking:
            actions.append(wait(job, Reason.EXCEEDS_CLUSTER, lacking))
        elif is_full:
            actions.append(wait(job, Reason.CLUSTER_FULL, "waits for older jobs"))
        elif running >= policy.max_running_jobs:
            is_full = True
            message = f"as many jobs run as may at once ({policy.max_running_jobs})"
            actions.append(wait(job, Reason.CLUSTER_FULL, message))
        elif cpus + demand.cpus > capacity.cpus or gpus + demand.gpus > capacity.gpus:
            is_full = True
            message = (
                f"needs {_amount(demand)}; running jobs hold {_amount(Capacity(cpus, gpus))} of {_amount(capacity)}"
            )
            actions.append(wait(job, Reason.CLUSTER_FULL, message))
        else:
            running, cpus, gpus = running + 1, cpus + demand.cpus, gpus + demand.gpus
            actions.append(Move(job, State.STARTING, changes={"attempt": job.attempt + 1}))
    return actions


def _demand(job: Job, capacity: Capacity) -> Capacity:
    demand = job.demand
    automatic = 1.0 if capacity.gpus > 0 else 0.0
    return Capacity(cpus=float(demand.cpus), gpus=automatic if demand.gpus == "auto" else demand.gpus)


def lacks(job: Job, capacity: Capacity) -> str:
    """What keeps a job from ever fitting, or nothing."""
    demand = _demand(job, capacity)
    if demand.cpus <= capacity.cpus and demand.gpus <= capacity.gpus:
        return ""
    return f"needs {_amount(demand)}; the cluster has {_amount(capacity)} in all"


def _amount(amount: Capacity) -> str:
    return f"{amount.cpus:g} CPUs and {amount.gpus:g} GPUs"


def wait(job: Job, reason: Reason, message: str) -> Wait | None:
    """Said once: an unchanged reason is no news."""
    return None if (job.reason, job.message) == (reason, message) else Wait(job, reason, message)
