from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from pydantic import JsonValue

from ncfm_core.submission import resolve
from service.database import StoreError
from service.filtering import Filter
from service.jobs import IllegalMove, Job, Reason, State, new_job_id
from service.listing import summaries
from service.reports import Progress
from service.store import Sighting, Store
from tests.kept import all_jobs
from worker.records import now

DOCUMENT: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1}
SPEC = resolve(DOCUMENT).document()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


def add(store: Store, **changes: object) -> Job:
    job = Job(id=new_job_id(), requested=DOCUMENT, spec=SPEC, created_at=now())
    return store.add(job.model_copy(update=changes))


def test_add_when_read_back_by_another_store(store: Store, database_url: str) -> None:
    job = add(store, warnings=("slow",))
    other = Store(database_url)
    assert other.get(job.id) == job
    assert other.get("nothing") is None
    [event] = other.events(job.id, after=0, limit=10)
    assert (event.seq, event.type, event.data) == (1, "created", {"state": "queued"})
    other.close()


def test_move_when_legal_sets_times_and_writes_one_event(store: Store) -> None:
    job = add(store)
    starting = store.move(job, State.STARTING, attempt=1)
    assert starting is not None
    assert starting.started_at is not None
    running = store.move(starting, State.RUNNING, progress=Progress(stage=None, completed=0, total=1, unit="step"))
    assert running is not None
    done = store.move(running, State.FAILED, reason=Reason.USER_ERROR, message="no data")
    assert done is not None
    assert done.finished_at is not None
    assert done == store.get(job.id)
    events = store.events(job.id, after=0, limit=10)
    assert [event.seq for event in events] == [1, 2, 3, 4]
    assert events[-1].data == {
        "from": "running", "to": "failed", "reason": "user_error", "message": "no data", "attempt": 1
    }  # fmt: skip


def test_move_when_illegal_or_terminal_writes_nothing(store: Store) -> None:
    job = add(store)
    with pytest.raises(IllegalMove):
        store.move(job, State.SUCCEEDED)
    cancelled = store.move(job, State.CANCELLED)
    assert cancelled is not None
    with pytest.raises(IllegalMove):
        store.move(cancelled, State.STARTING)
    assert store.get(job.id) == cancelled
    assert len(store.events(job.id, after=0, limit=10)) == 2


def test_move_when_the_job_was_read_too_early_changes_nothing(store: Store) -> None:
    job = add(store)
    moved = store.move(job, State.STARTING, attempt=1)
    assert store.move(job, State.CANCELLED) is None
    assert store.note(job, "waiting", {}, reason=Reason.CLUSTER_FULL) is None
    store.report(job, message="too late")
    assert store.get(job.id) == moved


def test_report_when_the_job_is_moved_meanwhile_by_another_never_stands_in_its_way(store: Store) -> None:
    job = store.move(add(store), State.STARTING, attempt=1)
    assert job is not None
    store.report(job, progress=Progress(stage="distill", completed=3, total=9, unit="step"))
    moved = store.move(job, State.CANCELLING, reason=Reason.REQUESTED)
    assert moved is not None
    assert len(store.events(job.id, after=0, limit=10)) == 3


def test_move_when_many_threads_race_exactly_one_wins(store: Store) -> None:
    for _ in range(10):
        job = add(store)
        barrier = threading.Barrier(8)

        def race(number: int, job: Job = job, barrier: threading.Barrier = barrier) -> Job | None:
            barrier.wait()
            return store.move(job, State.STARTING if number % 2 else State.CANCELLED, attempt=number)

        with ThreadPoolExecutor(8) as pool:
            winners = [moved for moved in pool.map(race, range(8)) if moved is not None]
        assert winners == [store.get(job.id)]
        assert [event.seq for event in store.events(job.id, after=0, limit=10)] == [1, 2]


def test_note_when_many_stores_write_at_once_sequence_has_no_gaps(store: Store, database_url: str) -> None:
    job = add(store)

    def write(number: int) -> None:
        other = Store(database_url)
        written = 0
        while written < 10:
            current = other.get(job.id)
            assert current is not None
            written += other.note(current, "waiting", {"by": number}) is not None
        other.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    events = store.events(job.id, after=0, limit=100)
    assert [event.seq for event in events] == list(range(1, 42))


def test_summaries_when_jobs_are_added_meanwhile_are_stable(store: Store) -> None:
    jobs = [add(store) for _ in range(7)]
    newest_first = sorted((job.id for job in jobs), reverse=True)
    first = summaries(store, limit=3, wanted=Filter())
    add(store)
    second = summaries(store, limit=3, wanted=Filter(), beyond=first[-1]["id"])
    add(store)
    third = summaries(store, limit=3, wanted=Filter(), beyond=second[-1]["id"])
    assert [row["id"] for row in (*first, *second, *third)] == newest_first


def test_summaries_when_filtered_by_state(store: Store) -> None:
    jobs = [add(store) for _ in range(3)]
    store.move(jobs[1], State.CANCELLED)
    assert [job.id for job in all_jobs(store, Filter(states=[State.CANCELLED]))] == [jobs[1].id]
    assert len(all_jobs(store, Filter(states=[State.CANCELLED, State.QUEUED]))) == 3


def test_queue_when_many_exceed_the_cluster_still_shows_the_others(store: Store) -> None:
    for _ in range(5):
        add(store, reason=Reason.EXCEEDS_CLUSTER)
    small = add(store)
    window = store.queue(limit=2)
    assert small.id in [job.id for job in window]
    assert [job.id for job in window] == sorted(job.id for job in window)


def test_active_when_some_jobs_have_ended(store: Store) -> None:
    running, done = add(store), add(store)
    store.move(running, State.STARTING)
    store.move(done, State.CANCELLED)
    assert [job.id for job in store.active()] == [running.id]


def test_sighting_when_the_cluster_goes_away_keeps_its_totals(store: Store) -> None:
    assert store.sighting() is None
    seen_at = datetime(2026, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    store.see(Sighting(cpus=2, gpus=1, seen_at=seen_at, checked_at=seen_at))
    later = seen_at + timedelta(seconds=9)
    store.see(Sighting(checked_at=later, ray_error="away"))
    sighting = store.sighting()
    assert sighting == Sighting(cpus=2, gpus=1, seen_at=seen_at, checked_at=later, ray_error="away")
    assert sighting is not None
    assert sighting.checked_at.tzinfo is UTC


def test_check_writable_when_it_is_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    assert store.sighting() is None


def test_store_when_killed_before_a_commit_keeps_nothing_of_it(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/deep/er/ncfm.db")
    job = add(store)
    raw = sqlite3.connect(tmp_path / "deep/er/ncfm.db", isolation_level=None)
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.execute("BEGIN IMMEDIATE")
    raw.execute("UPDATE jobs SET state = 'failed'")
    raw.close()
    assert store.get(job.id) == job
    store.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:////proc/nowhere/ncfm.db", "No such file"),
        ("sqlite:///{folder}", "unable to open"),
        ("sqlite:///{file}", "not a database"),
        ("sqlite://", "in memory"),
        ("nonsense", "parse"),
        ("mysql+nothing://user:secret@host/name", "Can't load plugin"),
    ],
)
def test_store_when_it_cannot_be_opened_names_setting_value_and_way_out(url: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is a text of more than a hundred bytes " * 5)
    with pytest.raises(StoreError) as caught:
        Store(url.format(folder=tmp_path, file=tmp_path / "text"))
    [problem] = caught.value.problems
    assert problem.field == "NCFM_DATABASE_URL"
    assert says in problem.message
    assert "secret" not in str(caught.value)
    assert "sqlite:////absolute/path.db" in problem.hint
