"""What every request passes first: a request id, and the checks that keep web pages of other sites out.

On this machine no key is needed before there is one, so a browser must not be a way in. A page elsewhere can send a form or a
simple POST here (told by Origin and Sec-Fetch-Site), or have its own name resolve to 127.0.0.1 (told by Host).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.api.errors import ApiError, ForeignRequest, HeadersTooLarge, error_response
from service.jobs import new_job_id

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
"""Of all headers of a request together."""
_ELSEWHERE = "pages of other sites may not change anything here"
_NO_PAGE = "Send it from a program, such as curl or `ncfm`, that says nothing of a page"


class Guard:
    """ASGI middleware around the whole API."""

    def __init__(self, app: ASGIApp, *, host: str, public_hosts: Collection[str]) -> None:
        """
        Args:
            app: what is guarded.
            host: the address the API is bound to, which is a name of ours too.
            public_hosts: further names by which it may be called; `*` for any.
        """
        self.app = app
        self._names = {"localhost", host.lower(), *(name.lower() for name in public_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_job_id()
        is_head = scope["method"] == "HEAD"
        # In place, so that the handler of last resort, which stands outside, finds it too.
        scope.setdefault("state", {}).update(request_id=request_id, is_head=is_head)
        logs.request_id.set(request_id)
        sending = _Sending(send, request_id, is_head=is_head)
        error = self._refusal(scope["method"], headers)
        if error is not None:
            await error_response(scope, error)(scope, receive, sending)
            return
        if is_head:
            # Whatever answers GET answers HEAD: the routes see GET, the body stays here.
            outer, scope = scope, {**scope, "method": "GET"}
            try:
                await self.app(scope, receive, sending)
            finally:
                outer["route"] = scope.get("route")
            return
        await self.app(scope, receive, sending)

    def _refusal(self, method: str, headers: Headers) -> ApiError | None:
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if len(headers.raw) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            message = f"more than {MAX_HEADERS} headers, or {MAX_HEADER_BYTES} bytes of them"
            return HeadersTooLarge.of("headers", f"{len(headers.raw)}, {size} bytes", message, "Send fewer.")
        host = headers.get("host", "")
        if not self._is_ours(host):
            hint = "Use 127.0.0.1 or localhost, or add the name to NCFM_PUBLIC_HOSTS."
            return ForeignRequest.of("Host", host, "not a name of this service", hint)
        if method in SAFE_METHODS:
            return None
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin"):
            return ForeignRequest.of("Sec-Fetch-Site", site, _ELSEWHERE, f"{_NO_PAGE}.")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            return ForeignRequest.of("Origin", origin, _ELSEWHERE, f"{_NO_PAGE}, or from a page of {host} itself.")
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or "*" in self._names or is_loopback(name)


def _place(origin: str) -> str | None:
    """Host and port of an origin; None where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class _Sending:
    """Adds our headers to a response, and keeps the body of a HEAD back."""

    def __init__(self, send: Send, request_id: str, *, is_head: bool) -> None:
        self._send = send
        self._request_id = request_id
        self._is_head = is_head

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            headers["X-Content-Type-Options"] = "nosniff"
        elif self._is_head and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)
