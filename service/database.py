"""The tables, and how a database is opened. The statements on them are in `store.py`; what is special to SQLite is here."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    DateTime,
    Dialect,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from ncfm_core.errors import NcfmError

BUSY_TIMEOUT_MS = 20_000
"""How long a writer waits for another one."""


class StoreError(NcfmError):
    """The database cannot be opened, read or written."""

    code = "database_unavailable"


class UtcDateTime(TypeDecorator[datetime]):
    """Aware times in UTC on every engine: SQLite drops the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("event_seq", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(64)),
    Column("message", Text, nullable=False),
    Column("requested", JSON, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("retry_at", UtcDateTime),
    Column("progress", JSON(none_as_null=True)),
    Column("stages", JSON, nullable=False),
    Column("result", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("artifacts", JSON, nullable=False),
    Column("mlflow_run_id", String(64)),
    Column("mlflow_url", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Index("jobs_by_state", "state", "id"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("type", String(16), nullable=False),
    Column("data", JSON, nullable=False),
)

cluster = Table(
    "cluster",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("cpus", Float),
    Column("gpus", Float),
    Column("seen_at", UtcDateTime),
    Column("checked_at", UtcDateTime, nullable=False),
    Column("ray_error", Text, nullable=False),
    Column("mlflow_error", Text, nullable=False),
)


def open_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
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


def unavailable(url: str, error: Exception) -> StoreError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    hint = "Name a file as sqlite:////absolute/path.db, in a folder that may be written."
    try:
        shown = make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        shown = "not a URL"
    return StoreError.of("NCFM_DATABASE_URL", shown, f"the database cannot be used: {str(cause).splitlines()[0]}", hint)
