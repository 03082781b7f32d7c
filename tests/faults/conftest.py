"""What the tests of faults share: finding the processes to kill, knowing when to, and watching the API meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.client import Client
from service.filtering import Filter
from service.jobs import State
from service.local.state import Home, StackState
from service.local.sweep import find
from service.replies import Job
from service.store import Store
from tests.faults.checker import ClientLog, check
from tests.kept import all_jobs
from tests.postgres import Postgres
from worker.history import HISTORY_FILE, read_history
from worker.records import StageResult
from worker.storage import Storage

Until = Callable[..., Any]

POLL_S = 0.1
CHECKPOINT_LIMIT_S = 240.0
"""From a job's submission to its first checkpoint: teachers come first, and a driver needs seconds to start."""
END_LIMIT_S = 60.0
"""For the last processes of a job that has ended."""
PATIENCE_S = 10.0
"""For one answer of the API: a machine that is busy is no fault."""


@pytest.fixture
def home(stack: StackState) -> Home:
    """Where the running stack says how it is."""
    return Home(Path(stack.home))


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A PostgreSQL server to be killed."""
    started = Postgres(syncs=True)
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the running stack: what must hold whatever befell it."""
    stack = request.getfixturevalue("stack") if "stack" in request.fixturenames else None
    yield
    if isinstance(stack, StackState):
        check_stack(stack)


def check_stack(stack: StackState, *, database: str = "", storage: str = "", log: ClientLog | None = None) -> None:
    """What must hold of a running stack.

    Args:
        stack: that runs.
        database: URL of its database; its home's where it has no other.
        storage: its storage root; its home's where it has no other.
        log: what its clients were told.
    """
    with Store(database or f"sqlite:///{stack.home}/ncfm.db") as store:
        root = Storage(storage or str(Path(stack.home, "storage")))
        check(store, root, mlflow=stack.mlflow, log=log, alive=Carriers(store))


class Carriers:
    """Processes of this machine that carry a job's id; those of ended jobs are given a while to end."""

    def __init__(self, store: Store) -> None:
        ended = [state for state in State if state.is_terminal]
        jobs = [job.id for job in all_jobs(store, Filter(states=ended))]
        deadline = time.monotonic() + END_LIMIT_S
        while True:
            told = {each: words(each) for each in psutil.process_iter()}
            self._found = {job_id: [each for each in told if job_id in told[each]] for job_id in jobs}
            if not any(self._found.values()) or time.monotonic() > deadline:
                return
            time.sleep(0.5)

    def __call__(self, job_id: str) -> list[psutil.Process]:
        return self._found.get(job_id, [])


@pytest.fixture
def followed(stack_client: Client) -> Callable[[str], Job]:
    """Waits for the end of a job."""
    return lambda job_id: stack_client.wait(job_id, on_change=lambda _: None, poll_s=0.1)


@pytest.fixture
def forget_sets(stack_storage: Storage) -> Callable[[], None]:
    """Takes all sets out of the storage root, so that they are made again."""
    return lambda: forget_sets_of(stack_storage)


def forget_sets_of(storage: Storage) -> None:
    """The same for any storage root."""
    for path in storage.list("results"):
        result = storage.get_record(path, StageResult)
        assert result is not None
        if result.stage in ("distill", "publish"):
            storage.delete([path])


def results_of(storage: Storage, job_id: str) -> list[StageResult]:
    """What a job itself has built."""
    found = [storage.get_record(path, StageResult) for path in storage.list("results")]
    return [each for each in found if each is not None and each.built_by.startswith(job_id)]


def lacks(run: dict[str, Any], client: Client, storage: Storage, job_id: str) -> str:
    """What an MLflow run has not of a job that succeeded and made its own set; empty where it has all of it."""
    if (run["status"], run["tags"].get("ncfm.job_id")) != ("FINISHED", job_id):
        return f"it is {run['status']} and has the tags {run['tags']}"
    (made,) = [each for each in results_of(storage, job_id) if each.stage == "distill"]
    (history,) = [storage.read_file(file) for file in made.files if file.name == HISTORY_FILE]
    told, steps = sorted(run["steps"]["distill/discrepancy"]), [row["step"] for row in read_history(history).rows]
    if told != steps:
        return f"it has the steps {told} where there were {steps}"
    files = {artifact.name for artifact in client.artifacts(job_id)} - run["files"]
    return f"it lacks the files {files}" if files else ""


@pytest.fixture
def same_job(main_job: list[Job], small_job: dict[str, Any], forget_sets: Callable[[], None]) -> dict[str, Any]:
    """The main job's submission, whose set has been taken out of the storage root so that it is made again."""
    forget_sets()
    return small_job


@pytest.fixture
def checkpoint_of(stack_storage: Storage, until: Until) -> Callable[[str], int]:
    """Waits for a checkpoint of a job in mid-distillation, and returns its step."""
    return lambda job_id: int(until(lambda: newest_checkpoint(stack_storage, job_id), CHECKPOINT_LIMIT_S))


def newest_checkpoint(storage: Storage, job_id: str) -> int:
    """Its step; 0 where there is none."""
    # Teachers of the small job end before their first checkpoint is due.
    records = [Path(path) for path in storage.list(f"checkpoints/{job_id}") if path.endswith(".json")]
    return max((int(path.stem) for path in records), default=0)


@pytest.fixture
def processes_of(stack: StackState) -> Callable[[str], list[psutil.Process]]:
    """Processes that a job has on this machine: those that carry its id, and those of the stack that run a stage."""

    def look(job_id: str) -> list[psutil.Process]:
        carriers = [each for each in psutil.process_iter() if carries(each, job_id)]
        return carriers + [each for each in find(stack.stack_id) if title(each).startswith("ray::distill")]

    return look


def words(process: psutil.Process) -> str:
    """The command line and the environment of another process."""
    with suppress(psutil.Error, OSError):
        if process.pid != os.getpid():
            return "\n".join([*process.cmdline(), *process.environ().values()])
    return ""


def carries(process: psutil.Process, word: str) -> bool:
    return word in words(process)


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error, OSError):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def driver_of(processes_of: Callable[[str], list[psutil.Process]]) -> Callable[[str], psutil.Process]:
    """The process `python -m worker run` of a job."""

    def look(job_id: str) -> psutil.Process:
        found = [each for each in processes_of(job_id) if title(each).split()[1:4] == ["-m", "worker", "run"]]
        assert len(found) == 1, found
        return found[0]

    return look


@pytest.fixture
def task_of(processes_of: Callable[[str], list[psutil.Process]]) -> Callable[[str], psutil.Process]:
    """Ray's process that runs the distillation of a job, the only one at the time."""

    def look(job_id: str) -> psutil.Process:
        found = [each for each in processes_of(job_id) if title(each).startswith("ray::distill")]
        assert len(found) == 1, found
        return found[0]

    return look


@pytest.fixture
def steady_api(stack: StackState) -> Iterator[None]:
    """Asks the API ten times a second while a test runs; one answer that is missing fails the test."""
    answers: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=stack.api, timeout=PATIENCE_S) as http:
            while not ended.wait(POLL_S):
                began = time.monotonic()
                try:
                    answers.append(str(http.get("/jobs", params={"limit": 5}).status_code))
                except httpx.HTTPError as error:
                    answers.append(f"{type(error).__name__} after {time.monotonic() - began:.2f} s")

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    ended.set()
    thread.join()
    assert set(answers) == {"200"}, answers
