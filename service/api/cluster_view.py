"""Route: what jobs run on."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter
from pydantic import JsonValue

from service.api.context import StoreDep
from service.api.health import is_silent
from service.api.models import Body
from service.api.openapi import problems
from service.jobs import Job

router = APIRouter(tags=["service"])


class Held(Body):
    """What running jobs hold."""

    cpus: float
    gpus: float
    jobs: int


class ClusterBody(Body):
    """The cluster as the controller last saw it."""

    cpus: float | None
    """Totals; null before it was first seen."""
    gpus: float | None
    held: Held
    nodes: list[dict[str, JsonValue]]
    seen_at: datetime | None
    """When Ray last answered."""
    checked_at: datetime | None
    """When the controller last looked."""
    stale: bool
    """Whether it may be otherwise by now: the controller is silent, or Ray cannot be asked."""
    error: str
    """Why Ray could not be asked; empty where it could."""


@router.get("/cluster", responses=problems(503), summary="What jobs run on")
def get_cluster(store: StoreDep) -> ClusterBody:
    """The cluster as the controller last saw it, and what running jobs hold of it."""
    sighting, running = store.sighting(), store.active()
    cpus, gpus = _held(running, has_gpus=bool(sighting and sighting.gpus))
    silent = sighting is None or is_silent(sighting)
    return ClusterBody(
        cpus=sighting.cpus if sighting else None,
        gpus=sighting.gpus if sighting else None,
        held=Held(cpus=cpus, gpus=gpus, jobs=len(running)),
        nodes=[dict(node) for node in sighting.nodes] if sighting else [],
        seen_at=sighting.seen_at if sighting else None,
        checked_at=sighting.checked_at if sighting else None,
        stale=silent or bool(sighting and (sighting.ray_error or sighting.seen_at is None)),
        error=sighting.ray_error if sighting else "no controller has looked yet",
    )


def _held(running: list[Job], *, has_gpus: bool) -> tuple[float, float]:
    cpus, gpus = 0.0, 0.0
    for job in running:
        demand = job.demand
        cpus += demand.cpus
        gpus += (1.0 if has_gpus else 0.0) if demand.gpus == "auto" else float(demand.gpus)
    return cpus, gpus
