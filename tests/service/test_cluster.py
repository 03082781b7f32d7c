"""Ray over REST: what each answer means, and a real head."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from service.cluster import Capacity, Cluster, ClusterUnreachable, RayJob, SubmissionRefused
from service.local import ports, probes
from service.local.stack import lay_out
from service.local.sweep import STACK_ID, find, sweep
from service.processes import commands, environments
from service.settings import Settings

Handler = Callable[[httpx.Request], httpx.Response]


def cluster_that(handler: Handler) -> Cluster:
    return Cluster(Settings(ray_url="http://ray", ray_token_path=None), transport=httpx.MockTransport(handler))


def answering(status: int, content: object) -> Cluster:
    text = content if isinstance(content, str) else json.dumps(content)
    return cluster_that(lambda _request: httpx.Response(status, text=text))


def details(**changes: object) -> dict[str, object]:
    return {"type": "SUBMISSION", "status": "RUNNING", "message": "Running.", "driver_exit_code": None, **changes}


def nodes(*found: dict[str, object]) -> dict[str, object]:
    return {"result": True, "msg": "", "data": {"result": {"total": len(found), "result": found}}}


def test_submit_holds_no_cpu_and_sends_the_environment() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"submission_id": "a-1"})

    cluster_that(handler).submit("a-1", "python -m worker", env={"A": "b"}, metadata={"job": "a"})

    assert seen[0].url.path == "/api/jobs/"
    assert json.loads(seen[0].content) == {
        "submission_id": "a-1",
        "entrypoint": "python -m worker",
        "entrypoint_num_cpus": 0,
        "runtime_env": {"env_vars": {"A": "b"}},
        "metadata": {"job": "a"},
    }


def test_submit_is_content_when_the_id_exists() -> None:
    trace = "RuntimeError: Request failed with status code 400: ValueError: Job with submission_id a-1 already exists."

    answering(500, trace).submit("a-1", "true", env={}, metadata={})


def test_submit_is_refused_when_the_agent_finds_fault() -> None:
    with pytest.raises(SubmissionRefused, match="entrypoint must be a string"):
        answering(500, "Request failed with status code 400: TypeError: entrypoint must be a string").submit(
            "a-1", "x", env={}, metadata={}
        )


def test_submit_is_unreachable_when_no_agent_is_there() -> None:
    with pytest.raises(ClusterUnreachable, match="No available agent"):
        answering(500, "No available agent to submit job, please try again later.").submit(
            "a-1", "x", env={}, metadata={}
        )


def test_find_gives_the_exit_code_when_the_driver_failed() -> None:
    job = answering(200, details(status="FAILED", message="killed", driver_exit_code=137)).find("a-1")

    assert job == RayJob(status="FAILED", message="killed", exit_code=137)
    assert job is not None and job.is_terminal


def test_find_gives_none_when_ray_knows_no_such_job() -> None:
    assert answering(404, "Job a-1 does not exist").find("a-1") is None


@pytest.mark.parametrize(
    ("status", "content"),
    [(404, "<h1>Not found</h1>"), (502, "Bad gateway"), (200, "<html>"), (200, {"status": "ODD"})],
)
def test_find_is_unreachable_when_something_else_answers(status: int, content: object) -> None:
    with pytest.raises(ClusterUnreachable, match="NCFM_RAY_URL"):
        answering(status, content).find("a-1")


@pytest.mark.parametrize("status", [401, 403])
def test_find_names_the_token_when_it_is_refused(status: int) -> None:
    with pytest.raises(ClusterUnreachable, match="NCFM_RAY_TOKEN"):
        answering(status, "Unauthorized").find("a-1")


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("")])
def test_every_method_is_unreachable_when_ray_is_away(error: httpx.TransportError) -> None:
    def handler(_request: httpx.Request) -> httpx.Response:
        raise error

    cluster = cluster_that(handler)
    for ask in (
        lambda: cluster.submit("a", "x", env={}, metadata={}),
        lambda: cluster.find("a"),
        lambda: cluster.stop("a"),
        lambda: cluster.capacity(),
        lambda: cluster.logs("a"),
        lambda: cluster.remains("a"),
    ):
        with pytest.raises(ClusterUnreachable, match="cannot be asked"):
            ask()


def test_stop_is_content_when_ray_knows_no_such_job() -> None:
    answering(404, "Job a-1 does not exist").stop("a-1")


def test_stop_is_unreachable_when_the_agent_is_away() -> None:
    with pytest.raises(ClusterUnreachable, match="TimeoutError"):
        answering(500, "Traceback\nTimeoutError: Failed to get head node agent").stop("a-1")


def test_capacity_sums_the_nodes_that_are_alive() -> None:
    cluster = answering(
        200,
        nodes(
            {"state": "ALIVE", "resources_total": {"CPU": 2.0, "memory": 1e9}},
            {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 4.0}},
            {"state": "DEAD", "resources_total": {"CPU": 99.0}},
        ),
    )

    assert cluster.capacity() == Capacity(cpus=10.0, gpus=4.0)


def test_capacity_shows_its_nodes() -> None:
    node = {"state": "ALIVE", "node_id": "n1", "node_ip": "10.0.0.1", "is_head_node": True}
    [shown] = answering(200, nodes(node | {"resources_total": {"CPU": 2.0, "memory": 1e9}})).capacity().nodes
    assert shown == {"id": "n1", "address": "10.0.0.1", "head": True, "memory_bytes": 1e9, "cpus": 2.0, "gpus": 0.0}


def state_of(job: dict[str, object], **rows: list[dict[str, object]]) -> Cluster:
    """A Ray whose state API has these tasks, actors and workers."""

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/jobs/a-1":
            return httpx.Response(200, json=job)
        kind = request.url.path.rpartition("/")[2]
        if kind == "nodes" and request.url.query == b"view=summary":
            return httpx.Response(200, json={"result": True, "data": {"summary": rows.get("gpus", [])}})
        wanted = {"workers": ("is_alive", "true")}.get(kind, ("job_id", "02000000"))
        query = request.url.params
        assert (query["filter_keys"], query["filter_values"], query["filter_predicates"]) == (*wanted, "=")
        return httpx.Response(200, json=nodes(*rows.get(kind, [])))

    return cluster_that(handler)


WORKER: dict[str, object] = {"worker_id": "w1", "worker_type": "WORKER", "node_id": "n1", "ip": "10.0.0.1", "pid": 7}


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        ({"workers": [WORKER]}, ()),
        (
            {"workers": [WORKER], "tasks": [{"worker_id": "w1", "worker_pid": 7, "node_id": "n1"}]},
            ("worker 7 on 10.0.0.1",),
        ),
        ({"workers": [WORKER], "actors": [{"node_id": "n1", "pid": 7, "state": "DEAD"}]}, ("worker 7 on 10.0.0.1",)),
        # The same pid on another node is another process.
        ({"workers": [WORKER], "actors": [{"node_id": "n2", "pid": 7}], "tasks": [{"worker_pid": 7}]}, ()),
        (
            {"workers": [WORKER | {"worker_id": "02000000" + "f" * 48, "worker_type": "DRIVER"}]},
            ("driver 7 on 10.0.0.1",),
        ),
    ],
)
def test_remains_are_the_live_workers_that_ran_anything_of_the_job(
    rows: dict[str, list[dict[str, object]]], left: tuple[str, ...]
) -> None:
    joined = details(driver_info={"id": "02000000", "node_ip_address": "10.0.0.1", "pid": "5"})
    assert state_of(joined, **rows).remains("a-1") == left


def test_gpu_memory_of_a_dead_process_remains_until_its_node_no_longer_sees_it() -> None:
    joined = details(driver_info={"id": "02000000", "node_ip_address": "10.0.0.1", "pid": "5"})
    tasks: list[dict[str, object]] = [{"worker_id": "w1", "worker_pid": 7, "node_id": "n1"}]
    held = [{"pid": 7, "gpuMemoryUsage": 900}, {"pid": 8, "gpuMemoryUsage": 50}]
    gpus = [{"index": 1, "processesPids": held}, {"index": 2, "processesPids": None}]

    def left(node: str, gpus: Sequence[object]) -> tuple[str, ...]:
        seen: dict[str, object] = {"ip": "10.0.0.1", "raylet": {"nodeId": node}, "gpus": gpus}
        return state_of(joined, tasks=tasks, gpus=[seen]).remains("a-1")

    assert left("n1", gpus) == ("900 MiB of GPU 1 on 10.0.0.1, held by process 7",)
    assert left("n2", gpus) == ()
    assert left("n1", []) == ()
    assert left("n1", [{"index": 1, "processesPids": [{"pid": 7, "gpuMemoryUsage": 0}]}]) == ()


def test_remains_are_none_when_the_driver_never_joined_and_unknown_when_ray_is_vague() -> None:
    assert state_of(details(driver_info=None), workers=[WORKER]).remains("a-1") == ()
    assert answering(404, "Job a-1 does not exist").remains("a-1") == ()
    with pytest.raises(ClusterUnreachable):
        answering(500, "GCS is away").remains("a-1")


@pytest.mark.parametrize("reply", [nodes(), {"result": False, "msg": "GCS is away", "data": {"result": None}}])
def test_capacity_is_unreachable_when_no_node_is_known(reply: dict[str, object]) -> None:
    with pytest.raises(ClusterUnreachable):
        answering(200, reply).capacity()


def test_logs_are_empty_when_ray_knows_no_such_job() -> None:
    assert answering(404, "Job a-1 does not exist").logs("a-1") == ""


def test_ids_cannot_leave_their_place_in_the_path() -> None:
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path.decode())
        return httpx.Response(404, text="Job does not exist")

    cluster_that(handler).find("../../api/version?x")

    assert paths == ["/api/jobs/..%2F..%2Fapi%2Fversion%3Fx"]


def test_token_is_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "token"
    sent: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["Authorization"])
        return httpx.Response(404, text="Job a does not exist")

    cluster = Cluster(Settings(ray_url="http://ray", ray_token_path=path), transport=httpx.MockTransport(handler))
    for token in ("one\n", "two"):
        path.write_text(token)
        cluster.find("a")

    assert sent == ["Bearer one", "Bearer two"]


def test_token_file_is_named_when_it_is_missing(tmp_path: Path) -> None:
    settings = Settings(ray_url="http://ray", ray_token_path=tmp_path / "token")

    with pytest.raises(ClusterUnreachable, match=r"NCFM_RAY_TOKEN_PATH.*token"):
        Cluster(settings).find("a")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Ray head with a token, started as the embedded stack starts it."""
    home = tmp_path_factory.mktemp("ray")
    token, tmpdir = home / "token", Path(f"/tmp/ncfm-t{os.getpid()}")
    token.write_text("a" * 64)
    chosen: dict[str, int] = {}
    for name in ("api", "mlflow", "ray", "gcs", "client"):
        chosen[name] = ports.choose(chosen.values())
    tmpdir.mkdir()
    layout = lay_out(Settings(home=home), chosen, token=token, ray_tmpdir=tmpdir, num_cpus=2)
    stack_id = f"test-{os.getpid()}"
    environment = {**os.environ, **environments(layout)["ray"], STACK_ID: stack_id}
    with (home / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            commands(layout)["ray"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    cluster = Cluster(Settings(ray_url=layout.ray_url, ray_token_path=token))
    with probes.local_client() as http:
        is_ready = probes.takes_jobs(http, cluster)
        deadline = time.monotonic() + 60
        while not is_ready() and time.monotonic() < deadline:
            assert process.poll() is None, (home / "ray.log").read_text()
            time.sleep(0.2)
        assert is_ready(), (home / "ray.log").read_text()
    yield cluster
    cluster.close()
    sweep(stack_id, term_wait_s=0)
    process.wait()
    shutil.rmtree(tmpdir)
    assert find(stack_id) == []


def wait_for_end(cluster: Cluster, submission_id: str) -> RayJob:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        job = cluster.find(submission_id)
        if job is not None and job.is_terminal:
            return job
        time.sleep(0.2)
    raise AssertionError(f"{submission_id} does not end")


@pytest.mark.e2e
def test_real_head_runs_a_job_once_when_it_is_submitted_twice(head: Cluster) -> None:
    for _ in range(2):
        head.submit("twice-1", "echo once $WORD; exit 7", env={"WORD": "only"}, metadata={"job": "twice"})

    job = wait_for_end(head, "twice-1")

    assert (job.status, job.exit_code) == ("FAILED", 7)
    assert head.logs("twice-1").count("\nonce only\n") == 1


@pytest.mark.e2e
def test_real_head_stops_a_job_when_asked(head: Cluster) -> None:
    head.submit("stop-1", "sleep 1000", env={}, metadata={})
    while (job := head.find("stop-1")) is None or job.status == "PENDING":
        time.sleep(0.1)

    head.stop("stop-1")

    assert wait_for_end(head, "stop-1").status == "STOPPED"
    head.stop("stop-1")


DRIVER = """
import time, ray
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1)
def hang():
    time.sleep(600)
@ray.remote(num_cpus=0)
class Held:
    def up(self): return True
held = Held.remote()
ray.get(held.up.remote())
tasks = [hang.remote()]
print("all up", flush=True)
ray.get(tasks)
"""


@pytest.mark.e2e
def test_real_head_tells_what_is_left_of_a_job(head: Cluster, tmp_path: Path) -> None:
    """While it runs it has a driver and an actor's process; soon after its stop nothing."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    head.submit("left-1", f"{sys.executable} {script}", env={}, metadata={})
    deadline = time.monotonic() + 60
    while "all up" not in head.logs("left-1") or len(head.remains("left-1")) < 2:
        assert time.monotonic() < deadline, head.logs("left-1")
        time.sleep(0.2)
    assert sum(each.startswith("driver ") for each in head.remains("left-1")) == 1

    head.stop("left-1")

    assert wait_for_end(head, "left-1").status == "STOPPED"
    deadline = time.monotonic() + 60
    while head.remains("left-1"):
        assert time.monotonic() < deadline, head.remains("left-1")
        time.sleep(0.2)


@pytest.mark.e2e
def test_real_head_knows_its_size_and_no_strangers(head: Cluster) -> None:
    assert head.capacity() == Capacity(cpus=2.0, gpus=head.capacity().gpus)
    assert head.find("never") is None
    assert head.logs("never") == ""
    head.stop("never")


@pytest.mark.e2e
def test_real_head_refuses_when_the_token_is_wrong(head: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("b" * 64)

    stranger = Cluster(Settings(ray_url=head.url, ray_token_path=path))
    with pytest.raises(ClusterUnreachable, match="refuses our token"):
        stranger.find("a")
    stranger.close()
