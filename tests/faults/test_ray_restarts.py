"""Ray's head is killed in mid-run, and jobs are cancelled at any moment: they end right, and nothing of them is left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from service.client import Client
from service.local.state import Home
from service.replies import Job

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]

OLD_SESSION_LIMIT_S = 120.0
CANCEL_LIMIT_S = 60.0
LATEST_CANCEL_S = 12.0
"""A driver has begun to distil by then."""


def head_processes(home: Home) -> dict[str, psutil.Process]:
    """What a head consists of, by name."""
    pid = home.status().processes["ray"]
    assert pid is not None
    main = psutil.Process(pid)
    found = {
        name: each for each in main.children(recursive=True) for name in ("gcs_server", "raylet") if name in each.name()
    }
    return {"ray": main} | found


def session(home: Home) -> list[psutil.Process]:
    """All processes of the head that runs now, its workers and drivers among them."""
    pid = home.status().processes["ray"]
    assert pid is not None
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


@pytest.mark.usefixtures("steady_api")
@pytest.mark.timeout(1800)
def test_job_recovers_and_nothing_of_the_old_head_is_left_when_it_is_killed(
    home: Home,
    stack_client: Client,
    small_job: Document,
    forget_sets: Callable[[], None],
    checkpoint_of: Callable[[str], int],
    followed: Callable[[str], Job],
    images_of: Callable[[str], bytes],
    until: Until,
    is_long: bool,
) -> None:
    document = small_job | {"seed": 5}
    images = set()
    for victim in ("ray", "gcs_server", "raylet") if is_long else ("ray",):
        forget_sets()
        job = stack_client.submit(document)
        checkpoint_of(job.id)
        old = session(home)
        killed_at = time.monotonic()
        os.kill(head_processes(home)[victim].pid, signal.SIGKILL)
        ended = followed(job.id)

        assert (ended.state, ended.attempt) == ("succeeded", 2), (victim, ended.complaint)
        images.add(images_of(job.id))
        left = OLD_SESSION_LIMIT_S - (time.monotonic() - killed_at)
        until(
            lambda old=old: not [each for each in old if each.is_running() and each.status() != "zombie"], max(1, left)
        )
        until(lambda: home.status().state == "up")
    assert len(images) == 1, "resumed runs differ"


@pytest.mark.timeout(3600)
def test_jobs_end_and_leave_nothing_when_they_are_cancelled_at_any_moment(
    stack_client: Client,
    small_job: Document,
    processes_of: Callable[[str], list[psutil.Process]],
    until: Until,
    is_long: bool,
) -> None:
    chosen = random.Random(7)
    slowest = 0.0
    for number in range(30 if is_long else 3):
        endless = small_job | {"seed": 100 + number, "method": small_job["method"] | {"steps": 100_000}}
        job = stack_client.submit(endless)
        time.sleep(chosen.uniform(0, LATEST_CANCEL_S))
        asked_at = time.monotonic()
        stack_client.cancel(job.id)
        until(lambda job=job: stack_client.job(job.id).state == "cancelled", CANCEL_LIMIT_S)
        until(lambda job=job: not processes_of(job.id), max(1, CANCEL_LIMIT_S - (time.monotonic() - asked_at)))
        slowest = max(slowest, time.monotonic() - asked_at)
    assert slowest < CANCEL_LIMIT_S
