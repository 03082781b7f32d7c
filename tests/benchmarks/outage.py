"""What an MLflow that stops in the middle of a run costs its steps: one run, whose server is stopped and let go on in turns.

Two runs, in turn or side by side, differ by more than the bar on a machine that others share; neighbouring blocks of one run do not.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from service.local import ports
from tests.faults.controllers import CLEAN
from worker.records import AttemptStatus, attempt_path
from worker.storage import Storage

JOB: dict[str, Any] = {
    "dataset": "digits",
    "ipc": 1,
    "model": {"width": 16},
    "method": {
        "num_frequencies": 64,
        "num_components": 8,
        "real_batch": 64,
        "steps": 10_000_000,
    },
    "teachers": {"count": 2, "training": {"epochs": 2}},
    "resources": {"cpus": 1},
    "checkpoint": {"every_steps": 1_000_000, "every_seconds": 3600.0},
}
BEGIN_S = 120.0
SETTLING_S = 3.0
"""Not counted at the start of each block: what the server does when it goes on, and the status, written once a second."""
LOOK_EVERY_S = 0.1


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process with its descendants as of now; nobody where it has ended."""
    with suppress(psutil.Error):
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    return []


@contextmanager
def _running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A quiet process, which ends with all its descendants."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        family = _family(process)
        for each in family:
            with suppress(psutil.Error):
                each.send_signal(signal.SIGCONT)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for each in family:
            with suppress(psutil.Error):
                each.kill()
        process.wait()


@contextmanager
def _mlflow(home: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    """A server of its own and its processes."""
    port = ports.choose(())
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "files")]
    with _running(command, cwd=home) as process:
        until = time.monotonic() + BEGIN_S
        while not _answers(url):
            if time.monotonic() > until:
                raise RuntimeError("MLflow does not answer")
            time.sleep(LOOK_EVERY_S)
        yield url, _family(process)


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def ratios(home: Path, *, rounds: int, seconds: float) -> list[float]:
    """Steps a second while MLflow is stopped over those while it answers, each block against the mean of its two neighbours."""
    spec, storage = home / "job.json", Storage(str(home / "storage"))
    spec.write_text(json.dumps(JOB))
    command = [sys.executable, "-m", "worker", "run", str(spec), "--storage", storage.url, "--job-id", "job"]
    with _mlflow(home) as (url, server):
        with _running([*command, "--mlflow", url], env=CLEAN | {"OMP_NUM_THREADS": "1"}) as driver:
            _until_it_is_tracked(storage, driver)
            rates = []
            for block in range(2 * rounds + 1):
                for each in server:
                    each.send_signal(signal.SIGSTOP if block % 2 else signal.SIGCONT)
                rates.append(_rate(storage, seconds))
    return [rates[n] / statistics.fmean((rates[n - 1], rates[n + 1])) for n in range(1, len(rates), 2)]


def summary(found: list[float]) -> dict[str, object]:
    error = statistics.stdev(found) / len(found) ** 0.5
    mean = statistics.fmean(found)
    shown = {"mean": round(mean, 4), "standard_error": round(error, 4), "median": round(statistics.median(found), 4)}
    return {
        "step_rate": shown | {"blocks": [round(each, 4) for each in found]},
        "bar": ">= 0.98",
        "reached": mean >= 0.98,
    }


def _until_it_is_tracked(storage: Storage, driver: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + BEGIN_S
    while time.monotonic() < until and driver.poll() is None:
        status = _status(storage)
        if status is not None and status.stage == "distill" and status.completed and status.mlflow_run_id:
            return
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError("no step of a distillation with a run in MLflow")


def _rate(storage: Storage, seconds: float) -> float:
    """Steps a second of the next block."""
    time.sleep(SETTLING_S)
    first = _next(storage)
    time.sleep(seconds - SETTLING_S)
    last = _next(storage)
    return (last.completed - first.completed) / (last.heartbeat_at - first.heartbeat_at).total_seconds()


def _next(storage: Storage) -> AttemptStatus:
    """The first status that is written from now on."""
    before, until = _status(storage), time.monotonic() + BEGIN_S
    while (status := _status(storage)) is None or status == before:
        if time.monotonic() > until:
            raise RuntimeError("the driver says no more")
        time.sleep(LOOK_EVERY_S)
    return status


def _status(storage: Storage) -> AttemptStatus | None:
    return storage.get_record(attempt_path("job", 1, "status.json"), AttemptStatus)
