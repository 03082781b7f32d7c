"""A small world for tests of the controller: database, storage root and cluster are real or twins, its time is the test's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ncfm_core.submission import resolve
from service.controller import Controller
from service.controller.decision import Policy
from service.controller.launch import Launch
from service.controller.tenure import Tenure
from service.jobs import MOVES, CancelRequest, Job, Reason, State, cancel_move, new_job_id
from service.settings import Settings
from service.store import Store
from service.testing import FakeDriver, InMemoryCluster
from worker.records import now
from worker.storage import Storage

# Two of the cluster's two CPUs: one job fills it.
DOCUMENT: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1, "resources": {"cpus": 2}}
SPEC = resolve(DOCUMENT).document()
POLICY = Policy(max_running_jobs=4, max_infra_retries=2, first_backoff_s=0.0)


def move(store: Store, job_id: str, *states: State, **changes: Any) -> Job:
    """Move a stored job through states, as its first attempt unless said."""
    job = store.get(job_id)
    assert job is not None
    for state in states:
        moved = store.move(job, state, **{"attempt": 1} | changes)
        assert moved is not None
        job = moved
    return job


class World:
    """A database, a storage root and a cluster, which outlive their controller."""

    def __init__(self, home: Path, database_url: str = "") -> None:
        self.settings = Settings(
            home=home,
            database_url=database_url,
            worker_python="/opt/a venv/bin/python",
            mlflow_url="http://mlflow:5000",
        )
        self.store = Store(self.settings.database)
        self.storage = Storage(self.settings.storage_url)
        self.cluster = InMemoryCluster()
        self._opened = [self.store]
        self.seconds = 0.0
        self.controller = self.restarted()

    def restarted(self, store: Store | None = None, cluster: InMemoryCluster | None = None) -> Controller:
        self.controller = Controller(
            store or self.store,
            self.storage,
            cluster or self.cluster,
            policy=POLICY,
            launch=Launch.from_settings(self.settings),
            clock=lambda: self.seconds,
        )
        return self.controller

    def rival(self, holder: str, *, policy: Policy = POLICY, seconds: float = 15.0) -> tuple[Controller, Tenure]:
        """Another controller, with a database connection and a hold on the lease of its own."""
        store = Store(self.settings.database)
        self._opened.append(store)
        tenure = Tenure(store, seconds=seconds, holder=holder)
        launch = Launch.from_settings(self.settings)
        return Controller(store, self.storage, self.cluster, policy=policy, launch=launch, tenure=tenure), tenure

    def close(self) -> None:
        for store in self._opened:
            store.close()

    def submit(self, **changes: object) -> Job:
        job = Job(id=new_job_id(), requested=DOCUMENT, spec=SPEC, created_at=now())
        return self.store.add(job.model_copy(update=changes))

    def job(self, job: Job) -> Job:
        current = self.store.get(job.id)
        assert current is not None
        return current

    def driver(self, job: Job) -> FakeDriver:
        return FakeDriver(self.storage, self.job(job))

    def rounds(self, job: Job, *, n: int = 5) -> Job:
        """Some rounds, with time passing between them."""
        for _ in range(n):
            self.controller.round()
            self.seconds += 1
        return self.job(job)

    def running(self) -> Job:
        """A job whose first attempt runs."""
        job = self.submit()
        self.rounds(job, n=2)
        self.cluster.start(f"{job.id}-1")
        self.driver(job).beat(1)
        return self.rounds(job, n=1)

    def cancel(self, job: Job, request: CancelRequest | None = None) -> Job:
        to = cancel_move(self.job(job))
        assert to is not None
        moved = self.store.move(self.job(job), to, reason=Reason.REQUESTED, cancel=request)
        assert moved is not None
        return moved

    def path(self, job: Job) -> list[str]:
        """The states of a job, from its events; checks that it is a legal one."""
        events = self.store.events(job.id, after=0, limit=200)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        states = [State.QUEUED]
        for event in events:
            if event.type == "state":
                assert event.data["from"] == states[-1]
                assert event.data["to"] in MOVES[states[-1]]
                states.append(State(str(event.data["to"])))
        return [str(state) for state in states]
