"""Which queued jobs may start, decided from a snapshot and nothing else."""

from __future__ import annotations

from collections import Counter

from service.cluster import Capacity
from service.controller.decision import Action, Move, Policy, Snapshot, Wait
from service.jobs import Job, Reason, State


def hold_all(snapshot: Snapshot) -> list[Action | None]:
    """Start nothing: nobody knows what would fit."""
    message = "Ray cannot be asked; the job starts once it answers"
    return [wait(job, Reason.CLUSTER_UNREACHABLE, message) for job in snapshot.queued]


def admit(snapshot: Snapshot, capacity: Capacity, policy: Policy) -> list[Action | None]:
    """Start queued jobs in their order, as long as they fit beside what runs.

    Our own account counts, not Ray's usage, which lags. A job that must wait keeps its place before all that follow, or a large
    one would wait for ever; one that can never fit, or whose owner has as many running as may, holds up nobody.
    """
    account = _Account(snapshot, capacity)
    actions: list[Action | None] = []
    is_full = False
    for job in snapshot.queued:
        lacking = lacks(job, capacity)
        if lacking:
            actions.append(wait(job, Reason.EXCEEDS_CLUSTER, lacking))
        elif is_owner_full(account.of_owner[job.owner], policy):
            message = f"as many jobs of this owner run as may at once ({policy.max_running_per_owner})"
            actions.append(wait(job, Reason.OWNER_LIMIT, message))
        elif is_full:
            # The same words for all of them, however long: each change would be an event of each.
            actions.append(wait(job, Reason.CLUSTER_FULL, "waits for jobs before it in the queue"))
        elif full := account.full(job, policy):
            is_full = True
            actions.append(wait(job, Reason.CLUSTER_FULL, full))
        else:
            account.take(job)
            actions.append(Move(job, State.STARTING, changes={"attempt": job.attempt + 1}))
    return actions


def is_owner_full(running: int, policy: Policy) -> bool:
    return policy.max_running_per_owner is not None and running >= policy.max_running_per_owner


class _Account:
    """What running jobs hold of the cluster."""

    def __init__(self, snapshot: Snapshot, capacity: Capacity) -> None:
        self.capacity = capacity
        self.running = 0
        self.held = Capacity(0.0, 0.0)
        self.of_owner: Counter[str] = Counter()
        for attempt in snapshot.attempts:
            self.take(attempt.job)

    def take(self, job: Job) -> None:
        demand = _demand(job, self.capacity)
        self.running += 1
        self.of_owner[job.owner] += 1
        self.held = Capacity(self.held.cpus + demand.cpus, self.held.gpus + demand.gpus)

    def full(self, job: Job, policy: Policy) -> str:
        """What keeps a job from starting now, or nothing."""
        if self.running >= policy.max_running_jobs:
            return f"as many jobs run as may at once ({policy.max_running_jobs})"
        demand, held, capacity = _demand(job, self.capacity), self.held, self.capacity
        if held.cpus + demand.cpus <= capacity.cpus and held.gpus + demand.gpus <= capacity.gpus:
            return ""
        return f"needs {_amount(demand)}; running jobs hold {_amount(held)} of {_amount(capacity)}"


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
