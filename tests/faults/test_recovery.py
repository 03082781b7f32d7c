"""Whatever is killed, an accepted job comes to its end, and to the same set."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from service.client import Client, ServiceAway
from service.jobs import MOVES, State
from service.local.state import Home, StackState
from service.processes import ProcessName
from service.replies import Job

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]
Kill = Callable[[ProcessName], None]

CANCEL_LIMIT_S = 30.0
BACK_LIMIT_S = 60.0


@pytest.fixture
def kill(home: Home, until: Until) -> Kill:
    """Kills a process of the stack and waits until another has taken its place and all are up."""

    def kill_and_wait(name: ProcessName) -> None:
        before = home.status().processes[name]
        assert before is not None
        os.kill(before, signal.SIGKILL)
        until(lambda: home.status().processes[name] not in (None, before), BACK_LIMIT_S)
        until(lambda: home.status().state == "up", BACK_LIMIT_S)

    return kill_and_wait


def states(client: Client, job_id: str) -> list[str]:
    """Where a job went, having made sure that its events are gapless and its moves legal."""
    events = list(client.events(job_id))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    moves = [(State(str(each.data["from"])), State(str(each.data["to"]))) for each in events if each.type == "state"]
    assert all(to in MOVES[start] for start, to in moves)
    return [to for _, to in moves]


def resumed_at(log: str) -> int:
    """The step that a distillation went on from, by its driver's log."""
    found = re.search(r"the distillation goes on from step (\d+)", log)
    assert found, log
    return int(found[1])


@pytest.mark.usefixtures("steady_api")
def test_job_is_followed_to_its_end_when_the_controller_is_killed(
    stack_client: Client,
    same_job: Document,
    checkpoint_of: Callable[[str], int],
    kill: Kill,
    followed: Callable[[str], Job],
) -> None:
    job = stack_client.submit(same_job)
    checkpoint_of(job.id)
    kill("controller")
    ended = followed(job.id)

    assert (ended.state, ended.attempt) == ("succeeded", 1), ended.complaint
    assert states(stack_client, job.id) == ["starting", "running", "succeeded"]


@pytest.mark.usefixtures("steady_api")
def test_set_is_the_same_when_the_driver_is_killed(
    stack_client: Client,
    main_job: list[Job],
    same_job: Document,
    checkpoint_of: Callable[[str], int],
    driver_of: Callable[[str], psutil.Process],
    followed: Callable[[str], Job],
    images_of: Callable[[str], bytes],
) -> None:
    job = stack_client.submit(same_job)
    step = checkpoint_of(job.id)
    driver_of(job.id).kill()
    ended = followed(job.id)

    assert (ended.state, ended.attempt) == ("succeeded", 2), ended.complaint
    assert states(stack_client, job.id) == ["starting", "running", "recovering", "starting", "running", "succeeded"]
    assert step <= resumed_at(stack_client.logs(job.id)) < 600
    assert images_of(job.id) == images_of(main_job[-1].id)


@pytest.mark.usefixtures("steady_api")
def test_set_is_the_same_when_the_task_is_killed(
    stack_client: Client,
    main_job: list[Job],
    same_job: Document,
    checkpoint_of: Callable[[str], int],
    task_of: Callable[[str], psutil.Process],
    followed: Callable[[str], Job],
    images_of: Callable[[str], bytes],
) -> None:
    job = stack_client.submit(same_job)
    step = checkpoint_of(job.id)
    task_of(job.id).kill()
    ended = followed(job.id)

    assert (ended.state, ended.attempt) == ("succeeded", 1), ended.complaint
    assert step <= resumed_at(stack_client.logs(job.id)) < 600
    assert any("distill is begun again" in warning for warning in ended.warnings)
    assert images_of(job.id) == images_of(main_job[-1].id)


def test_acknowledged_jobs_are_all_there_when_the_api_is_killed(
    stack: StackState, stack_client: Client, small_job: Document, kill: Kill, until: Until
) -> None:
    waiting = small_job | {"resources": {"cpus": 1024}}
    acknowledged: list[str] = []
    enough = threading.Event()

    def submit() -> None:
        with Client(stack.api) as client:
            while not enough.is_set():
                try:
                    acknowledged.append(client.submit(waiting).id)
                except ServiceAway:
                    time.sleep(0.05)

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(acknowledged) > 10)
    kill("api")
    until(lambda: len(acknowledged) > 20)
    enough.set()
    for thread in threads:
        thread.join()

    assert {stack_client.job(job_id).state for job_id in acknowledged} == {"queued"}
    assert len(set(acknowledged)) == len(acknowledged)
    # Also those whose answer was lost, which their clients know nothing of.
    for job in stack_client.jobs(limit=200)[0]:
        if job.state == "queued":
            assert stack_client.cancel(job.id).state == "cancelled"


@pytest.mark.usefixtures("steady_api")
def test_nothing_is_left_of_a_job_when_it_is_cancelled(
    stack: StackState,
    stack_client: Client,
    small_job: Document,
    checkpoint_of: Callable[[str], int],
    processes_of: Callable[[str], list[psutil.Process]],
    read_run: Callable[[str, str], Document],
    until: Until,
) -> None:
    job = stack_client.submit(small_job | {"method": small_job["method"] | {"steps": 100_000}})
    checkpoint_of(job.id)
    assert len(processes_of(job.id)) >= 2

    asked_at = time.monotonic()
    assert stack_client.cancel(job.id).state == "cancelling"
    until(lambda: stack_client.job(job.id).state == "cancelled", CANCEL_LIMIT_S)
    until(lambda: not processes_of(job.id), CANCEL_LIMIT_S - (time.monotonic() - asked_at))

    ended = stack_client.job(job.id)
    assert (ended.reason, ended.result) == ("requested", None)
    assert stack_client.artifacts(job.id) == []
    # On a busy machine a publisher does it a little later.
    until(lambda: read_run(stack.mlflow, str(ended.mlflow_run_id))["status"] == "KILLED")


@pytest.mark.usefixtures("steady_api")
def test_nothing_is_left_of_a_job_when_it_is_cancelled_as_its_driver_is_lost(
    stack_client: Client,
    main_job: list[Job],
    small_job: Document,
    checkpoint_of: Callable[[str], int],
    driver_of: Callable[[str], psutil.Process],
    task_of: Callable[[str], psutil.Process],
    processes_of: Callable[[str], list[psutil.Process]],
    until: Until,
) -> None:
    """The stage outlives its driver, since it is stopped: Ray has to end it the hard way."""
    # The main job's teachers are there, so that the first checkpoint is one of the distillation.
    job = stack_client.submit(small_job | {"method": small_job["method"] | {"steps": 100_000}})
    checkpoint_of(job.id)
    task_of(job.id).suspend()
    driver_of(job.id).kill()
    until(lambda: stack_client.job(job.id).state == "recovering", CANCEL_LIMIT_S)
    assert stack_client.cancel(job.id).state in ("cancelling", "cancelled")
    until(lambda: stack_client.job(job.id).state == "cancelled", CANCEL_LIMIT_S)
    left = processes_of(job.id)

    assert not left
    assert states(stack_client, job.id) == ["starting", "running", "recovering", "cancelling", "cancelled"]
    end = list(stack_client.events(job.id))[-1].data
    assert end["cleanup"] == "verified"
    assert end["checked"] == ["Ray says FAILED", "no worker or actor of it lives by Ray's account"]
