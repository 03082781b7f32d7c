"""The disk of the storage root, or of the database, is full for a while: it is said, nothing is lost, and it goes on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.client import Client
from service.database import StoreFullError
from service.jobs import Job, Reason, State
from service.store import Store
from tests.conftest import Boot
from tests.faults.checker import ClientLog
from tests.faults.conftest import CHECKPOINT_LIMIT_S, check_stack, newest_checkpoint
from tests.faults.controllers import Site, state_is
from worker.storage import Storage

pytestmark = pytest.mark.e2e

FULL_S = 3.0
"""How long the disk stays full; a minute in a long run."""
LONG_FULL_S = 60.0

Document = dict[str, Any]
Disk = Callable[[str], Path]
Until = Callable[..., Any]


def fill(folder: Path) -> Path:
    """A file that leaves no room for another byte, or what there is of it with more."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            os.fsync(file.fileno())
    return path


def test_job_waits_and_says_so_when_the_storage_root_is_full(tmp_path: Path, small_disk: Disk, is_long: bool) -> None:
    disk = small_disk("512k")
    site = Site(tmp_path, storage=str(disk / "storage"))
    try:
        site.controller()
        first = site.post()
        site.until(state_is(site, first, State.SUCCEEDED))
        filler = fill(disk)
        jobs = [site.post() for _ in range(3)]
        site.until(lambda: all("waits for the storage root" in site.job(job).message for job in jobs))
        time.sleep(LONG_FULL_S if is_long else FULL_S)
        for job in jobs:
            waiting = site.job(job)
            assert waiting.state is State.STARTING
            assert waiting.reason in (Reason.STORAGE_FULL, Reason.STORAGE_UNAVAILABLE)
            assert "No space left" in waiting.message or "full" in waiting.message
            assert (waiting.attempt, waiting.losses, waiting.failures) == (1, 0, 0)
            said = [event for event in site.store.events(job.id, after=0, limit=99) if event.type == "waiting"]
            assert len(said) <= 2, said
        filler.unlink()
        site.until(site.has_ended)
        assert site.check() == 4
        assert {site.job(job).attempt for job in jobs} == {1}
    finally:
        site.close()


@pytest.mark.timeout(900)
def test_real_job_goes_on_when_the_storage_root_was_full_in_mid_distillation(
    tmp_path: Path, small_disk: Disk, boot: Boot, small_job: Document, until: Until, is_long: bool
) -> None:
    """On a stack of its own. A checkpoint is larger than what an attempt keeps in reserve to say that there is no room."""
    disk, home = small_disk("16m"), tmp_path / "home"
    storage, document = Storage(str(disk / "storage")), small_job | {"ipc": 20}
    home.mkdir()
    with boot(home, {"NCFM_STORAGE": storage.url}) as stack, Client(stack.api) as client:
        first = client.submit(document)
        until(lambda: newest_checkpoint(storage, first.id), CHECKPOINT_LIMIT_S)
        fill(disk)
        until(lambda: "storage is full" in client.job(first.id).message)
        # What it had kept to say so.
        fill(disk)
        second = client.submit(document)
        until(lambda: client.job(second.id).reason == "storage_full")
        time.sleep(LONG_FULL_S if is_long else FULL_S)
        waiting = [client.job(each.id) for each in (first, second)]
        assert [(job.state, job.attempt) for job in waiting] == [("running", 1), ("starting", 1)]
        assert "storage is full" in waiting[0].message and "waits for the storage root" in waiting[1].message

        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        for job in (first, second):
            ended = client.wait(job.id, on_change=lambda _: None, poll_s=0.1)
            assert (ended.state, ended.attempt) == ("succeeded", 1), ended.complaint
        assert any("storage is full" in warning for warning in client.job(first.id).warnings)
        acknowledged = {each.id: each.spec for each in (first, second)}
        check_stack(stack, storage=storage.url, log=ClientLog(acknowledged=acknowledged))


def test_nothing_acknowledged_is_lost_when_the_disk_of_the_database_is_full(
    tmp_path: Path, small_disk: Disk, is_long: bool
) -> None:
    disk = small_disk("2m")
    site = Site(tmp_path, database_url=f"sqlite:///{disk}/ncfm.db")
    try:
        site.controller()
        site.until(state_is(site, site.post(), State.SUCCEEDED))
        running = [site.post() for _ in range(3)]
        filler = fill(disk)
        refused = post_until_refused(site)
        time.sleep(LONG_FULL_S if is_long else FULL_S)
        filler.unlink()
        site.until(site.has_ended)
        after = site.post()
        site.until(site.has_ended)
        assert site.job(after).state is State.SUCCEEDED
        assert site.store.get(refused.id) is None, "it was refused, and is there"
        assert {site.job(job).state for job in running} == {State.SUCCEEDED}
        assert site.check() == len(site.acknowledged)
        assert integrity(site.store) == "ok"
    finally:
        site.close()


def post_until_refused(site: Site) -> Job:
    """Hands in jobs until there is no room for one; that one."""
    for _ in range(10_000):
        job = site.new_job()
        try:
            site.keep(job)
        except StoreFullError:
            return job
    raise AssertionError("the disk is never full")


def integrity(store: Store) -> str:
    with store.reading() as connection:
        return str(connection.exec_driver_sql("PRAGMA integrity_check").scalar_one())
