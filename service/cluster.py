"""The Ray cluster as the controller sees it: Ray's documented Jobs REST API and its list of nodes, over httpx.

Losing contact is not a job's failure, so "Ray cannot be asked" is one error of its own and never looks like an answer.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar
from urllib.parse import quote, urlencode

import httpx
from pydantic import BaseModel, Field, JsonValue, TypeAdapter, ValidationError

from ncfm_core.errors import NcfmError, shorten
from service.settings import Settings

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
TERMINAL: frozenset[Status] = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 5.0
SUBMIT_TIMEOUT_S = 15.0
"""Ray itself waits up to 10 s for an agent that can take a submission."""
MAX_ROWS = 10_000
"""As many as Ray's state API gives at once."""

T = TypeVar("T")


class ClusterUnreachable(NcfmError):
    """Ray cannot be asked now: nothing is known, so nothing may be decided."""

    code = "cluster_unreachable"


class SubmissionRefused(NcfmError):
    """Ray was reached and will never take this submission: asking again is of no use."""

    code = "submission_refused"


@dataclass(frozen=True, slots=True)
class RayJob:
    """What Ray says of one submission."""

    status: Status
    message: str
    exit_code: int | None
    """Of the driver; None while it runs and where it never ran."""

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL


@dataclass(frozen=True, slots=True)
class Capacity:
    """Totals over the nodes that are alive, used or not."""

    cpus: float
    gpus: float
    nodes: tuple[Mapping[str, JsonValue], ...] = field(default=(), compare=False)
    """The nodes, as far as a person wants to know them."""


class _Driver(BaseModel):
    id: str


class _JobDetails(BaseModel):
    status: Status
    message: str | None = None
    driver_exit_code: int | None = None
    driver_info: _Driver | None = None


class _Logs(BaseModel):
    logs: str


class _Node(BaseModel):
    state: str
    node_id: str = ""
    node_ip: str = ""
    is_head_node: bool = False
    resources_total: dict[str, float] = Field(default_factory=dict)

    def shown(self) -> dict[str, JsonValue]:
        resources = {"cpus": self.resources_total.get("CPU", 0.0), "gpus": self.resources_total.get("GPU", 0.0)}
        memory = self.resources_total.get("memory")
        return {
            "id": self.node_id,
            "address": self.node_ip,
            "head": self.is_head_node,
            "memory_bytes": memory,
            **resources,
        }


class _Row(BaseModel):
    """A task, an actor or a worker: what they have in common."""

    node_id: str | None = None
    worker_id: str | None = None
    worker_pid: int | None = None
    pid: int | None = None
    ip: str | None = None
    worker_type: str | None = None

    @property
    def process(self) -> int | None:
        return self.pid or self.worker_pid


class _List(BaseModel, Generic[T]):
    result: list[T]


class _Data(BaseModel, Generic[T]):
    result: _List[T]


class _Reply(BaseModel, Generic[T]):
    """Of the state API."""

    result: Literal[True]
    data: _Data[T]


class _GpuProcess(BaseModel):
    pid: int
    held_mib: int = Field(0, alias="gpuMemoryUsage")


class _Gpu(BaseModel):
    index: int = 0
    processes: list[_GpuProcess] | None = Field(None, alias="processesPids")


class _Raylet(BaseModel):
    node_id: str = Field("", alias="nodeId")


class _NodeStats(BaseModel):
    """What a node's agent reported last, every few seconds."""

    raylet: _Raylet
    ip: str = ""
    gpus: list[_Gpu] = Field(default_factory=list)


class _Summaries(BaseModel):
    summary: list[_NodeStats]


class _Nodes(BaseModel):
    """Of the dashboard's own list of nodes."""

    result: Literal[True]
    data: _Summaries


class _TokenAuth(httpx.Auth):
    """Sends Ray's token; a file is read for each request, so that a replaced one is noticed."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.ray_token_path
        self._token = settings.ray_token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        token = self._read()
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        yield request

    def _read(self) -> str:
        if self._path is None:
            return self._token.get_secret_value().strip() if self._token else ""
        try:
            return self._path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise ClusterUnreachable.of(
                "NCFM_RAY_TOKEN_PATH",
                str(self._path),
                f"the file with Ray's token cannot be read: {type(error).__name__}",
                "Write the token there, or unset the variable if the cluster asks for none.",
            ) from error


class Cluster:
    """One Ray cluster, by the address of its dashboard.

    Raises:
        ClusterUnreachable: by every method, when Ray cannot be asked.
    """

    def __init__(self, settings: Settings, *, transport: httpx.BaseTransport | None = None) -> None:
        """Open nothing yet: a cluster that is away is noticed by the first call.

        Args:
            settings: `ray_url`, and `ray_token_path` or `ray_token`.
            transport: in place of the network.
        """
        self.url = settings.ray_url.rstrip("/")
        # The cluster is a neighbour: a proxy from the environment would only lose it.
        self._http = httpx.Client(
            base_url=self.url,
            auth=_TokenAuth(settings),
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            trust_env=False,
        )

    def submit(
        self, submission_id: str, entrypoint: str, *, env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Start a driver, unless one of this id was started before.

        Args:
            submission_id: our own name for it, so that asking twice starts one.
            entrypoint: shell command; it holds no CPU, or a task that wants all of them would never start.
            env: variables of the driver.
            metadata: shown beside the job in Ray's dashboard.

        Raises:
            SubmissionRefused: Ray finds the submission itself at fault.
        """
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "entrypoint_num_cpus": 0,
            "runtime_env": {"env_vars": dict(env)},
            "metadata": dict(metadata),
        }
        response = self._ask("POST", "/api/jobs/", json=body, timeout=SUBMIT_TIMEOUT_S)
        if response.is_success or "already exists" in response.text:
            return
        # The head wraps a refusal of its agent (a 400) in a 500 of its own.
        if response.status_code == 400 or "status code 400" in response.text:
            raise SubmissionRefused.of("entrypoint", entrypoint, f"Ray refuses it: {_last_line(response)}")
        raise self._unreachable(_complaint(response))

    def find(self, submission_id: str) -> RayJob | None:
        """What became of a submission, or None where Ray knows none of this id (a restarted cluster forgets all)."""
        response = self._ask("GET", _job_path(submission_id))
        if _is_unknown_job(response):
            return None
        details = self._parse(response, _JobDetails)
        return RayJob(status=details.status, message=details.message or "", exit_code=details.driver_exit_code)

    def stop(self, submission_id: str) -> None:
        """Ask for the end of a driver (SIGTERM, then SIGKILL); returns before it has ended, and is no error after."""
        response = self._ask("POST", f"{_job_path(submission_id)}/stop")
        if not response.is_success and not _is_unknown_job(response):
            raise self._unreachable(_complaint(response))

    def capacity(self) -> Capacity:
        """What the cluster has in all."""
        reply = self._parse(self._ask("GET", f"/api/v0/nodes?limit={MAX_ROWS}"), _Reply[_Node])
        alive = [node for node in reply.data.result.result if node.state == "ALIVE"]
        if not alive:
            # A head that has just started lists no node: that is not an empty cluster.
            raise self._unreachable("no node has joined it yet")
        return Capacity(
            cpus=sum(node.resources_total.get("CPU", 0.0) for node in alive),
            gpus=sum(node.resources_total.get("GPU", 0.0) for node in alive),
            nodes=tuple(node.shown() for node in alive),
        )

    def remains(self, submission_id: str) -> tuple[str, ...]:
        """What is left of a submission by Ray's own account: its driver, all that ran its tasks and actors, and their GPU memory.

        The end of a driver is not the end of its workers: Ray ends them afterwards, on every node. GPU memory is seen where a
        node's agent knows the processes on its GPUs by the numbers that Ray has (a container may have numbers of its own).
        """
        response = self._ask("GET", _job_path(submission_id))
        if _is_unknown_job(response):
            return ()
        driver = self._parse(response, _JobDetails).driver_info
        if driver is None:
            # It never joined the cluster, so it has had no workers.
            return ()
        known = [row for kind in ("tasks", "actors") for row in self._rows(kind, "job_id", driver.id)]
        workers = {row.worker_id for row in known if row.worker_id}
        processes = {(row.node_id, row.process) for row in known if row.node_id and row.process}
        alive = tuple(
            f"{(row.worker_type or 'worker').lower()} {row.pid} on {row.ip or row.node_id}"
            for row in self._rows("workers", "is_alive", "true")
            # A driver's own id begins with that of its job.
            if row.worker_id in workers
            or (row.node_id, row.process) in processes
            or row.worker_id == driver.id.ljust(len(row.worker_id or ""), "f")
        )
        return alive or self._gpu_memory(processes)

    def _gpu_memory(self, processes: set[tuple[str, int]]) -> tuple[str, ...]:
        """GPU memory that these (node, process id) still hold; what is said of a node may be some seconds old."""
        if not processes:
            return ()
        nodes = self._parse(self._ask("GET", "/nodes?view=summary"), _Nodes).data.summary
        return tuple(
            f"{process.held_mib} MiB of GPU {gpu.index} on {node.ip or node.raylet.node_id}, held by process {process.pid}"
            for node in nodes
            for gpu in node.gpus
            for process in gpu.processes or ()
            if (node.raylet.node_id, process.pid) in processes and process.held_mib > 0
        )

    def _rows(self, kind: str, key: str, value: str) -> list[_Row]:
        query = {"filter_keys": key, "filter_predicates": "=", "filter_values": value, "limit": str(MAX_ROWS)}
        reply = self._parse(self._ask("GET", f"/api/v0/{kind}?{urlencode(query)}"), _Reply[_Row])
        return reply.data.result.result

    def logs(self, submission_id: str) -> str:
        """What the driver has printed so far; empty where Ray knows no such submission."""
        response = self._ask("GET", f"{_job_path(submission_id)}/logs")
        return "" if _is_unknown_job(response) else self._parse(response, _Logs).logs

    def close(self) -> None:
        self._http.close()

    def _ask(self, method: str, path: str, *, json: object = None, timeout: float = READ_TIMEOUT_S) -> httpx.Response:
        limits = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_S)
        try:
            response = self._http.request(method, path, json=json, timeout=limits)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(str(error) or type(error).__name__) from error
        if response.status_code in (401, 403):
            raise ClusterUnreachable.of(
                "NCFM_RAY_URL",
                self.url,
                f"Ray refuses our token ({response.status_code})",
                "Set NCFM_RAY_TOKEN_PATH or NCFM_RAY_TOKEN to the cluster's token.",
            )
        return response

    def _parse(self, response: httpx.Response, kind: type[T]) -> T:
        if not response.is_success:
            raise self._unreachable(_complaint(response))
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]["msg"]
            raise self._unreachable(f"its answer is not that of a Ray dashboard ({first})") from error

    def _unreachable(self, why: str) -> ClusterUnreachable:
        return ClusterUnreachable.of(
            "NCFM_RAY_URL", self.url, f"Ray cannot be asked: {why}", "It is asked again until it answers."
        )


def _job_path(submission_id: str) -> str:
    return f"/api/jobs/{quote(submission_id, safe='')}"


def _is_unknown_job(response: httpx.Response) -> bool:
    """Whether Ray itself says that it knows no such job: another server's 404 says nothing about jobs."""
    return response.status_code == 404 and "does not exist" in response.text


def _complaint(response: httpx.Response) -> str:
    return f"{response.request.url.path} answers {response.status_code} ({_last_line(response)})"


def _last_line(response: httpx.Response) -> str:
    """The last line that says something: Ray answers with tracebacks."""
    lines = [line.strip() for line in response.text.splitlines() if len(line.strip()) > 1]
    return shorten(lines[-1]) if lines else "no text"
