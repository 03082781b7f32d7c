"""Every process of the service is killed in the same second: all come back, and what was acknowledged comes to its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.client import Client
from service.local.state import Home
from service.processes import PROCESSES, ProcessName
from service.replies import Job
from service.store import Store
from tests.conftest import Boot, images
from tests.faults.checker import ClientLog
from tests.faults.conftest import CHECKPOINT_LIMIT_S, check_stack, forget_sets_of, lacks, newest_checkpoint
from tests.postgres import Postgres
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]

BACK_LIMIT_S = 120.0
PUBLISHED_LIMIT_S = 400.0


def kill_together(home: Home, server: Postgres) -> dict[ProcessName, int]:
    """Kill the four processes of a stack and its database's server within a second; the ids of the four."""
    pids = {name: pid for name, pid in home.status().processes.items() if pid is not None}
    assert set(pids) == set(PROCESSES), pids
    of_database = server.processes()
    began = time.monotonic()
    for pid in (*pids.values(), *(each.pid for each in of_database)):
        os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - began < 1.0
    psutil.wait_procs(of_database, timeout=10)
    return pids


def is_another(home: Home, name: ProcessName, killed: dict[ProcessName, int]) -> bool:
    """Whether another process has taken the place of one that was killed."""
    return home.status().processes[name] not in (None, killed[name])


@pytest.mark.timeout(1800)
def test_jobs_come_to_their_end_when_everything_is_killed_at_once(
    tmp_path: Path,
    boot: Boot,
    server: Postgres,
    main_job: list[Job],
    small_job: Document,
    images_of: Callable[[str], bytes],
    read_run: Callable[[str, str], Document],
    until: Until,
    is_long: bool,
) -> None:
    """On a stack of its own, whose database is PostgreSQL. Its server comes back last, and not by the stack."""
    undisturbed, database = images_of(main_job[-1].id), server.create_database()
    home, storage = Home(tmp_path), Storage(str(tmp_path / "storage"))
    acknowledged: Document = {}
    with (
        boot(tmp_path, {"NCFM_DATABASE_URL": database}) as stack,
        Client(stack.api) as client,
        Store(database) as store,
    ):
        for _ in range(3 if is_long else 1):
            forget_sets_of(storage)
            job = client.submit(small_job)
            waiting = client.submit(small_job | {"resources": {"cpus": 1024}})
            acknowledged |= {each.id: each.spec for each in (job, waiting)}
            until(lambda job=job: newest_checkpoint(storage, job.id), CHECKPOINT_LIMIT_S)
            killed = kill_together(home, server)
            until(lambda killed=killed: is_another(home, "api", killed), BACK_LIMIT_S)
            server.start()
            until(lambda killed=killed: all(is_another(home, name, killed) for name in PROCESSES), BACK_LIMIT_S)
            until(lambda: home.status().state == "up", BACK_LIMIT_S)

            assert client.job(waiting.id).state == "queued"
            assert client.cancel(waiting.id).state == "cancelled"
            ended = client.wait(job.id, on_change=lambda _: None, poll_s=0.1)
            assert (ended.state, ended.attempt) == ("succeeded", 2), ended.complaint
            assert images(stack, job.id) == undisturbed

            def publication(job_id: str = job.id) -> str:
                found = store.get(job_id)
                assert found is not None
                return found.publication

            until(lambda publication=publication: publication() == "done", PUBLISHED_LIMIT_S)
            run = read_run(stack.mlflow, str(ended.mlflow_run_id))
            assert not lacks(run, client, storage, job.id)
            check_stack(stack, database=database, log=ClientLog(acknowledged=acknowledged))
