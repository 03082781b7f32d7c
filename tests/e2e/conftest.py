"""The whole stack for tests: one for the session, and more for those that break theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.local.state import Home, StackState
from service.local.sweep import find, sweep

START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0

Launch = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """Runs an `ncfm` command on a home, in a session of its own as from a terminal; `wait_up` waits until it is up."""
    started: list[subprocess.Popen[bytes]] = []

    def run(home: Path, *arguments: str, wait_up: bool = False) -> subprocess.Popen[bytes]:
        with (home / "command.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NCFM_HOME": str(home), "NCFM_STORAGE": "", "NCFM_DATABASE_URL": ""},
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
def stack(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackState]:
    """A running stack: addresses, home and process ids. Nothing of it is left afterwards."""
    home = tmp_path_factory.mktemp("home")
    process = launch(home, "up", "--port", "0", "--mlflow-port", "0", "--ray-port", "0", wait_up=True)
    state = Home(home).read()
    assert state is not None
    yield state
    process.send_signal(signal.SIGINT)
    code = process.wait(STOP_LIMIT_S)
    left = find(state.stack_id)
    sweep(state.stack_id, term_wait_s=0)
    assert (code, left) == (0, []), (home / "command.log").read_text()
