"""ASGI middleware around everything: one line in the log and one count for each request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.prometheus import Figures
from service.api.templates import UNMATCHED, route_template

logger = logging.getLogger("ncfm.access")

QUIET = frozenset({"/livez", "/readyz", "/metrics"})
"""Asked by machines every few seconds: in the log only when something is wrong."""
REFUSED = frozenset({401, 403, 429})
"""Whoever looks for a way in is seen by what he asked for, also where there is no such route."""
MAX_PATH_CHARS = 200


class Watch:
    """Sees each request come and its answer end."""

    def __init__(self, app: ASGIApp, *, figures: Figures, is_draining: Callable[[], bool]) -> None:
        self.app = app
        self._figures, self._is_draining = figures, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 500, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            # The server breaks off what is under way when its time is over: that is no fault that needs a traceback.
            if not self._is_draining():
                raise
        finally:
            self._note(scope, status, time.monotonic() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route, method = route_template(scope), scope["method"]
        self._figures.count(method, route, status, seconds)
        state = scope.get("state", {})
        caller = state.get("caller")
        extra = {
            "action": "request",
            "request_id": state.get("request_id", ""),
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "key": caller.owner if caller is not None else "",
            "address": scope["client"][0] if scope.get("client") else "",
        }
        if route == UNMATCHED and status in REFUSED:
            extra["path"] = scope["path"][:MAX_PATH_CHARS]
        level = logging.DEBUG if route in QUIET and status < 400 else logging.INFO
        logger.log(level, "%s %s %d in %.1f ms", method, route, status, seconds * 1000, extra=extra)
