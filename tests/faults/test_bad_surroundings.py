"""Data, Ray or MLflow that are not there: said plainly, with nothing half-made, and gone on with once they are back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from service.client import Client
from service.local import ports
from service.local.state import Home, StackState
from service.processes import ProcessName
from service.replies import Job
from service.store import Store
from tests.faults.checker import check
from tests.faults.conftest import lacks, results_of
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]
TakeAway = Callable[[ProcessName], None]

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("NCFM_", "RAY_", "MLFLOW_"))}
PLAIN_ERROR_LIMIT_S = 15.0


@pytest.fixture
def take_away(home: Home, until: Until) -> TakeAway:
    """Kills a process of the stack and returns while it is away: it takes seconds to come back."""

    def kill(name: ProcessName) -> None:
        before = home.status().processes[name]
        assert before is not None
        os.kill(before, signal.SIGKILL)
        until(lambda: home.status().state == "starting", 10)

    return kill


def test_job_fails_as_the_users_when_its_data_is_missing(
    stack: StackState,
    stack_client: Client,
    stack_storage: Storage,
    followed: Callable[[str], Job],
    read_run: Callable[[str, str], Document],
) -> None:
    job = stack_client.submit({"dataset": "cifar10", "ipc": 1, "preset": "quick"})
    ended = followed(job.id)

    assert (ended.state, ended.reason, ended.attempt) == ("failed", "user_error", 1)
    told = httpx.get(f"{stack.api}/jobs/{job.id}").json()["error"]
    (problem,) = told["problems"]
    assert told["code"] == "dataset_unavailable"
    assert (problem["field"], problem["value"]) == ("dataset.name", "'cifar10'")
    assert str(Path(stack.home, "data")) in problem["message"]
    assert "NCFM_DATA_DIR" in problem["hint"] and "NCFM_ALLOW_DOWNLOAD" in problem["hint"]
    assert "Traceback" not in stack_client.logs(job.id)
    assert stack_client.artifacts(job.id) == []
    assert results_of(stack_storage, job.id) == []
    assert stack_storage.list(f"objects/{job.id}-1") == stack_storage.list(f"jobs/{job.id}/set") == []
    if ended.mlflow_run_id is not None:
        assert read_run(stack.mlflow, ended.mlflow_run_id)["status"] == "FAILED"


@pytest.mark.usefixtures("steady_api")
def test_jobs_go_on_when_ray_is_back(
    stack_client: Client,
    main_job: list[Job],
    same_job: Document,
    checkpoint_of: Callable[[str], int],
    take_away: TakeAway,
    followed: Callable[[str], Job],
    images_of: Callable[[str], bytes],
    until: Until,
) -> None:
    """One is in mid-distillation when Ray dies, the other is submitted while it is away."""
    first = stack_client.submit(same_job)
    checkpoint_of(first.id)
    take_away("ray")
    second = stack_client.submit(same_job)
    until(lambda: stack_client.job(second.id).reason == "cluster_unreachable", 10)
    assert "Ray cannot be asked" in stack_client.job(second.id).message

    for job_id, attempts in ((first.id, 2), (second.id, 1)):
        ended = followed(job_id)
        assert (ended.state, ended.attempt) == ("succeeded", attempts), ended.complaint
        assert images_of(job_id) == images_of(main_job[-1].id)
    reasons = [event.data["reason"] for event in stack_client.events(first.id) if event.data.get("to") == "recovering"]
    assert reasons == ["cluster_lost"]


@pytest.mark.usefixtures("steady_api")
def test_record_is_complete_when_mlflow_was_away_in_mid_run(
    stack: StackState,
    home: Home,
    stack_client: Client,
    stack_storage: Storage,
    small_job: Document,
    checkpoint_of: Callable[[str], int],
    take_away: TakeAway,
    followed: Callable[[str], Job],
    read_run: Callable[[str, str], Document],
    until: Until,
) -> None:
    job = stack_client.submit(small_job | {"method": small_job["method"] | {"steps": 1500}})
    step = checkpoint_of(job.id)
    take_away("mlflow")
    until(lambda: checkpoint_of(job.id) > step, 10)
    assert home.status().state == "starting", "MLflow was back before the distillation went on"
    ended = followed(job.id)

    assert (ended.state, ended.attempt) == ("succeeded", 1), ended.complaint
    assert "MLflow is away" in stack_client.logs(job.id)
    until(lambda: home.status().state == "up")
    run = read_run(stack.mlflow, str(ended.mlflow_run_id))
    assert not lacks(run, stack_client, stack_storage, job.id)


@pytest.mark.parametrize(
    ("variable", "named"),
    [("RAY_ADDRESS", "RAY_ADDRESS: Ray does not"), ("NCFM_MLFLOW_URL", "mlflow_url: MLflow does")],
)
def test_run_by_hand_ends_at_once_when_what_it_was_given_is_away(
    tmp_path: Path, small_job: Document, variable: str, named: str
) -> None:
    spec, storage = tmp_path / "job.yaml", tmp_path / "storage"
    spec.write_text(yaml.safe_dump(small_job))
    address = f"127.0.0.1:{ports.choose(())}"
    environment = CLEAN | {variable: address if variable == "RAY_ADDRESS" else f"http://{address}"}
    command = [sys.executable, "-m", "worker", "run", str(spec), "--storage", str(storage)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert time.monotonic() - began < PLAIN_ERROR_LIMIT_S
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {named}") and address in line
    assert not list(storage.rglob("*.json"))
    with Store(f"sqlite:///{tmp_path}/ncfm.db") as store:
        assert check(store, Storage(str(storage))) == 0
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(spec) in (each.info["cmdline"] or [])]
