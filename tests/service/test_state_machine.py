"""Everything at once: hypothesis drives API, controller, drivers and faults against a small model of what clients were told.

The database, the API and the controller are real; the cluster is its twin in memory, drivers only say what real ones would say,
and the time between rounds is the test's.
"""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from pydantic import JsonValue
from starlette.testclient import TestClient

from ncfm_core.errors import StorageError
from service.api import create_app
from service.doctor import examine
from service.jobs import Job, State
from service.testing import FakeDriver
from tests.faults.checker import ClientLog, check
from tests.service.world import World
from worker.storage import Storage

TERMINAL = {str(state) for state in State if state.is_terminal}
DRAIN_ROUNDS = 400
NUMBER = st.integers(0, 999)
HUGE = 64
"""CPUs of a job that fits only once the cluster has grown."""
SAME_MOMENT = 0.01
"""Seconds between two posts whose order nobody can know."""


class AwayStorage(Storage):
    """A storage root that can be cut off."""

    is_away = False

    def put(self, path: str, data: bytes) -> None:
        self._ask(path)
        super().put(path, data)

    def create(self, path: str, data: bytes) -> bool:
        self._ask(path)
        return super().create(path, data)

    def get(self, path: str) -> bytes | None:
        self._ask(path)
        return super().get(path)

    def size(self, path: str) -> int | None:
        self._ask(path)
        return super().size(path)

    def _ask(self, path: str) -> None:
        if self.is_away:
            raise StorageError.of("storage", path, "cannot be read: away")


class Service(RuleBasedStateMachine):
    """What clients were told, and what drivers there are."""

    @initialize(count=st.integers(2, 4))
    def begin(self, count: int) -> None:
        """Some jobs run, and more wait."""
        self.folder = tempfile.TemporaryDirectory(prefix="ncfm-machine-")
        self.world = World(Path(self.folder.name))
        self.storage = AwayStorage(self.world.settings.storage_url)
        self.world.storage = self.storage
        self.world.cluster.cpus = 3.0
        self.world.restarted()
        self.client = TestClient(create_app(self.world.settings), base_url="http://127.0.0.1")
        self.client.__enter__()
        self.specs: dict[str, dict[str, JsonValue] | None] = {}
        self.priorities: dict[str, int] = {}
        self.posted: dict[str, float] = {}
        """When each job was, in seconds; with its priority that is its place in the queue."""
        self.keys: dict[str, str] = {}
        self.ends: dict[str, str] = {}
        self.deleted: set[str] = set()
        self.forgotten: set[str] = set()
        """Drivers that live on though the cluster that started them is gone."""
        self.seen: dict[str, int] = {}
        """Events of each job whose moves have been looked at."""
        for number in range(count):
            self.submit(number + 10, priority=50, is_huge=False)
        self.go_on(3, 3)
        for name in self._drivers()[:1]:
            self._drive(name, "beat")

    # Clients

    @rule(number=st.integers(0, 3), priority=st.integers(0, 100), is_huge=st.booleans())
    def submit(self, number: int, priority: int, is_huge: bool) -> None:
        """A key may come again, with the same body or another one."""
        key = f"key-{number}"
        resources = {"cpus": HUGE if is_huge else 1}
        body = {"dataset": "digits", "ipc": 1, "seed": number, "resources": resources, "priority": priority}
        answer = self.client.post("/jobs", json=body, headers={"Idempotency-Key": key})
        if key in self.keys:
            is_same = answer.status_code in (200, 201)
            assert (
                is_same
                or (answer.status_code, answer.json()["code"]) == (409, "idempotency_key_reused")
                or (answer.status_code == 422)
            ), answer.text
            assert not is_same or answer.json()["id"] == self.keys[key]
            return
        assert answer.status_code == 201, answer.text
        told = answer.json()
        assert told["id"] not in self.specs and told["priority"] == priority
        self.priorities[told["id"]] = priority
        self.posted[told["id"]] = datetime.fromisoformat(told["created_at"]).timestamp()
        self.keys[key], self.specs[told["id"]] = told["id"], told["spec"]

    @precondition(lambda self: self.specs)
    @rule(number=NUMBER, mode=st.sampled_from(["graceful", "force"]))
    def cancel(self, number: int, mode: str) -> None:
        job_id = self._job(number)
        answer = self.client.post(f"/jobs/{job_id}/cancel", json={"mode": mode})
        allowed = {404} if job_id in self.deleted else {200, 202, 409}
        assert answer.status_code in allowed, answer.text
        if answer.status_code == 409:
            assert self._shown(job_id)["state"] in TERMINAL

    @precondition(lambda self: self.specs)
    @rule(number=NUMBER)
    def delete(self, number: int) -> None:
        job_id = self._job(number)
        before = self.client.get(f"/jobs/{job_id}")
        answer = self.client.delete(f"/jobs/{job_id}")
        if job_id in self.deleted:
            assert before.status_code == answer.status_code == 404
        elif before.json()["state"] in TERMINAL:
            assert answer.status_code == 204, answer.text
            self.deleted.add(job_id)
        else:
            assert answer.status_code == 409, "a job that runs is not deleted"

    @precondition(lambda self: self.specs)
    @rule(number=NUMBER, priority=st.integers(0, 100))
    def change(self, number: int, priority: int) -> None:
        job_id = self._job(number)
        answer = self.client.patch(f"/jobs/{job_id}", json={"priority": priority})
        assert answer.status_code in (200, 404, 409), answer.text
        if answer.status_code == 200:
            self.priorities[job_id] = priority
            self._shown(job_id)

    @precondition(lambda self: self.specs)
    @rule(number=NUMBER)
    def look(self, number: int) -> None:
        """An end is final; a deleted job is gone; lists have each job once."""
        job_id = self._job(number)
        if job_id in self.deleted:
            assert self.client.get(f"/jobs/{job_id}").status_code == 404
        else:
            self._shown(job_id)
        items = [job["id"] for job in self.client.get("/jobs?limit=200").json()["items"]]
        assert sorted(items) == sorted(set(self.specs) - self.deleted)

    # Time

    @rule(seconds=st.integers(0, 6), rounds=st.integers(1, 4))
    def go_on_for_a_while(self, seconds: int, rounds: int) -> None:
        """With all that is away back, since else most runs would stand still."""
        self.cut_off(False, False)
        self.go_on(seconds, rounds)

    @rule(seconds=st.integers(0, 12), rounds=st.integers(1, 4))
    def go_on(self, seconds: int, rounds: int) -> None:
        for _ in range(rounds):
            self._round()
            self.world.seconds += seconds / rounds

    def _round(self) -> None:
        """One round of the controller; no end as cancelled is published while Ray knows of anything that is left, and no job
        starts before another one that fits and waits before it."""
        left, known = dict(self.world.cluster.left), set(self.world.cluster.jobs)
        self.world.controller.round()
        waiting = [job_id for job_id in self.specs if self._is_waiting(job_id)]
        for job_id in self.specs:
            for event in self.world.store.events(job_id, after=self.seen.get(job_id, 0), limit=1000):
                self.seen[job_id] = event.seq
                if event.data.get("to") == "starting" and event.data["from"] == "queued":
                    ahead = [other for other in waiting if self._place(other) < self._place(job_id) - SAME_MOMENT]
                    assert not ahead, f"{job_id} starts, and {ahead} wait before it"
                if event.data.get("to") == "cancelled" and event.data["from"] != "queued":
                    alive = [name for name in left if name.startswith(job_id) and name in known]
                    assert not alive, f"{job_id} is cancelled, and {alive} live"

    # Drivers

    @precondition(lambda self: self._drivers())
    @rule(
        number=NUMBER, does=st.sampled_from(["beat", "beat", "succeed", "fail", "fail_for_now", "die", "die_of_spec"])
    )
    def drive(self, number: int, does: str) -> None:
        """A driver says something, or ends without a word."""
        drivers = self._drivers()
        if not drivers:
            return
        self._drive(drivers[number % len(drivers)], does)

    @precondition(lambda self: self._drivers())
    @rule(number=NUMBER, does=st.sampled_from(["beat", "succeed", "die", "fail_for_now"]))
    def drive_and_see(self, number: int, does: str) -> None:
        self.drive(number, does)
        self.go_on_for_a_while(2, 3)

    @precondition(lambda self: self._drivers())
    @rule(number=NUMBER, mode=st.sampled_from(["graceful", "force"]), does=st.sampled_from(["beat", "succeed", "die"]))
    def cancel_and_drive(self, number: int, mode: str, does: str) -> None:
        """The end that was asked for, and the one that comes by itself."""
        self.drive(number, "beat")
        if not (drivers := self._drivers()):
            return
        self.cancel(sorted(self.specs).index(drivers[number % len(drivers)].rpartition("-")[0]), mode)
        self.drive(number, does)

    def _drive(self, name: str, does: str) -> None:
        """What a driver says reaches the storage root, whatever we see of that."""
        is_away, self.storage.is_away = self.storage.is_away, False
        self._say(name, does)
        self.storage.is_away = is_away

    def _say(self, name: str, does: str) -> None:
        cluster = self.world.cluster
        driver = self._driver(name)
        if name in cluster.jobs:
            cluster.start(name)
        if does == "beat":
            driver.beat(int(self.world.seconds) % 10)
            return
        code: int | None = {"die": 137, "die_of_spec": 2, "succeed": 0}.get(does, 1)
        driver.beat(9)
        if does == "succeed":
            driver.succeed()
        elif does == "fail":
            driver.fail("dataset_unavailable", "there is no such data")
        elif does == "fail_for_now":
            driver.fail("storage_unavailable", "the storage root was away", retryable=True)
        self.forgotten.discard(name)
        if name in cluster.jobs:
            cluster.end(name, "SUCCEEDED" if code == 0 else "FAILED", exit_code=code)
        # Before and after the controller has seen it.
        if self.world.seconds % 2 < 1:
            self._round()

    @precondition(lambda self: self._drivers())
    @rule(number=NUMBER, mode=st.sampled_from(["graceful", "force"]))
    def cancel_what_outlives_its_driver(self, number: int, mode: str) -> None:
        """A driver is killed, a stage of it lives on, and the end of the job is asked for, before or after that is seen."""
        known = [name for name in self._drivers() if name in self.world.cluster.jobs]
        if known:
            name = known[number % len(known)]
            self.world.cluster.left[name] = ("worker 4711 on 10.0.0.2",)
            self._drive(name, "die")
            self.go_on(number % 3, 1 + number % 2)
            self.cancel(sorted(self.specs).index(name.rpartition("-")[0]), mode)
            self.go_on(12, 4)

    @precondition(lambda self: self.world.cluster.left)
    @rule()
    def stages_end(self) -> None:
        """Whatever outlived its driver ends too."""
        self.world.cluster.left.clear()

    @rule(number=NUMBER, code=st.sampled_from([0, 1]))
    def publish(self, number: int, code: int) -> None:
        """A publisher ends: MLflow has its run, or was away."""
        found = [name for name, ray in self.world.cluster.jobs.items() if "publish" in name and not ray.is_terminal]
        if found:
            name = found[number % len(found)]
            self.world.cluster.end(name, "SUCCEEDED" if code == 0 else "FAILED", exit_code=code)

    # Faults

    @rule(what=st.sampled_from(["controller", "api", "cluster"]))
    def restart(self, what: str) -> None:
        if what == "controller":
            self.world.restarted()
        elif what == "api":
            self.client.__exit__(None, None, None)
            self.client = TestClient(create_app(self.world.settings), base_url="http://127.0.0.1")
            self.client.__enter__()
        else:
            # A new head that knows nothing; the old one's drivers may go on for a while.
            self.forgotten |= set(self._drivers())
            self.world.cluster.restart()

    @rule(ray=st.booleans(), storage=st.booleans())
    def cut_off(self, ray: bool, storage: bool) -> None:
        self.world.cluster.is_away, self.storage.is_away = ray, storage

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            # The time that workers of a forgotten driver are given is counted by the clock on the wall.
            with patch("service.controller.looking.ORPHANED_S", 0.0):
                self._heal()
            log = ClientLog(acknowledged=self.specs, keys=list(self.keys.items()))
            check(self.world.store, self.storage, log=log, all_ended=True)
            found = [each for each in examine(self.world.store, self.storage, deep=True) if each.level == "error"]
            assert not [each for each in found if each.check != "disk"], found
            for job_id in sorted(set(self.specs) - self.deleted):
                self._shown(job_id)
        finally:
            self.client.__exit__(None, None, None)
            self.world.close()
            self.folder.cleanup()

    def _heal(self) -> None:
        """Everything is back, and all that waits is done."""
        self.storage.is_away = self.world.cluster.is_away = False
        self.world.cluster.left.clear()
        self.world.cluster.cpus = float(HUGE)
        for name in list(self.forgotten):
            self.forgotten.discard(name)
        for _ in range(DRAIN_ROUNDS):
            for name in self._drivers():
                if self.world.cluster.jobs[name].status == "PENDING":
                    self._drive(name, "beat")
                else:
                    self._drive(name, "succeed")
            self.publish(0, 0)
            for job in map(self._stored, self.specs):
                if job.publish_at is not None and job.publication == "pending":
                    # Another pause that is counted by that clock.
                    self.world.store.report(job, publish_at=None)
            self._round()
            self.world.seconds += 6
            if not self._unfinished():
                return
        raise AssertionError(f"not at its end after {DRAIN_ROUNDS} rounds: {self._unfinished()}")

    def _unfinished(self) -> list[str]:
        found = [self._stored(job_id) for job_id in self.specs]
        return [
            f"{job.id} {job.state} {job.reason} {job.message} {job.publication}"
            for job in found
            if not job.state.is_terminal or job.publication == "pending"
        ]

    # What there is

    def _job(self, number: int) -> str:
        return sorted(self.specs)[number % len(self.specs)]

    def _place(self, job_id: str) -> float:
        """In the queue, lower first: a point of priority is worth a minute of waiting (docs/service.md)."""
        return self.posted[job_id] - 60 * self.priorities[job_id]

    def _is_waiting(self, job_id: str) -> bool:
        """Whether it is in the queue, and the cluster is large enough for it."""
        job = self._stored(job_id)
        return job.state is State.QUEUED and job.demand.cpus <= self.world.cluster.cpus

    def _stored(self, job_id: str) -> Job:
        job = self.world.store.get(job_id, deleted=True)
        assert job is not None, "acknowledged, and lost"
        return job

    def _shown(self, job_id: str) -> dict[str, Any]:
        """What the API says of a job, held against what it said before."""
        answer = self.client.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        assert told["spec"] == self.specs[job_id] and told["priority"] == self.priorities[job_id]
        if told["state"] in TERMINAL:
            assert self.ends.setdefault(job_id, told["state"]) == told["state"], "an end is final"
        else:
            assert job_id not in self.ends, "an end is final"
        return told

    def _drivers(self) -> list[str]:
        """Submission ids of drivers that live."""
        known = {name for name, ray in self.world.cluster.jobs.items() if "publish" not in name and not ray.is_terminal}
        return sorted(known | self.forgotten)

    def _driver(self, name: str) -> FakeDriver:
        job_id, _, attempt = name.rpartition("-")
        return FakeDriver(self.storage, self._stored(job_id).model_copy(update={"attempt": int(attempt)}))


def test_service_when_everything_happens_in_any_order(is_long: bool) -> None:
    run_state_machine_as_test(
        Service,
        settings=settings(
            max_examples=100 if is_long else 15,
            stateful_step_count=30 if is_long else 20,
            deadline=None,
            derandomize=not is_long,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
