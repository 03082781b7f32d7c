"""Small jobs on real data, and stages run to their end without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
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
