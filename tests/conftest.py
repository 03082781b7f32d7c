"""The whole stack for tests: one for the session, and more for those that break theirs; and the main job on it, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from service.client import Client
from service.local.state import Home, StackState
from service.local.sweep import find, sweep
from service.replies import Job
from tests.postgres import Postgres
from worker.storage import Storage

START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0
POLL_S = 0.05

T = TypeVar("T")
Launch = Callable[..., subprocess.Popen[bytes]]
Until = Callable[..., Any]
Boot = Callable[..., AbstractContextManager[StackState]]
SmallDisk = Callable[[str], Path]
Document = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="Repeat each fault as often as a release asks for.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless they are asked for."""
    if "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether everything is repeated as often as a release asks for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server that all tests share; those that kill one start their own."""
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, on each engine."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/er/ncfm.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mounts a file system of a size, such as `512k`; it needs root, and can be made larger by mounting it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small file system can be mounted by root alone")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@pytest.fixture(scope="session")
def until() -> Until:
    """Asks again and again until the answer is true, and returns it; fails after `limit_s`."""

    def wait(ask: Callable[[], T], limit_s: float = 120.0) -> T:
        deadline = time.monotonic() + limit_s
        while not (answer := ask()):
            assert time.monotonic() < deadline, f"not true after {limit_s:.0f} s"
            time.sleep(POLL_S)
        return answer

    return wait


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """Runs an `ncfm` command on a home, in a session of its own as from a terminal; `wait_up` waits until it is up.

    `settings` are variables of its environment (`NCFM_...`).
    """
    started: list[subprocess.Popen[bytes]] = []

    def run(
        home: Path, *arguments: str, wait_up: bool = False, settings: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        own = {"NCFM_HOME": str(home), "NCFM_STORAGE": "", "NCFM_DATABASE_URL": "", "NCFM_DATA_DIR": str(home / "data")}
        with (home / "command.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **own, **(settings or {})},
                start_new_session=True,
            )
        started.append(process)
        deadline = time.monotonic() + START_LIMIT_S
        while wait_up and Home(home).status().state != "up":
            assert process.poll() is None, (home / "command.log").read_text()
            assert time.monotonic() < deadline, (home / "command.log").read_text()
            time.sleep(0.1)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def boot(launch: Launch) -> Boot:
    """Runs a stack on a home, with settings of its own where it needs any: addresses, home and process ids.

    Nothing of it is left afterwards.
    """

    @contextmanager
    def run(home: Path, settings: Mapping[str, str] | None = None) -> Iterator[StackState]:
        ports = ("--port", "0", "--mlflow-port", "0", "--ray-port", "0")
        process = launch(home, "up", *ports, wait_up=True, settings=settings)
        state = Home(home).read()
        assert state is not None
        try:
            yield state
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(STOP_LIMIT_S)
            left = find(state.stack_id)
            sweep(state.stack_id, term_wait_s=0)
        assert (code, left) == (0, []), (home / "command.log").read_text()

    return run


@pytest.fixture(scope="session")
def stack(boot: Boot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackState]:
    """The stack that all tests share; those that break theirs for good boot one of their own."""
    with boot(tmp_path_factory.mktemp("home")) as state:
        yield state


@pytest.fixture(scope="session")
def stack_client(stack: StackState) -> Iterator[Client]:
    with Client(stack.api) as client:
        yield client


@pytest.fixture(scope="session")
def stack_storage(stack: StackState) -> Storage:
    """The storage root of the stack."""
    return Storage(str(Path(stack.home, "storage")))


@pytest.fixture(scope="session")
def small_job() -> Document:
    """A job whose distillation takes some seconds and leaves a checkpoint several times a second."""
    return {
        "dataset": "digits",
        "ipc": 1,
        "model": {"width": 16},
        "method": {"steps": 600, "num_frequencies": 64, "num_components": 8, "real_batch": 64},
        "teachers": {"count": 2, "training": {"epochs": 4}},
        "evaluate": [{"students": 2, "tests": 2, "training": {"epochs": 30}}],
        "full_data": {"students": 1, "training": {"epochs": 2}},
        "resources": {"cpus": 1},
        "checkpoint": {"every_steps": 25, "every_seconds": 3600.0},
    }


@pytest.fixture(scope="session")
def main_job(stack_client: Client, small_job: Document) -> list[Job]:
    """The small job, undisturbed: every look at it, from the answer to its POST to its end."""
    looks = [stack_client.submit(small_job)]
    stack_client.wait(looks[0].id, on_change=looks.append, poll_s=0.1)
    assert looks[-1].state == "succeeded", looks[-1].complaint
    return looks


@pytest.fixture(scope="session")
def images_of(stack: StackState) -> Callable[[str], bytes]:
    """The tensor file of a job's set, byte for byte, by the job's id."""
    return lambda job_id: images(stack, job_id)


def images(stack: StackState, job_id: str) -> bytes:
    """The tensor file of the set of a job of any stack."""
    answer = httpx.get(f"{stack.api}/jobs/{job_id}/artifacts/distilled/images.safetensors")
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.fixture(scope="session")
def read_run() -> Callable[[str, str], Document]:
    """Everything that an MLflow server has of a run, over plain HTTP."""

    def read(url: str, run_id: str) -> Document:
        api = f"{url}/api/2.0/mlflow"
        run = httpx.get(f"{api}/runs/get", params={"run_id": run_id}).json()["run"]
        names = [each["key"] for each in run["data"].get("metrics", [])]
        history = {name: _metric_history(api, run_id, name) for name in names}
        return {
            "status": run["info"]["status"],
            "params": {each["key"]: each["value"] for each in run["data"].get("params", [])},
            "tags": {each["key"]: each["value"] for each in run["data"].get("tags", [])},
            "datasets": [each["dataset"] for each in run.get("inputs", {}).get("dataset_inputs", [])],
            "steps": {name: [int(row.get("step", 0)) for row in rows] for name, rows in history.items()},
            "files": set(_artifacts(api, run_id)),
        }

    return read


def _metric_history(api: str, run_id: str, name: str) -> list[Document]:
    query = {"run_id": run_id, "metric_key": name}
    rows: list[Document] = httpx.get(f"{api}/metrics/get-history", params=query).json()["metrics"]
    return rows


def _artifacts(api: str, run_id: str, folder: str = "") -> Iterator[str]:
    listed = httpx.get(f"{api}/artifacts/list", params={"run_id": run_id, "path": folder}).json()
    for each in listed.get("files", []):
        if each["is_dir"]:
            yield from _artifacts(api, run_id, each["path"])
        else:
            yield each["path"]
