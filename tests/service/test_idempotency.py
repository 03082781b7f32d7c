"""One key, one job: however often, by however many, and in however short a time it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ncfm_core.submission import resolve
from service.jobs import Job, new_job_id
from service.store import IdempotencyKey, KeyReused, Store
from tests.kept import all_jobs
from worker.records import now

SPEC = resolve({"dataset": "digits", "ipc": 1}).document()
KEY = IdempotencyKey("local", "POST /jobs", "key-1", "f" * 64)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


def new_job() -> Job:
    return Job(id=new_job_id(), requested={}, spec=SPEC, created_at=now())


def test_add_once_when_a_hundred_send_one_key_makes_one_job(store: Store, database_url: str) -> None:
    other = Store(database_url)
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda n: (store, other)[n % 2].add_once(new_job(), KEY), range(100)))
    assert len({job.id for job, _ in made}) == 1
    assert sum(is_new for _, is_new in made) == 1
    [kept] = all_jobs(store)
    assert kept == made[0][0]
    assert [event.type for event in store.events(kept.id, after=0, limit=9)] == ["created"]
    other.close()


def test_add_once_when_the_key_comes_with_another_request_is_refused(store: Store) -> None:
    job, _ = store.add_once(new_job(), KEY)
    with pytest.raises(KeyReused, match=job.id):
        store.add_once(new_job(), IdempotencyKey(KEY.owner, KEY.operation, KEY.key, "e" * 64))
    assert sum(store.counts().values()) == 1


def test_add_once_when_owner_operation_or_key_differ_makes_another_job(store: Store) -> None:
    for key in (
        KEY,
        IdempotencyKey("other", KEY.operation, KEY.key, KEY.fingerprint),
        IdempotencyKey(KEY.owner, "POST /jobs/x/rerun", KEY.key, KEY.fingerprint),
        IdempotencyKey(KEY.owner, KEY.operation, "key-2", KEY.fingerprint),
    ):
        assert store.add_once(new_job(), key)[1]
    assert sum(store.counts().values()) == 4


def test_add_once_when_the_first_try_was_taken_back_makes_the_job(store: Store) -> None:
    taken = store.add(new_job())
    with pytest.raises(Exception, match=r"UNIQUE|unique"):
        store.add_once(taken, KEY)
    job, is_new = store.add_once(new_job(), KEY)
    assert is_new
    assert store.get(job.id) == job
