"""How a database is opened, and what a transaction on it is. The tables are in `tables.py`; what is special to SQLite is here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from ncfm_core.errors import NcfmError
from service.schema import SCHEMA, revision_of, upgrade

BUSY_TIMEOUT_MS = 20_000
"""How long a writer waits for another one."""


class StoreError(NcfmError):
    """The database cannot be opened, read or written."""

    code = "database_unavailable"


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
        found = self.revision()
        if found is None:
            self.upgrade()
        elif found != SCHEMA:
            self.engine.dispose()
            older = found < SCHEMA
            raise StoreError.of(
                "NCFM_DATABASE_URL",
                self.shown_url,
                f"the database has schema {found}, this release needs {SCHEMA}",
                "Run `ncfm db upgrade` (make a copy with `ncfm backup` first)." if older else "Use the newer release.",
            )

    @property
    def shown_url(self) -> str:
        """The URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def revision(self) -> str | None:
        """The schema that it has; None where it is empty."""
        with self.reading() as connection:
            return revision_of(connection)

    def copy_beside(self, mark: str) -> str:
        """Copy a SQLite file to one beside it with a mark in its name, and return that; empty where there is no file.

        A copy that is there already is from an upgrade that broke off: it stays.
        """
        file = self.engine.url.database
        if self.engine.dialect.name != "sqlite" or file is None:
            return ""
        target = Path(f"{file}.{mark}")
        if not target.exists():
            with self._translated():
                raw = self.engine.raw_connection()
                try:
                    # Below SQLAlchemy, which would begin a transaction first.
                    raw.cursor().execute("VACUUM INTO ?", (str(target),))
                finally:
                    raw.close()
        return str(target)

    def upgrade(self) -> tuple[str | None, str]:
        """Bring it to this release's schema; the revisions before and after."""
        with self.writing() as connection:
            return upgrade(connection)

    def close(self) -> None:
        self.engine.dispose()

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


def open_unchecked(url: str) -> Database:
    """A database of any schema, for those who upgrade it or look at it."""
    database = Database.__new__(Database)
    database.engine = _open_engine(url)
    database._writer = database.engine.execution_options(ncfm_write=True)
    return database


def clock(connection: Connection) -> float:
    """The database's time, in seconds: the one clock that all processes share."""
    if connection.dialect.name == "sqlite":
        return float(connection.execute(text("SELECT (julianday('now') - 2440587.5) * 86400.0")).scalar_one())
    return float(connection.execute(text("SELECT EXTRACT(EPOCH FROM clock_timestamp())")).scalar_one())


def _open_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "sqlite":
            if parsed.database in (None, "", ":memory:"):
                raise ArgumentError("a database in memory cannot be shared by the service's processes")
            Path(str(parsed.database)).expanduser().parent.mkdir(parents=True, exist_ok=True)
        # As many connections as the API has threads: none of them waits for a connection.
        engine = create_engine(parsed, pool_size=10, max_overflow=40, pool_pre_ping=True)
    except (ArgumentError, ModuleNotFoundError, OSError, TypeError) as error:
        raise unavailable(url, error) from error
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine)
    return engine


def _prepare_sqlite(engine: Engine) -> None:
    """Durable, and one writer at a time that takes its turn at BEGIN, where waiting is safe, and not in mid-transaction."""

    def on_connect(connection: Any, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
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
    if shown.startswith("postgresql"):
        hint = "Is the server up? Name it as postgresql://user:password@host:5432/database."
    return StoreError.of("NCFM_DATABASE_URL", shown, f"the database cannot be used: {said}", hint)
