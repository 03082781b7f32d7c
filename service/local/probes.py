"""Whether each process of the stack can be used yet."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from service.cluster import Cluster, ClusterUnreachable

Probe = Callable[[], bool]

TIMEOUT_S = 1.0


def local_client() -> httpx.Client:
    """One for all probes: each new one would read the certificates of the machine."""
    return httpx.Client(timeout=TIMEOUT_S, trust_env=False)


def answers(http: httpx.Client, url: str) -> Probe:
    """Ready when the address answers 200."""

    def probe() -> bool:
        try:
            return http.get(url).status_code == 200
        except httpx.HTTPError:
            return False

    return probe


def takes_jobs(http: httpx.Client, cluster: Cluster) -> Probe:
    """Ready when Ray's head is healthy and a node has joined that can run a driver."""
    is_healthy = answers(http, f"{cluster.url}/api/gcs_healthz")

    def probe() -> bool:
        if not is_healthy():
            return False
        try:
            cluster.capacity()
            return cluster.find("never-submitted") is None
        except ClusterUnreachable:
            return False

    return probe


def is_followed(http: httpx.Client, api_url: str) -> Probe:
    """Ready when the API has lately seen the controller at work."""

    def probe() -> bool:
        try:
            checks = http.get(f"{api_url}/readyz").json()["checks"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False
        return bool(checks.get("controller") == "ok")

    return probe
