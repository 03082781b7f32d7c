"""`ncfm up` and what it promises: ready means ready, what dies comes back, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from service.cluster import Cluster
from service.local.state import Home, StackState
from service.local.sweep import find
from service.processes import PROCESSES, ProcessName
from service.settings import Settings

pytestmark = pytest.mark.e2e

Launch = Callable[..., subprocess.Popen[bytes]]
FREE_PORTS = ("--port", "0", "--mlflow-port", "0", "--ray-port", "0")
RESTART_LIMIT_S = 60.0


def ncfm(home: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NCFM_HOME": str(home)} | variables
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def cluster_of(state: StackState) -> Cluster:
    return Cluster(Settings(ray_url=state.ray, ray_token_path=Path(state.ray_token_path)))


def test_all_four_answer_when_the_stack_is_up(stack: StackState) -> None:
    assert httpx.get(f"{stack.api}/livez").status_code == 200
    assert httpx.get(f"{stack.mlflow}/health").text == "OK"
    assert httpx.get(f"{stack.ray}/api/jobs/").status_code == 401
    cluster = cluster_of(stack)
    assert cluster.capacity().cpus >= 1
    cluster.close()


def test_nothing_listens_beyond_the_loopback_interface_when_the_stack_is_up(stack: StackState) -> None:
    seen: set[str] = set()
    for process in find(stack.stack_id):
        # One that ends meanwhile, as a subprocess of Ray's that asks the machine something, listens nowhere.
        with contextlib.suppress(psutil.NoSuchProcess):
            seen |= {each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}

    assert seen and seen <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_status_names_addresses_and_processes_when_the_stack_is_up(stack: StackState) -> None:
    started = time.monotonic()
    told = json.loads(ncfm(stack.home, "status", "--json").stdout)

    assert time.monotonic() - started < 15, "it imports neither torch nor ray"
    assert (told["state"], told["api"], told["mlflow"], told["ray"]) == ("up", stack.api, stack.mlflow, stack.ray)
    assert all(psutil.pid_exists(told["processes"][name]) for name in PROCESSES)


def test_secrets_are_for_their_owner_when_the_stack_is_up(stack: StackState) -> None:
    for name in ("ray.token", "stack.json"):
        assert (Path(stack.home) / name).stat().st_mode & 0o777 == 0o600


def test_second_up_is_refused_when_one_runs(stack: StackState) -> None:
    done = ncfm(stack.home, "up")

    assert done.returncode == 1
    assert "a stack already runs here" in done.stderr and stack.api in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("option", "name"), [("--port", "api"), ("--mlflow-port", "mlflow"), ("--ray-port", "ray")])
def test_port_is_named_when_it_is_in_use(stack: StackState, tmp_path: Path, option: str, name: str) -> None:
    port = str(stack.ports[name])

    done = ncfm(tmp_path, "up", option, port)

    assert done.returncode == 1
    assert f"{option}: the port is in use (got {port})" in done.stderr
    assert "Traceback" not in done.stderr


def test_jobs_are_listed_when_only_the_home_is_known(stack: StackState) -> None:
    done = ncfm(stack.home, "ls", "--json")

    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"items", "next"}


def test_unknown_job_is_told_in_one_line(stack: StackState) -> None:
    done = ncfm(stack.home, "show", "../nothing")

    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("names", [("api", "controller"), ("mlflow", "ray")])
def test_child_is_started_again_when_it_is_killed(stack: StackState, names: tuple[ProcessName, ...]) -> None:
    home = Home(Path(stack.home))
    before = home.status().processes
    for name in names:
        pid = before[name]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        status = home.status()
        return status.state == "up" and all(status.processes[name] not in (None, before[name]) for name in names)

    assert wait_until(is_back, RESTART_LIMIT_S), (home.folder / "command.log").read_text()
    after = home.status().processes
    assert {name: pid for name, pid in after.items() if name not in names} == {
        name: pid for name, pid in before.items() if name not in names
    }
    assert f"{names[0]} died (SIGKILL)" in (home.folder / "command.log").read_text()


def running(state: StackState, script: str) -> list[int]:
    """Processes of a stack that execute a script."""
    found = []
    for process in find(state.stack_id):
        with contextlib.suppress(psutil.Error):
            if script in process.cmdline():
                found.append(process.pid)
    return found


STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
time.sleep(1000)
"""


def test_nothing_is_left_when_up_is_killed_or_interrupted(launch: Launch, tmp_path: Path) -> None:
    """A driver that ignores SIGTERM and a child of it that leaves its session run both times."""
    home = Home(tmp_path)
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)

    def start(*ports: str) -> tuple[subprocess.Popen[bytes], StackState]:
        process = launch(tmp_path, "up", *ports, wait_up=True)
        state = home.read()
        assert state is not None
        cluster = cluster_of(state)
        cluster.submit("stubborn-1", f"{sys.executable} {script}", env={}, metadata={})
        assert wait_until(lambda: len(running(state, str(script))) >= 2, 30)
        cluster.close()
        return process, state

    process, first = start(*FREE_PORTS)
    process.kill()
    process.wait()
    assert wait_until(lambda: not find(first.stack_id), 15), find(first.stack_id)
    assert home.status().state == "down"

    process, second = start()
    assert (second.api, second.mlflow, second.ray) == (first.api, first.mlflow, first.ray)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert time.monotonic() - began < 30
    assert find(second.stack_id) == []
    assert home.status().state == "down"
    assert not Path(second.ray_tmpdir).exists()


def test_home_is_named_when_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    done = ncfm(tmp_path / "file" / "home", "up")

    assert done.returncode == 1
    assert "NCFM_HOME: the folder cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_database_is_named_when_it_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "ncfm.db").write_text("this is no database, and long enough to be sure of it" * 100)

    done = ncfm(tmp_path, "up")

    assert done.returncode == 1
    assert "NCFM_DATABASE_URL: the database cannot be used: file is not a database" in done.stderr
    assert "Traceback" not in done.stderr


def test_log_is_shown_and_all_is_freed_when_a_child_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    ports = ("--port", str(port), "--mlflow-port", "0", "--ray-port", "0")
    done = ncfm(tmp_path, "up", *ports, NCFM_STORAGE=str(tmp_path / "file" / "storage"))

    assert done.returncode == 1
    assert "the process ended at once (exit code 1)" in done.stderr and "The end of its log" in done.stderr
    assert "Traceback" not in done.stderr
    state = Home(tmp_path).read()
    assert state is not None and state.ports["api"] == port
    assert find(state.stack_id) == []
    socket.create_server(("127.0.0.1", port)).close()
