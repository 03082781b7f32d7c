from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.cluster import Capacity, RayJob
from service.controller.decision import Action, Attempt, Move, Policy, Report, Snapshot, Stop, Submit, Wait
from service.controller.policy import decide
from service.jobs import Job, Reason, State
from worker.records import AttemptResult, AttemptStatus, ErrorRecord

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
POLICY = Policy(max_running_jobs=2, max_infra_retries=3)
PENDING, RUNNING = RayJob("PENDING", "", None), RayJob("RUNNING", "", None)
KILLED, ENDED, STOPPED = RayJob("FAILED", "exit code 137", 137), RayJob("SUCCEEDED", "", 0), RayJob("STOPPED", "", None)
REFUSED = RayJob("FAILED", "exit code 2", 2)


def a_job(state: State, *, cpus: int = 1, gpus: float | str = "auto", id: str = "j1", **changes: Any) -> Job:
    job = Job(id=id, state=state, requested={}, spec={"resources": {"cpus": cpus, "gpus": gpus}}, created_at=NOW)
    return job.model_copy(update={"attempt": 0 if state is State.QUEUED else 1, "reason": None} | changes)


def a_status(**changes: object) -> AttemptStatus:
    status = AttemptStatus(
        job_id="j1", attempt=1, stage="distill", completed=3, total=9, unit="step", message="", stages={"distill": "running"},
        heartbeat_at=NOW, mlflow_run_id="r", mlflow_url="u",
    )  # fmt: skip
    return status.model_copy(update=changes)


def a_result(code: str | None = None, *, retryable: bool = False) -> AttemptResult:
    error = None if code is None else ErrorRecord(code=code, problems=({"message": "no such data"},))
    return AttemptResult(
        job_id="j1", attempt=1, outcome="failed" if code else "succeeded", error=error, retryable=retryable, figures=None,
        evaluations=(), seconds={}, artifacts=(), mlflow_run_id="r", mlflow_url="u", warnings=("w",), finished_at=NOW,
    )  # fmt: skip


TWO_CPUS = Capacity(2, 0)


def follow(job: Job, capacity: Capacity | None = TWO_CPUS, **known: Any) -> Action | None:
    """The one action for one active job."""
    attempt = replace(Attempt(job=job, ray=None, status=None, result=None, silent_s=math.inf), **known)
    actions = decide(Snapshot(now=NOW, capacity=capacity, attempts=(attempt,), queued=()), POLICY)
    assert len(actions) <= 1
    return actions[0] if actions else None


def outcome(action: Action | None) -> str:
    """A short name of an action, for tables."""
    match action:
        case None:
            return "nothing"
        case Move(_, to, reason):
            return f"{to} {reason}" if reason else str(to)
        case Wait(_, reason):
            return f"wait {reason}"
        case _:
            return type(action).__name__.lower()


FRESH: dict[str, Any] = {"status": a_status(), "silent_s": 0.5}
STALE: dict[str, Any] = {"status": a_status(), "silent_s": 11.0}


@pytest.mark.parametrize(
    ("state", "known", "expected"),
    [
        # An attempt that Ray has not heard of is handed over, also after a crash in between.
        (State.STARTING, {}, "submit"),
        (State.STARTING, {"ray": PENDING}, "nothing"),
        (State.STARTING, {"ray": RUNNING}, "nothing"),
        (State.STARTING, {"ray": RUNNING} | FRESH, "running"),
        (State.STARTING, {"ray": ENDED, "result": a_result()} | FRESH, "running"),
        (State.STARTING, {"ray": KILLED}, "recovering worker_lost"),
        (State.STARTING, {"ray": REFUSED}, "failed user_error"),
        (State.STARTING, {"ray": REFUSED, "result": a_result("invalid_spec")}, "failed user_error"),
        # The result decides, whatever Ray says.
        (State.RUNNING, {"ray": RUNNING, "result": a_result()} | FRESH, "succeeded"),
        (State.RUNNING, {"ray": KILLED, "result": a_result()} | STALE, "succeeded"),
        (State.RUNNING, {"result": a_result()} | FRESH, "succeeded"),
        (State.RUNNING, {"ray": ENDED, "result": a_result("dataset_unavailable")} | FRESH, "failed user_error"),
        (State.RUNNING, {"ray": ENDED, "result": a_result("internal")} | FRESH, "failed internal"),
        (
            State.RUNNING,
            {"ray": ENDED, "result": a_result("storage_error", retryable=True)},
            "recovering attempt_failed",
        ),
        # Ended without one: lost, whatever Ray calls it.
        (State.RUNNING, {"ray": KILLED} | FRESH, "recovering worker_lost"),
        (State.RUNNING, {"ray": ENDED} | FRESH, "recovering worker_lost"),
        (State.RUNNING, {"ray": STOPPED} | FRESH, "recovering worker_lost"),
        (State.RUNNING, {"ray": RUNNING} | STALE, "report"),
        # Forgotten by Ray: lost only when it is silent too.
        (State.RUNNING, FRESH, "report"),
        (State.RUNNING, STALE, "recovering cluster_lost"),
        # A lost attempt is followed by a new one once the old is gone for sure.
        (State.RECOVERING, {"ray": KILLED} | FRESH, "starting"),
        (State.RECOVERING, {"ray": RUNNING} | FRESH, "stop"),
        (State.RECOVERING, FRESH, "nothing"),
        (State.RECOVERING, STALE, "starting"),
        # Cancelled is who is known to be gone.
        (State.CANCELLING, {}, "cancelled requested"),
        (State.CANCELLING, {"ray": PENDING}, "stop"),
        (State.CANCELLING, {"ray": RUNNING} | FRESH, "stop"),
        (State.CANCELLING, {"ray": STOPPED} | FRESH, "nothing"),
        (State.CANCELLING, {"ray": STOPPED, "status": a_status(), "silent_s": 3.5}, "cancelled requested"),
        (State.CANCELLING, FRESH, "nothing"),
        (State.CANCELLING, STALE, "cancelled requested"),
        (State.CANCELLING, {"ray": ENDED, "result": a_result()} | FRESH, "succeeded"),
        (State.CANCELLING, {"ray": RUNNING, "result": a_result("internal")} | FRESH, "stop"),
    ],
)
def test_decide_when_an_attempt_stands_so(state: State, known: dict[str, Any], expected: str) -> None:
    assert outcome(follow(a_job(state), **known)) == expected


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING, State.RECOVERING, State.CANCELLING])
@pytest.mark.parametrize("ray", [None, KILLED, RUNNING])
def test_decide_when_ray_or_storage_cannot_be_asked_moves_nothing(state: State, ray: RayJob | None) -> None:
    blind = follow(a_job(state), capacity=None, ray=ray, **(STALE if state is State.RUNNING else {}))
    assert outcome(blind) in ("nothing", "report")
    assert follow(a_job(state), ray=ray, is_readable=False) is None


def test_decide_when_ray_is_away_still_believes_a_result() -> None:
    assert outcome(follow(a_job(State.RUNNING), capacity=None, result=a_result())) == "succeeded"


def test_decide_when_succeeded_hands_over_all_that_the_driver_left() -> None:
    move = follow(a_job(State.RUNNING, warnings=("slow",)), result=a_result(), **FRESH)
    assert isinstance(move, Move)
    assert move.changes["warnings"] == ("slow", "w")
    assert move.changes["mlflow_url"] == "u"
    assert {"result", "artifacts", "progress", "stages"} <= set(move.changes)


def test_decide_when_lost_again_and_again_waits_longer_and_gives_up() -> None:
    pauses = []
    for losses in range(3):
        move = follow(a_job(State.RUNNING, losses=losses), ray=KILLED)
        assert isinstance(move, Move)
        retry_at = move.changes["retry_at"]
        assert isinstance(retry_at, datetime)
        pauses.append((retry_at - NOW).total_seconds())
    assert pauses == [1, 2, 4]
    last = follow(a_job(State.RUNNING, losses=3), ray=KILLED)
    assert isinstance(last, Move)
    assert (last.to, last.reason) == (State.FAILED, Reason.WORKER_LOST)
    assert "4 attempts were lost" in last.message
    assert isinstance(last.changes["error"], ErrorRecord)
    assert POLICY.backoff(1000) == timedelta(seconds=60)


def test_decide_when_recovering_waits_for_its_time_and_counts_on() -> None:
    job = a_job(State.RECOVERING, attempt=4, retry_at=NOW + timedelta(seconds=1))
    assert follow(job, ray=KILLED) is None
    move = follow(job.model_copy(update={"retry_at": NOW}), ray=KILLED)
    assert isinstance(move, Move)
    assert move.changes["attempt"] == 5


def test_decide_when_recovering_and_the_cluster_has_shrunk_says_so() -> None:
    job = a_job(State.RECOVERING, cpus=8, reason=Reason.CLUSTER_LOST)
    wait = follow(job, ray=KILLED)
    assert isinstance(wait, Wait)
    assert wait.reason is Reason.CLUSTER_LOST
    assert wait.message == "needs 8 CPUs and 0 GPUs; the cluster has 2 CPUs and 0 GPUs in all"


def test_decide_when_nothing_new_was_reported_writes_nothing() -> None:
    status = a_status(message="trains teacher 2")
    first = follow(a_job(State.RUNNING), ray=RUNNING, status=status)
    assert isinstance(first, Report)
    assert first.event == {"attempt": 1, "stages": {"distill": "running"}}
    known = a_job(State.RUNNING).model_copy(update=dict(first.changes))
    assert follow(known, ray=RUNNING, status=status) is None
    second = follow(known, ray=RUNNING, status=a_status(completed=4, message="trains teacher 2"))
    assert isinstance(second, Report)
    assert set(second.changes) == {"progress"}
    assert second.event is None


def admitted(queued: list[Job], capacity: Capacity | None, *running: Job, policy: Policy = POLICY) -> list[str]:
    attempts = tuple(
        Attempt(job=job, ray=RUNNING, status=None, result=None, silent_s=0, is_readable=False) for job in running
    )
    snapshot = Snapshot(now=NOW, capacity=capacity, attempts=attempts, queued=tuple(queued))
    return [f"{action.job.id} {outcome(action)}" for action in decide(snapshot, policy)]


def queued(id: str, *, cpus: int = 1, gpus: float | str = "auto") -> Job:
    return a_job(State.QUEUED, cpus=cpus, gpus=gpus, id=id)


def test_decide_when_the_queue_fits_starts_the_oldest_first() -> None:
    jobs = [queued("a"), queued("b"), queued("c")]
    assert admitted(jobs, Capacity(2, 0)) == ["a starting", "b starting", "c wait cluster_full"]


def test_decide_when_running_jobs_hold_the_cluster_counts_them_itself() -> None:
    running = a_job(State.STARTING, cpus=2)
    assert admitted([queued("a")], Capacity(2, 0), running) == ["a wait cluster_full"]
    assert admitted([queued("a")], Capacity(3, 0), running) == ["a starting"]


def test_decide_when_a_large_job_waits_younger_ones_do_not_pass() -> None:
    jobs = [queued("large", cpus=2), queued("small")]
    assert admitted(jobs, Capacity(2, 0), a_job(State.RUNNING)) == [
        "large wait cluster_full",
        "small wait cluster_full",
    ]


def test_decide_when_a_job_can_never_fit_it_says_so_and_holds_up_nobody() -> None:
    jobs = [queued("cpus", cpus=8), queued("gpus", gpus=1.0), queued("a")]
    assert admitted(jobs, Capacity(2, 0)) == ["cpus wait exceeds_cluster", "gpus wait exceeds_cluster", "a starting"]


def test_decide_when_gpus_are_automatic_takes_one_where_there_are_any() -> None:
    jobs = [queued("a"), queued("b")]
    policy = Policy(max_running_jobs=9, max_infra_retries=0)
    assert admitted(jobs, Capacity(8, 1), policy=policy) == ["a starting", "b wait cluster_full"]
    assert admitted(jobs, Capacity(8, 2), policy=policy) == ["a starting", "b starting"]
    assert admitted([queued("a", gpus=0.0), queued("b")], Capacity(8, 1), policy=policy) == ["a starting", "b starting"]


def test_decide_when_as_many_run_as_may_waits() -> None:
    running = [a_job(State.RUNNING), a_job(State.CANCELLING)]
    assert admitted([queued("a")], Capacity(99, 0), *running) == ["a wait cluster_full"]


def test_decide_when_ray_is_away_the_queue_waits_and_is_told_once() -> None:
    assert admitted([queued("a")], None) == ["a wait cluster_unreachable"]
    told = queued("a").model_copy(
        update={"reason": Reason.CLUSTER_UNREACHABLE, "message": "Ray cannot be asked; the job starts once it answers"}
    )
    assert admitted([told], None) == []


def test_actions_when_decided_are_one_for_each_job() -> None:
    attempts = tuple(
        Attempt(job=a_job(state, id=state), ray=None, status=None, result=None, silent_s=math.inf)
        for state in (State.STARTING, State.RUNNING, State.RECOVERING, State.CANCELLING)
    )
    actions = decide(Snapshot(now=NOW, capacity=Capacity(9, 0), attempts=attempts, queued=(queued("q"),)), POLICY)
    assert [type(action) for action in actions] == [Submit, Move, Move, Move, Wait]
    assert not any(isinstance(action, Stop) for action in actions)
