"""The same job without the service: by hand, and by `ray job submit` on a cluster that knows nothing of us."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.local import ports
from service.local.sweep import STACK_ID, find, sweep
from service.replies import Job
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("NCFM_", "RAY_", "MLFLOW_"))}
CONTRACT = {
    *("job_id", "dataset", "ipc", "distilled", "random_real", "full", "seconds"),
    *("mlflow_run_id", "mlflow_url", "preview", "set_path"),
}
MOST_UPLOADED = 8 << 20
"""Bytes of a checkout that are worth sending: sources, docs and tests, never an environment."""


@dataclass(frozen=True)
class Head:
    """A Ray head of its own."""

    url: str
    environment: dict[str, str]
    """Of a client that may use it."""
    folder: Path


@pytest.fixture
def mark() -> Iterator[str]:
    """Put as `STACK_ID` into the environment of what a test starts, it finds every process of it; none may be left."""
    name = secrets.token_hex(8)
    yield name
    left = find(name)
    sweep(name, term_wait_s=0)
    assert left == []


@pytest.fixture
def head(tmp_path: Path, mark: str, until: Until) -> Iterator[Head]:
    """A cluster as an administrator starts one: a token, the worker's interpreter on PATH, nothing of ours."""
    environment = CLEAN | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{CLEAN['PATH']}"}
    gcs, dashboard, client = (ports.choose(()) for _ in range(3))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.2", "--port", str(gcs), "--ray-client-server-port", str(client)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"]
    url = f"http://127.0.0.1:{dashboard}"
    # A short path: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ncfm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        with (tmp_path / "head.log").open("wb") as log:
            own = {STACK_ID: mark, "RAY_TMPDIR": folder}
            process = subprocess.Popen(command, env=environment | own, stdout=log, stderr=log)
        until(lambda: has_a_node(url, environment["RAY_AUTH_TOKEN"]))
        yield Head(url, environment, Path(folder))
        sweep(mark)
        process.wait()


def has_a_node(url: str, token: str) -> bool:
    try:
        answer = httpx.get(f"{url}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}, timeout=5)
        return bool(answer.json()["data"]["result"]["result"])
    except (httpx.HTTPError, ValueError, KeyError):
        return False


@pytest.fixture
def spec_file(tmp_path: Path, small_job: Document) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(small_job))
    return path


def check_same(shown: Document, storage: Path, main_job: Job, images_of: Callable[[str], bytes]) -> None:
    """The contract's object, and the very set and figures that the service found."""
    assert set(shown) >= CONTRACT
    assert {"total", "teachers", "distill", "evaluate"} <= set(shown["seconds"])
    assert shown["seconds"]["distill"] > 0
    assert main_job.result is not None and main_job.result.distilled is not None
    assert shown["distilled"] == pytest.approx(main_job.result.distilled.model_dump(), abs=1e-4)
    assert Path(shown["set_path"]).is_relative_to(storage)
    assert Path(shown["preview"]).read_bytes().startswith(b"\x89PNG")
    assert Path(shown["set_path"], "images.safetensors").read_bytes() == images_of(main_job.id)


def test_set_is_the_same_when_it_is_run_by_hand(
    tmp_path: Path, mark: str, spec_file: Path, main_job: list[Job], images_of: Callable[[str], bytes]
) -> None:
    command = [sys.executable, "-m", "worker", "run", str(spec_file), "--json", "--storage", str(tmp_path / "storage")]
    environment = CLEAN | {STACK_ID: mark}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)

    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    check_same(shown, tmp_path / "storage", main_job[-1], images_of)
    assert (shown["mlflow_run_id"], shown["mlflow_url"]) == (None, None)


def test_set_is_the_same_when_it_is_submitted_to_ray(
    tmp_path: Path, head: Head, spec_file: Path, main_job: list[Job], images_of: Callable[[str], bytes]
) -> None:
    storage = tmp_path / "storage"
    assert Storage(str(storage)).list("") == []
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head.url, "--working-dir", "."]
    command += ["--", "python", "-m", "worker", "run", str(spec_file), "--json", "--storage", str(storage)]
    done = subprocess.run(
        command, cwd=ROOT, env=head.environment, capture_output=True, text=True, check=False, timeout=240
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    shown = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    check_same(shown, storage, main_job[-1], images_of)
    sent = list(head.folder.glob("ray/session_*/runtime_resources/working_dir_files/*"))
    size = sum(file.stat().st_size for path in sent for file in [path, *path.rglob("*")] if file.is_file())
    assert sent and 0 < size < MOST_UPLOADED, f"{size} bytes"
