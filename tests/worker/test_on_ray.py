"""What only a real Ray shows: which processes tasks run in, and what becomes of a search that is disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("NCFM_", "RAY_", "TUNE_"))}


def told_by(program: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.worker.on_ray", program, str(folder)]
    environment = CLEAN | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


def test_task_on_a_gpu_has_a_process_of_its_own_and_one_on_cpus_uses_it_again(tmp_path: Path) -> None:
    processes = told_by("processes", tmp_path)
    assert len(set(processes["1"])) == 3
    assert len(set(processes["0"])) < 3


def test_search_is_committed_only_when_all_of_its_trials_came_to_their_end(tmp_path: Path) -> None:
    searches = told_by("searches", tmp_path)
    kept = searches["lost once"]
    assert (kept["ended"], kept["rungs"], kept["lost"]) == ("committed", [3, 3, 3], [])
    failed = searches["failed"]
    assert (failed["ended"], len(failed["lost"])) == ("committed", 1)
    assert "a trial of its own accord" in failed["lost"][0]
    for name, ended in {
        "lost for good": "SearchCutError",
        "signalled": "SearchCutError",
        "interrupted": "KeyboardInterrupt",
    }.items():
        assert (searches[name]["ended"], searches[name]["results"]) == (ended, []), name
    assert "1 were lost" in searches["lost for good"]["message"]
