"""API, controller and Ray's head are killed in the same second: all come back, and what was acknowledged comes to its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from service.client import Client
from service.local.state import Home, StackState
from service.processes import ProcessName
from service.replies import Job
from service.store import Store
from tests.faults.checker import ClientLog, check
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]

VICTIMS: tuple[ProcessName, ...] = ("api", "controller", "ray")
BACK_LIMIT_S = 120.0


def kill_together(home: Home) -> dict[ProcessName, int]:
    """Kill them within a second; their process ids."""
    pids = {name: pid for name, pid in home.status().processes.items() if name in VICTIMS and pid is not None}
    assert set(pids) == set(VICTIMS), pids
    began = time.monotonic()
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - began < 1.0
    return pids


def is_back(home: Home, killed: dict[ProcessName, int]) -> bool:
    """Whether others have taken their places, and all is up."""
    now = home.status()
    return now.state == "up" and all(now.processes[name] not in (None, pid) for name, pid in killed.items())


@pytest.mark.timeout(900)
def test_jobs_come_to_their_end_when_api_controller_and_head_are_killed_at_once(
    stack: StackState,
    home: Home,
    stack_client: Client,
    stack_storage: Storage,
    main_job: list[Job],
    small_job: Document,
    forget_sets: Callable[[], None],
    checkpoint_of: Callable[[str], int],
    followed: Callable[[str], Job],
    images_of: Callable[[str], bytes],
    until: Until,
    is_long: bool,
) -> None:
    undisturbed = images_of(main_job[-1].id)
    for _ in range(3 if is_long else 1):
        forget_sets()
        job = stack_client.submit(small_job)
        waiting = stack_client.submit(small_job | {"resources": {"cpus": 1024}})
        checkpoint_of(job.id)
        killed = kill_together(home)
        until(lambda killed=killed: is_back(home, killed), BACK_LIMIT_S)

        assert stack_client.job(waiting.id).state == "queued"
        assert stack_client.cancel(waiting.id).state == "cancelled"
        ended = followed(job.id)
        assert (ended.state, ended.attempt) == ("succeeded", 2), ended.complaint
        assert images_of(job.id) == undisturbed

        store = Store(f"sqlite:///{stack.home}/ncfm.db")
        check(store, stack_storage, log=ClientLog(acknowledged={each.id: each.spec for each in (job, waiting)}))
        store.close()
