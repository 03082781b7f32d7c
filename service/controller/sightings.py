"""Tells the API, through the database, what the controller sees of Ray and MLflow."""

from __future__ import annotations

import time
from dataclasses import replace

import httpx

from service.cluster import Capacity
from service.store import Sighting, Store
from worker.records import now

EVERY_S = 5.0
"""An unchanged sighting is written again after this long, as a sign of life."""
MLFLOW_EVERY_S = 10.0
MLFLOW_TIMEOUT_S = 1.0


class Lookout:
    """Writes the sightings, no more often than they are news."""

    def __init__(self, store: Store, mlflow_url: str) -> None:
        self._store = store
        self._mlflow_url = mlflow_url
        self.mlflow_error = ""
        """Why MLflow could not be reached when it was last asked."""
        self._mlflow_asked_at = self._written_at = float("-inf")
        self._written: tuple[object, ...] = ()

    def note(self, capacity: Capacity | None, ray_error: str, *, awaited_gpus: float = 0.0) -> None:
        """Pass on the outcome of a round.

        Args:
            capacity: of the cluster; None where Ray could not be asked.
            ray_error: why.
            awaited_gpus: that it had and that are waited for: they count, as they do for `gpus: auto`.

        Raises:
            StoreError: the database cannot be written.
        """
        at = time.monotonic()
        if at - self._mlflow_asked_at >= MLFLOW_EVERY_S:
            self._mlflow_asked_at = at
            self.mlflow_error = ask_mlflow(self._mlflow_url)
        seen = (capacity, capacity and capacity.nodes, awaited_gpus, ray_error, self.mlflow_error)
        if seen == self._written and at - self._written_at < EVERY_S:
            return
        sighting = Sighting(checked_at=now(), ray_error=ray_error, mlflow_error=self.mlflow_error)
        if capacity is not None:
            sighting = replace(
                sighting, cpus=capacity.cpus, gpus=capacity.gpus or awaited_gpus, seen_at=sighting.checked_at
            )
            sighting = replace(sighting, nodes=capacity.nodes)
        self._store.see(sighting)
        self._written, self._written_at = seen, at


def ask_mlflow(url: str) -> str:
    """What is wrong with the tracking server; empty where nothing is, or where there is none."""
    if not url:
        return ""
    try:
        reply = httpx.get(f"{url.rstrip('/')}/health", timeout=MLFLOW_TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"NCFM_MLFLOW_URL: cannot be reached ({str(error) or type(error).__name__})"
    return "" if reply.is_success else f"NCFM_MLFLOW_URL: answers {reply.status_code}"
