from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ncfm_core.errors import StorageError
from service.cluster import Capacity, ClusterUnreachable
from service.controller import Controller
from service.controller.decision import Submit
from service.controller.launch import Launch
from service.controller.sightings import Lookout, ask_mlflow
from service.jobs import Job, Reason, State, cancel_move
from service.settings import Settings
from service.testing import FakeDriver
from tests.service.world import World
from worker.records import attempt_path, spec_path


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    built = World(tmp_path)
    yield built
    built.store.close()


def test_job_when_all_goes_well(world: World) -> None:
    job = world.submit()
    assert world.rounds(job, n=1).state is State.STARTING
    assert world.cluster.submissions == {}
    assert world.rounds(job, n=1).state is State.STARTING
    [(name, submission)] = world.cluster.submissions.items()
    assert name == f"{job.id}-1"
    started_at = world.job(job).started_at
    assert started_at is not None
    assert submission.entrypoint == (
        f"'/opt/a venv/bin/python' -m worker run storage:jobs/{job.id}/spec.json --job-id {job.id} --attempt 1"
        f" --started-at {started_at.isoformat()}"
    )
    assert submission.env["NCFM_STORAGE"] == str(world.settings.home / "storage")
    assert submission.env["NCFM_MLFLOW_URL"] == "http://mlflow:5000"
    assert submission.env["NCFM_ALLOW_DOWNLOAD"] == "false"
    assert world.storage.get(spec_path(job.id)) is not None
    world.cluster.start(name)
    assert world.rounds(job).state is State.STARTING
    world.driver(job).beat(3, message="trains teacher 1")
    assert world.rounds(job, n=1).state is State.RUNNING
    running = world.rounds(job, n=1)
    assert running.progress is not None
    assert (running.progress.stage, running.progress.completed) == ("distill", 3)
    assert (running.message, running.mlflow_run_id) == ("trains teacher 1", "run-1")
    world.driver(job).succeed()
    done = world.rounds(job, n=1)
    assert done.state is State.SUCCEEDED
    assert done.result is not None
    assert done.result.distilled is not None
    assert (done.result.distilled.mean, done.reason, done.error) == (87.0, None, None)
    assert [file.name for file in done.artifacts] == ["distilled/preview.png"]
    assert done.warnings == ("the driver's warning",)
    assert world.path(job) == ["queued", "starting", "running", "succeeded"]
    world.cluster.end(name, "SUCCEEDED", exit_code=0)
    assert world.rounds(job) == done


def test_job_when_its_data_is_missing_fails_with_the_drivers_words(world: World) -> None:
    job = world.running()
    world.driver(job).fail("dataset_unavailable", "there is no cifar10 in /data")
    failed = world.rounds(job, n=1)
    assert (failed.state, failed.reason) == (State.FAILED, Reason.USER_ERROR)
    assert failed.message == "there is no cifar10 in /data"
    assert failed.error is not None
    assert failed.error.code == "dataset_unavailable"


def test_job_when_its_driver_is_killed_recovers_with_a_new_attempt(world: World) -> None:
    job = world.running()
    world.cluster.end(f"{job.id}-1", message="driver was killed, last available logs (truncated):\nnoise")
    assert world.rounds(job, n=1).state is State.RECOVERING
    lost = world.job(job)
    assert (lost.reason, lost.losses) == (Reason.WORKER_LOST, 1)
    assert lost.message == "attempt 1 ended without a result: driver was killed; attempt 2 follows in 0 s"
    assert world.storage.get(attempt_path(job.id, 1, "driver.log")) == f"log of {job.id}-1\n".encode()
    again = world.rounds(job, n=2)
    assert (again.state, again.attempt) == (State.STARTING, 2)
    assert list(world.cluster.submissions) == [f"{job.id}-1", f"{job.id}-2"]
    world.driver(job).beat()
    world.rounds(job, n=1)
    world.driver(job).succeed()
    assert world.rounds(job).state is State.SUCCEEDED


def test_job_when_lost_too_often_fails(world: World) -> None:
    job = world.submit()
    for attempt in (1, 2, 3):
        world.rounds(job, n=2)
        world.cluster.end(f"{job.id}-{attempt}")
        world.rounds(job, n=1)
    failed = world.job(job)
    assert (failed.state, failed.reason, failed.losses) == (State.FAILED, Reason.WORKER_LOST, 3)
    assert failed.error is not None


def test_job_when_lost_ever_again_goes_on_as_long_as_it_gets_further(world: World) -> None:
    job = world.submit()
    for attempt in range(1, 13):
        world.rounds(job, n=2)
        world.cluster.start(f"{job.id}-{attempt}")
        world.driver(job).beat(kept=1)
        world.rounds(job, n=1)
        world.cluster.end(f"{job.id}-{attempt}")
        lost = world.rounds(job, n=1)
        assert (lost.state, lost.losses) == (State.RECOVERING, 1)
    for attempt in (13, 14):
        world.rounds(job, n=2)
        world.driver(job).beat()
        world.cluster.end(f"{job.id}-{attempt}")
        world.rounds(job, n=2)
    assert (world.job(job).state, world.job(job).losses) == (State.FAILED, 3)


def test_job_when_the_result_was_written_just_before_ray_saw_the_end_succeeds(world: World) -> None:
    job = world.running()
    world.driver(job).succeed()
    world.cluster.end(f"{job.id}-1")
    assert world.rounds(job, n=1).state is State.SUCCEEDED


def test_job_when_ray_forgets_it_goes_on_while_its_driver_does(world: World) -> None:
    job = world.running()
    world.cluster.restart()
    for completed in range(20):
        world.driver(job).beat(completed)
        assert world.rounds(job, n=1).state is State.RUNNING
    assert world.rounds(job, n=9).state is State.RUNNING
    assert world.rounds(job, n=1).state is State.RECOVERING
    assert world.job(job).reason is Reason.CLUSTER_LOST
    assert world.rounds(job, n=2).attempt == 2


def test_jobs_when_ray_is_away_nothing_is_decided(world: World) -> None:
    running, waiting = world.running(), world.submit()
    world.cluster.is_away = True
    world.cluster.restart()
    assert world.rounds(running, n=40).state is State.RUNNING
    job = world.job(waiting)
    assert (job.state, job.reason) == (State.QUEUED, Reason.CLUSTER_UNREACHABLE)
    world.driver(running).beat(7)
    progress = world.rounds(running, n=2).progress
    assert progress is not None
    assert progress.completed == 7
    world.driver(running).succeed()
    assert world.rounds(running, n=1).state is State.SUCCEEDED
    world.cluster.is_away = False
    assert world.rounds(waiting, n=2).state is State.STARTING


def test_job_when_its_documents_cannot_be_read_is_left_alone_and_holds_its_share(world: World) -> None:
    job, other = world.running(), world.submit()
    world.storage.put(attempt_path(job.id, 1, "status.json"), b"{half")
    world.cluster.end(f"{job.id}-1")
    assert world.rounds(job).state is State.RUNNING
    assert world.job(other).reason is Reason.CLUSTER_FULL
    world.driver(job).beat()
    assert world.rounds(job, n=1).state is State.RECOVERING


def test_round_when_the_storage_root_hangs_waits_for_it_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.cpus = 6
    jobs = [world.submit() for _ in range(3)]
    world.rounds(jobs[0], n=2)
    asked: list[str] = []

    def hang(path: str, _: object) -> None:
        asked.append(path.split("/")[1])
        world.seconds += 5.0
        raise StorageError.of("storage", path, "cannot be read: timed out", "")

    monkeypatch.setattr(world.storage, "get_record", hang)
    for _ in range(2):
        world.controller.round()
    assert len(asked) == 2
    assert len(set(asked)) == 2, "one job's documents do not hide those of the others for good"
    assert all("cannot be read: timed out" in world.job(job).message for job in jobs)


def test_round_when_the_storage_root_takes_nothing_waits_for_it_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.cluster.cpus = 6
    jobs = [world.submit() for _ in range(3)]
    world.controller.round()
    asked: list[str] = []

    def hang(path: str, _: object) -> None:
        asked.append(path)
        world.seconds += 5.0
        raise StorageError.of("storage", path, "cannot be written: timed out", "")

    with monkeypatch.context() as patched:
        patched.setattr(world.storage, "put", hang)
        world.controller.round()
    assert len(asked) == 1
    world.controller.round()
    assert set(world.cluster.submissions) == {f"{job.id}-1" for job in jobs}


def test_cancel_when_running_ends_only_after_its_driver(world: World) -> None:
    job = world.running()
    world.cluster.stops_at_once = False
    world.cancel(job)
    assert world.rounds(job, n=4).state is State.CANCELLING
    assert world.cluster.stops == [f"{job.id}-1"]
    assert world.rounds(job, n=4).state is State.CANCELLING
    assert len(world.cluster.stops) == 2
    world.driver(job).beat(9)
    world.cluster.end(f"{job.id}-1", "STOPPED")
    assert world.rounds(job, n=3).state is State.CANCELLING
    cancelled = world.rounds(job, n=3)
    assert (cancelled.state, cancelled.reason) == (State.CANCELLED, Reason.REQUESTED)
    assert world.path(job) == ["queued", "starting", "running", "cancelling", "cancelled"]


def test_cancel_when_the_set_was_there_before_succeeds(world: World) -> None:
    job = world.running()
    world.driver(job).succeed()
    world.cancel(job)
    assert world.rounds(job, n=1).state is State.SUCCEEDED
    assert world.job(job).result is not None


def test_cancel_when_not_yet_submitted_starts_nothing(world: World) -> None:
    job = world.submit()
    world.rounds(job, n=1)
    world.cancel(job)
    waiting = world.rounds(job, n=20)
    assert (waiting.state, waiting.reason) == (State.CANCELLING, Reason.REQUESTED)
    assert "waits for Ray, which may be about to start its driver" in waiting.message
    assert world.rounds(job, n=7).state is State.CANCELLED
    assert world.cluster.submissions == {}
    assert world.storage.size(f"jobs/{job.id}/attempts/1/stop.json"), "a driver that starts yet ends at once"


def test_cancel_when_the_answer_to_the_submission_was_lost_stops_what_ray_starts_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.submit()

    def slow(*_: object, **__: object) -> None:
        raise ClusterUnreachable.of("NCFM_RAY_URL", "memory", "timed out")

    with monkeypatch.context() as patched:
        patched.setattr(world.cluster, "submit", slow)
        world.rounds(job, n=2)
    starting = world.job(job)
    world.cancel(job)
    assert world.rounds(job, n=10).state is State.CANCELLING
    # Ray was slow to take it, and did.
    Launch.from_settings(world.settings).submit(starting, world.storage, world.cluster)
    assert world.rounds(job, n=3).state is State.CANCELLED
    assert world.cluster.stops == [f"{job.id}-1"]


def test_cancel_when_ray_is_away_meanwhile_waits_anew_for_what_it_may_start(world: World) -> None:
    job = world.submit()
    world.rounds(job, n=1)
    world.cancel(job)
    world.rounds(job, n=20)
    world.cluster.is_away = True
    world.rounds(job, n=1)
    world.cluster.is_away = False
    assert world.rounds(job, n=25).state is State.CANCELLING
    assert world.rounds(job, n=1).state is State.CANCELLED


def test_cancel_when_it_ends_while_a_slow_controller_submits_leaves_no_driver(world: World) -> None:
    job = world.submit()
    world.rounds(job, n=1)
    starting = world.job(job)
    world.cancel(job)
    assert world.rounds(job, n=28).state is State.CANCELLED
    slow = world.restarted()
    slow._act.do(Submit(starting))
    assert world.cluster.stops == [f"{job.id}-1"]


def test_job_when_ray_refuses_its_submission_fails_and_says_why(world: World) -> None:
    world.cluster.refuses = True
    job = world.submit()
    failed = world.rounds(job, n=2)
    assert (failed.state, failed.reason) == (State.FAILED, Reason.INTERNAL)
    assert failed.error is not None
    assert failed.error.code == "submission_refused"


def test_round_when_the_cluster_is_full_keeps_the_order(world: World) -> None:
    first, second = world.submit(), world.submit()
    world.rounds(first, n=2)
    waiting = world.job(second)
    assert (waiting.state, waiting.reason) == (State.QUEUED, Reason.CLUSTER_FULL)
    assert "needs 2 CPUs" in waiting.message
    events = world.store.events(second.id, after=0, limit=10)
    assert [event.type for event in events] == ["created", "waiting"]
    world.driver(first).beat()
    world.rounds(first, n=1)
    world.driver(first).succeed()
    assert world.rounds(second, n=2).state is State.STARTING
    assert world.job(second).reason is None


def test_round_when_ray_takes_no_submission_asks_once_and_tries_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.cluster.cpus = 100
    jobs = [world.submit() for _ in range(3)]
    world.controller.round()
    asked: list[str] = []

    def no_agent(submission_id: str, *_: object, **__: object) -> None:
        asked.append(submission_id)
        raise ClusterUnreachable.of("NCFM_RAY_URL", "memory", "no agent takes submissions")

    with monkeypatch.context() as patched:
        patched.setattr(world.cluster, "submit", no_agent)
        world.controller.round()
    assert asked == [f"{jobs[0].id}-1"]
    world.controller.round()
    assert len(world.cluster.submissions) == 3


class Killed(BaseException):
    """kill -9 of the controller."""


class Fuse:
    """Lets so many side effects happen and kills the controller right before or right after the next one."""

    def __init__(self, after: int, *, effect_happens: bool) -> None:
        self.left, self.effect_happens = after, effect_happens

    def around(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def burning(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                if self.effect_happens:
                    effect(*args, **kwargs)
                raise Killed
            return effect(*args, **kwargs)

        return burning


class Fused:
    """A part whose side effects pass through a fuse."""

    def __init__(self, part: object, fuse: Fuse, *effects: str) -> None:
        self._part, self._fuse, self._effects = part, fuse, effects

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return self._fuse.around(value) if name in self._effects else value


def live(world: World, job: Job, fuse: Fuse, *, cancel: bool) -> None:
    """A job's whole life, its first driver killed, its second one at peace; the controller dies when the fuse burns."""

    def restart() -> Controller:
        store: Any = Fused(world.store, fuse, "move", "note", "report")
        return world.restarted(store, fused_cluster)

    fused_cluster: Any = Fused(world.cluster, fuse, "submit", "stop")
    controller = restart()
    for step in range(40):
        try:
            controller.round()
        except Killed:
            controller = restart()
        world.seconds += 4
        current = world.job(job)
        if current.state.is_terminal and all(ray.is_terminal for ray in world.cluster.jobs.values()):
            return
        if cancel and step > 4 and not current.state.is_terminal and cancel_move(current) is not None:
            world.cancel(job)
        for name, ray in list(world.cluster.jobs.items()):
            attempt = int(name.rpartition("-")[2])
            driver = FakeDriver(world.storage, current.model_copy(update={"attempt": attempt}))
            if ray.status == "PENDING":
                world.cluster.start(name)
                driver.beat()
            elif ray.status == "RUNNING" and attempt == 1 and not cancel:
                world.cluster.end(name)
            elif ray.status == "RUNNING" and not cancel:
                driver.succeed()
                world.cluster.end(name, "SUCCEEDED", exit_code=0)


@pytest.mark.parametrize(("cancel", "effect_happens"), list(itertools.product([False, True], repeat=2)))
def test_job_when_the_controller_is_killed_around_any_side_effect(
    tmp_path: Path, cancel: bool, effect_happens: bool
) -> None:
    effects = 0
    for after in range(30):
        world = World(tmp_path / str(after))
        fuse = Fuse(after, effect_happens=effect_happens)
        job = world.submit()
        live(world, job, fuse, cancel=cancel)
        path = world.path(job)
        if cancel:
            assert path == ["queued", "starting", "running", "cancelling", "cancelled"], f"killed at {after}"
            assert list(world.cluster.submissions) == [f"{job.id}-1"]
        else:
            assert path == ["queued", "starting", "running", "recovering", "starting", "running", "succeeded"], after
            assert list(world.cluster.submissions) == [f"{job.id}-1", f"{job.id}-2"]
        assert all(ray.is_terminal for ray in world.cluster.jobs.values())
        world.store.close()
        if fuse.left >= 0:
            effects = after
            break
    assert effects >= (5 if cancel else 7), "the scenario has had at least as many side effects as moves"


def test_run_when_asked_to_stop_ends_at_once_and_tells_what_it_saw(world: World) -> None:
    stop = threading.Event()
    lookout = Lookout(world.store, "")
    thread = threading.Thread(
        target=world.controller.run, args=(stop,), kwargs={"poll_seconds": 30.0, "lookout": lookout}
    )
    thread.start()
    deadline = time.monotonic() + 10
    while world.store.sighting() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    stop.set()
    thread.join()
    assert time.monotonic() - began < 15, "half a poll"
    sighting = world.store.sighting()
    assert sighting is not None
    assert (sighting.cpus, sighting.gpus, sighting.ray_error) == (2, 0, "")


def test_lookout_when_ray_and_mlflow_are_away_says_so(world: World) -> None:
    lookout = Lookout(world.store, "http://127.0.0.1:9")
    lookout.note(Capacity(4, 1), "")
    lookout.note(None, "Ray cannot be asked")
    sighting = world.store.sighting()
    assert sighting is not None
    assert (sighting.cpus, sighting.ray_error) == (4, "Ray cannot be asked")
    assert "cannot be reached" in sighting.mlflow_error
    assert ask_mlflow("") == ""


def test_launch_when_the_storage_is_remote_passes_its_url_on(tmp_path: Path) -> None:
    env: Mapping[str, str] = Launch.from_settings(Settings(home=tmp_path, storage="s3://bucket/prefix")).env
    assert env["NCFM_STORAGE"] == "s3://bucket/prefix"
    assert env["NCFM_DATA_BUCKETS"] == ""
    settings = Settings(home=tmp_path, data_buckets=("s3://birds/b", "gs://fish"))
    assert Launch.from_settings(settings).env["NCFM_DATA_BUCKETS"] == "s3://birds/b,gs://fish"
    relative = Launch.from_settings(Settings(home=tmp_path, storage="here")).env["NCFM_STORAGE"]
    assert Path(relative).is_absolute()
