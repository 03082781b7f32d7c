"""Small jobs on real data, and stages run to their end without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from tests.worker.driving import Driver
from worker.history import Event, Stage
from worker.records import StageResult
from worker.site import Site
from worker.storage import Storage

Document = dict[str, Any]


@pytest.fixture(scope="session")
def submission() -> Document:
    """A job that takes seconds."""
    return {
        "dataset": "digits",
        "ipc": 1,
        "model": {"width": 8},
        "method": {"steps": 60, "reuse": 7, "num_frequencies": 32, "num_components": 4, "real_batch": 32},
        "teachers": {"count": 2, "training": {"epochs": 6}},
        "evaluate": [{"students": 2, "tests": 2, "training": {"epochs": 20}}],
        "full_data": {"students": 1, "training": {"epochs": 1}},
        "resources": {"cpus": 1},
        "checkpoint": {"every_steps": 20, "every_seconds": 3600.0},
    }


@pytest.fixture(scope="session")
def spec(submission: Document) -> JobSpec:
    return resolve(submission)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", data_dir=Path("unused"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


SiteOf = Callable[[int], Site]


@pytest.fixture
def site_of(spec: JobSpec, storage: Storage) -> SiteOf:
    """The site of an attempt."""

    def make(attempt: int) -> Site:
        return Site(
            job_id="job",
            attempt=attempt,
            storage_url=storage.url,
            device="cpu",
            threads=1,
            checkpoint=spec.checkpoint,
            code_version="test",
        )

    return make


Finish = Callable[[Stage], tuple[StageResult, list[Event]]]


@pytest.fixture(scope="session")
def finish() -> Finish:
    """Runs a stage to its end: its result and its events."""

    def run(stage: Stage) -> tuple[StageResult, list[Event]]:
        events: list[Event] = []
        while True:
            try:
                events.append(next(stage))
            except StopIteration as stop:
                return stop.value, events

    return run


class _Held:
    """A reservation in this process."""

    def __init__(self, held: dict[str, str], key: str) -> None:
        self._held, self._key = held, key

    def release(self) -> None:
        self._held.pop(self._key, None)


class InProcess:
    """Stands where Ray does: tasks are generators that take turns in this process, reservations a dictionary."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.held: dict[str, str] = {}
        """Who builds a key (`<job>-<attempt>`)."""
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.before: Callable[[str], None] = lambda label: None
        """Called before each turn of a task with its label."""
        self._labels: dict[int, str] = {}

    def start(self, kind: str, site: Site, dataset: Any, arguments: dict[str, Any], *, demand: Any, label: str) -> Any:
        self.started.append(label)
        task = self._run(kind, site, arguments)
        self._labels[id(task)] = label
        return task

    def _run(self, kind: str, site: Site, arguments: dict[str, Any]) -> Iterator[Any]:
        from worker import stages
        from worker.stopping import StopWatch, in_trouble_no_longer
        from worker.tasks import SAVING, STARTED

        yield STARTED
        storage = Storage(site.storage_url)
        with StopWatch(storage, site.job_id, site.attempt) as watch:
            asked = {"asked": watch.now} if kind in SAVING else {}
            stage = getattr(stages, kind)(site, storage, self.data, **arguments, **asked)
            yield (yield from in_trouble_no_longer(stage, watch.now))

    def events(self, task: Any) -> Iterator[Any]:
        self.before(self._labels[id(task)])
        yield next(task)

    def cancel(self, task: Any) -> None:
        self.cancelled.append(self._labels[id(task)])
        task.close()

    def reserve(self, key: str, built_by: str) -> Any:
        if key in self.held:
            return None
        self.held[key] = built_by
        return _Held(self.held, key)

    def builder_of(self, key: str) -> str | None:
        return self.held.get(key)


@pytest.fixture
def in_process(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Lets a pool and an attempt run without Ray."""
    from worker import stages, tasks
    from worker.driver import pool

    stand_in = InProcess(digits)
    for name in ("start", "events", "cancel", "reserve", "builder_of"):
        monkeypatch.setattr(pool, name, getattr(stand_in, name))
    monkeypatch.setattr(pool, "ready", lambda generators, timeout_s: generators)
    monkeypatch.setattr(pool, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(tasks, "nodes", lambda: (tasks.Node(2, 0),))
    monkeypatch.setattr(tasks, "ready", lambda references, timeout_s: references)
    monkeypatch.setattr(tasks, "fetch", lambda reference: reference)
    monkeypatch.setattr(
        tasks,
        "inspect",
        lambda spec, access, *, held_out, demand: stages.inspect(spec, access, held_out=held_out),
    )
    return stand_in


@pytest.fixture
def driver(storage: Storage, in_process: InProcess) -> Driver:
    return Driver(storage)
