"""A node of the cluster is lost beside a living head: its job goes on elsewhere, from its checkpoint, and others are not touched."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.client import Client
from service.local.state import Home, StackState
from service.replies import Job
from tests.faults.conftest import title

pytestmark = pytest.mark.e2e

Document = dict[str, Any]
Until = Callable[..., Any]

JOIN_LIMIT_S = 180.0
NOTICE_LIMIT_S = 60.0
"""Ray misses a node's heartbeats for ten seconds before it calls it dead."""


JOIN = """
from ray._private import ray_constants, services
from ray.scripts.scripts import cli
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
cli()
"""
"""`ray start` for a node beside a head that nobody may join: it listens on 127.0.0.1, which Ray would rewrite."""


class Node:
    """A second node on this machine, whose one CPU takes one job."""

    def __init__(self, head: psutil.Process, log: Path) -> None:
        words = head.cmdline()
        told = {name: words[words.index(name) + 1] for name in ("--node-ip-address", "--port")}
        command = [
            *(sys.executable, "-c", JOIN, "start", "--block", "--num-cpus", "1"),
            *("--address", f"{told['--node-ip-address']}:{told['--port']}"),
            *("--node-ip-address", told["--node-ip-address"]),
            *("--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"),
            "--disable-usage-stats",
        ]
        with log.open("ab") as out:
            # The head's surroundings: its token, the storage root, and the mark by which the stack finds all that is its own.
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env=head.environ())

    def processes(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def lose(self) -> None:
        """As if its machine were switched off: everything on it ends at once, and says nothing."""
        for each in self.processes():
            each.send_signal(signal.SIGSTOP)
        for each in self.processes():
            each.kill()
        self._process.wait()


def cpus_of(stack: StackState) -> float:
    """What the cluster has in all, as the API tells it."""
    answer: float = httpx.get(f"{stack.api}/cluster").json()["cpus"]
    return answer


@pytest.fixture
def second_node(home: Home) -> Iterator[Callable[[], Node]]:
    """Starts one; it is lost at the end of the test at the latest."""
    started: list[Node] = []

    def start() -> Node:
        pid = home.status().processes["ray"]
        assert pid is not None
        started.append(Node(psutil.Process(pid), home.folder / "node.log"))
        return started[-1]

    yield start
    for each in started:
        each.lose()


@pytest.mark.usefixtures("steady_api")
@pytest.mark.timeout(900)
def test_job_goes_on_elsewhere_when_its_node_is_lost(
    stack: StackState,
    stack_client: Client,
    main_job: list[Job],
    small_job: Document,
    images_of: Callable[[str], bytes],
    forget_sets: Callable[[], None],
    checkpoint_of: Callable[[str], int],
    followed: Callable[[str], Job],
    second_node: Callable[[], Node],
    until: Until,
) -> None:
    undisturbed = images_of(main_job[-1].id)
    forget_sets()
    cpus = cpus_of(stack)
    filling = small_job | {"seed": 41, "resources": {"cpus": int(cpus)}}
    filling["method"] = small_job["method"] | {"steps": 100_000}
    other = stack_client.submit(filling)
    checkpoint_of(other.id)

    node = second_node()
    until(lambda: cpus_of(stack) == cpus + 1, JOIN_LIMIT_S)
    job = stack_client.submit(small_job)
    checkpoint_of(job.id)
    on_it = [title(each) for each in node.processes() if title(each).startswith("ray::distill")]
    assert len(on_it) == 1, on_it

    node.lose()
    until(lambda: cpus_of(stack) == cpus, NOTICE_LIMIT_S)
    # Its driver lives on the head: the attempt goes on, and its stage waits for room.
    until(lambda: "waits for its resources" in stack_client.job(job.id).message, NOTICE_LIMIT_S)
    for each in (job, other):
        untouched = stack_client.job(each.id)
        assert (untouched.state, untouched.attempt) == ("running", 1), untouched

    stack_client.cancel(other.id)
    ended = followed(job.id)
    assert (ended.state, ended.attempt) == ("succeeded", 1), ended.complaint
    assert any("a process of the cluster was lost" in warning for warning in ended.warnings), ended.warnings
    assert images_of(job.id) == undisturbed
    assert followed(other.id).state == "cancelled"
