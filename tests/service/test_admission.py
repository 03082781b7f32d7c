"""What fits on which node, what `gpus: auto` stands for, and jobs that wait for room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import JsonValue
from sqlalchemy import update

from ncfm_core.submission import resolve
from service.cluster import Capacity
from service.controller.admission import automatic, lacks
from service.controller.looking import GPU_PATIENCE_S
from service.controller.sightings import Lookout
from service.jobs import Job, Reason, State, new_job_id
from service.store import Sighting
from service.tables import jobs
from tests.service.world import World
from worker.records import AttemptStatus, attempt_path, now

AUTO = resolve({"dataset": "digits", "ipc": 1, "resources": {"cpus": 1}}).document()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    built = World(tmp_path)
    yield built
    built.close()


def demanding(cpus: int, gpus: float | str) -> Job:
    resources: dict[str, JsonValue] = {"cpus": cpus, "gpus": gpus}
    return Job(id=new_job_id(), requested={}, spec={"resources": resources}, created_at=now())


def of_nodes(*nodes: tuple[float, float]) -> Capacity:
    listed = tuple({"cpus": cpus, "gpus": gpus} for cpus, gpus in nodes)
    return Capacity(sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes), listed)


@pytest.mark.parametrize(
    ("cpus", "gpus", "nodes", "lacking"),
    [
        (8, 0.0, [(8, 0), (8, 0)], ""),
        (
            16,
            0.0,
            [(8, 0), (8, 0)],
            "needs 16 CPUs and 0 GPUs on one node; no node has both, and the most that one has is 8 CPUs and 0 GPUs",
        ),
        (32, 0.0, [(8, 0), (8, 0)], "needs 32 CPUs and 0 GPUs; the cluster has 16 CPUs and 0 GPUs in all"),
        # The CPUs and the GPU are there, but not together.
        (
            8,
            1.0,
            [(8, 0), (2, 1)],
            "needs 8 CPUs and 1 GPUs on one node; no node has both, and the most that one has is 8 CPUs and 1 GPUs",
        ),
        (2, 0.5, [(8, 0), (2, 1)], ""),
    ],
)
def test_job_fits_where_one_node_holds_one_task(
    cpus: int, gpus: float, nodes: list[tuple[float, float]], lacking: str
) -> None:
    assert lacks(demanding(cpus, gpus), of_nodes(*nodes), automatic=0.0) == lacking


def test_automatic_gpus_are_what_there_is_what_is_awaited_or_what_the_job_had() -> None:
    none, some = Capacity(4, 0), Capacity(4, 1)
    assert automatic(none, awaits_gpus=False) == 0
    assert automatic(some, awaits_gpus=False) == 1
    assert automatic(none, awaits_gpus=True) == 1
    assert automatic(none, awaits_gpus=False, kept=1.0) == 1
    assert automatic(some, awaits_gpus=False, kept=0.0) == 1
    told = "needs 1 CPUs and 1 GPUs, which the cluster had and may have again; it has 4 CPUs and 0 GPUs in all now"
    assert lacks(demanding(1, "auto"), none, automatic=1.0) == told


def submit(world: World) -> Job:
    return world.submit(spec=AUTO)


def computes_on(world: World, job: Job, gpus: float) -> None:
    """The driver of the current attempt runs, and has said what its tasks take."""
    current = world.job(job)
    world.cluster.start(f"{job.id}-{current.attempt}")
    world.driver(job).beat()
    path = attempt_path(job.id, current.attempt, "status.json")
    status = world.storage.get_record(path, AttemptStatus)
    assert status is not None
    world.storage.put_record(path, status.model_copy(update={"gpus": gpus}))


def at_work(world: World, *, gpus: float) -> Job:
    """A job whose first attempt computes on so many."""
    job = submit(world)
    world.rounds(job, n=2)
    computes_on(world, job, gpus)
    return world.rounds(job, n=1)


def test_job_that_computed_on_a_gpu_waits_for_one(world: World) -> None:
    world.cluster.gpus = 1
    job = submit(world)
    world.rounds(job, n=2)
    assert world.cluster.submissions[f"{job.id}-1"].entrypoint.endswith(" --gpus 1")
    computes_on(world, job, 1.0)
    world.rounds(job, n=2)
    # The node goes, and with it the driver, for longer than GPUs are awaited; the controller begins anew.
    world.cluster.gpus = 0
    world.cluster.end(f"{job.id}-1")
    world.rounds(job, n=2)
    world.seconds += GPU_PATIENCE_S + 1
    world.restarted()
    waiting = world.rounds(job, n=3)
    assert (waiting.state, waiting.attempt) == (State.RECOVERING, 1)
    assert waiting.message.startswith("needs 1 CPUs and 1 GPUs, which the cluster had and may have again")
    world.cluster.gpus = 1
    again = world.rounds(job, n=2)
    assert (again.state, again.attempt) == (State.STARTING, 2)
    assert world.cluster.submissions[f"{job.id}-2"].entrypoint.endswith(" --gpus 1")


def test_attempt_that_is_lost_before_it_says_anything_passes_on_what_the_one_before_had(world: World) -> None:
    world.cluster.gpus = 1
    job = at_work(world, gpus=1.0)
    world.cluster.end(f"{job.id}-1")
    assert world.rounds(job, n=4).attempt == 2
    world.cluster.end(f"{job.id}-2")
    world.cluster.gpus = 0
    world.restarted()
    assert "1 GPUs, which the cluster had" in world.rounds(job, n=3).message


def test_new_job_waits_some_minutes_for_gpus_that_were_there(world: World) -> None:
    world.store.see(Sighting(cpus=4.0, gpus=4.0, seen_at=now(), checked_at=now()))
    lookout = Lookout(world.store, "")
    job = submit(world)
    waiting = world.rounds(job, n=2)
    assert (waiting.state, waiting.reason) == (State.QUEUED, Reason.EXCEEDS_CLUSTER)
    assert "1 GPUs, which the cluster had and may have again" in waiting.message
    # The API goes by the same, and a controller that begins anew too.
    controller = world.controller
    lookout.note(controller.capacity, "", awaited_gpus=controller._look.awaited_gpus)
    sighting = world.store.sighting()
    assert sighting is not None and sighting.gpus == 4
    world.restarted()
    assert world.rounds(job, n=2).state is State.QUEUED
    world.seconds += GPU_PATIENCE_S
    assert world.rounds(job, n=1).state is State.STARTING
    world.rounds(job, n=1)
    assert "--gpus" not in world.cluster.submissions[f"{job.id}-1"].entrypoint
    assert world.controller._look.awaited_gpus == 0


def test_job_that_began_without_gpus_holds_none_of_those_that_come(world: World) -> None:
    world.cluster.cpus = 4
    at_work(world, gpus=0.0)
    world.cluster.gpus = 1
    other = submit(world)
    assert world.rounds(other, n=2).state is State.STARTING
    assert world.cluster.submissions[f"{other.id}-1"].entrypoint.endswith(" --gpus 1")
    third = submit(world)
    assert "running jobs hold 2 CPUs and 1 GPUs of 4 CPUs and 1 GPUs" in world.rounds(third, n=2).message


def test_job_that_wants_no_gpu_does_not_wait_for_any(world: World) -> None:
    world.cluster.gpus = 1
    at_work(world, gpus=1.0)
    world.cluster.gpus = 0
    other = world.submit(spec=resolve({"dataset": "digits", "ipc": 1, "resources": {"cpus": 1, "gpus": 0}}).document())
    assert world.rounds(other, n=2).state is State.STARTING


def test_job_whose_driver_finds_no_room_waits_and_uses_up_no_budget(world: World) -> None:
    job = world.submit()
    world.rounds(job, n=2)
    world.cluster.start(f"{job.id}-1")
    world.driver(job).fail("no_node", "no node of the cluster has so many CPUs free; the most is 1")
    world.cluster.end(f"{job.id}-1", exit_code=2)
    waiting = world.rounds(job, n=2)
    assert (waiting.state, waiting.reason) == (State.RECOVERING, Reason.EXCEEDS_CLUSTER)
    assert waiting.message.startswith("waits for room on the cluster: no node of the cluster has so many CPUs free")
    assert (waiting.losses, waiting.failures, waiting.error) == (0, 0, None)
    assert waiting.retry_at is not None


@pytest.mark.parametrize("code", ["out_of_memory", "resources_unavailable"])
def test_job_whose_device_cannot_do_it_has_failed(world: World, code: str) -> None:
    """Another attempt would only meet the same: too little memory, no CUDA in its torch, a compiler that fails."""
    job = world.running()
    world.driver(job).fail(code, "what the stage needs is not there")
    failed = world.rounds(job, n=1)
    assert (failed.state, failed.reason) == (State.FAILED, Reason.USER_ERROR)


@pytest.mark.parametrize("damage", [{"reason": "of_a_later_release"}, {"spec": {"resources": {}}}, {"spec": {}}])
def test_row_that_cannot_be_read_stops_no_other_job(
    world: World, damage: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    bad, active, good = world.submit(), world.running(), world.submit(spec=AUTO)
    with world.store.writing() as connection:
        connection.execute(update(jobs).where(jobs.c.id.in_([bad.id, active.id])).values(damage))
    world.cluster.cpus = 8
    assert world.rounds(good, n=3).state is State.STARTING
    told = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(told) == 2
    assert any(bad.id in each for each in told)


def test_turn_that_fails_on_an_error_of_our_own_is_not_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(world.controller, "round", fail)
    assert world.controller._turn(0.5, None) == 0.5
    monkeypatch.undo()
    assert world.controller._turn(0.5, None) == 0.5
