"""How a database is opened, and what a transaction on it is. The tables are in `tables.py`; what is special to SQLite is here."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic_core import from_json, to_json
from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from ncfm_core.errors import NcfmError
from service.schema import SCHEMA, revision_of, upgrade

BUSY_TIMEOUT_MS = 20_000
"""How long a writer waits for another one, and any statement of PostgreSQL's may take."""
IDLE_TIMEOUT_MS = 60_000
"""A transaction of a process that was stopped in the middle of it holds its locks at most this long."""
CONNECT_TIMEOUT_S = 3


class StoreError(NcfmError):
    """The database cannot be opened, read or written."""

    code = "database_unavailable"


class NoDatabase(StoreError):
    """There is no database where one should be."""


class StoreFullError(StoreError):
    """The database cannot grow: its disk, or what it may take of it, is full."""

    code = "database_full"


class Database:
    """One database behind its URL.

    Raises:
        StoreError: by every method, when the database cannot be used.
    """

    def __init__(self, url: str) -> None:
        """Open it; an empty one gets its tables.

        Raises:
            StoreError: it cannot be opened, or has the schema of another release.
        """
        self.engine = _open_engine(url)
        self._writer = self.engine.execution_options(ncfm_write=True)
        if self.revision() is None:
            self.upgrade()
        self.check_schema()

    @property
    def shown_url(self) -> str:
        """The URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def revision(self) -> str | None:
        """The schema that it has; None where it is empty."""
        with self.reading() as connection:
            return revision_of(connection)

    def check_schema(self) -> None:
        """Close it again unless it has this release's schema.

        Raises:
            StoreError: it is empty, or has the schema of another release.
        """
        found = self.revision()
        if found == SCHEMA:
            return
        self.close()
        message = f"the database has schema {found}, this release needs {SCHEMA}"
        hint = "Run `ncfm db upgrade` (make a copy with `ncfm backup` first)."
        if found is None:
            message, hint = (
                "the database is empty",
                "Is it the one you mean? The start of the service makes its tables.",
            )
        elif found > SCHEMA:
            hint = "Use the newer release."
        raise StoreError.of("NCFM_DATABASE_URL", self.shown_url, message, hint)

    def copy_beside(self, mark: str) -> str:
        """Copy a SQLite file to one beside it with a mark in its name, and return that; empty where there is no file.

        A copy that is there already is from an upgrade that broke off: it stays.
        """
        file = self.engine.url.database
        if self.engine.dialect.name != "sqlite" or file is None:
            return ""
        target, unfinished = Path(f"{file}.{mark}"), Path(f"{file}.{mark}.partial")
        if not target.exists():
            unfinished.unlink(missing_ok=True)
            with self._translated():
                raw = self.engine.raw_connection()
                try:
                    # Below SQLAlchemy, which would begin a transaction first.
                    raw.cursor().execute("VACUUM INTO ?", (str(unfinished),))
                finally:
                    raw.close()
            with unfinished.open("rb") as copied:
                os.fsync(copied.fileno())
            unfinished.replace(target)
        return str(target)

    def upgrade(self) -> tuple[str | None, str]:
        """Bring it to this release's schema; the revisions before and after."""
        with self.writing() as connection:
            return upgrade(connection)

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: durable once it is over."""
        with self._translated(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._translated(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def trying(self) -> Iterator[Connection]:
        """A transaction that writes, and is taken back."""
        with self._translated(), self._writer.connect() as connection:
            yield connection
            connection.rollback()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise unavailable(self.shown_url, error) from error


def open_unchecked(url: str, *, is_look: bool = False) -> Database:
    """A database of any schema, for those who upgrade it or look at it.

    Args:
        url: of the database.
        is_look: nothing is made or changed, not even a file beside it.

    Raises:
        NoDatabase: there is none that could be looked at.
    """
    database = Database.__new__(Database)
    database.engine = _open_engine(url, is_look=is_look)
    database._writer = database.engine.execution_options(ncfm_write=True)
    return database


def sqlite_file(engine: Engine) -> Path | None:
    """The file of a SQLite database; None on another engine."""
    return Path(str(engine.url.database)).expanduser() if engine.dialect.name == "sqlite" else None


def insert_missing(connection: Connection, table: Table, **values: object) -> None:
    """Insert a row unless there is one of its key, also where another process does the same at this moment."""
    kind = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(kind(table).values(**values).on_conflict_do_nothing())


def clock(connection: Connection) -> float:
    """The database's time, in seconds: the one clock that all processes share."""
    if connection.dialect.name == "sqlite":
        return float(connection.execute(text("SELECT (julianday('now') - 2440587.5) * 86400.0")).scalar_one())
    return float(connection.execute(text("SELECT EXTRACT(EPOCH FROM clock_timestamp())")).scalar_one())


def _open_engine(url: str, *, is_look: bool = False) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "sqlite":
            if parsed.database in (None, "", ":memory:"):
                raise ArgumentError("a database in memory cannot be shared by the service's processes")
            path = Path(str(parsed.database)).expanduser()
            if not is_look:
                path.parent.mkdir(parents=True, exist_ok=True)
            elif not path.exists():
                raise _no_database(path)
        options = _pool_and_timeouts(parsed)
        if is_look and parsed.get_backend_name() == "sqlite":
            options["creator"] = partial(_open_to_read, path)
        engine = create_engine(parsed, json_serializer=_to_json, json_deserializer=from_json, **options)
    except (ArgumentError, ModuleNotFoundError, OSError, TypeError) as error:
        raise unavailable(url, error) from error
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine, is_look=is_look)
    return engine


def _no_database(path: Path) -> NoDatabase:
    hint = "Name the one you mean with NCFM_HOME or NCFM_DATABASE_URL; the start of the service makes a new one."
    return NoDatabase.of("NCFM_DATABASE_URL", str(path), "there is no database here", hint)


def _open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that cannot write.

    Where there is no journal nobody has the file open, and it is read as it lies there: SQLite would else put a journal
    beside it, perhaps of another user than the service's, and leave it.
    """
    is_open = path.with_name(path.name + "-wal").exists()
    options = "mode=ro" if is_open else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True, check_same_thread=False)


def _to_json(value: object) -> str:
    """JSON that both engines take: PostgreSQL has neither NaN nor half a surrogate pair, and drivers may say either."""
    try:
        written = json.dumps(value, allow_nan=False)
    except ValueError:
        written = to_json(value, inf_nan_mode="null").decode()
    if "\\ud" in written:
        written = json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()
    return written


def _pool_and_timeouts(url: URL) -> dict[str, Any]:
    if url.get_backend_name() != "postgresql":
        # As many connections as the API has threads: none of them waits for a connection.
        return {"pool_size": 10, "max_overflow": 40}
    # A server has 100 connections as it comes, and several processes share them.
    limits = {
        "statement_timeout": BUSY_TIMEOUT_MS,
        "lock_timeout": BUSY_TIMEOUT_MS,
        "idle_in_transaction_session_timeout": IDLE_TIMEOUT_MS,
    }
    arguments: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "tcp_user_timeout": BUSY_TIMEOUT_MS,
        "application_name": "ncfm",
        "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
    }
    # What the URL says goes first.
    arguments = {name: value for name, value in arguments.items() if name not in url.query}
    return {
        "pool_size": 10,
        "max_overflow": 10,
        "pool_timeout": BUSY_TIMEOUT_MS / 1000,
        # After a restart of the server, all of the pool's are dead.
        "pool_pre_ping": True,
        "isolation_level": "READ COMMITTED",
        "connect_args": arguments,
    }


def _prepare_sqlite(engine: Engine, *, is_look: bool) -> None:
    """Durable, and one writer at a time that takes its turn at BEGIN, where waiting is safe, and not in mid-transaction."""

    def on_connect(connection: Any, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        for pragma in () if is_look else ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("ncfm_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)


FULL = ("database or disk is full", "No space left on device", "could not extend file")
"""What SQLite and PostgreSQL say when there is no room."""


def unavailable(url: str, error: Exception) -> StoreError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    try:
        shown = make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        shown = "not a URL"
    said = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    if any(words in str(cause) for words in FULL):
        return StoreFullError.of("NCFM_DATABASE_URL", shown, said, "Make room; nothing that was accepted is lost.")
    hint = "Name a file as sqlite:////absolute/path.db, in a folder that may be written."
    if "malformed" in str(cause):
        hint = "The file is damaged: stop the service, keep the file, and `ncfm restore` the last backup."
    if shown.startswith("postgresql"):
        hint = "Is the server up? Name it as postgresql://user:password@host:5432/database."
    return StoreError.of("NCFM_DATABASE_URL", shown, f"the database cannot be used: {said}", hint)
