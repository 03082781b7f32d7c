"""Who may come in: the key of a request, what it may do, how often, and the note of what it changed."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from anyio.to_thread import run_sync
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as RequestScope

from ncfm_core.errors import NcfmError
from service.api.context import LOCAL, Caller, need_scope
from service.api.errors import Draining, TooManyRequests, Unauthorized, error_response
from service.api.guard import SAFE_METHODS, is_loopback
from service.api.templates import route_template, target_of
from service.auditing import AuditEntry, Recorder
from service.keys import KeyRing
from service.scopes import SCOPES, Scope

Mode = Literal["auto", "required", "off"]

OPEN = frozenset({"/", "/livez", "/readyz", "/openapi.json", "/docs"})
"""Paths that need no key: they tell nothing of any job."""
MAX_BUCKETS = 10_000
NOTES_PER_MINUTE = 60
"""Of one key's changes that were refused for their number: one a second, whatever it sends."""
DRAIN_RETRY_S = 5
ANYBODY = Caller(LOCAL, frozenset(SCOPES))
_MAKE_ONE = "Send a key as bearer token in this header (the command line: NCFM_API_KEY); `ncfm keys create` makes one."


class Access:
    """ASGI middleware inside the guard: tells routes who calls, and keeps those out who may not."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        ring: KeyRing,
        mode: Mode,
        host: str,
        per_minute: int,
        recorder: Recorder,
        is_draining: Callable[[], bool],
    ) -> None:
        """
        Args:
            app: what is behind.
            ring: of keys.
            mode: when a key is needed.
            host: the address the API is bound to.
            per_minute: requests of one key that change something, or guesses at keys from one address.
            recorder: takes a note of each of them.
            is_draining: whether nothing new is taken any more.
        """
        self.app = app
        self._ring, self._mode, self._is_remote = ring, mode, not is_loopback(host)
        self._buckets = Buckets(per_minute)
        self._notes = Buckets(NOTES_PER_MINUTE, at_once=1)
        self._recorder, self._is_draining = recorder, is_draining

    async def __call__(self, scope: RequestScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            caller = await self._admit(scope)
        except NcfmError as error:
            response = error_response(scope, error)
            self._note_refusal(scope, response.status_code)
            await response(scope, receive, send)
            return
        if scope["method"] in SAFE_METHODS:
            await self.app(scope, receive, send)
        else:
            await self._recorded(caller, scope, receive, send)

    async def _admit(self, scope: RequestScope) -> Caller:
        """Who calls, if they may. Who is known by a good key stands in the request's state, also where it is refused."""
        request_id, writes = scope["state"]["request_id"], scope["method"] not in SAFE_METHODS
        address = scope["client"][0] if scope.get("client") else ""
        if scope["path"] in OPEN and not writes:
            scope["state"]["caller"] = caller = Caller(LOCAL, frozenset(), request_id, address)
            return caller
        if writes and self._is_draining():
            error = Draining.of("", None, "this process ends and takes nothing new", "Send it again in a moment.")
            error.headers = {"Retry-After": str(DRAIN_RETRY_S)}
            raise error
        try:
            owner, scopes = await self._identify(Headers(scope=scope).get("authorization"))
        except Unauthorized:
            # Guesses count too.
            self._buckets.take(f"address {address}", address)
            raise
        scope["state"]["caller"] = caller = Caller(owner, scopes, request_id, address)
        # Who needs no key is on this machine, and may ask as much of it as he likes. What the scope forbids counts too: it is
        # noted, and the notes take room.
        if writes and owner != LOCAL:
            self._buckets.take(f"key {owner}", caller.actor.name)
        need_scope(caller, "submit" if writes else "read")
        return caller

    async def _identify(self, header: str | None) -> tuple[str, frozenset[Scope]]:
        if not await self._needs_key():
            return LOCAL, ANYBODY.scopes
        if header is None:
            raise _unauthorized("a key is needed here", "")
        kind, _, token = header.partition(" ")
        token = token.strip()
        if kind.lower() != "bearer" or not token:
            raise _unauthorized("not of the form `Bearer <key>`", 'error="invalid_request"')
        key = self._ring.known(token) or await run_sync(self._ring.find, token)
        if key is None:
            raise _unauthorized("the key is unknown, expired or revoked", 'error="invalid_token"')
        return key.id, key.scopes

    async def _needs_key(self) -> bool:
        if self._mode != "auto":
            return self._mode == "required"
        if self._is_remote:
            return True
        known = self._ring.known_to_exist()
        return await run_sync(self._ring.exist) if known is None else known

    async def _recorded(self, caller: Caller, scope: RequestScope, receive: Receive, send: Send) -> None:
        """Serve a request that changes something, and take a note of it."""
        status, location = 500, ""

        async def sending(message: Message) -> None:
            nonlocal status, location
            if message["type"] == "http.response.start":
                status = message["status"]
                location = Headers(raw=message["headers"]).get("location", "")
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            self._note(caller, scope, status, target_of(scope) or location.rpartition("/")[2])

    def _note_refusal(self, scope: RequestScope, status: int) -> None:
        """Take a note of a change that was refused to a good key."""
        caller = scope["state"].get("caller")
        if caller is None or scope["method"] in SAFE_METHODS:
            return
        # Those over the rate have no rate: each of them noted, a client could fill the disk as fast as it can send.
        if status != TooManyRequests.status or self._notes.has(caller.owner):
            self._note(caller, scope, status, target_of(scope))

    def _note(self, caller: Caller, scope: RequestScope, status: int, target: str) -> None:
        self._recorder.note(
            AuditEntry(
                actor=caller.actor.name,
                action=f"{scope['method']} {route_template(scope)}",
                target=target,
                request_id=caller.request_id,
                address=caller.address,
                data={"status": status},
            )
        )


class Buckets:
    """Token buckets in memory: as many as come in a minute may come at once, then one by one as they are filled up."""

    def __init__(
        self, per_minute: int, *, at_once: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            per_minute: tokens.
            at_once: most of them in one bucket; those of a minute by default.
            clock: in seconds.
        """
        self._per_minute, self._size, self._clock = float(per_minute), float(at_once or per_minute), clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, shown: str) -> None:
        """One token.

        Raises:
            TooManyRequests: there is none; it says when.
        """
        level = self._level(name)
        if level < 1:
            seconds = max(1, math.ceil((1 - level) * 60 / self._per_minute))
            hint = f"Try again in {seconds} s. NCFM_RATE_LIMIT_PER_MINUTE sets the limit."
            error = TooManyRequests.of("", shown, f"more than {self._per_minute:.0f} requests a minute", hint)
            error.headers = {"Retry-After": str(seconds)}
            raise error

    def has(self, name: str) -> bool:
        """Whether there was a token, which is taken."""
        return self._level(name) >= 1

    def _level(self, name: str) -> float:
        """Tokens before one was taken, if there was one."""
        at = self._clock()
        level, since = self._levels.pop(name, (self._size, at))
        level = min(self._size, level + (at - since) * self._per_minute / 60)
        self._levels[name] = (level - 1 if level >= 1 else level, at)
        while len(self._levels) > MAX_BUCKETS:
            self._levels.popitem(last=False)
        return level


def _unauthorized(message: str, parameter: str) -> Unauthorized:
    error = Unauthorized.of("Authorization", None, message, _MAKE_ONE)
    error.headers = {"WWW-Authenticate": f'Bearer realm="ncfm"{", " if parameter else ""}{parameter}'}
    return error
