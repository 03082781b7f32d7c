"""What whoever runs the service does by hand: schema, copies, checks, removal. Through the command line, on real databases."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import tarfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, text, update

from ncfm_core.submission import resolve
from service.cli import app as cli
from service.database import open_unchecked
from service.jobs import CancelRequest, Job, Reason, State, new_job_id
from service.retention import Limits, tidy
from service.schema import downgrade, revision_of, upgrade
from service.store import IdempotencyKey, Store
from service.tables import attempts, audit, events, idempotency, jobs, uploads
from service.testing import FakeDriver
from tests.postgres import Postgres
from worker.records import AttemptResult, StageResult, attempt_path, now, object_folder
from worker.storage import Storage

SPEC = resolve({"dataset": "digits", "ipc": 1}).document()
Ncfm = Callable[..., tuple[int, str]]


@pytest.fixture
def ncfm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, database_url: str) -> Ncfm:
    """Runs a command on the test's database and storage root; its exit code and all that it said."""
    for name, value in {"HOME": "", "STORAGE": "/storage"}.items():
        monkeypatch.setenv(f"NCFM_{name}", f"{tmp_path}{value}")
    monkeypatch.setenv("NCFM_DATABASE_URL", database_url)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ncfm", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capfd.readouterr()
        return int(left.value.code or 0), said.out + said.err

    return run


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def new_job(store: Store) -> Job:
    return store.add(Job(id=new_job_id(), requested={}, spec=SPEC, created_at=now()))


def moved(job: Job | None) -> Job:
    assert job is not None
    return job


def ended(store: Store, storage: Storage, *, key: str = "a") -> Job:
    """A job that succeeded, with a committed result and its files."""
    job = moved(store.move(moved(store.move(new_job(store), State.STARTING, attempt=1)), State.RUNNING))
    result = FakeDriver(storage, job).succeed({"distilled/images.bin": b"x" * 1000})
    storage.commit(
        StageResult(
            key=f"sha256:{key}", stage="publish", built_by=f"{job.id}-1", created_at=now(), files=result.artifacts,
            figures={}, seconds=1.0, environment={},
        )
    )  # fmt: skip
    return moved(store.move(job, State.SUCCEEDED, artifacts=result.artifacts, publication="pending"))


def findings(ncfm: Ncfm, *arguments: str) -> tuple[int, dict[str, str]]:
    code, said = ncfm("doctor", "--json", *arguments)
    return code, {each["check"]: each["message"] for each in json.loads(said)["findings"]}


def test_db_when_empty_new_older_and_newer(ncfm: Ncfm) -> None:
    assert ncfm("db", "check")[0] == 1
    assert ncfm("db", "upgrade") == (0, "schema none -> 0003\n")
    assert ncfm("db", "upgrade") == (0, "schema 0003: nothing to do\n")
    assert ncfm("db", "check")[0] == 0
    assert ncfm("db", "downgrade", "0001")[0] == 2
    code, said = ncfm("db", "downgrade", "9999", "--yes")
    assert code == 1 and "Known ones: 0001, 0002, 0003" in said
    assert ncfm("db", "downgrade", "0001", "--yes")[0] == 0
    code, said = ncfm("db", "check", "--json")
    document = json.loads(said)
    assert (code, document["schema"], document["needs"]) == (1, "0001", "0003")
    assert "ncfm backup" in document["hint"] and "ncfm db upgrade" in document["hint"]
    assert ncfm("db", "upgrade") == (0, "schema 0001 -> 0003\n")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, ncfm: Ncfm, tmp_path: Path) -> Path:
    """A home that is not there, as after a slip in NCFM_HOME."""
    folder = tmp_path / "none"
    for name, value in {"HOME": str(folder), "STORAGE": "", "DATABASE_URL": ""}.items():
        monkeypatch.setenv(f"NCFM_{name}", value)
    return folder


LOOKS = [
    "db check",
    "db check --json",
    "db downgrade 0001 --yes",
    "doctor",
    "doctor --json",
    "gc",
    "gc --dry-run",
    "keys list",
    "keys revoke x",
    "backup copy.tar",
]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("command", LOOKS)
def test_command_that_looks_makes_nothing_and_says_that_nothing_is_there(
    ncfm: Ncfm, nowhere: Path, command: str
) -> None:
    code, said = ncfm(*command.split())
    assert code == 1 and "there is no database here" in said and str(nowhere / "ncfm.db") in said
    assert "NCFM_HOME" in said and "Traceback" not in said
    if command == "doctor":
        assert f"storage: '{nowhere}/storage': there is no storage root here" in said
    assert not nowhere.exists() and not Path("copy.tar").exists()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_command_that_looks_leaves_the_folder_as_it_is(ncfm: Ncfm, store: Store, storage: Storage) -> None:
    ended(store, storage)
    file = Path(str(store.engine.url.database))

    def seen() -> dict[str, tuple[int, int]]:
        return {each.name: (each.stat().st_size, each.stat().st_mtime_ns) for each in file.parent.iterdir()}

    for is_open in (True, False):
        if not is_open:
            store.close()
        before = seen()
        assert ("ncfm.db-wal" in before) == is_open
        for command in ("db check", "doctor --deep", "gc --dry-run", "keys list"):
            assert ncfm(*command.split())[0] == 0
        after = seen()
        # The index of the journal counts its readers.
        assert {name: each for name, each in after.items() if not name.endswith("-shm")} == {
            name: each for name, each in before.items() if not name.endswith("-shm")
        }
        assert after.keys() == before.keys()


def test_gc_when_the_database_is_empty_takes_no_upload_for_one_without_a_name(
    ncfm: Ncfm, database_url: str, storage: Storage, tmp_path: Path
) -> None:
    open_unchecked(database_url).close()
    if database_url.startswith("sqlite"):
        sqlite3.connect(database_url.removeprefix("sqlite:///")).close()
        Path(database_url.removeprefix("sqlite:///")).touch()
    storage.put(f"uploads/{'f' * 64}.zip", b"u")
    age_file(tmp_path / f"storage/uploads/{'f' * 64}.zip", 3)
    code, said = ncfm("gc")
    assert code == 1 and "the database is empty" in said
    assert storage.list("uploads")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_restore_when_there_is_no_database_leaves_nothing_beside_it(
    ncfm: Ncfm, store: Store, nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, url = new_job(store), str(store.engine.url)
    monkeypatch.setenv("NCFM_DATABASE_URL", url)
    assert ncfm("backup", str(tmp_path / "copy.tar"))[0] == 0
    monkeypatch.setenv("NCFM_DATABASE_URL", "")
    code, said = ncfm("restore", str(tmp_path / "copy.tar"))
    assert code == 0, said
    assert [each.name for each in nowhere.iterdir() if "-" not in each.name] == ["ncfm.db"]
    assert not list(nowhere.glob("*.replaced-*"))
    with Store(f"sqlite:///{nowhere}/ncfm.db") as restored:
        assert restored.get(job.id) == job


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_db_check_when_the_file_is_damaged_says_so(ncfm: Ncfm, store: Store, storage: Storage) -> None:
    for _ in range(50):
        new_job(store)
    path = Path(str(store.engine.url.database))
    with store.engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.exec_driver_sql("BEGIN")
    store.close()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(16_384))
    for command in (("db", "check"), ("doctor",)):
        code, said = ncfm(*command)
        assert code == 1
        assert "damaged" in said and "ncfm restore" in said
        assert "Traceback" not in said


@pytest.fixture
def tools(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    """The client tools of the engine, where it has any."""
    if database_url.startswith("postgresql"):
        server: Postgres = request.getfixturevalue("postgres")
        monkeypatch.setenv("PATH", f"{server.binaries}:{os.environ['PATH']}")


@pytest.mark.usefixtures("tools")
def test_backup_when_restored_gives_every_row_back(ncfm: Ncfm, store: Store, storage: Storage, tmp_path: Path) -> None:
    kept = [ended(store, storage, key=str(n)) for n in range(3)]
    copy = tmp_path / "copy.tar"
    assert ncfm("backup", str(copy))[0] == 0
    code, said = ncfm("backup", str(copy))
    assert code == 1 and "--force" in said
    code, said = ncfm("backup", str(copy), "--force", "--json")
    assert code == 0 and json.loads(said)["counts"]["jobs"] == 3
    late = new_job(store)
    code, said = ncfm("restore", str(copy))
    assert code == 1 and "4 jobs" in said and "--force" in said
    store.close()
    code, said = ncfm("restore", str(copy), "--force")
    assert code == 0, said
    assert store.get(late.id) is None
    assert [store.get(job.id) for job in kept] == kept
    assert [event.seq for event in store.events(kept[0].id, after=0, limit=9)] == [1, 2, 3, 4]
    assert ncfm("doctor")[0] == 0
    new_job(store)


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_restore_when_the_copy_is_of_an_older_release_takes_the_place_of_a_newer_schema(
    ncfm: Ncfm, store: Store, storage: Storage, tmp_path: Path, force: tuple[str, ...]
) -> None:
    """What the newer release has added refers to tables that the copy brings."""
    job = new_job(store)
    with store.writing() as connection:
        downgrade(connection, "0002")
    copy = tmp_path / "copy.tar"
    assert ncfm("backup", str(copy))[0] == 0
    with store.writing() as connection:
        upgrade(connection)
        if not force:
            connection.execute(delete(events))
            connection.execute(delete(jobs))
    store.close()
    code, said = ncfm("restore", str(copy), *force)
    assert code == 0, said
    with store.reading() as connection:
        assert revision_of(connection) == "0002"
    store.close()
    assert ncfm("db", "upgrade")[0] == 0
    assert store.get(job.id) == job
    storage.put("jobs/mark", b"")
    code, said = ncfm("doctor")
    assert code == 0, said


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_copy_beside_that_was_broken_off_is_made_anew(store: Store) -> None:
    job = new_job(store)
    file = Path(str(store.engine.url.database))
    file.with_name(f"{file.name}.0002.partial").write_bytes(b"half of a copy")
    kept = store.copy_beside("0002")
    assert kept == f"{file}.0002"
    with Store(f"sqlite:///{kept}") as copied:
        assert copied.get(job.id) == job
    assert not list(file.parent.glob("*.partial"))
    new_job(store)
    before = Path(kept).read_bytes()
    assert store.copy_beside("0002") == kept
    assert Path(kept).read_bytes() == before, "the one from before the upgrade stays"


@pytest.mark.usefixtures("tools")
def test_restore_when_the_copy_is_damaged_changes_nothing(
    ncfm: Ncfm, store: Store, storage: Storage, tmp_path: Path
) -> None:
    job = new_job(store)
    copy, bad = tmp_path / "copy.tar", tmp_path / "bad.tar"
    assert ncfm("backup", str(copy))[0] == 0
    store.close()
    content = copy.read_bytes()
    with tarfile.open(copy) as archive:
        data = archive.getmembers()[1]
    middle = data.offset_data + data.size // 2
    cases = {
        "sha256 differs": content[:middle] + b"!!!!" + content[middle + 4 :],
        "not a whole copy": content[:middle],
    }
    for says, damaged in (*cases.items(), ("not a whole copy", b""), ("not a whole copy", b"no tar" * 1000)):
        bad.write_bytes(damaged)
        code, said = ncfm("restore", str(bad), "--force")
        assert (code, says in said) == (1, True), said
    assert store.get(job.id) == job


def test_backup_when_pg_dump_is_missing_names_the_way_out(
    ncfm: Ncfm, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, said = ncfm("backup", str(tmp_path / "copy.tar"))
    if store.engine.dialect.name == "sqlite":
        assert code == 0
    else:
        assert code == 1 and "pg_dump" in said and "client tools" in said
        assert not list(tmp_path.glob("*copy*")) and not list(tmp_path.glob(".ncfm*"))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_restore_when_the_database_is_in_use_refuses(ncfm: Ncfm, store: Store, tmp_path: Path) -> None:
    new_job(store)
    copy = tmp_path / "copy.tar"
    assert ncfm("backup", str(copy))[0] == 0
    user = sqlite3.connect(str(store.engine.url.database))
    user.execute("SELECT count(*) FROM jobs").fetchall()
    code, said = ncfm("restore", str(copy), "--force")
    assert code == 1 and "in use" in said
    user.close()
    store.close()
    assert ncfm("restore", str(copy), "--force")[0] == 0
    assert list(Path(str(store.engine.url.database)).parent.glob("*.replaced-*")), "the old file is kept"


def test_doctor_when_all_is_well_has_notes_alone(ncfm: Ncfm, store: Store, storage: Storage) -> None:
    ended(store, storage)
    job = moved(store.move(moved(store.move(new_job(store), State.STARTING, attempt=1)), State.RUNNING))
    FakeDriver(storage, job).succeed({})
    code, found = findings(ncfm, "--deep")
    found.pop("disk", None)
    assert (code, set(found)) == (0, {"mlflow", "untaken"})
    assert found["untaken"] == "attempt 1 has succeeded, and the job is running"


def test_doctor_when_rows_contradict_each_other_names_each(ncfm: Ncfm, store: Store, storage: Storage) -> None:
    job = ended(store, storage)
    breaks: dict[str, tuple[Any, Any]] = {
        "events": (
            delete(events).where(events.c.seq == 2),
            insert(events).values(
                job_id=job.id, seq=2, at=now(), type="state", data={"from": "queued", "to": "starting"}
            ),
        ),
        "moves": (
            update(jobs).values(state="failed"),
            update(jobs).values(state="succeeded"),
        ),
        "attempts": (update(attempts).values(ended_at=None), update(attempts).values(ended_at=now())),
    }
    for check, (broken, mended) in breaks.items():
        with store.writing() as connection:
            connection.execute(broken)
        code, found = findings(ncfm)
        assert code == 1 and check in found, found
        with store.writing() as connection:
            connection.execute(mended)
        assert findings(ncfm)[0] == 0


def test_doctor_when_a_history_has_a_move_that_is_not_made_any_more_lets_it_stand(
    ncfm: Ncfm, store: Store, storage: Storage
) -> None:
    job = moved(store.move(new_job(store), State.STARTING, attempt=1))
    for to in (State.RECOVERING, State.FAILED):
        job = moved(store.move(job, to))
    for end, is_wrong in (("cancelled", False), ("succeeded", True)):
        with store.writing() as connection:
            data = {"from": "recovering", "to": end}
            connection.execute(update(events).where(events.c.seq == job.event_seq).values(data=data))
            connection.execute(update(jobs).values(state=end))
            connection.execute(update(attempts).values(outcome=end))
        found = findings(ncfm)[1]
        assert ("moves" in found) is is_wrong, found


def test_doctor_when_files_are_missing_or_damaged_names_them(ncfm: Ncfm, store: Store, storage: Storage) -> None:
    job = ended(store, storage)
    path = job.artifacts[0].path
    storage.put(path, b"y" * 1000)
    assert findings(ncfm)[0] == 0, "only --deep reads it"
    code, found = findings(ncfm, "--deep")
    assert code == 1 and "sha256 differs" in found["artifacts"] and "sha256 differs" in found["results"]
    storage.put(path, b"y")
    assert "has 1 bytes and not 1000" in findings(ncfm)[1]["artifacts"]
    storage.delete([path])
    assert "is missing" in findings(ncfm)[1]["artifacts"]
    storage.put("results/b.json", b"no result")
    assert ncfm("doctor")[0] == 1


def test_gc_when_things_are_old_removes_them_and_nothing_else(
    ncfm: Ncfm, store: Store, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gone, live = ended(store, storage), ended(store, storage, key="b"), new_job(store)
    store.add_once(
        Job(id=new_job_id(), requested={}, spec=SPEC, created_at=now() - timedelta(hours=80)),
        IdempotencyKey("local", "POST /jobs", "old", "f"),
    )
    store.add_once(
        Job(id=new_job_id(), requested={}, spec=SPEC, created_at=now()),
        IdempotencyKey("local", "POST /jobs", "new", "f"),
    )
    long_ago = now() - timedelta(days=100)
    with store.writing() as connection:
        connection.execute(update(jobs).where(jobs.c.id == gone.id).values(deleted_at=long_ago, publication="done"))
        connection.execute(update(jobs).where(jobs.c.id == kept.id).values(finished_at=long_ago))
        for at in (long_ago, now()):
            row = {"at": at, "actor": "a", "action": "x", "target": "", "request_id": "", "address": "", "data": {}}
            connection.execute(insert(audit).values(row))
    storage.put(f"jobs/{gone.id}/spec.json", b"{}")
    for job in (kept, live):
        storage.put(f"checkpoints/{job.id}/abc/1/5.safetensors", b"c" * 10)
    for name, age in (("objects/x-1/distill-a/old.bin", 3), ("objects/x-1/distill-a/new.bin", 0)):
        storage.put(name, b"o")
        age_file(tmp_path / "storage" / name, age)
    age_file(tmp_path / "storage" / kept.artifacts[0].path, 3)
    for name, named in (("f" * 64, False), ("e" * 64, True)):
        storage.put(f"uploads/{name}.zip", b"u")
        age_file(tmp_path / f"storage/uploads/{name}.zip", 3)
        if named:
            facts = {"id": name, "owner": "local", "name": "birds", "size": 1, "facts": {}, "created_at": now()}
            with store.writing() as connection:
                connection.execute(insert(uploads).values(facts))
    (tmp_path / "storage/objects/half.bin#1").write_bytes(b"h")
    age_file(tmp_path / "storage/objects/half.bin#1", 3)

    code, said = ncfm("gc", "--dry-run", "--json")
    told = json.loads(said)["counts"]
    assert (code, storage.list(f"jobs/{gone.id}")) != (0, [])
    code, said = ncfm("gc", "--json")
    assert json.loads(said)["counts"] == told
    assert {name: told[name] for name in ("events", "idempotency", "audit", "deleted jobs", "checkpoints")} == {
        "events": 3, "idempotency": 1, "audit": 1, "deleted jobs": 1, "checkpoints": 1
    }  # fmt: skip
    assert told["unreferenced objects"] == told["temporary files"] == told["uploads without a name"] == 1
    assert storage.list("uploads") == [f"uploads/{'e' * 64}.zip"]
    assert store.get(gone.id, deleted=True) is None
    assert storage.list(f"jobs/{gone.id}") == [] and storage.list("checkpoints") != []
    assert [(event.seq, event.data["to"]) for event in store.events(kept.id, after=0, limit=9)] == [(4, "succeeded")]
    assert len(storage.list("results")) == 2, "results stay unless told otherwise"
    assert storage.size(kept.artifacts[0].path) == 1000
    with store.reading() as connection:
        assert connection.execute(idempotency.select()).one().key == "new"
        assert connection.execute(text("SELECT count(*) FROM events WHERE job_id = :id"), {"id": gone.id}).scalar() == 0
    assert ncfm("gc") == (0, "nothing to remove\n")
    assert ncfm("doctor")[0] == 0

    age_result(storage, "results/b.json", now() - timedelta(days=9))
    monkeypatch.setenv("NCFM_KEEP_CACHE_DAYS", "1")
    assert json.loads(ncfm("gc", "--json")[1])["counts"]["results"] == 1
    assert storage.list("results") == ["results/a.json"]


def test_gc_when_a_result_is_unreadable_keeps_its_files_and_removes_the_rest(
    ncfm: Ncfm, store: Store, storage: Storage, tmp_path: Path
) -> None:
    damaged, other = "c" * 64, "d" * 64
    kept, gone = (f"{object_folder('x-1', 'distill', f'sha256:{key}')}/images.bin" for key in (damaged, other))
    for path in (kept, gone):
        storage.put(path, b"o")
        age_file(tmp_path / "storage" / path, 3)
    storage.put(f"results/{damaged}.json", b"")
    code, said = ncfm("gc", "--json")
    [line] = [line for line in said.splitlines() if line.startswith("{")]
    assert (code, json.loads(line)["counts"]) == (0, {"unreferenced objects": 1})
    assert storage.list("objects") == [kept]
    assert storage.size(f"results/{damaged}.json") == 0, "whoever needs it sets it aside"


def test_gc_keeps_results_that_a_publisher_is_yet_to_read(
    ncfm: Ncfm, store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ended(store, storage)
    teacher = StageResult(
        key="sha256:t", stage="teachers", built_by=f"{job.id}-1", created_at=now() - timedelta(days=9), files=(),
        figures={}, seconds=1.0, environment={},
    )  # fmt: skip
    storage.commit(teacher)
    path = attempt_path(job.id, 1, "result.json")
    last = storage.get_record(path, AttemptResult)
    assert last is not None
    storage.put_record(path, last.model_copy(update={"keys": ("sha256:t",)}))
    monkeypatch.setenv("NCFM_KEEP_CACHE_DAYS", "1")
    assert "results" not in json.loads(ncfm("gc", "--json")[1])["counts"]
    with store.writing() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(publication="done"))
    assert json.loads(ncfm("gc", "--json")[1])["counts"]["results"] == 1
    assert storage.list("results") == ["results/a.json"]


def test_tidy_keeps_checkpoints_of_jobs_that_were_cancelled_to_be_gone_on_from(store: Store, storage: Storage) -> None:
    saved, plain, old, deleted, live = (new_job(store) for _ in range(5))
    for job in (saved, plain, old, deleted):
        request = CancelRequest(checkpoint=job is not plain, requested_at=now())
        store.move(job, State.CANCELLED, reason=Reason.REQUESTED, cancel=request)
    with store.writing() as connection:
        days = now() - timedelta(days=8)
        connection.execute(update(jobs).where(jobs.c.id == old.id).values(finished_at=days))
        connection.execute(update(jobs).where(jobs.c.id == deleted.id).values(deleted_at=now()))
    for job in (saved, plain, old, deleted, live):
        storage.put(f"checkpoints/{job.id}/abc/1/0000000005.json", b"c" * 10)
        storage.put(f"resumable/abc/{job.id}", b"")
    for folder in ("checkpoints", "resumable"):
        for path in storage.list(folder):
            age_file(Path(storage.url) / path, 3)
    assert tidy(store, storage, now(), Limits(), dry_run=True).counts == {"checkpoints": 3}
    assert len(storage.list("checkpoints")) == len(storage.list("resumable")) == 5
    assert tidy(store, storage, now(), Limits()).counts == {"checkpoints": 3}
    for folder, place in (("checkpoints", 1), ("resumable", 2)):
        assert {path.split("/")[place] for path in storage.list(folder)} == {saved.id, live.id}
    later = now() + timedelta(days=8)
    assert "checkpoints" not in tidy(store, storage, later, Limits(checkpoints=timedelta(days=9))).counts
    assert tidy(store, storage, later, Limits()).counts == {"checkpoints": 1}
    assert {path.split("/")[1] for path in storage.list("checkpoints")} == {live.id}


def test_tidy_when_thousands_are_old_removes_them_in_batches(store: Store, storage: Storage) -> None:
    job = new_job(store)
    store.move(moved(store.move(job, State.STARTING, attempt=1)), State.FAILED, reason=Reason.INTERNAL)
    long_ago = now() - timedelta(days=100)
    row = {"owner": "local", "operation": "x", "fingerprint": "f", "job_id": job.id, "created_at": long_ago}
    with store.writing() as connection:
        connection.execute(insert(idempotency), [row | {"key": str(n)} for n in range(1234)])
    assert tidy(store, storage, now(), Limits()).counts == {"idempotency": 1234}
    assert tidy(store, storage, now(), Limits()).counts == {}


def age_file(path: Path, days: float) -> None:
    at = (now() - timedelta(days=days)).timestamp()
    os.utime(path, (at, at))


def age_result(storage: Storage, path: str, created_at: datetime) -> None:
    result = storage.get_record(path, StageResult)
    assert result is not None
    storage.put_record(path, result.model_copy(update={"created_at": created_at}))
