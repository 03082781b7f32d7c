"""What an MLflow that takes everything and answers nothing costs a driver: pairs of runs in turn, each with the machine for itself.

Side by side on two cores the two drivers take what the stages would have had, and the start of MLflow's client is measured.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.controllers import CLEAN
from worker.records import StageResult
from worker.storage import Storage

JOB: dict[str, Any] = {
    "dataset": "digits",
    "ipc": 1,
    "model": {"width": 16},
    "method": {"num_frequencies": 64, "num_components": 8, "real_batch": 64},
    "teachers": {"count": 2, "training": {"epochs": 2}},
    "evaluate": [{"students": 1, "tests": 1, "training": {"epochs": 2}}],
    "full_data": {"students": 1, "training": {"epochs": 1}},
    "resources": {"cpus": 1},
    "checkpoint": {"every_steps": 100_000, "every_seconds": 3600.0},
}


@contextmanager
def hole() -> Iterator[str]:
    """URL of a server that accepts every connection and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(512)
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        for each in kept:
            each.close()


def ratios(home: Path, *, pairs: int, steps: int) -> list[float]:
    """Steps a second with a silent MLflow over those without any, pair by pair."""
    spec, short = home / "job.json", home / "short.json"
    for path, number in ((spec, steps), (short, 1)):
        path.write_text(json.dumps(JOB | {"method": {**JOB["method"], "steps": number}}))
    first = home / "first"
    _rate(short, first, None)
    root = Storage(str(first))
    # The teachers stay, all else is made again.
    root.delete([path for path in root.list("results") if _stage(root, path) != "teachers"])
    found = []
    with hole() as url:
        for pair in range(pairs):
            storages = [home / f"{pair}-{name}" for name in ("without", "with")]
            for storage in storages:
                shutil.copytree(first, storage)
            # Each goes first in every other pair.
            rates = {n: _rate(spec, storages[n], url if n else None) for n in ((0, 1) if pair % 2 else (1, 0))}
            found.append(rates[1] / rates[0])
    return found


def summary(found: list[float]) -> dict[str, object]:
    error = statistics.stdev(found) / len(found) ** 0.5
    mean = statistics.fmean(found)
    shown = {"mean": round(mean, 4), "standard_error": round(error, 4), "median": round(statistics.median(found), 4)}
    return {
        "step_rate": shown | {"pairs": [round(each, 4) for each in found]},
        "bar": ">= 0.98",
        "reached": mean >= 0.98,
    }


def _rate(spec: Path, storage: Path, mlflow: str | None) -> float:
    """Steps a second of one run."""
    command = [sys.executable, "-m", "worker", "run", str(spec), "--storage", str(storage), "--job-id", "job"]
    run = subprocess.run(
        command + (["--mlflow", mlflow] if mlflow else []),
        env=CLEAN | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-4000:])
    root = Storage(str(storage))
    for path in root.list("results"):
        result = root.get_record(path, StageResult)
        if result is not None and result.stage == "distill":
            rate = result.figures["steps_per_second"]
            assert isinstance(rate, float)
            return rate
    raise RuntimeError("the run left no set")


def _stage(root: Storage, path: str) -> str:
    result = root.get_record(path, StageResult)
    return result.stage if result is not None else ""
