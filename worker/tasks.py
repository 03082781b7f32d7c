"""Ray: the cluster, one task per result, and the reservation of a result while it is built. The only remote functions."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayActorError, RayError, RayTaskError

from ncfm_core.errors import NcfmError, NoNodeError, OutOfMemoryError
from ncfm_core.spec import DatasetSpec, ResourcesSpec
from worker.driver.probe import ClusterUnreachableError
from worker.history import Event, Notice, Stage
from worker.plan import Kind
from worker.records import StageResult
from worker.settings import DataAccess
from worker.site import Site
from worker.stopping import StopWatch, in_trouble_no_longer
from worker.storage import Storage

NAMESPACE = "ncfm"
UNITS = 10_000
"""Ray counts resources in these parts of one."""
CLUSTER_FOLDER = "/tmp"
"""Above the folder of an own cluster: Ray puts sockets below it, whose paths may have 107 characters."""
SAVING: frozenset[Kind] = frozenset({"teacher", "distill"})
"""Stages that end of themselves when they are asked to stop, and can go on from there; the others are simply ended."""
STARTED = Notice("started")
"""First event of every task: before it, the task waits for its resources."""


class WorkerLostError(NcfmError):
    """A process or node of the cluster died while it computed."""

    code = "worker_lost"


@contextmanager
def connected(address: str | None) -> Generator[None, None, None]:
    """Be a driver of a cluster.

    Args:
        address: of its head; None starts a cluster in this process (`settings.prepare_own_ray` comes before Ray's import).

    Raises:
        ClusterUnreachableError: the cluster refuses.
    """
    if address is not None:
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ClusterUnreachableError.of(
                "RAY_ADDRESS", address, f"Ray refuses: {reason}", "Look at its log."
            ) from None
        try:
            yield
        finally:
            ray.shutdown()
        return
    with tempfile.TemporaryDirectory(prefix="ncfm-ray-", dir=CLUSTER_FOLDER, ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


@dataclass(frozen=True, slots=True)
class Demand:
    """What each task of a job takes."""

    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def options(self) -> dict[str, float]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@dataclass(frozen=True, slots=True)
class Node:
    cpus: float
    gpus: float

    def slots(self, demand: Demand) -> int:
        """Tasks of this demand that fit at once."""
        by_cpu = _units(self.cpus) // _units(demand.cpus)
        return min(by_cpu, self._by_gpu(demand.gpus)) if demand.gpus else by_cpu

    def _by_gpu(self, each: float) -> int:
        """Several tasks may share one GPU, but none takes parts of two."""
        if each > 1:
            return _units(self.gpus) // _units(each)
        whole, rest = divmod(_units(self.gpus), UNITS)
        return whole * (UNITS // _units(each)) + rest // _units(each)


def _units(amount: float) -> int:
    """As Ray counts: 0.3 / 0.1 is less than 3 otherwise."""
    return max(1, round(amount * UNITS)) if amount else 0


def nodes() -> tuple[Node, ...]:
    """The nodes that are alive."""
    alive = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
    return tuple(Node(float(each.get("CPU", 0)), float(each.get("GPU", 0))) for each in alive)


def demand(resources: ResourcesSpec, cluster: tuple[Node, ...], *, auto: float | None = None) -> Demand:
    """What the tasks of a job take on this cluster.

    Args:
        resources: of the spec.
        cluster: its nodes.
        auto: what `gpus: auto` stands for; None for one where there is any.

    Raises:
        NoNodeError: no node could ever hold one task.
    """
    if auto is None:
        auto = 1.0 if any(node.gpus for node in cluster) else 0.0
    wanted = Demand(resources.cpus, auto if resources.gpus == "auto" else resources.gpus)
    if any(node.slots(wanted) for node in cluster):
        return wanted
    most_cpus, most_gpus = max(node.cpus for node in cluster), max(node.gpus for node in cluster)
    if wanted.gpus > most_gpus:
        raise NoNodeError.of(
            "resources.gpus",
            resources.gpus,
            f"no node of the cluster has so many GPUs; the most is {most_gpus:g}",
            "Ask for fewer.",
        )
    raise NoNodeError.of(
        "resources.cpus",
        resources.cpus,
        f"no node of the cluster has so many CPUs free; the most is {most_cpus:g}",
        "Ask for fewer.",
    )


@ray.remote
def _inspect(spec: DatasetSpec, access: DataAccess, held_out: tuple[float, int] | None) -> tuple[Any, Any]:
    from worker.stages import inspect

    return inspect(spec, access, held_out=held_out)


def _run_stage(
    kind: Kind, site: Site, dataset: Any, arguments: dict[str, Any]
) -> Generator[Event | StageResult, None, None]:
    from ncfm_core.devices import told
    from worker import stages

    def full() -> OutOfMemoryError:
        # Where no part of the stage knows better.
        message = f"the stage {kind} does not fit the memory of {site.device}"
        return OutOfMemoryError.of(
            "model.width", None, message, "Lower it, ipc or the image size, or give the node more memory."
        )

    yield STARTED
    storage = Storage(site.storage_url)
    with told(full), StopWatch(storage, site.job_id, site.attempt) as watch:
        stage: Callable[..., Stage] = getattr(stages, kind)
        asked = {"asked": watch.asked} if kind in SAVING else {}
        result = yield from in_trouble_no_longer(stage(site, storage, dataset, **arguments, **asked), watch.asked)
    yield result


_ON_CPU = cast(Any, ray).remote(_run_stage)
"""Its processes are used again: importing torch takes seconds."""
_ON_GPU = cast(Any, ray).remote(max_calls=1)(_run_stage)
"""Its processes end with their task: torch stays with the devices of its first look, and keeps their memory. Ray sees to that
itself only where the GPUs are named in the decorator."""


def inspect(
    spec: DatasetSpec, access: DataAccess, *, held_out: tuple[float, int] | None, demand: Demand
) -> tuple[Any, Any]:
    """References to the facts of a data set and to the data set itself, which other tasks take from the object store."""
    task = cast(Any, _inspect).options(num_returns=2, num_cpus=demand.cpus, name=f"inspect {spec.name}")
    facts, dataset = task.remote(spec, access, held_out)
    return facts, dataset


def start(kind: Kind, site: Site, dataset: Any, arguments: dict[str, Any], *, demand: Demand, label: str) -> Any:
    """Submit a stage; the generator's references are its events and, last, its `StageResult`."""
    # Ray would run a lost task again from its start without a word; the builder does that itself, and says so.
    task = _ON_GPU if demand.gpus else _ON_CPU
    options = task.options(num_returns="streaming", max_retries=0, name=label, **demand.options())
    return options.remote(kind, site, dataset, arguments)


def cancel(generator: Any) -> None:
    """End a task, whatever it does; its process ends with it."""
    cast(Any, ray).cancel(generator, force=True)


def fetch(reference: Any) -> Any:
    """The value behind a reference.

    Raises:
        NcfmError: the very one that the task raised.
        WorkerLostError: its process or node died.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, NcfmError):
            raise error.cause from None
        raise
    except RayError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WorkerLostError.of(
            "", None, f"a process of the cluster was lost: {reason}", "It is tried again."
        ) from error


def ready(generators: list[Any], timeout_s: float) -> list[Any]:
    """Those of the generators that have an event, or their end, waiting."""
    found: list[Any] = ray.wait(generators, num_returns=1, timeout=timeout_s, fetch_local=False)[0]
    return found


def events(generator: Any) -> Iterator[Any]:
    """What a generator has waiting, without blocking for more than the first."""
    while True:
        try:
            yield fetch(next(generator))
        except StopIteration:
            return
        if not ray.wait([generator], timeout=0, fetch_local=False)[0]:
            return


@ray.remote(num_cpus=0, max_restarts=0)
class _Holder:
    """Holds a name as long as the driver that made it lives and keeps its handle."""

    def __init__(self, built_by: str) -> None:
        self._built_by = built_by

    def built_by(self) -> str:
        return self._built_by


@dataclass(frozen=True, slots=True)
class Reservation:
    """The right to build a result on this cluster, until it is released or this process ends."""

    holder: Any

    def release(self) -> None:
        ray.kill(self.holder)


def reserve(key: str, built_by: str) -> Reservation | None:
    """Become the one builder of a key on this cluster; None where another is at it.

    The name is taken in the call itself (2 ms); the actor's process starts behind it and is not waited for.
    """
    try:
        return Reservation(cast(Any, _Holder).options(name=key, namespace=NAMESPACE).remote(built_by))
    except (ActorAlreadyExistsError, ValueError):
        return None


def builder_of(key: str, timeout_s: float = 0.5) -> str | None:
    """Who builds a key (`<job>-<attempt>`); None where nobody does or they do not answer in time."""
    try:
        holder = cast(Any, ray).get_actor(key, namespace=NAMESPACE)
        answer = cast(Any, ray).get(holder.built_by.remote(), timeout=timeout_s)
    except (ValueError, RayActorError, GetTimeoutError):
        return None
    return str(answer)
