"""The command line: what a person is told when something is wrong, and that `plan` stays light."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from worker.records import EXIT_USER_ERROR, AttemptResult, result_path
from worker.settings import prepare_own_ray
from worker.storage import Storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("dataset: digits\nipc: 1\n")
    return path


def worker(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NCFM_", "RAY_", "MLFLOW_"))}
    command = [sys.executable, "-m", "worker", *arguments]
    home = {"NCFM_HOME": str(tmp_path / "home"), "NCFM_STORAGE": str(tmp_path / "storage")}
    return subprocess.run(
        command, env=clean | home | environment, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_plan_names_every_result(tmp_path: Path, spec_file: Path) -> None:
    done = worker(tmp_path, "plan", str(spec_file), "--json", "--no-inspect")
    assert done.returncode == 0 and "--inspect loads them here" in done.stderr, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert [each["stage"] for each in document["builds"]].count("teachers") == 3
    assert {each["key"] for each in document["builds"]} == {"unknown until inspected"}


def test_plan_says_what_is_stored_when_the_data_are_built_in(tmp_path: Path, spec_file: Path) -> None:
    first = worker(tmp_path, "plan", str(spec_file), "--json")
    assert first.returncode == 0, first.stderr
    builds = json.loads(first.stdout.splitlines()[-1])["builds"]
    assert {each["state"] for each in builds} == {"to build"} and "unknown" not in first.stderr
    key = builds[0]["key"]
    Storage(str(tmp_path / "storage")).put(result_path(key), b"{}")
    second = worker(tmp_path, "plan", str(spec_file), "--storage", str(tmp_path / "storage"), "--json")
    states = {each["key"]: each["state"] for each in json.loads(second.stdout.splitlines()[-1])["builds"]}
    assert states.pop(key) == "cached" and set(states.values()) == {"to build"}


def test_plan_knows_the_keys_when_it_inspects(tmp_path: Path, spec_file: Path) -> None:
    done = worker(tmp_path, "plan", str(spec_file), "--json", "--inspect", "--set", "search.space={image_lr: [0.1]}")
    assert done.returncode == 0, done.stderr
    builds = {each["name"]: each for each in json.loads(done.stdout.splitlines()[-1])["builds"]}
    assert builds["teacher 0"]["key"].startswith("sha256:")
    assert builds["teacher 0"]["state"] == "to build"
    assert builds["distill"]["key"] == "unknown until searched"


def test_plan_imports_neither_torch_nor_ray_nor_mlflow(tmp_path: Path, spec_file: Path) -> None:
    code = (
        "import sys; from worker.__main__ import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(spec_file), "--no-inspect", "--storage", str(tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: digitz\nipc: 1\n", "Did you mean 'digits'?"),
        ("dataset: digits\nipc: 0\n", "ipc: "),
        ("dataset: digits\nipc: 500\n", "Choose 1 to 118."),
        ("dataset: digits\nipc: 1\nstesp: 3\n", "unknown key"),
        ("dataset: [digits\n", "not YAML"),
    ],
)
def test_bad_spec_is_the_users_error(tmp_path: Path, command: str, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    done = worker(tmp_path, command, str(tmp_path / "job.yaml"))
    assert done.returncode == EXIT_USER_ERROR
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list((tmp_path / "storage").rglob("*.json"))


def test_missing_file_is_told(tmp_path: Path) -> None:
    done = worker(tmp_path, "run", str(tmp_path / "none.yaml"))
    assert (done.returncode, done.stdout) == (EXIT_USER_ERROR, "")
    assert "none.yaml" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "option",
    [
        ("--job-id", "../elsewhere"),
        ("--attempt", "0"),
        ("--gpus", "-1"),
        ("--gpus", "1.5"),
        ("--gpus", "65"),
        ("--gpus", "nan"),
    ],
)
def test_bad_option_is_told(tmp_path: Path, spec_file: Path, option: tuple[str, str]) -> None:
    done = worker(tmp_path, "run", str(spec_file), *option)
    assert done.returncode == EXIT_USER_ERROR
    assert option[0] in done.stderr


def test_bad_surroundings_are_told(tmp_path: Path, spec_file: Path) -> None:
    done = worker(tmp_path, "run", str(spec_file), NCFM_ALLOW_DOWNLOAD="perhaps")
    assert done.returncode == EXIT_USER_ERROR
    assert "NCFM_ALLOW_DOWNLOAD" in done.stderr
    done = worker(tmp_path, "run", str(spec_file), "--storage", str(spec_file / "below"))
    assert done.returncode == 1
    assert "cannot be opened" in done.stderr


def assert_told_quickly(done: subprocess.CompletedProcess[str], seconds: float, message: str, tmp_path: Path) -> None:
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 30
    assert not (tmp_path / "storage" / "jobs").exists()


def test_mlflow_that_is_away_is_told_before_anything_is_made(tmp_path: Path, spec_file: Path) -> None:
    started = time.monotonic()
    done = worker(tmp_path, "run", str(spec_file), "--mlflow", f"http://127.0.0.1:{closed_port()}")
    assert_told_quickly(done, time.monotonic() - started, "MLflow does not answer", tmp_path)


def test_ray_that_is_away_is_told_before_anything_is_made(tmp_path: Path, spec_file: Path) -> None:
    started = time.monotonic()
    done = worker(tmp_path, "run", str(spec_file), RAY_ADDRESS=f"127.0.0.1:{closed_port()}")
    assert_told_quickly(done, time.monotonic() - started, "Ray does not answer", tmp_path)


class _Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Refuses) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_server_that_is_no_mlflow_is_told(tmp_path: Path, spec_file: Path, refusing_server: str) -> None:
    done = worker(tmp_path, "run", str(spec_file), "--mlflow", refusing_server)
    assert done.returncode == 1
    assert "HTTP 403" in done.stderr
    assert "--allowed-hosts" in done.stderr


@pytest.mark.parametrize("url", ["localhost:5000", "sqlite:///x.db", "http://"])
def test_address_that_is_none_is_told(tmp_path: Path, spec_file: Path, url: str) -> None:
    done = worker(tmp_path, "run", str(spec_file), "--mlflow", url)
    assert done.returncode == 1
    assert "mlflow_url" in done.stderr
    assert "Traceback" not in done.stderr


def test_controller_finds_the_reason_of_an_attempt_that_could_not_begin(tmp_path: Path, spec_file: Path) -> None:
    address = f"127.0.0.1:{closed_port()}"
    done = worker(tmp_path, "run", str(spec_file), "--job-id", "J", "--attempt", "3", RAY_ADDRESS=address)
    assert done.returncode == 1
    result = AttemptResult.model_validate_json((tmp_path / "storage/jobs/J/attempts/3/result.json").read_bytes())
    assert result.outcome == "failed"
    assert result.retryable
    assert result.error is not None
    assert result.error.code == "cluster_unreachable"
    assert address in result.error.problems[0]["value"]


def test_cluster_of_its_own_asks_for_a_token_and_listens_on_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"RAY_AUTH_TOKEN_PATH": "/of/another"})

    prepare_own_ray()

    assert os.environ.pop("RAY_AUTH_TOKEN")
    assert os.environ == {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
