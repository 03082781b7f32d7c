"""Whether MLflow and Ray answer, asked before anything is begun. Light."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import httpx

from ncfm_core.errors import NcfmError, TrackingError

TIMEOUT_S = 5.0


class ClusterUnreachableError(NcfmError):
    """Ray does not answer."""

    code = "cluster_unreachable"


def probe_mlflow(url: str) -> None:
    """Ask the tracking server how it is.

    Raises:
        TrackingError: nothing answers there, or something else does.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise TrackingError.of("mlflow_url", url, "not the address of a server", "Try http://127.0.0.1:5000.")
    try:
        answer = httpx.get(f"{url.rstrip('/')}/health", timeout=TIMEOUT_S, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        hint = "Start it, name another one, or leave it out to run without tracking."
        raise TrackingError.of("mlflow_url", url, f"MLflow does not answer: {reason}", hint) from None
    if answer.status_code != httpx.codes.OK:
        hint = "A 403 comes from MLflow's host check: start it with --allowed-hosts."
        raise TrackingError.of("mlflow_url", url, f"answers, but not as MLflow does: HTTP {answer.status_code}", hint)


def probe_ray(address: str) -> None:
    """Open a connection to the head of a cluster.

    Raises:
        ClusterUnreachableError: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        hint = "Start the cluster, or unset RAY_ADDRESS to use one of this process's own."
        raise ClusterUnreachableError.of("RAY_ADDRESS", address, f"Ray does not answer: {error}", hint) from None
