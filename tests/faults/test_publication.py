"""MLflow is away for as long as it likes: jobs end, and their runs are completed by themselves once it is back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest

from service.client import Client
from service.local.state import Home, StackState
from service.replies import Job

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]

LONG_S = 600.0


@pytest.fixture
def freeze(home: Home) -> Iterator[Callable[[], Callable[[], None]]]:
    """Stops MLflow's processes as they are: connections are taken and never answered. Returns what lets them go on."""
    frozen: list[psutil.Process] = []

    def thaw() -> None:
        for each in frozen:
            with suppress(psutil.Error):
                each.send_signal(signal.SIGCONT)
        frozen.clear()

    def stop() -> Callable[[], None]:
        pid = home.status().processes["mlflow"]
        assert pid is not None
        frozen.extend([psutil.Process(pid), *psutil.Process(pid).children(recursive=True)])
        for each in frozen:
            each.send_signal(signal.SIGSTOP)
        return thaw

    yield stop
    thaw()


@pytest.mark.usefixtures("steady_api")
@pytest.mark.timeout(1800)
def test_runs_are_completed_when_mlflow_is_back_after_the_jobs_have_ended(
    stack: StackState,
    stack_client: Client,
    small_job: Document,
    checkpoint_of: Callable[[str], int],
    followed: Callable[[str], Job],
    freeze: Callable[[], Callable[[], None]],
    read_run: Callable[[str, str], Document],
    until: Until,
    is_long: bool,
) -> None:
    """One job succeeds meanwhile, another is cancelled: neither waits, and neither leaves a run that is RUNNING."""

    def body(job_id: str) -> Document:
        answer: Document = httpx.get(f"{stack.api}/jobs/{job_id}").json()
        return answer

    doomed = stack_client.submit(
        small_job | {"seed": 31, "method": small_job["method"] | {"steps": 100_000}, "priority": 90}
    )
    until(lambda: stack_client.job(doomed.id).mlflow_run_id)
    job = stack_client.submit(small_job | {"seed": 32, "method": small_job["method"] | {"steps": 1000}})
    until(lambda: stack_client.job(job.id).mlflow_run_id)
    checkpoint_of(job.id)
    thaw, frozen_at = freeze(), time.monotonic()
    stack_client.cancel(doomed.id)
    assert followed(doomed.id).state == "cancelled"
    ended = followed(job.id)
    assert (ended.state, ended.attempt) == ("succeeded", 1), ended.complaint
    assert [body(each.id)["publication"] for each in (doomed, job)] == ["pending", "pending"]
    if is_long:
        time.sleep(max(0.0, LONG_S - (time.monotonic() - frozen_at)))
    thaw()

    until(lambda: [body(each.id)["publication"] for each in (doomed, job)] == ["done", "done"], 400.0)
    run = read_run(stack.mlflow, str(ended.mlflow_run_id))
    assert run["status"] == "FINISHED"
    assert {artifact.name for artifact in stack_client.artifacts(job.id)} <= run["files"]
    steps = run["steps"]["distill/discrepancy"]
    assert len(steps) == len(set(steps)) and max(steps) == 1000
    assert read_run(stack.mlflow, str(body(doomed.id)["mlflow_run_id"]))["status"] == "KILLED"
    assert [event.type for event in stack_client.events(job.id)][-1] == "published"
