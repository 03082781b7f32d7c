"""The process of a stage is killed again and again: the job succeeds, and its set has the bits of one that was left alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.client import Client
from service.local.state import StackState
from service.local.sweep import find
from service.replies import Job
from service.store import Store
from tests.faults.conftest import results_of, title
from worker.records import AttemptResult, attempt_path, now
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]
Alone = Callable[[], AbstractContextManager[None]]

STAGES = ("ray::teacher", "ray::distill", "ray::evaluation", "ray::random real", "ray::full data")
KILLS = 3
LATEST_KILL_S = 3.0


@contextmanager
def emptied(root: Path, aside: Path) -> Iterator[None]:
    """Nothing is in a folder meanwhile but what comes; afterwards what was there is in it again, beside what came."""
    aside.mkdir()
    for each in list(root.iterdir()):
        each.rename(aside / each.name)
    try:
        yield
    finally:
        for path in [each for each in aside.rglob("*") if each.is_file()]:
            target = root / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            # The same result may have been built once more: one of the two is as good as the other.
            if not target.exists():
                path.rename(target)


@pytest.fixture
def alone(stack: StackState, tmp_path: Path, until: Until) -> Alone:
    """Waits until no job of the stack is left to do, and empties its storage root for those that follow."""

    def is_at_rest() -> bool:
        with Store(f"sqlite:///{stack.home}/ncfm.db") as store:
            later = now() + timedelta(days=1)
            return not (store.active() or store.queue(limit=1) or store.unpublished(limit=1, at=later))

    def empty() -> AbstractContextManager[None]:
        until(is_at_rest)
        return emptied(Path(stack.home, "storage"), tmp_path / f"aside-{time.monotonic_ns()}")

    return empty


@pytest.mark.usefixtures("steady_api")
@pytest.mark.timeout(1800)
def test_set_is_the_same_when_its_stages_are_killed_three_times(
    stack: StackState,
    stack_client: Client,
    stack_storage: Storage,
    small_job: Document,
    alone: Alone,
    followed: Callable[[str], Job],
    images_of: Callable[[str], bytes],
    is_long: bool,
) -> None:
    chosen = random.Random(11)
    for number in range(5 if is_long else 1):
        document = small_job | {"seed": 50 + number, "teachers": small_job["teachers"] | {"seed": 50 + number}}
        with alone():
            job = stack_client.submit(document)
            killed = [_kill_one(stack, stack_client, job.id, chosen) for _ in range(KILLS)]
            ended = followed(job.id)
            assert ended.state == "succeeded", (killed, ended.complaint)
            _require_all_built(stack_storage, ended)
            disturbed = images_of(job.id)

        with alone():
            undisturbed = followed(stack_client.submit(document).id)
            assert undisturbed.state == "succeeded", undisturbed.complaint
            _require_all_built(stack_storage, undisturbed)
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


def _require_all_built(storage: Storage, job: Job) -> None:
    """Every result of a job that ran alone is its own: it found none."""
    last_word = storage.get_record(attempt_path(job.id, job.attempt, "result.json"), AttemptResult)
    assert last_word is not None
    built = results_of(storage, job.id)
    assert {result.key for result in built} == set(last_word.keys)
    assert {result.stage for result in built} == {"teachers", "distill", "evaluate", "publish"}
    assert len(storage.list("results")) == len(built), "results of others were in its storage root"
