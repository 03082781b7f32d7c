"""Figures for Prometheus: requests as they pass, and the state of jobs and cluster as the database has it. No id is a label."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from service.api.openapi import problems
from service.database import Database
from service.jobs import State
from service.store import Store
from service.tables import attempts, jobs
from worker.records import now

router = APIRouter(tags=["operation"])

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
LAG_PAUSE_S = 0.25
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Figures:
    """The figures of one application."""

    def __init__(self, store: Store) -> None:
        # Of our own: two applications in one process have nothing in common.
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "ncfm_http_requests_total", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "ncfm_http_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._lag = Histogram(
            "ncfm_event_loop_lag_seconds",
            "Seconds by which the event loop comes late.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(Kept(store))

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request that was answered."""
        # A stranger chooses the method: without a bound on its values he would choose how many series there are.
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    async def watch_loop(self) -> None:
        """Measure how late the event loop comes, until cancelled."""
        while True:
            due = time.monotonic() + LAG_PAUSE_S
            await asyncio.sleep(LAG_PAUSE_S)
            self._lag.observe(max(0.0, time.monotonic() - due))


class Kept(Collector):
    """What the database knows, asked at each scrape."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[Metric]:
        """Nothing beforehand: registering asks no database."""
        return []

    def collect(self) -> Iterator[Metric]:
        by_state = GaugeMetricFamily("ncfm_jobs", "Jobs by state.", labels=["state"])
        for state, count in self._store.counts().items():
            by_state.add_metric([str(state)], count)
        yield by_state
        yield _gauge("ncfm_queue_oldest_seconds", "Age of the oldest queued job.", _oldest_seconds(self._store))
        lost = CounterMetricFamily("ncfm_attempts_lost", "Attempts that were lost, by reason.", labels=["reason"])
        for reason, count in _losses(self._store):
            lost.add_metric([reason], count)
        yield lost
        yield _gauge("ncfm_publications_pending", "Jobs whose MLflow run is to be completed.", _pending(self._store))
        sighting = self._store.sighting()
        if sighting is not None and sighting.cpus is not None and sighting.gpus is not None:
            yield _gauge("ncfm_cluster_cpus", "CPUs of the cluster, as last seen.", sighting.cpus)
            yield _gauge("ncfm_cluster_gpus", "GPUs of the cluster, as last seen.", sighting.gpus)
            away = {"ray": sighting.ray_error, "mlflow": sighting.mlflow_error}
            up = GaugeMetricFamily("ncfm_up", "Whether the controller last reached it.", labels=["part"])
            for part, error in away.items():
                up.add_metric([part], float(not error))
            yield up
        build = GaugeMetricFamily("ncfm_build_info", "Always 1.", labels=["version", "python"])
        build.add_metric([version("ncfm"), platform.python_version()], 1)
        yield build


@router.get(
    "/metrics",
    responses=problems(503) | {200: {"content": {"text/plain": {}}, "description": "Prometheus's text format"}},
    response_class=Response,
    summary="Figures for Prometheus",
)
def get_metrics(request: Request) -> Response:
    """Jobs by state, queue, losses, requests, the event loop. Needs the scope `read`."""
    figures: Figures = request.app.state.figures
    return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _oldest_seconds(database: Database) -> float:
    query = select(func.min(jobs.c.created_at)).where(jobs.c.state == State.QUEUED)
    with database.reading() as connection:
        oldest = connection.execute(query).scalar_one()
    return 0.0 if oldest is None else max(0.0, (now() - oldest).total_seconds())


def _losses(database: Database) -> list[tuple[str, int]]:
    query = select(attempts.c.reason, func.count()).where(attempts.c.outcome == "lost").group_by(attempts.c.reason)
    with database.reading() as connection:
        return [(str(reason or "unknown"), int(count)) for reason, count in connection.execute(query)]


def _pending(database: Database) -> int:
    query = select(func.count()).select_from(jobs).where(jobs.c.publication == "pending")
    with database.reading() as connection:
        return int(connection.execute(query).scalar_one())
