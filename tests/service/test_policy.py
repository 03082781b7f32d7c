from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.cluster import Capacity, RayJob
from service.controller.decision import (
    Action,
    Attempt,
    Move,
    Policy,
    Publication,
    Published,
    Report,
    RequestStop,
    Snapshot,
    Stop,
    StopPublisher,
    Submit,
    Wait,
)
from service.controller.policy import decide
from service.jobs import CancelRequest, Job, Reason, State
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


def stopped() -> AttemptResult:
    return a_result().model_copy(update={"outcome": "stopped", "publication": "done"})


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
        # What a driver lost that lived to tell it is nobody's error.
        (State.RUNNING, {"ray": ENDED, "result": a_result("worker_lost", retryable=True)}, "recovering worker_lost"),
        (
            State.RUNNING,
            {"ray": ENDED, "result": a_result("cluster_unreachable", retryable=True)},
            "recovering cluster_lost",
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
        (State.CANCELLING, {"has_stop_request": True, "unknown_s": 25.0}, "cancelled requested"),
        # Ray may be about to start a driver, when the answer to its submission was lost.
        (State.CANCELLING, {}, "requeststop"),
        (State.CANCELLING, {"unknown_s": 25.0}, "requeststop"),
        (State.CANCELLING, {"has_stop_request": True, "unknown_s": 24.0}, "wait requested"),
        (State.CANCELLING, {"ray": PENDING}, "stop"),
        (State.CANCELLING, {"ray": RUNNING} | FRESH, "stop"),
        (State.CANCELLING, {"ray": STOPPED} | FRESH, "nothing"),
        (State.CANCELLING, {"ray": STOPPED, "status": a_status(), "silent_s": 3.5}, "nothing"),
        (
            State.CANCELLING,
            {"ray": STOPPED, "status": a_status(), "silent_s": 3.5, "remains": ()},
            "cancelled requested",
        ),
        (State.CANCELLING, {"ray": STOPPED, "silent_s": 3.5, "remains": ("worker 7",)}, "wait requested"),
        # The driver ended in good order: nothing more of it is to be expected.
        (State.CANCELLING, {"ray": ENDED, "result": stopped(), "remains": ()} | FRESH, "cancelled requested"),
        (State.CANCELLING, {"ray": ENDED, "result": stopped()} | FRESH, "nothing"),
        (State.CANCELLING, FRESH, "requeststop"),
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
    assert outcome(blind) in ("nothing", "report", "wait requested")
    unreadable = follow(a_job(state), ray=ray, is_readable=False, trouble="no such bucket")
    assert isinstance(unreadable, Wait)
    assert unreadable.message == "waits for the storage root, which cannot be read: no such bucket"
    assert unreadable.reason is Reason.STORAGE_UNAVAILABLE
    told = a_job(state, reason=unreadable.reason, message=unreadable.message)
    assert follow(told, ray=ray, is_readable=False, trouble="no such bucket") is None


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
    assert "4 attempts were lost without progress" in last.message
    assert isinstance(last.changes["error"], ErrorRecord)
    assert POLICY.backoff(1000) == timedelta(seconds=60)


@pytest.mark.parametrize("known", [{"ray": KILLED, "silent_s": 0.5}, {"silent_s": 11.0}])
def test_decide_when_an_attempt_made_progress_before_it_was_lost_counts_anew(known: dict[str, Any]) -> None:
    """The eleventh loss of a job of many days does not end it, as long as each attempt gets further."""
    job = a_job(State.RUNNING, losses=POLICY.max_infra_retries)
    further = follow(job, status=a_status(kept=1), **known)
    assert isinstance(further, Move)
    assert (further.to, further.changes["losses"]) == (State.RECOVERING, 1)
    assert further.changes["retry_at"] == NOW + timedelta(seconds=1)
    nowhere = follow(job, status=a_status(kept=0), **known)
    assert isinstance(nowhere, Move)
    assert nowhere.to is State.FAILED


def test_decide_when_no_retries_are_allowed_progress_gives_none() -> None:
    attempt = Attempt(job=a_job(State.RUNNING), ray=KILLED, status=a_status(kept=5), result=None, silent_s=0)
    snapshot = Snapshot(now=NOW, capacity=TWO_CPUS, attempts=(attempt,), queued=())
    [move] = decide(snapshot, replace(POLICY, max_infra_retries=0))
    assert isinstance(move, Move)
    assert move.to is State.FAILED


def test_decide_when_lost_hands_over_how_far_it_came() -> None:
    for losses in (0, POLICY.max_infra_retries):
        move = follow(a_job(State.RUNNING, losses=losses), ray=KILLED, **FRESH)
        assert isinstance(move, Move)
        assert move.changes["stages"] == {"distill": "running"}
        assert move.changes["mlflow_run_id"] == "r"
        assert move.changes.get("publication", "pending") == "pending"


def test_decide_when_an_error_passes_again_and_again_counts_it_apart_from_losses() -> None:
    passing = a_result("storage_error", retryable=True)
    policy = replace(POLICY, max_error_retries=1)
    job = a_job(State.RUNNING, losses=3)
    attempt = Attempt(job=job, ray=ENDED, status=None, result=passing, silent_s=0)
    [move] = decide(Snapshot(now=NOW, capacity=TWO_CPUS, attempts=(attempt,), queued=()), policy)
    assert isinstance(move, Move)
    assert (move.to, move.changes["failures"]) == (State.RECOVERING, 1)
    assert "losses" not in move.changes
    assert move.message == "no such data; attempt 2 follows in 1 s"
    attempt = replace(attempt, job=job.model_copy(update={"failures": 1}))
    [last] = decide(Snapshot(now=NOW, capacity=TWO_CPUS, attempts=(attempt,), queued=()), policy)
    assert isinstance(last, Move)
    assert (last.to, last.reason) == (State.FAILED, Reason.ATTEMPT_FAILED)
    assert "2 attempts failed, and no more are made" in last.message


def test_decide_when_storage_is_full_waits_without_using_up_a_budget() -> None:
    job = a_job(State.RUNNING, losses=3, failures=3)
    move = follow(job, ray=ENDED, result=a_result("storage_full", retryable=True))
    assert isinstance(move, Move)
    assert (move.to, move.reason) == (State.RECOVERING, Reason.STORAGE_FULL)
    assert set(move.changes) == {"retry_at"}
    assert move.message.startswith("waits for room in the storage root")


def test_decide_when_stopped_by_hand_tries_again() -> None:
    assert outcome(follow(a_job(State.RUNNING), ray=ENDED, result=stopped())) == "recovering worker_lost"


def test_decide_when_a_job_ends_without_a_set_its_run_is_to_be_closed() -> None:
    for job in (a_job(State.RUNNING, mlflow_run_id="r"), a_job(State.RUNNING)):
        failed = follow(job, ray=ENDED, result=a_result("dataset_unavailable"))
        assert isinstance(failed, Move)
        assert failed.changes["publication"] == "pending"
    done = follow(
        a_job(State.RUNNING), ray=ENDED, result=a_result("internal").model_copy(update={"publication": "done"})
    )
    assert isinstance(done, Move)
    assert done.changes["publication"] == "done"
    bare = follow(a_job(State.STARTING), ray=REFUSED)
    assert isinstance(bare, Move)
    assert bare.changes["publication"] == "none"
    unsure = a_status().model_copy(update={"mlflow_run_id": None, "is_tracked": True})
    for lost in (
        follow(a_job(State.RUNNING, losses=POLICY.max_infra_retries), ray=KILLED, status=unsure, silent_s=11.0),
        climb(asked(9), ray=STOPPED, remains=(), status=unsure, silent_s=11.0),
    ):
        assert isinstance(lost, Move)
        assert lost.changes["publication"] == "pending", "MLflow may have a run that nobody was told of"
    late = follow(a_job(State.RUNNING), ray=ENDED, result=a_result().model_copy(update={"publication": "pending"}))
    assert isinstance(late, Move)
    assert (late.to, late.changes["publication"]) == (State.SUCCEEDED, "pending")


def asked(seconds_ago: float, mode: str = "graceful", **changes: Any) -> CancelRequest:
    at = NOW - timedelta(seconds=seconds_ago)
    return CancelRequest.model_validate({"mode": mode, "requested_at": at, **changes})


def climb(request: CancelRequest, **known: Any) -> Action | None:
    return follow(a_job(State.CANCELLING, reason=Reason.REQUESTED, cancel=request), **known)


def test_decide_when_cancelled_gracefully_asks_the_driver_once_and_then_stops_it() -> None:
    alive = {"ray": RUNNING} | FRESH
    ask = climb(asked(1, checkpoint=True), **alive)
    assert isinstance(ask, RequestStop)
    assert ask.request.checkpoint
    assert climb(asked(1), has_stop_request=True, **alive) is None
    assert climb(asked(29), has_stop_request=True, **alive) is None
    assert isinstance(climb(asked(31), has_stop_request=True, **alive), Stop)
    assert isinstance(climb(asked(6, grace_seconds=5), has_stop_request=True, **alive), Stop)
    # Nothing to save, or no time to: at once.
    assert isinstance(climb(asked(1), ray=PENDING), Stop)
    assert isinstance(climb(asked(0, "force"), **alive), Stop)


def test_decide_when_ray_forgot_a_driver_that_is_cancelled_tells_it_through_storage() -> None:
    assert isinstance(climb(asked(1), **FRESH), RequestStop)
    assert climb(asked(1), has_stop_request=True, **FRESH) is None
    assert outcome(climb(asked(40), has_stop_request=True, **STALE)) == "cancelled requested"


def test_decide_when_no_driver_is_known_and_it_cannot_be_asked_to_end_gives_up_in_the_end() -> None:
    assert isinstance(climb(asked(400), unknown_s=24.0, sought_s=60.0), RequestStop)
    given_up = climb(asked(400), unknown_s=25.0, sought_s=60.0)
    assert isinstance(given_up, Move)
    assert (given_up.to, given_up.detail["cleanup"]) == (State.CANCELLED, "unverified")
    assert "may be about to start its driver" in given_up.message


def test_decide_when_cancelled_says_what_its_end_rests_on() -> None:
    verified = climb(asked(9), ray=STOPPED, remains=())
    assert isinstance(verified, Move)
    assert verified.detail["cleanup"] == "verified"
    assert verified.detail["checked"] == ["Ray says STOPPED", "no worker or actor of it lives by Ray's account"]
    silent = climb(asked(9), **STALE)
    assert isinstance(silent, Move)
    assert silent.detail["cleanup"] == "unverified"
    assert silent.detail["checked"] == ["Ray knows no such driver", "silent for 11 s"]
    unborn = climb(asked(30), has_stop_request=True, unknown_s=26.0)
    assert isinstance(unborn, Move)
    assert unborn.detail["cleanup"] == "verified"
    assert unborn.detail["checked"] == [
        "Ray knows no such driver",
        "no driver has ever reported",
        "one that starts yet finds the request to stop, and ends at once",
    ]


def test_decide_when_a_cancelled_job_leaves_processes_waits_for_them_but_not_for_ever() -> None:
    left: dict[str, Any] = {"ray": STOPPED, "remains": ("worker 7 on node-2",), "sought_s": 60.0}
    waiting = climb(asked(299, "force"), **left)
    assert isinstance(waiting, Wait)
    assert "waits for what its driver left running: worker 7 on node-2" in waiting.message
    given_up = climb(asked(300, "force"), **left)
    assert isinstance(given_up, Move)
    assert (given_up.to, given_up.detail["cleanup"]) == (State.CANCELLED, "unverified")
    assert "worker 7 on node-2" in given_up.message
    assert isinstance(climb(asked(329), **left), Wait), "the grace is no part of it"
    assert isinstance(climb(asked(400), capacity=None, **left), Wait), "nobody can see"
    assert outcome(climb(asked(301, "force"), ray=RUNNING, sought_s=60.0)) == "cancelled requested"


def test_decide_when_nobody_could_see_to_the_end_of_a_cancelled_job_seeks_it_first() -> None:
    """Storage, Ray or the controller was away for longer than an end is waited for."""
    alive: dict[str, Any] = {"ray": RUNNING} | FRESH
    assert isinstance(climb(asked(4000), **alive), Stop)
    assert isinstance(climb(asked(4000), sought_s=59.0, **alive), Stop)
    assert outcome(climb(asked(4000), sought_s=60.0, **alive)) == "cancelled requested"
    assert isinstance(climb(asked(4000), ray=STOPPED, remains=("worker 7 on node-2",), sought_s=59.0), Wait)


def publications(*tried: tuple[int, RayJob | None], mlflow_error: str = "", capacity: Capacity | None = TWO_CPUS, running_s: float = 0.0) -> list[Action]:  # fmt: skip
    found = tuple(
        Publication(
            job=a_job(State.FAILED, id=f"j{index}", publication="pending", publish_tries=tries),
            ray=ray,
            running_s=running_s,
        )
        for index, (tries, ray) in enumerate(tried)
    )
    snapshot = Snapshot(
        now=NOW, capacity=capacity, attempts=(), queued=(), publications=found, mlflow_error=mlflow_error
    )
    return decide(snapshot, POLICY)


def test_publications_when_due_are_started_two_at_a_time() -> None:
    assert [action.job.id for action in publications((0, None), (0, None), (0, None))] == ["j0", "j1"]
    assert [action.job.id for action in publications((0, RUNNING), (0, None), (0, None))] == ["j1"]
    assert publications((0, RUNNING), (0, PENDING), (0, None)) == []
    assert publications((0, None), mlflow_error="away") == []
    assert publications((0, None), (0, ENDED), capacity=None) == []


def test_publications_when_tried_in_vain_wait_ever_longer_and_never_give_up() -> None:
    away = RayJob("FAILED", "", 1)
    pauses = []
    for tries in (0, 1, 2, 5, 6, 500):
        [again] = publications((tries, away))
        assert isinstance(again, Published)
        assert again.publication == "pending"
        assert again.publish_at is not None
        pauses.append((again.publish_at - NOW).total_seconds())
    assert pauses == [5, 10, 20, 160, 300, 300]


@pytest.mark.parametrize(
    ("ray", "expected"), [(ENDED, "done"), (REFUSED, "error"), (KILLED, "pending"), (STOPPED, "pending")]
)
def test_publications_when_over_are_noted(ray: RayJob, expected: str) -> None:
    [over] = publications((0, ray))
    assert isinstance(over, Published)
    assert over.publication == expected


def test_publications_when_one_takes_too_long_is_stopped() -> None:
    assert publications((0, RUNNING), running_s=899) == []
    assert [type(action) for action in publications((0, RUNNING), running_s=901)] == [StopPublisher]


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
    attempts = tuple(Attempt(job=job, ray=RUNNING, status=None, result=None, silent_s=0) for job in running)
    snapshot = Snapshot(now=NOW, capacity=capacity, attempts=attempts, queued=tuple(queued))
    decided = [action for action in decide(snapshot, policy) if action.job in queued]
    return [f"{action.job.id} {outcome(action)}" for action in decided]


def queued(id: str, *, cpus: int = 1, gpus: float | str = "auto", **changes: Any) -> Job:
    return a_job(State.QUEUED, cpus=cpus, gpus=gpus, id=id, **changes)


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


def test_decide_when_an_owner_has_as_many_running_as_may_lets_others_pass() -> None:
    policy = Policy(max_running_jobs=9, max_infra_retries=0, max_running_per_owner=1)
    running = a_job(State.RUNNING, owner="ann")
    jobs = [queued("a", owner="ann"), queued("b", owner="bob"), queued("c", owner="bob"), queued("d", owner="eve")]
    assert admitted(jobs, Capacity(9, 0), running, policy=policy) == [
        "a wait owner_limit",
        "b starting",
        "c wait owner_limit",
        "d starting",
    ]


def test_decide_when_many_wait_says_the_same_of_all_but_the_first() -> None:
    jobs = [queued(str(number), cpus=2) for number in range(50)]
    snapshot = Snapshot(
        now=NOW, capacity=TWO_CPUS, queued=tuple(jobs),
        attempts=(Attempt(job=a_job(State.RUNNING), ray=RUNNING, status=None, result=None, silent_s=0),),
    )  # fmt: skip
    said = [action.message for action in decide(snapshot, POLICY) if isinstance(action, Wait)]
    assert set(said[1:]) == {"waits for jobs before it in the queue"}


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
    assert [type(action) for action in actions] == [Submit, Move, Move, RequestStop, Wait]
    assert not any(isinstance(action, Stop) for action in actions)
