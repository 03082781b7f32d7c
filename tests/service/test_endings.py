"""How the controller ends jobs: the ladder of a cancellation, the late publication, storage that has no room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from ncfm_core.errors import StorageError
from service.cluster import RayJob
from service.controller.crash_points import POINTS, UnknownCrashPoint, arm, reached
from service.controller.looking import ORPHANED_S, QUEUE_WINDOW
from service.controller.loop import MAX_WAITS
from service.jobs import CancelRequest, Event, Job, Reason, State
from service.tables import attempts
from tests.service.world import POLICY, World
from worker.records import AttemptResult, StopRequest, attempt_path, checkpoint_root, now


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    built = World(tmp_path)
    yield built
    built.close()


def asked(seconds_ago: float = 0.0, **changes: object) -> CancelRequest:
    return CancelRequest.model_validate({"requested_at": now() - timedelta(seconds=seconds_ago), **changes})


def last_event(world: World, job: Job) -> Event:
    return world.store.events(job.id, after=0, limit=100)[-1]


def test_cancel_when_graceful_asks_the_driver_and_is_over_when_it_has_ended(world: World) -> None:
    job = world.running()
    world.cancel(job, asked(checkpoint=True))
    assert world.rounds(job, n=6).state is State.CANCELLING
    assert world.cluster.stops == []
    request = world.storage.get_record(attempt_path(job.id, 1, "stop.json"), StopRequest)
    assert request is not None
    assert request.checkpoint
    world.driver(job).stopped()
    world.cluster.end(f"{job.id}-1", "SUCCEEDED", exit_code=0)
    ended = world.rounds(job, n=1)
    assert (ended.state, ended.reason, ended.publication) == (State.CANCELLED, Reason.REQUESTED, "done")
    assert world.cluster.stops == []
    detail = last_event(world, job).data
    assert (detail["to"], detail["cleanup"]) == ("cancelled", "verified")
    assert detail["checked"] == [
        "Ray says SUCCEEDED",
        "no worker or actor of it lives by Ray's account",
        "its driver left a result: stopped",
    ]
    assert detail["checkpoint"] == "none"


@pytest.mark.parametrize("is_kept", [True, False])
def test_cancel_when_it_wants_a_checkpoint_says_whether_there_is_one(world: World, is_kept: bool) -> None:
    job = world.running()
    if is_kept:
        world.storage.put(f"{checkpoint_root(job.id)}/abc/1/400.safetensors", b"x")
    world.cancel(job, asked(checkpoint=True, grace_seconds=0))
    ended = world.rounds(job, n=8)
    assert ended.state is State.CANCELLED
    assert last_event(world, job).data["checkpoint"] == ("kept" if is_kept else "none")
    assert ("a rerun goes on from its checkpoints" in ended.message) == is_kept
    assert ("it left no checkpoint" in ended.message) != is_kept


def test_cancel_when_a_second_one_forces_it_does_not_wait(world: World) -> None:
    job = world.running()
    cancelling = world.cancel(job, asked())
    world.rounds(job, n=2)
    assert world.cluster.stops == []
    current = world.job(cancelling)
    assert current.cancel is not None
    forced = current.cancel.model_copy(update={"mode": "force"})
    world.store.note(current, "changed", {}, cancel=forced)
    world.rounds(job, n=1)
    assert world.cluster.stops == [f"{job.id}-1"]
    assert world.rounds(job, n=5).state is State.CANCELLED
    assert world.job(job).publication == "pending"


def test_cancel_when_the_grace_is_over_has_ray_stop_it(world: World) -> None:
    job = world.running()
    cancelling = world.cancel(job, asked(seconds_ago=1.0, grace_seconds=60.0))
    world.rounds(job, n=2)
    assert world.cluster.stops == []
    world.store.note(world.job(cancelling), "changed", {}, cancel=asked(seconds_ago=61.0, grace_seconds=60.0))
    world.rounds(job, n=1)
    assert world.cluster.stops == [f"{job.id}-1"]


def test_cancel_when_workers_outlive_their_driver_waits_and_names_them(world: World) -> None:
    job = world.running()
    world.cluster.left[f"{job.id}-1"] = ("worker 4711 on 10.0.0.2",)
    world.cancel(job, asked(mode="force"))
    waiting = world.rounds(job, n=8)
    assert waiting.state is State.CANCELLING
    assert "worker 4711 on 10.0.0.2" in waiting.message
    waits = [event for event in world.store.events(job.id, after=0, limit=99) if event.type == "waiting"]
    assert len(waits) == 1
    del world.cluster.left[f"{job.id}-1"]
    assert world.rounds(job, n=1).state is State.CANCELLED


def test_cancel_when_its_driver_is_lost_waits_for_the_stage_that_outlives_it(world: World) -> None:
    job = world.running()
    world.cluster.left[f"{job.id}-1"] = ("worker 4711 on 10.0.0.2",)
    world.cluster.end(f"{job.id}-1")
    assert world.rounds(job, n=1).state is State.RECOVERING
    world.cancel(job, asked())
    waiting = world.rounds(job, n=8)
    assert waiting.state is State.CANCELLING
    assert "worker 4711 on 10.0.0.2" in waiting.message
    del world.cluster.left[f"{job.id}-1"]
    ended = world.rounds(job, n=1)
    assert (ended.state, ended.attempt, ended.publication) == (State.CANCELLED, 1, "pending")
    detail = last_event(world, job).data
    assert detail["cleanup"] == "verified"
    assert detail["checked"] == ["Ray says FAILED", "no worker or actor of it lives by Ray's account"]
    assert [(row.number, row.outcome) for row in world.store.attempts(job.id)] == [(1, "lost")]


@pytest.mark.parametrize("is_submitted", [False, True])
def test_cancel_when_a_stage_of_an_earlier_attempt_lives_waits_for_it(world: World, is_submitted: bool) -> None:
    job = world.running()
    world.cluster.left[f"{job.id}-1"] = ("worker 4711 on 10.0.0.2",)
    world.cluster.end(f"{job.id}-1")
    assert world.rounds(job, n=2).state is State.STARTING
    if is_submitted:
        world.rounds(job, n=1)
    world.cancel(job, asked(mode="force"))
    waiting = world.rounds(job, n=8)
    assert waiting.state is State.CANCELLING
    assert "worker 4711 on 10.0.0.2" in waiting.message
    del world.cluster.left[f"{job.id}-1"]
    # Where Ray does not know the attempt yet, it may be about to start it.
    assert world.rounds(job, n=1 if is_submitted else 18).state is State.CANCELLED
    checked = last_event(world, job).data["checked"]
    assert isinstance(checked, list)
    assert checked[-1] == (
        "no worker or actor of it lives by Ray's account"
        if is_submitted
        else "no worker or actor of an earlier attempt lives by Ray's account"
    )


def test_cancel_when_ray_has_forgotten_the_driver_is_not_called_verified(world: World) -> None:
    job = world.running()
    world.cluster.restart()
    while world.job(job).state is State.RUNNING:
        world.rounds(job, n=1)
    assert (world.job(job).state, world.job(job).reason) == (State.RECOVERING, Reason.CLUSTER_LOST)
    world.cancel(job, asked())
    assert world.rounds(job, n=2).state is State.CANCELLED
    detail = last_event(world, job).data
    assert detail["cleanup"] == "unverified"
    assert "Ray does not know the driver any more" in str(detail["pending"])


def test_cancel_when_recovering_and_ray_is_away_waits_for_its_word(world: World) -> None:
    job = world.running()
    world.cluster.end(f"{job.id}-1")
    world.rounds(job, n=1)
    world.cluster.is_away = True
    world.cancel(job, asked(seconds_ago=1000))
    waiting = world.rounds(job, n=5)
    assert (waiting.state, waiting.reason) == (State.CANCELLING, Reason.REQUESTED)
    world.cluster.is_away = False
    assert world.rounds(job, n=5).state is State.CANCELLED


def test_cancel_when_its_end_cannot_be_verified_says_so_in_the_end(world: World) -> None:
    job = world.running()
    world.cluster.left[f"{job.id}-1"] = ("worker 4711 on 10.0.0.2",)
    world.cancel(job, asked(seconds_ago=294, mode="force"))
    world.seconds += 100
    assert world.rounds(job, n=6).state is State.CANCELLING
    world.seconds += 100
    wished_at(world, job, 301)
    assert world.rounds(job, n=1).state is State.CANCELLED
    detail = last_event(world, job).data
    assert detail["cleanup"] == "unverified"
    assert "worker 4711" in str(detail["pending"])


def wished_at(world: World, job: Job, seconds_ago: float) -> None:
    """Let the time since a forced cancel pass."""
    world.store.note(world.job(job), "changed", {}, cancel=asked(seconds_ago=seconds_ago, mode="force"))


@pytest.mark.parametrize("away", ["storage", "ray", "controller"])
def test_cancel_when_nobody_could_see_to_it_for_long_stops_the_driver_before_it_ends(
    world: World, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    job = world.running()
    other = world.submit()
    if away == "storage":

        def fail(*_: object) -> None:
            raise StorageError.of("NCFM_STORAGE", "memory", "cannot be read")

        monkeypatch.setattr(world.storage, "get_record", fail)
    world.cluster.is_away = away == "ray"
    world.cluster.stops_at_once = False
    world.cancel(job, asked(mode="force"))
    if away != "controller":
        assert world.rounds(job, n=3).state is State.CANCELLING
        assert world.cluster.stops == []
    world.seconds += 400
    wished_at(world, job, 400)
    monkeypatch.undo()
    world.cluster.is_away = False
    if away == "controller":
        world.restarted()
    assert world.rounds(job, n=5).state is State.CANCELLING
    assert world.cluster.stops == [f"{job.id}-1"]
    assert world.job(other).state is State.QUEUED, "what the driver holds is not free"
    world.cluster.end(f"{job.id}-1", "STOPPED", exit_code=None)
    assert world.rounds(job, n=5).state is State.CANCELLED
    assert last_event(world, job).data["cleanup"] == "verified"


def test_cancel_when_ray_has_forgotten_an_earlier_attempt_gives_its_workers_time_to_end(world: World) -> None:
    job = world.running()
    world.cluster.restart()
    while world.job(job).attempt < 2 or world.job(job).state is not State.STARTING:
        world.rounds(job, n=1)
    world.rounds(job, n=1)
    world.cancel(job, asked(mode="force"))
    waiting = world.rounds(job, n=8)
    assert waiting.state is State.CANCELLING
    assert "attempt 1, which Ray does not know any more" in waiting.message
    with world.store.writing() as connection:
        connection.execute(update(attempts).values(ended_at=now() - timedelta(seconds=ORPHANED_S)))
    assert world.rounds(job, n=1).state is State.CANCELLED


def publishing(world: World) -> Job:
    """A job that has succeeded while MLflow was away."""
    job = world.running()
    word = world.driver(job).succeed().model_dump() | {"publication": "pending"}
    world.storage.put_record(attempt_path(job.id, 1, "result.json"), AttemptResult.model_validate(word))
    world.cluster.end(f"{job.id}-1", "SUCCEEDED", exit_code=0)
    world.controller.mlflow_error = "away"
    assert world.rounds(job, n=2).publication == "pending"
    return job


def test_publication_when_mlflow_is_back_is_made_by_a_job_of_its_own(world: World) -> None:
    job, name = publishing(world), "publish-1"
    assert list(world.cluster.submissions) == [f"{job.id}-1"]
    world.controller.mlflow_error = ""
    other = world.submit()
    world.rounds(job, n=2)
    submission = world.cluster.submissions[f"{job.id}-{name}"]
    assert submission.entrypoint == (
        f"'/opt/a venv/bin/python' -m worker publish storage:jobs/{job.id}/spec.json --job-id {job.id} --attempt 1"
        " --status FINISHED"
    )
    assert world.job(other).state is State.STARTING, "a publisher takes no share of the cluster"
    world.cluster.end(f"{job.id}-{name}", "SUCCEEDED", exit_code=0)
    assert world.rounds(job, n=1).publication == "done"
    event = last_event(world, job)
    assert (event.type, event.data["publication"], event.data["try"]) == ("published", "done", 1)
    assert len([name for name in world.cluster.submissions if "publish" in name]) == 1


def test_publication_when_mlflow_is_away_again_is_tried_again_later(world: World) -> None:
    job = publishing(world)
    world.controller.mlflow_error = ""
    world.rounds(job, n=1)
    world.cluster.end(f"{job.id}-publish-1", exit_code=1)
    tried = world.rounds(job, n=2)
    assert (tried.publication, tried.publish_tries) == ("pending", 1)
    assert tried.publish_at is not None
    assert 3 < (tried.publish_at - now()).total_seconds() <= 5
    world.store.note(tried, "changed", {}, publish_at=now())
    # A head that has restarted has forgotten the first publisher too.
    world.cluster.restart()
    world.rounds(job, n=1)
    assert f"{job.id}-publish-2" in world.cluster.submissions
    world.cluster.end(f"{job.id}-publish-2", exit_code=2)
    assert world.rounds(job, n=1).publication == "error"


def test_publication_when_the_controller_restarts_is_followed_on(world: World) -> None:
    job = publishing(world)
    world.controller.mlflow_error = ""
    world.rounds(job, n=1)
    world.cluster.start(f"{job.id}-publish-1")
    world.restarted()
    world.rounds(job, n=2)
    assert len([name for name in world.cluster.submissions if "publish" in name]) == 1
    world.cluster.end(f"{job.id}-publish-1", "SUCCEEDED", exit_code=0)
    assert world.rounds(job, n=1).publication == "done"


def test_submit_when_the_storage_has_no_room_waits_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.submit()
    world.rounds(job, n=1)

    class FullError(StorageError):
        code = "storage_full"

    def full(path: str, data: bytes) -> None:
        raise FullError.of("storage", path, "no room", "Make room.")

    with monkeypatch.context() as patched:
        patched.setattr(world.storage, "put", full)
        waiting = world.rounds(job, n=5)
    assert (waiting.state, waiting.reason, waiting.losses) == (State.STARTING, Reason.STORAGE_FULL, 0)
    assert "waits for the storage root: storage: no room" in waiting.message
    waits = [event for event in world.store.events(job.id, after=0, limit=99) if event.type == "waiting"]
    assert len(waits) == 1
    world.rounds(job, n=1)
    assert list(world.cluster.submissions) == [f"{job.id}-1"]
    world.driver(job).beat()
    assert world.rounds(job, n=1).reason is None


def test_run_when_storage_was_away_drops_the_reason_once_it_is_back(world: World) -> None:
    job = world.running()
    world.storage.put(attempt_path(job.id, 1, "status.json"), b"{half")
    waiting = world.rounds(job, n=3)
    assert (waiting.state, waiting.reason) == (State.RUNNING, Reason.STORAGE_UNAVAILABLE)
    world.driver(job).beat(4, message="goes on")
    back = world.rounds(job, n=1)
    assert (back.reason, back.message) == (None, "goes on")


def test_round_when_thousands_wait_tells_few_at_a_time_and_each_once(world: World) -> None:
    running = world.running()
    jobs = [world.submit() for _ in range(3 * MAX_WAITS)]
    for told in (MAX_WAITS, 2 * MAX_WAITS, 3 * MAX_WAITS, 3 * MAX_WAITS):
        world.rounds(running, n=1)
        assert sum(world.job(job).reason is Reason.CLUSTER_FULL for job in jobs) == told
    events = [event for job in jobs for event in world.store.events(job.id, after=0, limit=99)]
    assert len([event for event in events if event.type == "waiting"]) == len(jobs)
    assert world.cluster.find(f"{running.id}-1") == RayJob("RUNNING", "", None)


def test_round_when_one_owner_fills_the_window_lets_another_pass(world: World) -> None:
    world.cluster.cpus = 100
    controller, _ = world.rival("only", policy=replace(POLICY, max_running_per_owner=1))
    first = world.submit(owner="ann")
    controller._turn(0, None)
    assert world.job(first).state is State.STARTING
    theirs = [world.submit(owner="ann") for _ in range(QUEUE_WINDOW + 5)]
    other = world.submit(owner="bob")
    urgent = world.submit(owner="eve", priority=100)
    controller._turn(0, None)
    assert world.job(other).state is world.job(urgent).state is State.STARTING
    told = [world.job(job) for job in theirs]
    assert {job.state for job in told} == {State.QUEUED}
    assert sum(job.reason is Reason.OWNER_LIMIT for job in told) == MAX_WAITS


def test_crash_point_when_unknown_is_refused_and_when_not_armed_is_nothing() -> None:
    with pytest.raises(UnknownCrashPoint, match="NCFM_CRASH_AT"):
        arm("nowhere")
    arm("")
    for point in POINTS:
        reached(point)
    assert len(POINTS) == len(set(POINTS)) >= 15
