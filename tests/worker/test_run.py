"""Whole jobs on real Ray and real MLflow: what they leave, what they share, and what survives a killed driver."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from ncfm_core.datasets import Dataset
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from worker import stages
from worker.plan import plan
from worker.records import AttemptResult, AttemptStatus, StageResult, attempt_path
from worker.site import Site
from worker.storage import Storage

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("NCFM_", "RAY_", "MLFLOW_"))}


def free_port() -> int:
    """Below the range that Ray gives to its workers."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
        if port > 20_000:
            return port


def eventually(true: Callable[[], bool], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ended at the end, with a signal it heeds."""
    with log.open("wb") as output:
        running = subprocess.Popen(command, env=CLEAN | environment, stdout=output, stderr=output, cwd=log.parent)
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
    with process(command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, folder / "log"):
        eventually(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[str, str]]]:
    """Process id of a cluster with two CPUs, and the environment of its drivers."""
    port, log = free_port(), tmp_path_factory.mktemp("ray") / "log"
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ncfm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        command += ["--num-cpus=2", "--node-ip-address=127.0.0.2", "--include-dashboard=false", f"--temp-dir={folder}"]
        with process(command, environment, log) as running:
            eventually(lambda: b"Ray runtime started" in log.read_bytes())
            yield running.pid, environment | {"RAY_ADDRESS": f"127.0.0.2:{port}"}


@pytest.fixture(scope="module")
def cluster(head: tuple[int, dict[str, str]]) -> dict[str, str]:
    """The environment of a driver."""
    return head[1]


@pytest.fixture
def spec_file(tmp_path: Path, submission: dict[str, Any]) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(submission))
    return path


def start(arguments: list[str], environment: dict[str, str], storage: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "worker", "run", *arguments, "--storage", str(storage), "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=CLEAN | environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def publish(arguments: list[str], environment: dict[str, str], storage: Path) -> None:
    command = [sys.executable, "-m", "worker", "publish", *arguments, "--storage", str(storage)]
    subprocess.run(command, env=CLEAN | environment, cwd=ROOT, check=True, capture_output=True)


def finish(running: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    shown: dict[str, Any] = json.loads(out.splitlines()[-1])
    return shown


def results(storage: Path) -> dict[str, StageResult]:
    found = [StageResult.model_validate_json(path.read_bytes()) for path in (storage / "results").iterdir()]
    return {result.key: result for result in found}


def sums(storage: Path, stage: str) -> dict[str, str]:
    """sha256 of the images and grids of a stage's results."""
    return {
        f"{result.key}/{file.name}": file.sha256
        for result in results(storage).values()
        for file in result.files
        if result.stage == stage and file.name.endswith((".safetensors", ".png"))
    }


def read_mlflow(url: str, run_id: str) -> dict[str, Any]:
    """Everything of a run, over plain HTTP."""
    api = f"{url}/api/2.0/mlflow"
    run = httpx.get(f"{api}/runs/get", params={"run_id": run_id}).json()["run"]
    metrics = {each["key"] for each in run["data"].get("metrics", [])}
    history = {
        key: httpx.get(f"{api}/metrics/get-history", params={"run_id": run_id, "metric_key": key}).json()["metrics"]
        for key in metrics
    }
    files: list[str] = []
    folders = [""]
    while folders:
        listed = httpx.get(f"{api}/artifacts/list", params={"run_id": run_id, "path": folders.pop()}).json()
        for each in listed.get("files", []):
            (folders if each["is_dir"] else files).append(each["path"])
    return {
        "status": run["info"]["status"],
        "params": {each["key"]: each["value"] for each in run["data"]["params"]},
        "tags": {each["key"]: each["value"] for each in run["data"]["tags"]},
        "inputs": run["inputs"]["dataset_inputs"],
        "steps": {key: [int(each.get("step", 0)) for each in rows] for key, rows in history.items()},
        "files": set(files),
    }


def assert_complete(run: dict[str, Any], job_id: str) -> None:
    assert run["status"] == "FINISHED"
    assert run["tags"]["ncfm.job_id"] == job_id
    assert run["params"]["method.steps"] == "60"
    assert run["inputs"][0]["dataset"]["name"] == "digits"
    assert run["steps"]["accuracy/distilled"] == [0]
    assert {15, 25, 30, 45, 50, 60} <= set(run["steps"]["distill/discrepancy"])
    for key, steps in run["steps"].items():
        assert len(steps) == len(set(steps)), f"{key} has a step twice: {steps}"
    pictures = [name for name in run["files"] if name.startswith("images/") and name.endswith(".png")]
    assert len(pictures) == 6
    assert {"distilled/images.safetensors", "evaluation.json", "distilled-digits-ipc1.zip"} < run["files"]


def test_run_leaves_a_set_its_figures_and_an_mlflow_run(
    tmp_path: Path, spec_file: Path, mlflow_url: str, cluster: dict[str, str]
) -> None:
    storage = tmp_path / "storage"
    # The first on a cluster of its own, the second on one that is there: neither may matter.
    shown = finish(start([str(spec_file), "--mlflow", mlflow_url], {}, storage))
    assert shown["distilled"]["n"] == shown["random_real"]["n"] == 2
    assert {"total", "teachers", "distill", "evaluate"} <= shown["seconds"].keys()
    assert Path(shown["preview"]).read_bytes().startswith(b"\x89PNG")
    assert (Path(shown["set_path"]) / "README.md").exists()
    assert_complete(read_mlflow(mlflow_url, shown["mlflow_run_id"]), shown["job_id"])

    before = results(storage)
    again = finish(start([str(spec_file), "--mlflow", mlflow_url], cluster, storage))
    assert results(storage) == before
    assert {name: again[name] for name in ("distilled", "random_real", "full")} == {
        name: shown[name] for name in ("distilled", "random_real", "full")
    }
    assert again["seconds"]["distill"] == 0
    assert_complete(read_mlflow(mlflow_url, again["mlflow_run_id"]), again["job_id"])
    status = Storage(str(storage)).get_record(attempt_path(again["job_id"], 1, "status.json"), AttemptStatus)
    assert status is not None
    assert status.stages["teachers"] == status.stages["distill"] == "cached"


def test_two_drivers_at_once_build_each_result_once(tmp_path: Path, spec_file: Path, cluster: dict[str, str]) -> None:
    storage = tmp_path / "storage"
    # Long enough for whichever driver starts later, by seconds on a busy machine, to find the other at work.
    long = ["--set", "method.steps=1500"]
    both = [start([str(spec_file), "--job-id", name, *long], cluster, storage) for name in ("one", "two")]
    shown = [finish(each) for each in both]
    assert shown[0]["distilled"] == shown[1]["distilled"]
    folders = [folder for attempt in (storage / "objects").iterdir() for folder in attempt.iterdir()]
    assert len(folders) == len(results(storage)) == 7
    logs = "".join(path.read_text() for path in storage.glob("jobs/*/attempts/1/driver.log"))
    assert "waits for" in logs


def test_killed_driver_is_resumed_to_the_same_bits(tmp_path: Path, spec_file: Path, cluster: dict[str, str]) -> None:
    undisturbed, storage = tmp_path / "undisturbed", tmp_path / "storage"
    long = ["--set", "method.steps=400"]
    first = start([str(spec_file), "--job-id", "J", *long], cluster, storage)
    eventually(lambda: any(storage.glob("checkpoints/J/*/1/*.json")) and _distilling(storage))
    first.kill()
    first.communicate()
    assert not list(storage.glob("jobs/J/attempts/1/result.json"))
    shown = finish(start(["storage:jobs/J/spec.json", "--job-id", "J", "--attempt", "2"], cluster, storage))
    assert shown["job_id"] == "J"
    log = (storage / "jobs/J/attempts/2/driver.log").read_text()
    assert "goes on from step" in log
    finish(start([str(spec_file), *long], cluster, undisturbed))
    assert sums(storage, "distill") == sums(undisturbed, "distill")
    assert sums(storage, "teachers") == sums(undisturbed, "teachers")


def _distilling(storage: Path) -> bool:
    status = Storage(str(storage)).get_record(attempt_path("J", 1, "status.json"), AttemptStatus)
    return status is not None and status.stage == "distill" and 40 <= status.completed < status.total


def test_killed_task_goes_on_in_the_same_attempt(
    tmp_path: Path, spec_file: Path, head: tuple[int, dict[str, str]]
) -> None:
    storage = tmp_path / "storage"
    running = start([str(spec_file), "--job-id", "J", "--set", "method.steps=2000"], head[1], storage)
    eventually(lambda: any(storage.glob("checkpoints/J/*/1/*.json")) and _distilling(storage))
    eventually(lambda: _kill(head[0], "ray::distill"))
    finish(running)
    log = (storage / "jobs/J/attempts/1/driver.log").read_text()
    assert "was lost" in log
    assert "goes on from step" in log


def test_killed_teacher_goes_on_from_its_checkpoint_to_the_same_bits(
    tmp_path: Path, spec_file: Path, submission: dict[str, Any], digits: Dataset, head: tuple[int, dict[str, str]]
) -> None:
    storage, undisturbed = tmp_path / "storage", tmp_path / "undisturbed"
    # Some seconds of training beyond the first checkpoint.
    submission = submission | {"teachers": {"count": 1, "training": {"epochs": 150}}}
    spec_file.write_text(yaml.safe_dump(submission))
    running = start([str(spec_file), "--job-id", "J"], head[1], storage)
    eventually(lambda: any(storage.glob("checkpoints/J/*/1/*.json")))
    eventually(lambda: _kill(head[0], "ray::teacher 0"))
    finish(running)
    log = (storage / "jobs/J/attempts/1/driver.log").read_text()
    assert "was lost" in log
    step = re.search(r"teacher 0 goes on from step (\d+)", log)
    assert step is not None and int(step[1]) >= 20
    _train_here(resolve(submission), digits, undisturbed)
    assert sums(storage, "teachers") == sums(undisturbed, "teachers") != {}


def _train_here(spec: JobSpec, digits: Dataset, storage: Path) -> None:
    """The only teacher of a job, in this process and in one go."""
    site = Site(
        job_id="U",
        attempt=1,
        storage_url=str(storage),
        device="cpu",
        threads=1,
        checkpoint=spec.checkpoint,
        code_version="test",
    )
    (build,) = plan(spec, digits.digest).teachers
    training, seed = spec.teachers.training, spec.teachers.seed
    for _ in stages.teacher(
        site,
        Storage(str(storage)),
        digits,
        key=str(build.key),
        model=spec.model,
        training=training,
        seed=seed,
        index=0,
        held_out=None,
    ):
        pass


def _kill(head: int, name: str) -> bool:
    """Whether a process with a task of that name was there to be killed."""
    for each in psutil.Process(head).children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(each.cmdline()).strip() == name:
                each.kill()
                return True
    return False


def test_stopped_driver_ends_promptly_without_a_result(
    tmp_path: Path, spec_file: Path, cluster: dict[str, str], mlflow_url: str
) -> None:
    storage = tmp_path / "storage"
    arguments = [str(spec_file), "--job-id", "J", "--mlflow", mlflow_url, "--set", "method.steps=100000"]
    running = start(arguments, cluster, storage)
    eventually(lambda: _status(storage) is not None and _status(storage).mlflow_run_id is not None)  # type: ignore[union-attr]
    eventually(lambda: _status(storage).stage == "distill")  # type: ignore[union-attr]
    started = time.monotonic()
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM, err
    assert time.monotonic() - started < 20, "far less than its 100 000 steps take"
    assert not list(storage.glob("jobs/J/attempts/1/result.json"))
    status = _status(storage)
    assert status is not None
    run_id = str(status.mlflow_run_id)
    if read_mlflow(mlflow_url, run_id)["status"] == "RUNNING":
        # A driver that is told to end gives a busy server two seconds; the service's publisher comes later, as here.
        arguments = ["storage:jobs/J/spec.json", "--job-id", "J", "--status", "KILLED", "--mlflow", mlflow_url]
        publish(arguments, cluster, storage)
    assert read_mlflow(mlflow_url, run_id)["status"] == "KILLED"


def _status(storage: Path) -> AttemptStatus | None:
    return Storage(str(storage)).get_record(attempt_path("J", 1, "status.json"), AttemptStatus)


def test_demand_that_no_node_can_hold_is_told(tmp_path: Path, spec_file: Path, cluster: dict[str, str]) -> None:
    running = start([str(spec_file), "--job-id", "J", "--set", "resources.cpus=64"], cluster, tmp_path / "storage")
    _, err = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "resources.cpus" in err
    result = AttemptResult.model_validate_json((tmp_path / "storage/jobs/J/attempts/1/result.json").read_bytes())
    assert result.error is not None
    assert (result.error.code, result.retryable) == ("no_node", False)


def test_data_that_is_not_there_is_told(tmp_path: Path, spec_file: Path, cluster: dict[str, str]) -> None:
    spec_file.write_text("{dataset: cifar10, ipc: 1, preset: quick, resources: {cpus: 1}}")
    environment = cluster | {"NCFM_DATA_DIR": str(tmp_path / "none")}
    running = start([str(spec_file), "--job-id", "J"], environment, tmp_path / "storage")
    _, err = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "NCFM_DATA_DIR" in err
    assert "Traceback" not in err


def test_search_chooses_on_held_out_data_and_its_best_spec_runs(
    tmp_path: Path, spec_file: Path, cluster: dict[str, str], mlflow_url: str
) -> None:
    storage = tmp_path / "storage"
    space = "{trials: 3, rungs: 2, steps: 10, students: 1, epochs: 3, space: {image_lr: [0.002, 0.02], reuse: [1, 5]}}"
    shown = finish(start([str(spec_file), "--mlflow", mlflow_url, "--set", f"search={space}"], cluster, storage))
    best = Path(shown["set_path"]) / "best.yaml"
    assert yaml.safe_load(best.read_text())["search"] is None
    run = read_mlflow(mlflow_url, shown["mlflow_run_id"])
    assert "best.yaml" in run["files"]
    query = {"experiment_ids": ["1"], "filter": f"tags.`mlflow.parentRunId` = '{shown['mlflow_run_id']}'"}
    trials = httpx.post(f"{mlflow_url}/api/2.0/mlflow/runs/search", json=query).json()["runs"]
    assert sorted(
        next(tag["value"] for tag in each["data"]["tags"] if tag["key"] == "ncfm.trial") for each in trials
    ) == [
        "0",
        "1",
        "2",
    ]
    before = results(storage).keys()
    again = finish(start([str(best)], cluster, storage))
    assert again["distilled"] == shown["distilled"]
    assert results(storage).keys() == before
