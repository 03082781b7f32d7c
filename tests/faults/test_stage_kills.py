"""The process of a stage is killed again and again: the job succeeds, and its set has the bits of one that was left alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from service.client import Client
from service.local.state import StackState
from service.local.sweep import find
from service.replies import Job
from tests.faults.conftest import title
from worker.records import StageResult
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Document = dict[str, Any]

STAGES = ("ray::teacher", "ray::distill", "ray::evaluation", "ray::random real", "ray::full data")
KILLS = 3
LATEST_KILL_S = 3.0


@pytest.mark.usefixtures("steady_api")
@pytest.mark.timeout(1800)
def test_set_is_the_same_when_its_stages_are_killed_three_times(
    stack: StackState,
    stack_client: Client,
    stack_storage: Storage,
    small_job: Document,
    followed: Callable[[str], Job],
    images_of: Callable[[str], bytes],
    is_long: bool,
) -> None:
    """Teachers of a seed of their own, so that nothing of the job is stored when it begins."""
    chosen = random.Random(11)
    for number in range(5 if is_long else 1):
        document = small_job | {"seed": 50 + number, "teachers": small_job["teachers"] | {"seed": 50 + number}}
        job = stack_client.submit(document)
        killed = [_kill_one(stack, stack_client, job.id, chosen) for _ in range(KILLS)]
        ended = followed(job.id)
        assert ended.state == "succeeded", (killed, ended.complaint)
        disturbed = images_of(job.id)

        _forget(stack_storage, job.id)
        undisturbed = followed(stack_client.submit(document).id)
        assert undisturbed.state == "succeeded", undisturbed.complaint
        assert undisturbed.stages["distill"] == "done"
        assert images_of(undisturbed.id) == disturbed, killed


def _kill_one(stack: StackState, client: Client, job_id: str, chosen: random.Random) -> str:
    """Kill whatever stage runs at a moment by chance; its title."""
    time.sleep(chosen.uniform(0, LATEST_KILL_S))
    while not client.job(job_id).is_final:
        for each in find(stack.stack_id):
            with suppress(psutil.Error):
                name = title(each)
                if name.startswith(STAGES):
                    each.kill()
                    return name
        time.sleep(0.05)
    pytest.fail("the job ended before its stages were killed as often as they should be")


def _forget(storage: Storage, job_id: str) -> None:
    """Take out all that a job has built."""
    for path in storage.list("results"):
        result = storage.get_record(path, StageResult)
        if result is not None and result.built_by.startswith(job_id):
            storage.delete([path])
