"""The four processes of the service, as command lines and environments: the same for `ncfm up` and for containers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ProcessName = Literal["mlflow", "ray", "api", "controller"]
PROCESSES: tuple[ProcessName, ...] = ("mlflow", "ray", "api", "controller")
STOP_ORDER: tuple[ProcessName, ...] = ("controller", "api", "ray", "mlflow")
"""Who gives orders ends before who takes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPorts:
    """Ports of a Ray head that shares its machine with others; a container keeps Ray's own."""

    node_ip: str
    """On this machine alone: 127.0.0.1, for any other address has Ray's servers listen on every interface."""
    gcs: int
    client: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the processes listen, how they reach each other, and where their state is."""

    python: str
    """The interpreter of all four, and of the drivers."""
    bind: str
    """Address the servers bind to."""
    api_port: int
    mlflow_port: int
    ray_port: int
    """Of Ray's dashboard, which serves the Jobs REST API."""
    mlflow_url: str
    mlflow_public_url: str
    """As people reach it."""
    ray_url: str
    mlflow_hosts: tuple[str, ...]
    """Host headers that MLflow answers to."""
    home: str
    storage: str
    data_dir: str
    mlflow_dir: str
    ray_ports: RayPorts | None = None
    ray_token_path: str | None = None
    """None where the token itself comes in the environment."""
    ray_tmpdir: str | None = None
    num_cpus: int | None = None
    """CPUs that Ray may give away; None for all."""
    data_roots: tuple[str, ...] = ()
    """Folders that users' own images may be read from; empty for any."""
    data_buckets: tuple[str, ...] = ()
    """Prefixes in buckets that they may be read from; empty for none."""
    public_hosts: tuple[str, ...] = ()
    """Names by which the API may be called beside this machine's."""


def commands(layout: Layout) -> dict[ProcessName, tuple[str, ...]]:
    """What to execute for each process."""
    service = (layout.python, "-m", "service.cli")
    return {
        "mlflow": _mlflow(layout),
        "ray": _ray(layout),
        "api": (*service, "api"),
        "controller": (*service, "controller"),
    }


def _mlflow(layout: Layout) -> tuple[str, ...]:
    return (
        *(layout.python, "-m", "mlflow", "server"),
        *("--host", layout.bind),
        *("--port", str(layout.mlflow_port)),
        *("--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{layout.mlflow_dir}/mlflow.db"),
        *("--artifacts-destination", f"{layout.mlflow_dir}/artifacts"),
        "--serve-artifacts",
        *("--allowed-hosts", ",".join(layout.mlflow_hosts)),
    )


def _ray(layout: Layout) -> tuple[str, ...]:
    command = [
        *(layout.python, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--dashboard-host", layout.bind),
        *("--dashboard-port", str(layout.ray_port)),
        "--disable-usage-stats",
    ]
    if layout.ray_ports is not None:
        command += [
            *("--node-ip-address", layout.ray_ports.node_ip),
            *("--port", str(layout.ray_ports.gcs)),
            *("--ray-client-server-port", str(layout.ray_ports.client)),
            # Two heads on one machine would draw from the same fixed ranges; 0 lets the system choose.
            *("--dashboard-agent-listen-port", "0"),
            *("--min-worker-port", "0"),
            *("--max-worker-port", "0"),
        ]
    if layout.num_cpus is not None:
        command += ["--num-cpus", str(layout.num_cpus)]
    return tuple(command)


def environments(layout: Layout) -> dict[ProcessName, Mapping[str, str]]:
    """What each process finds in its environment, beyond what its surroundings give it."""
    worker = {
        "NCFM_HOME": layout.home,
        "NCFM_STORAGE": layout.storage,
        "NCFM_DATA_DIR": layout.data_dir,
        "NCFM_MLFLOW_URL": layout.mlflow_url,
        "NCFM_MLFLOW_PUBLIC_URL": layout.mlflow_public_url,
    }
    if layout.data_roots:
        worker["NCFM_DATA_ROOTS"] = ",".join(layout.data_roots)
    if layout.data_buckets:
        worker["NCFM_DATA_BUCKETS"] = ",".join(layout.data_buckets)
    # Told to end, a head would wait 30 s for its drivers: they resume from checkpoints instead.
    ray = {"RAY_AUTH_MODE": "token", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    service = worker | {"NCFM_RAY_URL": layout.ray_url, "NCFM_WORKER_PYTHON": layout.python}
    if layout.ray_token_path is not None:
        ray["RAY_AUTH_TOKEN_PATH"] = layout.ray_token_path
        service["NCFM_RAY_TOKEN_PATH"] = layout.ray_token_path
    if layout.ray_ports is not None:
        # What Ray has for machines that must not be clusters: 127.0.0.1 stays as it is, and its servers listen there alone.
        ray["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if layout.ray_tmpdir is not None:
        ray["RAY_TMPDIR"] = layout.ray_tmpdir
    api = service | {"NCFM_HOST": layout.bind, "NCFM_PORT": str(layout.api_port)}
    if layout.public_hosts:
        api["NCFM_PUBLIC_HOSTS"] = ",".join(layout.public_hosts)
    return {
        # Left on, it starts a runner and seven consumers: over a GiB for jobs that are not ours.
        "mlflow": {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        # Drivers inherit it, so that `ray job submit` needs no settings.
        "ray": worker | ray,
        "api": api,
        "controller": service,
    }
