"""One holder at a time, told by the database's clock; whoever lost the lease writes nothing more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ncfm_core.submission import resolve
from service.database import Database
from service.jobs import Job, State, new_job_id
from service.leases import FencedError, acquire, release
from service.store import Store
from worker.records import now

SPEC = resolve({"dataset": "digits", "ipc": 1}).document()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


def new_job() -> Job:
    return Job(id=new_job_id(), requested={}, spec=SPEC, created_at=now())


def test_acquire_when_free_held_over_and_released(database: Database) -> None:
    first = acquire(database, "a", seconds=30)
    assert (first.holder, first.token) == ("a", 1)
    seen = acquire(database, "b", seconds=30)
    assert (seen.holder, seen.token) == ("a", 1)
    assert 25 < seen.seconds_left <= 30
    assert acquire(database, "a", seconds=0.2).token == 1, "a renewal is no new holder"
    time.sleep(0.3)
    assert acquire(database, "b", seconds=30).token == 2
    release(database, "a")
    assert acquire(database, "a", seconds=30).holder == "b", "only the holder can release it"
    release(database, "b")
    assert acquire(database, "a", seconds=30).token == 3
    assert acquire(database, "a", seconds=30, name="other").token == 1


def test_acquire_when_many_ask_at_once_has_one_holder(database: Database) -> None:
    for name in ("one", "two", "three"):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda n, name=name: acquire(database, f"c{n}", seconds=30, name=name), range(8)))
        assert len({(lease.holder, lease.token) for lease in found}) == 1
        assert found[0].token == 1


def test_write_when_another_took_over_is_refused_and_leaves_nothing(database: Database, database_url: str) -> None:
    job = new_job()
    free = Store(database_url)
    free.add(job)
    lease = acquire(database, "a", seconds=0.2)
    held = Store(database_url, fence=lease.token)
    starting = held.move(free.get(job.id) or job, State.STARTING, attempt=1)
    assert starting is not None
    assert held.attempts(job.id)[0].fence == 1
    time.sleep(0.3)
    assert held.note(starting, "waiting", {}) is not None, "nobody else has taken it: it may still write"
    taken = acquire(database, "b", seconds=30)
    current = free.get(job.id)
    assert current is not None
    writes: tuple[Callable[[], object], ...] = (
        lambda: held.move(current, State.RUNNING),
        lambda: held.note(current, "waiting", {}),
        lambda: held.report(current, message="late"),
        lambda: held.add(new_job()),
    )
    for write in writes:
        with pytest.raises(FencedError, match="b"):
            write()
    assert free.get(job.id) == current
    assert sum(free.counts().values()) == 1
    second = Store(database_url, fence=taken.token)
    assert second.move(current, State.RUNNING) is not None
    for store in (free, held, second):
        store.close()


def test_acquire_when_a_write_of_the_holder_is_under_way_waits_for_it(database: Database, database_url: str) -> None:
    """Between the check of the fence and the commit nobody can take over."""
    job = new_job()
    lease = acquire(database, "a", seconds=0.05)
    held = Store(database_url, fence=lease.token)
    held.add(job)
    time.sleep(0.1)
    with ThreadPoolExecutor(1) as pool:
        with held.writing():
            waiting = pool.submit(acquire, database, "b", seconds=30)
            time.sleep(0.3)
            assert not waiting.done()
        assert waiting.result(timeout=20).token == 2
    held.close()
