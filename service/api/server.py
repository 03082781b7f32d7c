"""The API's process: `ncfm api`."""

from __future__ import annotations

import logging
import math
import signal
import socket
import time
from types import FrameType

import uvicorn

from ncfm_core.errors import NcfmError
from service import logs
from service.api.app import create_app
from service.api.draining import Draining
from service.api.guard import is_loopback
from service.keys import Keys
from service.settings import Settings

logger = logging.getLogger("ncfm.api")

MAX_HEAD_BYTES = 64 * 1024
"""Of a request, before there is anything that could answer it well."""
DRAIN_S = 0.5
"""After SIGTERM the doors stay open for this long: whoever comes gets a 503 that says when to come again."""
GRACE_S = 5
"""Requests under way get this long after that."""


class AddressError(NcfmError):
    """The address cannot be bound to, or may not."""

    code = "address_unavailable"


def main(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        AddressError: the address is taken, unknown, or reachable by others while no key keeps them out.
        StoreError: the database cannot be opened.
        StorageError: the storage root cannot be opened.
    """
    logs.configure(settings.log_format)
    app = create_app(settings)
    check_reach(settings, Keys(app.state.store))
    with bind(settings) as listener:
        config = uvicorn.Config(
            app,
            # Its bound on the size of a request's head is a property of this parser.
            http="h11",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            # Whoever may set X-Forwarded-For could choose the address that stands in the audit.
            proxy_headers=False,
            # Its lines go the way of ours.
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        server = _Server(config, app.state.draining)

        def end(number: int, frame: FrameType | None) -> None:
            server.handle_exit(number, frame)

        # Before uvicorn has its own handlers, and when it raises the signal once more after an orderly end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        host, port = listener.getsockname()[:2]
        logger.info("api listens on %s port %d", host, port, extra={"action": "start"})
        server.run(sockets=[listener])
    logger.info("api ends", extra={"action": "end"})


class _Server(uvicorn.Server):
    """Tells the application before it closes its doors, so that streams end first and nothing new is begun."""

    def __init__(self, config: uvicorn.Config, draining: Draining) -> None:
        super().__init__(config)
        self._draining, self._close_at = draining, math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if math.isfinite(self._close_at) or not self.started:
            super().handle_exit(sig, frame)
        else:
            self._close_at = time.monotonic() + DRAIN_S

    async def on_tick(self, counter: int) -> bool:
        # Every 0.1 s, in the event loop: a signal may come in the middle of anything.
        if math.isfinite(self._close_at):
            self._draining.begin()
            self.should_exit = self.should_exit or time.monotonic() >= self._close_at
        return await super().on_tick(counter)


def check_reach(settings: Settings, keys: Keys) -> None:
    """Refuse an address that others reach while nothing keeps them out.

    Raises:
        AddressError: no key is asked for, or there is none that is good.
    """
    if is_loopback(settings.host):
        return
    hint = "Bind to 127.0.0.1, or make a key first: `ncfm keys create --name NAME --scope admin`."
    if settings.auth == "off":
        hint = "Bind to 127.0.0.1, or unset NCFM_AUTH and make a key with `ncfm keys create`."
        raise AddressError.of(
            "NCFM_HOST", settings.host, "others could reach the API there, and NCFM_AUTH is off", hint
        )
    if not keys.any_valid():
        raise AddressError.of("NCFM_HOST", settings.host, "others could reach the API there, and there is no key", hint)


def bind(settings: Settings) -> socket.socket:
    """The listening socket of the settings' address."""
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
        # asyncio does it for sockets that it has made itself alone: without it each answer waits 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        hint = "Choose another NCFM_PORT, or 0 for a free one."
        where = f"{host}:{port}"
        raise AddressError.of("NCFM_PORT", where, f"cannot listen there: {error.strerror}", hint) from error
