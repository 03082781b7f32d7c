"""Which queued jobs may start, decided from a snapshot and nothing else.

`gpus: auto` is one GPU where the cluster has any. It stays one for a job that has computed on a GPU, however long there is none,
and for every job while GPUs that were there have been away for a few minutes only: nodes come back one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pydantic import JsonValue

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
        lacking = lacks(job, capacity, automatic=automatic(capacity, awaits_gpus=snapshot.awaits_gpus))
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
        self._automatic = automatic(capacity, awaits_gpus=snapshot.awaits_gpus)
        for attempt in snapshot.attempts:
            job, gpus = attempt.job, attempt.gpus
            is_at_work = job.state in (State.RUNNING, State.CANCELLING)
            if gpus is None or not is_at_work:
                # One that began where there was no GPU goes on without; its next attempt would take one.
                gpus = automatic(capacity, awaits_gpus=snapshot.awaits_gpus, kept=gpus)
            # What recovers and fits nowhere now runs nowhere: it keeps its place, and holds up nobody.
            waits = job.state is State.RECOVERING and lacks(job, capacity, automatic=gpus)
            self.take(job, automatic=gpus, holds=not waits)

    def take(self, job: Job, *, automatic: float | None = None, holds: bool = True) -> None:
        self.running += 1
        self.of_owner[job.owner] += 1
        if holds:
            demand = _demand(job, self._automatic if automatic is None else automatic)
            self.held = Capacity(self.held.cpus + demand.cpus, self.held.gpus + demand.gpus)

    def full(self, job: Job, policy: Policy) -> str:
        """What keeps a job from starting now, or nothing."""
        if self.running >= policy.max_running_jobs:
            return f"as many jobs run as may at once ({policy.max_running_jobs})"
        demand, held, capacity = _demand(job, self._automatic), self.held, self.capacity
        # Those that hold GPUs which have gone away hold up nobody who wants none.
        has_gpus = not demand.gpus or held.gpus + demand.gpus <= capacity.gpus
        if held.cpus + demand.cpus <= capacity.cpus and has_gpus:
            return ""
        return f"needs {_amount(demand)}; running jobs hold {_amount(held)} of {_amount(capacity)}"


def automatic(capacity: Capacity, *, awaits_gpus: bool, kept: float | None = None) -> float:
    """What `gpus: auto` stands for.

    Args:
        capacity: of the cluster.
        awaits_gpus: whether it had GPUs until a few minutes ago.
        kept: what an earlier attempt of the job took.
    """
    if kept:
        return kept
    return 1.0 if capacity.gpus > 0 or awaits_gpus else 0.0


def _demand(job: Job, automatic: float) -> Capacity:
    demand = job.demand
    return Capacity(cpus=float(demand.cpus), gpus=automatic if demand.gpus == "auto" else demand.gpus)


def lacks(job: Job, capacity: Capacity, *, automatic: float) -> str:
    """What keeps a job from ever fitting, or nothing.

    Args:
        job: whose task one node must hold as a whole.
        capacity: of the cluster; without a list of its nodes it counts as one.
        automatic: what `gpus: auto` stands for.
    """
    demand = _demand(job, automatic)
    nodes = [_of_node(node) for node in capacity.nodes] or [capacity]
    if any(demand.cpus <= node.cpus and demand.gpus <= node.gpus for node in nodes):
        return ""
    needs = f"needs {_amount(demand)}"
    if demand.gpus > capacity.gpus and job.demand.gpus == "auto":
        return f"{needs}, which the cluster had and may have again; it has {_amount(capacity)} in all now"
    if demand.cpus > capacity.cpus or demand.gpus > capacity.gpus:
        return f"{needs}; the cluster has {_amount(capacity)} in all"
    most = Capacity(max(node.cpus for node in nodes), max(node.gpus for node in nodes))
    return f"{needs} on one node; no node has both, and the most that one has is {_amount(most)}"


def _of_node(node: Mapping[str, JsonValue]) -> Capacity:
    cpus, gpus = (float(str(node.get(name) or 0.0)) for name in ("cpus", "gpus"))
    return Capacity(cpus, gpus)


def _amount(amount: Capacity) -> str:
    return f"{amount.cpus:g} CPUs and {amount.gpus:g} GPUs"


def wait(job: Job, reason: Reason, message: str) -> Wait | None:
    """Said once: an unchanged reason is no news."""
    return None if (job.reason, job.message) == (reason, message) else Wait(job, reason, message)
