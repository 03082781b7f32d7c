"""Parts of the embedded stack: the home, its ports, and finding every process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.database import open_unchecked
from service.local import ports
from service.local.stack import _upgrade_database
from service.local.state import Home, StackError, StackState
from service.local.sweep import STACK_ID, STACK_PART, find, sweep
from service.processes import PROCESSES
from service.schema import SCHEMA, downgrade

SLEEPER = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
FAMILY = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.execve("/bin/sleep", ["sleep", "600"], {})
time.sleep(600)
"""


def state_of(home: Home, **changes: object) -> StackState:
    state = StackState(
        state="up",
        stack_id="abc",
        home=str(home.folder),
        supervisor=os.getpid(),
        api="http://127.0.0.1:1",
        mlflow="http://127.0.0.1:2",
        ray="http://127.0.0.1:3",
        ports={"api": 1},
        processes=dict.fromkeys(PROCESSES, 7),
        ray_tmpdir="/tmp/ncfm-none",
        ray_token_path="token",
    )
    return state.model_copy(update=changes)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


def test_home_is_up_when_its_stack_holds_the_lock(home: Home) -> None:
    with home.locked():
        home.write(state_of(home))

        assert home.status().model_dump() == {
            "state": "up",
            "api": "http://127.0.0.1:1",
            "mlflow": "http://127.0.0.1:2",
            "ray": "http://127.0.0.1:3",
            "processes": dict.fromkeys(PROCESSES, 7),
        }


def test_home_is_down_when_its_stack_was_killed(home: Home) -> None:
    home.write(state_of(home))

    assert home.status().state == "down"


def test_home_is_down_when_a_new_stack_has_not_written_yet(home: Home) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    home.write(state_of(home, supervisor=gone.pid))
    with home.locked():
        assert home.status().state == "down"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "odd"}'])
def test_home_is_down_when_its_state_is_damaged(home: Home, content: str) -> None:
    (home.folder / "stack.json").write_text(content)

    assert home.status().state == "down"


def test_lock_is_refused_when_another_holds_it(home: Home) -> None:
    with home.locked():
        home.write(state_of(home))
        with (
            pytest.raises(StackError, match=r"already runs here \(process \d+, http://127\.0\.0\.1:1\)"),
            home.locked(),
        ):
            pass


def test_lock_is_taken_when_somebody_only_looks(home: Home) -> None:
    for _ in range(20):
        home.is_locked()
        with home.locked():
            assert home.is_locked()


def test_secret_is_for_its_owner_alone(home: Home) -> None:
    (home.folder / "token").write_text("old")
    (home.folder / "token").chmod(0o644)

    path = home.write_secret("token", "new")

    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


def test_logs_of_the_last_stack_stay_beside_the_new_ones(home: Home) -> None:
    (home.logs / "api.log").write_text("\n".join(str(line) for line in range(100)))
    assert home.tail("api", 2) == "98\n99"

    home.rotate_logs()

    assert [path.name for path in home.logs.iterdir()] == ["api.log.1"]
    assert home.tail("api") == ""


def test_port_is_the_preferred_one_when_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not ports.is_free(port)
        chosen = ports.choose([], port)
        assert chosen != port and ports.LOWEST <= chosen <= ports.HIGHEST

    assert ports.choose([], 0, port) == port
    assert ports.choose([port], port) != port


def test_port_is_named_when_it_is_demanded_and_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ports.PortTaken, match=rf"--port: the port is in use \(got {port}\)"):
            ports.demand(port, "--port")


@pytest.fixture
def stack_id() -> Iterator[str]:
    made = f"test-{os.getpid()}-{time.monotonic_ns()}"
    yield made
    sweep(made, term_wait_s=0)
    assert find(made) == []


def spawn(stack_id: str, program: str, part: str = "ray") -> subprocess.Popen[bytes]:
    environment = {**os.environ, STACK_ID: stack_id, STACK_PART: part}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> None:
    process.communicate()


def test_sweep_ends_what_obeys_and_what_does_not(stack_id: str) -> None:
    obeys, stubborn = spawn(stack_id, SLEEPER), spawn(stack_id, STUBBORN)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()

    assert sweep(stack_id, term_wait_s=0.5) == 2

    assert not any(psutil.pid_exists(process.pid) for process in (obeys, stubborn))
    end(obeys)
    end(stubborn)


def test_sweep_ends_descendants_that_cleared_their_environment(stack_id: str) -> None:
    parent = spawn(stack_id, FAMILY)
    deadline = time.monotonic() + 10
    while len(found := find(stack_id)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    child = next(process.pid for process in found if process.pid != parent.pid)

    sweep(stack_id, term_wait_s=0)

    end(parent)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_sweep_spares_other_parts_and_other_stacks(stack_id: str) -> None:
    ray, api = spawn(stack_id, SLEEPER, "ray"), spawn(stack_id, SLEEPER, "api")
    other = spawn(f"{stack_id}-other", SLEEPER)

    sweep(stack_id, "ray", term_wait_s=0)

    end(ray)
    assert not psutil.pid_exists(ray.pid)
    assert (api.poll(), other.poll()) == (None, None)
    sweep(f"{stack_id}-other", term_wait_s=0)
    sweep(stack_id, term_wait_s=0)
    end(api)
    end(other)


def test_guardian_sweeps_when_the_supervisor_is_gone(stack_id: str, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    worker = spawn(stack_id, STUBBORN)
    assert worker.stdout is not None
    worker.stdout.readline()
    guardian = subprocess.Popen(
        [sys.executable, "-m", "service.local.sweep", stack_id, str(folder)], stdin=subprocess.PIPE
    )
    time.sleep(0.5)
    assert (worker.poll(), guardian.poll()) == (None, None)

    guardian.communicate()

    end(worker)
    assert worker.returncode == -9
    assert not folder.exists()


def test_database_of_an_older_release_is_upgraded_and_kept(tmp_path: Path) -> None:
    url, said = f"sqlite:///{tmp_path / 'ncfm.db'}", list[str]()
    database = open_unchecked(url)
    database.upgrade()
    with database.writing() as connection:
        downgrade(connection, "0001")
    _upgrade_database(url, said.append)
    assert database.revision() == SCHEMA
    kept = open_unchecked(f"{url}.0001")
    assert kept.revision() == "0001"
    [line] = said
    assert str(tmp_path / "ncfm.db.0001") in line
    _upgrade_database(url, said.append)
    assert len(said) == 1
    kept.close()
    database.close()
