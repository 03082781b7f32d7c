"""A Ray for tests that kill controllers by the dozen: its Jobs REST API over HTTP, and drivers that only say what real ones would.

The controllers are real processes; only the cluster is not. What a driver does is chosen by the test, job by job.
"""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from ncfm_core.errors import StorageError
from service.jobs import Job
from service.testing import FakeDriver
from worker.records import AttemptResult, attempt_path, now
from worker.storage import Storage

PACE_S = 0.02
BEATS = 20
"""Of a driver's life, if nothing befalls it: long enough for a controller to see its stages change."""
LEFT_FOR_S = 0.4
"""A worker outlives a driver that was stopped by force for this long."""


@dataclass
class Driver:
    """One submission."""

    name: str
    job: Job
    options: dict[str, str]
    status: str = "PENDING"
    exit_code: int | None = None
    is_stopped: bool = False
    ended_at: float = 0.0
    beats: int = 0

    def end(self, status: str, exit_code: int | None) -> None:
        self.status, self.exit_code, self.ended_at = status, exit_code, time.monotonic()


Behaviour = Callable[[Driver, Storage], None]
"""One step of a driver's life."""


def beat(driver: Driver, storage: Storage) -> None:
    driver.beats += 1
    FakeDriver(storage, driver.job).beat(driver.beats, stage="teachers" if driver.beats <= BEATS // 2 else "distill")


def succeeds(driver: Driver, storage: Storage) -> None:
    """Makes its set after a few beats; MLflow is away meanwhile."""
    beat(driver, storage)
    if driver.beats > BEATS:
        word = FakeDriver(storage, driver.job).succeed().model_dump() | {"publication": "pending"}
        result = AttemptResult.model_validate(word)
        storage.put_record(attempt_path(driver.job.id, driver.job.attempt, "result.json"), result)
        driver.end("SUCCEEDED", 0)


def succeeds_at_the_second_attempt(driver: Driver, storage: Storage) -> None:
    """Its first driver is killed in the middle."""
    if driver.job.attempt > 1:
        succeeds(driver, storage)
        return
    beat(driver, storage)
    if driver.beats > BEATS:
        driver.end("FAILED", 137)


def ends_when_asked(driver: Driver, storage: Storage) -> None:
    if driver.is_stopped:
        driver.end("STOPPED", None)
    elif storage.size(attempt_path(driver.job.id, driver.job.attempt, "stop.json")) is None:
        beat(driver, storage)
    else:
        FakeDriver(storage, driver.job).stopped()
        driver.end("SUCCEEDED", 0)


def ends_when_stopped(driver: Driver, storage: Storage) -> None:
    """Deaf to all but Ray's stop."""
    beat(driver, storage)
    if driver.is_stopped:
        driver.end("STOPPED", None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked was killed before the answer."""


@dataclass
class RayTwin:
    """The cluster: a server on a free port and one thread that lives its drivers' lives."""

    storage: Storage
    cpus: float = 8.0
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    """By job id; `succeeds` for all others."""
    drivers: dict[str, Driver] = field(default_factory=dict)

    def __post_init__(self) -> None:
        twin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(twin.get(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(twin.post(self.path, json.loads(body or b"{}")))

            def _answer(self, answer: tuple[int, Any]) -> None:
                status, content = answer
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._threads = [threading.Thread(target=self._server.serve_forever), threading.Thread(target=self._live)]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()

    def running(self) -> list[str]:
        """Drivers that have not ended."""
        with self._lock:
            return [driver.name for driver in self.drivers.values() if driver.status in ("PENDING", "RUNNING")]

    def get(self, path: str) -> tuple[int, Any]:
        url = urlparse(path)
        with self._lock:
            if url.path == "/health":
                return 200, "OK"
            if url.path == "/nodes":
                return 200, {"result": True, "data": {"summary": []}}
            if url.path.startswith("/api/v0/"):
                return 200, _rows(self._state(url.path.rpartition("/")[2], parse_qs(url.query)))
            name, _, what = url.path.removeprefix("/api/jobs/").partition("/")
            driver = self.drivers.get(name)
            if driver is None:
                return 404, f"Job {name} does not exist"
            if what == "logs":
                return 200, {"logs": f"log of {name}\n"}
            info = {"id": name, "node_ip_address": "127.0.0.1", "pid": "1"}
            return 200, {"status": driver.status, "driver_exit_code": driver.exit_code, "driver_info": info}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            name = path.removeprefix("/api/jobs/").removesuffix("/stop")
            if path.endswith("/stop"):
                if name not in self.drivers:
                    return 404, f"Job {name} does not exist"
                self.drivers[name].is_stopped = True
                return 200, {"stopped": True}
            name = body["submission_id"]
            if name in self.drivers:
                return 500, f"status code 400: ValueError: Job with submission_id {name} already exists."
            words = shlex.split(body["entrypoint"])
            options = dict(zip(words[5::2], words[6::2], strict=True))
            job = Job(
                id=options["--job-id"], attempt=int(options["--attempt"]), requested={}, spec={}, created_at=now()
            )
            self.drivers[name] = Driver(name, job, options | {"command": words[3]})
            return 200, {"submission_id": name}

    def _state(self, kind: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        if kind == "nodes":
            return [{"state": "ALIVE", "node_id": "n1", "resources_total": {"CPU": self.cpus}}]
        if kind == "workers":
            left = [each for each in self.drivers.values() if time.monotonic() - each.ended_at < LEFT_FOR_S]
            return [{"worker_id": each.name, "node_id": "n1", "pid": 7, "worker_type": "WORKER"} for each in left]
        name = query["filter_values"][0]
        return [{"worker_id": name, "node_id": "n1"}] if kind == "tasks" else []

    def _live(self) -> None:
        while not self._ended.wait(PACE_S):
            with self._lock:
                for driver in list(self.drivers.values()):
                    if driver.status == "PENDING":
                        driver.status = "RUNNING"
                    elif driver.status == "RUNNING" and driver.options["command"] == "publish":
                        driver.end("SUCCEEDED", 0)
                    elif driver.status == "RUNNING":
                        with suppress(StorageError):
                            # It tries again, as a real driver does.
                            self.behaviours.get(driver.job.id, succeeds)(driver, self.storage)


def _rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"result": True, "msg": "", "data": {"result": {"total": len(rows), "result": rows}}}
