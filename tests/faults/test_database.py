"""The database's own faults: killed writers, a restarted server, a lock that somebody holds, a disk without room.

Whatever was acknowledged is there afterwards, once; meanwhile the answer is 503 or 507 with the way out.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from ncfm_core.submission import resolve
from service.database import StoreError
from service.doctor import examine
from service.jobs import Job, new_job_id
from service.store import IdempotencyKey, Store
from tests.faults.checker import ClientLog
from tests.faults.checker import check as check_everything
from tests.kept import all_jobs
from tests.postgres import Postgres
from tests.serving import ApiProcess
from worker.records import now
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Until = Callable[..., Any]

SPEC = resolve({"dataset": "digits", "ipc": 1}).document()
WRITERS = 4
RECOVERY_LIMIT_S = 5.0

WRITE = """
import sys
from service.jobs import Job, new_job_id
from service.store import IdempotencyKey, Store
from worker.records import now
import json
store, spec = Store(sys.argv[1]), json.loads(sys.argv[2])
# The last ones once more: some of them may be in doubt.
for n in range(max(0, int(sys.argv[4]) - 20), 10**9):
    key = f"{sys.argv[3]}-{n}"
    job = Job(id=new_job_id(), requested={"seed": n}, spec=spec, created_at=now(), labels={"key": key})
    kept, _ = store.add_once(job, IdempotencyKey("local", "POST /jobs", key, "f"))
    sys.stdout.write(f"{key} {kept.id}\\n")
    sys.stdout.flush()
"""

LOCK = """
import sqlite3, sys, time
held = sqlite3.connect(sys.argv[1], isolation_level=None)
held.execute("BEGIN IMMEDIATE")
sys.stdout.write("held\\n")
sys.stdout.flush()
time.sleep(float(sys.argv[2]))
held.execute("COMMIT")
"""


def check(url: str, storage: Path, acknowledged: dict[str, str]) -> None:
    """Each acknowledged job is there; one job for each key; events, moves and the file are whole."""
    with Store(url) as store:
        kept = {job.id: job for job in all_jobs(store)}
        assert set(acknowledged.values()) <= set(kept), "acknowledged, and lost"
        for key, job_id in acknowledged.items():
            assert kept[job_id].labels.get("key", key) == key
        keys = Counter(job.labels["key"] for job in kept.values() if "key" in job.labels)
        assert not [key for key, count in keys.items() if count > 1], "doubled"
        log = ClientLog(acknowledged=dict.fromkeys(acknowledged.values()), keys=list(acknowledged.items()))
        check_everything(store, Storage(str(storage)), log=log)
        errors = [each for each in examine(store, Storage(str(storage))) if each.level == "error"]
        assert not [each for each in errors if each.check != "disk"], errors


def test_writers_when_killed_lose_and_double_nothing(
    database_url: str, tmp_path: Path, until: Until, is_long: bool
) -> None:
    """Processes that write to the store itself, killed at random and started again with the same keys."""
    Store(database_url).close()
    acknowledged: dict[str, str] = {}
    for _ in range(20 if is_long else 3):
        logs = [tmp_path / f"acknowledged-{n}" for n in range(WRITERS)]
        running = []
        for log in logs:
            known = sum(key.startswith(f"{log.name}-") for key in acknowledged)
            command = [sys.executable, "-c", WRITE, database_url, json.dumps(SPEC), log.name, str(known)]
            with log.open("w") as target:
                running.append(subprocess.Popen(command, stdout=target))
        until(lambda logs=logs: all(log.stat().st_size for log in logs), 60)
        time.sleep(random.uniform(0.1, 0.8))
        for process in running:
            process.kill()
        for process in running:
            process.wait()
        for log in logs:
            said = log.read_text()
            for line in said[: said.rfind("\n") + 1].splitlines():
                key, job_id = line.split()
                assert acknowledged.setdefault(key, job_id) == job_id, "one key has two jobs"
    assert len(acknowledged) > 10
    check(database_url, tmp_path / "storage", acknowledged)


@dataclass
class Writer:
    """A client that posts, notes what was acknowledged, and sends what is in doubt again under its key."""

    api: str
    name: str
    acknowledged: dict[str, str] = field(default_factory=dict)
    answered_at: list[float] = field(default_factory=list)
    refusals: list[httpx.Response] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        with httpx.Client(base_url=self.api, timeout=30, trust_env=False) as client:
            for n in itertools.count():
                key = f"{self.name}-{n}"
                while not self._post(client, key):
                    if stop.wait(0.02):
                        return
                if stop.is_set():
                    return

    def _post(self, client: httpx.Client, key: str) -> bool:
        body = {"dataset": "digits", "ipc": 1, "seed": int(key.rpartition("-")[2])}
        try:
            answer = client.post("/jobs", json=body, headers={"Idempotency-Key": key})
        except httpx.HTTPError:
            return False
        if answer.status_code not in (200, 201):
            assert answer.status_code in (503, 507), answer.text
            self.refusals.append(answer)
            return False
        assert self.acknowledged.setdefault(key, answer.json()["id"]) == answer.json()["id"]
        self.answered_at.append(time.monotonic())
        return True


@pytest.fixture
def writers() -> Iterator[Writers]:
    group = Writers()
    yield group
    group.end()


class Writers:
    """Some writers in threads."""

    def __init__(self) -> None:
        self.members: list[Writer] = []
        self._stop, self._threads = threading.Event(), list[threading.Thread]()

    def begin(self, api: str, count: int = WRITERS) -> None:
        self.members = [Writer(api, f"w{n}") for n in range(count)]
        self._threads = [threading.Thread(target=each.run, args=(self._stop,)) for each in self.members]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def acknowledged(self) -> dict[str, str]:
        return {key: job_id for each in self.members for key, job_id in each.acknowledged.items()}


def test_api_when_killed_under_writers_loses_and_doubles_nothing(
    tmp_path: Path, writers: Writers, is_long: bool
) -> None:
    api = ApiProcess(tmp_path)
    with api:
        writers.begin(api.url)
        for _ in range(20 if is_long else 3):
            time.sleep(random.uniform(0.3, 1.2))
            api.kill()
            api.start()
        time.sleep(0.5)
        writers.end()
    assert len(writers.acknowledged) > 10
    url = f"sqlite:///{tmp_path}/ncfm.db"
    check(url, tmp_path / "storage", writers.acknowledged)
    with Store(url) as store:
        made = Counter(int(str(job.spec["seed"])) for job in all_jobs(store))
    asked = Counter(int(key.rpartition("-")[2]) for key in writers.acknowledged)
    # Each writer may have one in doubt at the end.
    assert sum((made - asked).values()) <= WRITERS and not asked - made


def test_api_when_postgresql_restarts_refuses_meanwhile_and_recovers_soon(
    tmp_path: Path, writers: Writers, is_long: bool
) -> None:
    server = Postgres()
    url = server.create_database()
    try:
        with ApiProcess(tmp_path, database_url=url) as api:
            writers.begin(api.url, 2)
            for _ in range(5 if is_long else 1):
                time.sleep(1.5)
                server.kill()
                with httpx.Client(base_url=api.url, timeout=30, trust_env=False) as client:
                    for answer in (client.get("/jobs"), client.get("/readyz")):
                        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
                        assert answer.headers["Retry-After"]
                    assert client.get("/livez").status_code == 200
                time.sleep(30 if is_long else 1)
                server.start()
                back = time.monotonic()
                while not all(each.answered_at and each.answered_at[-1] > back for each in writers.members):
                    assert time.monotonic() - back < (RECOVERY_LIMIT_S if is_long else 30)
                    time.sleep(0.02)
            writers.end()
        assert all(each.refusals for each in writers.members)
        check(url, tmp_path / "storage", writers.acknowledged)
    finally:
        server.stop()


def test_api_when_another_process_holds_the_lock_reads_on_and_writes_later(tmp_path: Path, is_long: bool) -> None:
    seconds = 20.0 if is_long else 3.0
    with ApiProcess(tmp_path) as api, httpx.Client(base_url=api.url, timeout=60, trust_env=False) as client:
        first = client.post("/jobs", json={"dataset": "digits", "ipc": 1})
        command = [sys.executable, "-c", LOCK, str(tmp_path / "ncfm.db"), str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as locker:
            assert locker.stdout is not None and locker.stdout.readline() == "held\n"
            held_at = time.monotonic()
            late: list[httpx.Response] = []
            thread = threading.Thread(
                target=lambda: late.append(client.post("/jobs", json={"dataset": "digits", "ipc": 2}))
            )
            thread.start()
            with httpx.Client(base_url=api.url, timeout=60, trust_env=False) as reader:
                assert [job["id"] for job in reader.get("/jobs").json()["items"]] == [first.json()["id"]]
            assert time.monotonic() - held_at < seconds, "readers wait for no writer"
            thread.join()
        assert late[0].status_code == 201 or late[0].json()["code"] == "database_unavailable"
        assert client.post("/jobs", json={"dataset": "digits", "ipc": 3}).status_code == 201
    kept = {"first": first.json()["id"]} | ({"late": late[0].json()["id"]} if late[0].status_code == 201 else {})
    check(f"sqlite:///{tmp_path}/ncfm.db", tmp_path / "storage", kept)


def test_api_when_the_databases_disk_is_full_says_so_and_goes_on_with_room(
    small_disk: Callable[[str], Path],
) -> None:
    disk = small_disk("3m")
    with ApiProcess(disk) as api, httpx.Client(base_url=api.url, timeout=60, trust_env=False) as client:
        acknowledged: dict[str, str] = {}
        for n in range(5000):
            answer = client.post("/jobs", json={"dataset": "digits", "ipc": 1, "seed": n})
            if answer.status_code != 201:
                break
            acknowledged[str(n)] = answer.json()["id"]
        assert (answer.status_code in (503, 507), answer.json()["code"]) == (True, "database_full")
        assert "Make room" in answer.json()["errors"][0]["hint"]
        assert client.get("/livez").status_code == 200
        assert client.get(f"/jobs/{acknowledged['0']}").status_code == 200
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = client.post("/jobs", json={"dataset": "digits", "ipc": 1, "seed": n})
        assert again.status_code == 201, again.text
        acknowledged[str(n)] = again.json()["id"]
        assert api.stop() == 0
        check(f"sqlite:///{disk}/ncfm.db", disk / "storage", acknowledged)


def test_store_when_locked_for_longer_than_it_waits_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.database.BUSY_TIMEOUT_MS", 300)
    url = f"sqlite:///{tmp_path}/ncfm.db"
    with Store(url) as store:
        command = [sys.executable, "-c", LOCK, str(tmp_path / "ncfm.db"), "1.5"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as locker:
            assert locker.stdout is not None and locker.stdout.readline() == "held\n"
            job = Job(id=new_job_id(), requested={}, spec=SPEC, created_at=now())
            key = IdempotencyKey("local", "POST /jobs", "k", "f")
            with pytest.raises(StoreError, match="locked"):
                store.add_once(job, key)
        assert store.add_once(job, key)[1]
    check(url, tmp_path / "storage", {key.key: job.id})
