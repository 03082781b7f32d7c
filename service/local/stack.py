"""`ncfm up`: lay out a stack for a home, and run it."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from service.cluster import Cluster
from service.local import ports, probes
from service.local.state import Home, StackError, StackState
from service.local.supervisor import Child, Say, Supervisor
from service.local.sweep import sweep
from service.processes import PROCESSES, Layout, ProcessName, RayPorts, commands, environments
from service.settings import Settings

LOOPBACK = "127.0.0.1"
PREFERRED = {"api": 8000, "mlflow": 5000, "ray": 8265}
NEEDED = ("torch", "ray", "mlflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the person who starts the stack asks for."""

    port: int | None = None
    """Of the API: None for 8000 or a free one, 0 for any free one."""
    mlflow_port: int | None = None
    ray_port: int | None = None
    num_cpus: int | None = None


def run_stack(
    settings: Settings,
    wishes: Wishes,
    *,
    say: Say,
    on_ready: Callable[[StackState], None],
    lifeline: int | None = None,
) -> None:
    """Run the stack of a home until a signal comes.

    Args:
        settings: `home` and all that the children inherit.
        wishes: ports and CPUs.
        say: tells a person what happens.
        on_ready: called once, when all processes answer.
        lifeline: a file descriptor whose end asks for a stop.

    Raises:
        StackError: something is missing, another stack runs here, or a child does not start.
        PortTaken: a port that was asked for is in use.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise StackError.of("", None, f"{', '.join(missing)} not installed", "pip install 'ncfm[worker]'")
    home = Home(settings.home)
    home.create()
    with home.locked():
        home.rotate_logs()
        before = home.read()
        if before is not None:
            _sweep_stale(before, say)
        _upgrade_database(settings.database, say)
        chosen = _choose_ports(wishes, before.ports if before else {})
        ray_tmpdir = _make_ray_tmpdir()
        token = home.write_secret("ray.token", secrets.token_hex(32))
        try:
            layout = lay_out(settings, chosen, token=token, ray_tmpdir=ray_tmpdir, num_cpus=wishes.num_cpus)
            state = _first_state(layout, chosen)
            supervisor = Supervisor(home=home, state=state, children=_children(layout), say=say, lifeline=lifeline)
            supervisor.run(lambda: on_ready(supervisor.state))
        finally:
            shutil.rmtree(ray_tmpdir, ignore_errors=True)


def _sweep_stale(state: StackState, say: Say) -> None:
    """End what a stack left that could not stop by itself; its lock is free, so it does not run."""
    left = sweep(state.stack_id)
    shutil.rmtree(state.ray_tmpdir, ignore_errors=True)
    if left:
        say(f"ended {left} processes that an earlier stack had left behind")


def _upgrade_database(url: str, say: Say) -> None:
    """Bring the database of an older release to this one's schema: nobody else uses it, and a copy of it stays."""
    from service.database import open_unchecked  # SQLAlchemy is slow to import, and commands are not
    from service.schema import SCHEMA

    database = open_unchecked(url)
    try:
        found = database.revision()
        if found is None or found >= SCHEMA:
            return
        kept = database.copy_beside(found)
        database.upgrade()
        say(
            f"the database has been brought from schema {found} to {SCHEMA}{kept and f'; the old one is kept as {kept}'}"
        )
    finally:
        database.close()


def _choose_ports(wishes: Wishes, before: dict[str, int]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    asked = {
        "api": (wishes.port, "--port"),
        "mlflow": (wishes.mlflow_port, "--mlflow-port"),
        "ray": (wishes.ray_port, "--ray-port"),
        "gcs": (0, ""),
        "client": (0, ""),
    }
    for name, (port, option) in asked.items():
        if port:
            chosen[name] = ports.demand(port, option)
    for name, (port, _) in asked.items():
        if name not in chosen:
            # The last ones again, so that links of yesterday work.
            preferred = () if port == 0 else (before.get(name, 0), PREFERRED.get(name, 0))
            chosen[name] = ports.choose(chosen.values(), *preferred)
    return chosen


def _make_ray_tmpdir() -> Path:
    # Sockets lie below it, and the path of a socket may have 107 characters: TMPDIR is often too long.
    return Path(tempfile.mkdtemp(prefix="ncfm-", dir="/tmp"))


def lay_out(
    settings: Settings, ports_by_name: dict[str, int], *, token: Path, ray_tmpdir: Path, num_cpus: int | None
) -> Layout:
    """The stack of one machine: everything listens on 127.0.0.1, all state is below the home."""
    mlflow_url = f"http://{LOOPBACK}:{ports_by_name['mlflow']}"
    return Layout(
        python=sys.executable,
        bind=LOOPBACK,
        api_port=ports_by_name["api"],
        mlflow_port=ports_by_name["mlflow"],
        ray_port=ports_by_name["ray"],
        mlflow_url=mlflow_url,
        mlflow_public_url=settings.mlflow_public_url or mlflow_url,
        ray_url=f"http://{LOOPBACK}:{ports_by_name['ray']}",
        mlflow_hosts=("localhost:*", f"{LOOPBACK}:*"),
        home=str(settings.home),
        storage=settings.storage_url,
        data_dir=str(settings.data_dir),
        data_roots=tuple(str(root) for root in settings.data_roots or ()),
        data_buckets=settings.data_buckets,
        mlflow_dir=str(settings.home / "mlflow"),
        ray_ports=RayPorts(node_ip=LOOPBACK, gcs=ports_by_name["gcs"], client=ports_by_name["client"]),
        ray_token_path=str(token),
        ray_tmpdir=str(ray_tmpdir),
        num_cpus=num_cpus,
    )


def _first_state(layout: Layout, chosen: dict[str, int]) -> StackState:
    nothing: dict[ProcessName, int | None] = dict.fromkeys(PROCESSES)
    return StackState(
        state="starting",
        stack_id=secrets.token_hex(8),
        home=layout.home,
        supervisor=os.getpid(),
        api=f"http://{LOOPBACK}:{layout.api_port}",
        mlflow=layout.mlflow_url,
        ray=layout.ray_url,
        ports=chosen,
        processes=nothing,
        ray_tmpdir=layout.ray_tmpdir or "",
        ray_token_path=layout.ray_token_path or "",
    )


def _children(layout: Layout) -> dict[ProcessName, Child]:
    cluster = Cluster(Settings(ray_url=layout.ray_url, ray_token_path=Path(layout.ray_token_path or "")))
    http = probes.local_client()
    api = f"http://{LOOPBACK}:{layout.api_port}"
    all_probes: dict[ProcessName, probes.Probe] = {
        "mlflow": probes.answers(http, f"{layout.mlflow_url}/health"),
        "ray": probes.takes_jobs(http, cluster),
        "api": probes.answers(http, f"{api}/livez"),
        "controller": probes.is_followed(http, api),
    }
    command, environment = commands(layout), environments(layout)
    return {
        name: Child(name=name, command=command[name], environment=environment[name], probe=all_probes[name])
        for name in PROCESSES
    }
