"""How the two engines behave at their edges: locks, restarts, room, texts that one of them cannot hold."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import event, text

from ncfm_core.submission import resolve
from service.database import Database, StoreError, StoreFullError
from service.filtering import Filter
from service.jobs import Job, Reason, State, new_job_id
from service.listing import summaries
from service.store import Sighting, Store
from tests.kept import all_jobs
from tests.postgres import Postgres
from worker.records import now

SPEC = resolve({"dataset": "digits", "ipc": 1}).document()


def new_job(**changes: object) -> Job:
    return Job(id=new_job_id(), requested={}, spec=SPEC, created_at=now()).model_copy(update=changes)


def test_store_when_a_driver_says_what_no_column_holds_keeps_the_rest(database_url: str) -> None:
    store = Store(database_url)
    said = {"note": "a\0b", "half": "\ud800", "pair": "\U0001f600"}
    job = store.add(new_job(requested=said, labels={"who": "m\u00fcller"}))
    assert store.note(store.get(job.id) or job, "waiting", {"loss": float("nan")}) is not None
    assert [event.data for event in store.events(job.id, after=1, limit=9)] == [{"loss": None}]
    job = store.get(job.id) or job
    starting = store.move(job, State.STARTING, attempt=1)
    assert starting is not None
    failed = store.move(starting, State.FAILED, reason=Reason.INTERNAL, message="said \0 and \ud800")
    assert failed is not None
    kept = store.get(job.id)
    assert kept is not None
    assert (kept.message, kept.requested) == ("said ? and ?", said | {"half": "?"})
    assert store.attempts(job.id)[0].message == "said ? and ?"
    assert all_jobs(store, Filter(labels={"who": "m\u00fcller"})) == [kept]
    assert all_jobs(store, Filter(labels={"who": "else"})) == []
    store.close()


def test_summaries_when_there_are_many_jobs_read_none_that_it_does_not_show(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/ncfm.db")
    asked: list[str] = []
    event.listen(store.engine, "before_cursor_execute", lambda *call: asked.append(str(call[2])))
    wanted = [
        Filter(),
        Filter(states=[State.SUCCEEDED]),
        Filter(owner="local"),
        Filter(dataset="digits"),
        Filter(method="ncfm"),
    ]
    for each in wanted:
        summaries(store, limit=50, beyond="01h", wanted=each)
    store.queue(limit=50)
    store.counts()
    with store.reading() as connection:
        for statement in [each for each in asked if each.startswith("SELECT")]:
            values = ("0",) * statement.count("?")
            plan = " ".join(
                str(row[3]) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
            )
            assert "INDEX" in plan and "TEMP B-TREE" not in plan, (statement, plan)
    store.close()


def test_queue_when_a_job_waits_without_a_reason_has_it(database_url: str) -> None:
    store = Store(database_url)
    job = store.add(new_job(reason=None))
    assert store.queue(limit=5) == [job]
    store.close()


def test_see_when_two_controllers_are_the_first_at_once(database_url: str) -> None:
    store = Store(database_url)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: store.see(Sighting(cpus=float(n), checked_at=now())), range(12)))
    sighting = store.sighting()
    assert sighting is not None and sighting.cpus is not None
    store.close()


def test_writing_when_another_holds_the_row_waits_its_turn(database_url: str) -> None:
    first, second = Store(database_url), Store(database_url)
    job = first.add(new_job())
    with ThreadPoolExecutor(1) as pool:
        with first.writing() as connection:
            connection.execute(text("UPDATE jobs SET version = version + 1"))
            waiting = pool.submit(second.move, job, State.STARTING, attempt=1)
            time.sleep(0.3)
            assert not waiting.done()
            assert second.get(job.id) == job, "readers wait for nobody"
        assert waiting.result(timeout=20) is None, "whoever came second sees that the job has changed"
    first.close()
    second.close()


def test_postgresql_when_opened_has_limits_on_all_that_can_hang(postgres: Postgres) -> None:
    database = Database(postgres.create_database())
    with database.reading() as connection:
        shown = {
            name: connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        }
        isolation = connection.execute(text("SHOW transaction_isolation")).scalar_one()
    assert shown == {
        "statement_timeout": "20s", "lock_timeout": "20s", "idle_in_transaction_session_timeout": "1min"
    }  # fmt: skip
    assert isolation == "read committed"
    database.close()


def test_postgresql_when_nobody_answers_says_so_soon() -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match="Is the server up") as caught:
        Store("postgresql://someone:secret@127.0.0.1:9/none")
    assert time.monotonic() - began < 5
    assert "secret" not in str(caught.value)


def test_postgresql_when_restarted_is_used_again_by_the_same_store() -> None:
    server = Postgres()
    store = Store(server.create_database())
    with ThreadPoolExecutor(5) as pool:
        kept = list(pool.map(lambda _: store.add(new_job()), range(20)))
    server.kill()
    with pytest.raises(StoreError):
        store.add(new_job())
    server.start()
    began = time.monotonic()
    while True:
        try:
            kept.append(store.add(new_job()))
            break
        except StoreError:
            assert time.monotonic() - began < 30
            time.sleep(0.05)
    assert {job.id for job in all_jobs(store)} == {job.id for job in kept}
    store.close()
    server.stop()


def test_sqlite_when_it_may_not_grow_says_so_and_goes_on_with_room(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/ncfm.db")
    kept = [store.add(new_job())]
    limits = {"pages": 1}
    event.listen(
        store.engine,
        "checkout",
        lambda connection, *_: connection.execute(f"PRAGMA max_page_count={limits['pages']}").close(),
    )
    with pytest.raises(StoreFullError, match="Make room"):
        for _ in range(200):
            kept.append(store.add(new_job()))
    assert {job.id for job in all_jobs(store)} == {job.id for job in kept}
    limits["pages"] = 100_000
    kept.append(store.add(new_job()))
    with store.reading() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
    assert sum(store.counts().values()) == len(kept)
    store.close()
