"""Free ports on this machine."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

from ncfm_core.errors import NcfmError

LOWEST, HIGHEST = 20_000, 32_000
"""Drawn from here: above Ray's fixed worker ports, below the ports that systems give to outgoing connections."""
ATTEMPTS = 200


class PortTaken(NcfmError):
    """A port that was asked for is in use."""

    code = "port_taken"


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of an earlier server that are still winding down are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def choose(taken: Collection[int], *preferred: int) -> int:
    """A free port: the first preferred one that is, else any.

    Raises:
        PortTaken: there is none.
    """
    drawn = (random.randint(LOWEST, HIGHEST) for _ in range(ATTEMPTS))
    for port in (*preferred, *drawn):
        if port and port not in taken and is_free(port):
            return port
    raise PortTaken.of("port", None, f"no free port between {LOWEST} and {HIGHEST}", "Name one with --port.")


def demand(port: int, option: str) -> int:
    """The port itself, if it is free.

    Raises:
        PortTaken: something listens there, or this user may not.
    """
    if not is_free(port):
        raise PortTaken.of(option, port, "the port is in use", f"Choose another, or leave {option} out for a free one.")
    return port
