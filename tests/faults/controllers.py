"""Real controller processes on a home of their own, over a twin of Ray: to be killed, stopped and started again."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from pydantic import JsonValue

from ncfm_core.submission import resolve
from service.jobs import CancelRequest, Job, Reason, State, cancel_move, new_job_id
from service.settings import Settings
from service.store import Actor, Store
from tests.faults.checker import ClientLog, check
from tests.faults.ray_twin import Behaviour, RayTwin
from worker.records import now
from worker.storage import Storage

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("NCFM_", "RAY_", "MLFLOW_"))}
DOCUMENT: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1, "resources": {"cpus": 1}}
LOCAL = Actor("local")


class Site:
    """One service without its API: the test posts and cancels jobs as the API does."""

    def __init__(self, home: Path, *, lease_seconds: float = 0.5, database_url: str = "", storage: str = "") -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.settings = Settings(home=home, database_url=database_url, storage=storage)
        self.store = Store(self.settings.database)
        self.storage = Storage(self.settings.storage_url)
        self.ray = RayTwin(self.storage)
        self.acknowledged: dict[str, dict[str, JsonValue] | None] = {}
        self._lease_seconds = lease_seconds
        self._processes: list[subprocess.Popen[bytes]] = []

    def controller(self, *, crash_at: str = "", log: str = "controller.log") -> subprocess.Popen[bytes]:
        """A controller's process."""
        own = {
            "NCFM_HOME": str(self.home),
            "NCFM_DATABASE_URL": self.settings.database_url,
            "NCFM_STORAGE": self.settings.storage,
            "NCFM_RAY_URL": self.ray.url,
            "NCFM_MLFLOW_URL": self.ray.url,
            "NCFM_POLL_SECONDS": "0.1",
            "NCFM_LEASE_SECONDS": str(self._lease_seconds),
            "NCFM_MAX_RUNNING_JOBS": "20",
            "NCFM_CRASH_AT": crash_at,
        }
        with (self.home / log).open("ab") as out:
            command = [sys.executable, "-m", "service.cli", "controller"]
            process = subprocess.Popen(command, stdout=out, stderr=out, env=CLEAN | own)
        self._processes.append(process)
        return process

    def stop_between_writes(self, process: subprocess.Popen[bytes]) -> None:
        """SIGSTOP at a moment when it does not hold SQLite's one write lock: who is stopped with it keeps all others from writing."""
        while True:
            process.send_signal(signal.SIGSTOP)
            # The signal is not carried out at once on a busy machine.
            while _state(process.pid) != "T":
                time.sleep(0.005)
            if self._can_write():
                return
            process.send_signal(signal.SIGCONT)
            time.sleep(0.1)

    def _can_write(self) -> bool:
        file = self.store.engine.url.database
        assert file is not None
        with closing(sqlite3.connect(file, timeout=0.5, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            connection.execute("ROLLBACK")
            return True

    def said(self, log: str = "controller.log") -> str:
        return (self.home / log).read_text()

    def post(self, behaviour: Behaviour | None = None, *, cpus: int = 1) -> Job:
        """A job, acknowledged."""
        job = self.new_job(cpus=cpus)
        if behaviour is not None:
            self.ray.behaviours[job.id] = behaviour
        self.keep(job)
        return job

    def new_job(self, *, cpus: int = 1) -> Job:
        document: dict[str, JsonValue] = DOCUMENT | {"resources": {"cpus": cpus}}
        spec = resolve(document).document()
        return Job(id=new_job_id(), requested=document, spec=spec, created_at=now())

    def keep(self, job: Job) -> None:
        """Hand it in; only what has been kept is acknowledged."""
        self.store.add(job, actor=LOCAL)
        self.acknowledged[job.id] = job.spec

    def job(self, job: Job) -> Job:
        found = self.store.get(job.id)
        assert found is not None
        return found

    def cancel(self, job: Job, request: CancelRequest) -> None:
        """As the API cancels: again until nobody else was first."""
        while True:
            current = self.job(job)
            to = cancel_move(current)
            if to is None or self.store.move(current, to, reason=Reason.REQUESTED, actor=LOCAL, cancel=request):
                return

    def until(self, holds: Callable[[], object], limit_s: float = 60.0) -> None:
        deadline = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > deadline:
                found = [self.store.get(job_id) for job_id in self.acknowledged]
                left = [job for job in found if job and (not job.state.is_terminal or job.publication == "pending")]
                raise AssertionError([(job.id, str(job.state), job.message, job.publication) for job in left])
            time.sleep(0.03)

    def has_ended(self) -> bool:
        """Whether every job has, and its run is complete."""
        store, later = self.store, now() + timedelta(days=1)
        return not (store.active() or store.queue(limit=1) or store.unpublished(limit=1, at=later))

    def check(self) -> int:
        """All rules, once all has ended; each attempt was started once, and nothing lives."""
        assert self.ray.running() == []
        started = {name for name in self.ray.drivers if "-publish-" not in name}
        counted = {f"{job_id}-{row.number}" for job_id in self.acknowledged for row in self.store.attempts(job_id)}
        assert started <= counted
        log = ClientLog(acknowledged=self.acknowledged)
        return check(self.store, self.storage, log=log, all_ended=True)

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        self.ray.close()
        self.store.close()


def _state(pid: int) -> str:
    """Linux's letter for what a process does: T where it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]


def state_is(site: Site, job: Job, *states: State) -> Callable[[], bool]:
    return lambda: site.job(job).state in states
