"""API keys: `ncfm_<id>_<secret>`. The database holds what a key may do and the sha256 of its secret, never the secret itself.

A secret has 256 random bits, so no slow hash is needed: nobody can try them all.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, insert, or_, select, update

from service.auditing import AuditEntry, append
from service.database import Database, StoreError
from service.scopes import SCOPES, KeyProblem, Scope
from service.tables import api_keys
from worker.records import now

KEY_PATTERN = re.compile(r"ncfm_([0-9a-f]{12})_([0-9a-f]{64})")
USED_PAUSE = timedelta(minutes=1)
"""`used_at` is written at most this often."""
CACHE_S = 5.0
"""How long a key that was found good is taken for good, and how long a revoked one may still work."""
NO_KEY_S = 1.0
"""How long a database without any key is taken to have none."""
MAX_CACHED = 1000
BY_HAND = AuditEntry(actor="cli")
"""By whoever has the database itself."""
MAX_NAME_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key without its secret."""

    id: str
    name: str
    scope: Scope
    created_at: datetime
    expires_at: datetime | None = None
    """None for never."""
    revoked_at: datetime | None = None
    used_at: datetime | None = None
    """To the minute."""
    previous_until: datetime | None = None
    """Until when the secret before the last rotation works."""

    @property
    def scopes(self) -> frozenset[Scope]:
        """The scope and those that it holds."""
        return frozenset(SCOPES[: SCOPES.index(self.scope) + 1])

    def is_valid(self, at: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > at)


class Keys:
    """The keys of one database.

    Raises:
        StoreError: by every method, when the database cannot be used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, name: str, scope: Scope, *, expires_at: datetime | None, entry: AuditEntry = BY_HAND
    ) -> tuple[Key, str]:
        """A new key, and the whole of it as text: the only time that its secret is seen.

        Raises:
            KeyProblem: the name is empty, too long or not printable.
        """
        if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
            hint = f"Say who or what will use it, in 1 to {MAX_NAME_CHARS} printable characters."
            raise KeyProblem.of("name", name, "cannot name a key", hint)
        key = Key(id=secrets.token_hex(6), name=name, scope=scope, created_at=now(), expires_at=expires_at)
        token, digest = _new_secret(key.id)
        row = {name: getattr(key, name) for name in ("id", "name", "created_at", "expires_at")}
        with self._database.writing() as connection:
            connection.execute(insert(api_keys).values(row | {"scopes": [scope], "digest": digest}))
            append(connection, replace(entry, action="keys.create", target=key.id, data={"name": name, "scope": scope}))
        return key, token

    def list(self) -> list[Key]:
        """All keys, oldest first."""
        with self._database.reading() as connection:
            return [_key(row) for row in connection.execute(select(api_keys).order_by(api_keys.c.created_at))]

    def revoke(self, key_id: str, *, entry: AuditEntry = BY_HAND) -> Key:
        """End a key at once (where it is cached: within `CACHE_S`); one that is revoked already stays so.

        Raises:
            KeyProblem: there is no such key.
        """
        key = self._found(key_id)
        if key.revoked_at is None:
            key = replace(key, revoked_at=now(), previous_until=None)
            values = {"revoked_at": key.revoked_at, "previous_digest": None, "previous_until": None}
            with self._database.writing() as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(values))
                append(connection, replace(entry, action="keys.revoke", target=key_id))
        return key

    def rotate(self, key_id: str, *, grace: timedelta, entry: AuditEntry = BY_HAND) -> tuple[Key, str]:
        """A new secret for a key, which stays the owner of its jobs; the one before works for `grace` more.

        Raises:
            KeyProblem: there is no such key, or it is revoked or expired.
        """
        key, at = self._found(key_id), now()
        if not key.is_valid(at):
            raise KeyProblem.of("id", key_id, "the key is revoked or expired", "Create a new one.")
        token, digest = _new_secret(key_id)
        key = replace(key, previous_until=at + grace if grace else None)
        values = {"previous_digest": api_keys.c.digest if grace else None, "previous_until": key.previous_until}
        with self._database.writing() as connection:
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(values | {"digest": digest}))
            data = {"grace_seconds": grace.total_seconds()}
            append(connection, replace(entry, action="keys.rotate", target=key_id, data=data))
        return key, token

    def exist(self) -> bool:
        """Whether there is, or was, any key."""
        with self._database.reading() as connection:
            return bool(connection.execute(select(func.count()).select_from(api_keys)).scalar_one())

    def any_valid(self) -> bool:
        """Whether there is a key that somebody could come in with."""
        return any(key.is_valid(now()) for key in self.list())

    def find(self, token: str) -> Key | None:
        """The key of a token, if it is good now; notes that it was used."""
        match = KEY_PATTERN.fullmatch(token)
        if match is None:
            return None
        key_id, secret = match.groups()
        with self._database.reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        at, given = now(), _digest(secret)
        # Compared also where there is none, so that the answer takes as long.
        is_current = hmac.compare_digest(given, row.digest if row else "")
        is_previous = hmac.compare_digest(given, (row.previous_digest if row else None) or "")
        if row is None or not (key := _key(row)).is_valid(at):
            return None
        if not is_current and not (is_previous and row.previous_until and row.previous_until > at):
            return None
        self._note_use(key_id, at)
        # A previous secret ends before its key does.
        return key if is_current else replace(key, expires_at=row.previous_until)

    def _note_use(self, key_id: str, at: datetime) -> None:
        due = or_(api_keys.c.used_at.is_(None), api_keys.c.used_at < at - USED_PAUSE)
        query = select(api_keys.c.id).where(api_keys.c.id == key_id, due)
        # A database that is full or locked is no reason to turn a good key away.
        with suppress(StoreError):
            with self._database.reading() as connection:
                if connection.execute(query).one_or_none() is None:
                    return
            with self._database.writing() as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key_id, due).values(used_at=at))

    def _found(self, key_id: str) -> Key:
        with self._database.reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise KeyProblem.of("id", key_id, "there is no such key", "`ncfm keys list` shows all.")
        return _key(row)


class KeyRing:
    """Keys as the API asks for them: what was found is taken for granted for a few seconds, so that a request stays cheap.

    Threads may share one.
    """

    def __init__(self, keys: Keys, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._clock, self._lock = keys, clock, threading.Lock()
        self._found: OrderedDict[str, tuple[Key, float]] = OrderedDict()
        self._exist: tuple[bool, float] | None = None

    def known(self, token: str) -> Key | None:
        """The key, if it was found lately and is good still; asks nobody."""
        with self._lock:
            key, until = self._found.get(_digest(token), (None, 0.0))
        return key if key is not None and self._clock() < until and key.is_valid(now()) else None

    def find(self, token: str) -> Key | None:
        """The key of a token, if it is good now; asks the database."""
        key = self._keys.find(token)
        with self._lock:
            digest = _digest(token)
            self._found.pop(digest, None)
            if key is not None:
                self._found[digest] = (key, self._clock() + CACHE_S)
            while len(self._found) > MAX_CACHED:
                self._found.popitem(last=False)
        return key

    def known_to_exist(self) -> bool | None:
        """Whether the database has any key, if that was asked lately."""
        answer = self._exist
        return answer[0] if answer is not None and self._clock() < answer[1] else None

    def exist(self) -> bool:
        """Whether the database has any key; asks it."""
        answer = self._keys.exist()
        self._exist = (answer, self._clock() + (CACHE_S if answer else NO_KEY_S))
        return answer


def _new_secret(key_id: str) -> tuple[str, str]:
    """The whole key as text, and the digest of its secret."""
    secret = secrets.token_hex(32)
    return f"ncfm_{key_id}_{secret}", _digest(secret)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(row: Row[Any]) -> Key:
    scopes: Iterable[Scope] = row.scopes
    fields = row._asdict()
    for name in ("digest", "previous_digest", "scopes"):
        del fields[name]
    return Key(**fields, scope=max(scopes, key=SCOPES.index))
