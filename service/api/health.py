"""Routes: whether the process turns, and whether it can take work."""

from __future__ import annotations

from datetime import timedelta

from fastapi import APIRouter, Request

from service.api.context import StoreDep
from service.api.errors import Draining
from service.api.models import Health
from service.api.openapi import problems
from service.store import Sighting
from worker.records import now

router = APIRouter(tags=["health"])

CONTROLLER_SILENT = timedelta(seconds=20)
"""A controller that has not looked for this long is taken for gone."""


@router.get("/livez", summary="Process turns")
async def livez() -> Health:
    """Never touches database, Ray or MLflow: their absence is no reason to restart the API."""
    return Health(status="ok", checks={})


@router.get("/readyz", responses=problems(503), summary="Can take work")
def readyz(store: StoreDep, request: Request) -> Health:
    """503 where the database takes no writes, or the process is about to end.

    Ray and MLflow, as the controller saw them, only degrade: jobs wait for them.
    """
    if request.app.state.draining.has_begun():
        raise Draining.of("", None, "this process ends and takes nothing new", "Ask another one.")
    store.check_writable()
    checks = {"database": "ok"} | _seen(store.sighting())
    return Health(status="ok" if set(checks.values()) == {"ok"} else "degraded", checks=checks)


def is_silent(sighting: Sighting) -> bool:
    """Whether the controller has not looked for so long that it is taken for gone."""
    return now() - sighting.checked_at > CONTROLLER_SILENT


def _seen(sighting: Sighting | None) -> dict[str, str]:
    if sighting is None or is_silent(sighting):
        since = f"silent since {sighting.checked_at:%Y-%m-%d %H:%M:%S} UTC" if sighting else "not seen yet"
        return {"controller": since}
    return {"controller": "ok", "ray": sighting.ray_error or "ok", "mlflow": sighting.mlflow_error or "ok"}
