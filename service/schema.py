"""Which schema a database has, and how it gets the one of this release."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from ncfm_core.errors import NcfmError

if TYPE_CHECKING:
    from alembic.config import Config

SCHEMA = "0003"
"""Revision that this release reads and writes: the newest migration."""
UNVERSIONED = "0001"
"""What a database of 0.1.0 has, which wrote no revision down."""
LOCK = 6_233_264_912
"""Of PostgreSQL: two processes that start at once upgrade one after the other."""


class SchemaError(NcfmError):
    """The database cannot get the schema that is asked for."""

    code = "invalid_schema"


@dataclass(frozen=True, slots=True)
class SchemaState:
    """Whether a release can work with a database."""

    schema: str | None
    problem: str = ""
    """What keeps it from that; empty where nothing does."""
    hint: str = ""
    """The way out."""


def state_of(connection: Connection) -> SchemaState:
    """Look at a database: its schema, and whether a SQLite file is whole."""
    if connection.dialect.name == "sqlite":
        said = [str(row[0]) for row in connection.execute(text("PRAGMA integrity_check(5)"))]
        if said != ["ok"]:
            hint = "Stop the service, keep the file, and `ncfm restore` the last backup (or `sqlite3 FILE .recover`)."
            return SchemaState(None, f"the file is damaged: {'; '.join(said)}", hint)
    found = revision_of(connection)
    if found is None:
        return SchemaState(None, "the database is empty", "Run `ncfm db upgrade`, or start the service.")
    if found < SCHEMA:
        hint = "Make a copy with `ncfm backup FILE`, then run `ncfm db upgrade`."
        return SchemaState(found, f"schema {found} is older than this release's", hint)
    if found > SCHEMA:
        return SchemaState(found, f"schema {found} is newer than this release's", "Use the newer release.")
    return SchemaState(found)


def revision_of(connection: Connection) -> str | None:
    """The revision of a database; None where it is empty."""
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
        return None if found is None else str(found)
    return UNVERSIONED if "jobs" in tables else None


def upgrade(connection: Connection, revision: str = SCHEMA) -> tuple[str | None, str]:
    """Bring a database to this release's schema, inside the transaction that is open; the revision before and after.

    Nothing happens where it is there already, or newer.
    """
    from alembic import command  # half as long to import as the rest of the API

    if connection.dialect.name == "postgresql":
        # However long it takes, and however long another process takes over it.
        for name in ("statement_timeout", "lock_timeout"):
            connection.execute(text(f"SET LOCAL {name} = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    before = revision_of(connection)
    if before is not None and before >= revision:
        return before, before
    config = _config(connection)
    if before == UNVERSIONED and not inspect(connection).has_table("alembic_version"):
        command.stamp(config, UNVERSIONED)
    command.upgrade(config, revision)
    return before, revision


def downgrade(connection: Connection, revision: str) -> None:
    """Take a database back to an older schema, inside the transaction that is open: what that schema lacks is lost.

    Raises:
        SchemaError: there is no such schema, or it is none that the database comes from.
    """
    from alembic import command

    before = revision_of(connection)
    older = sorted(each.stem[:4] for each in (Path(__file__).parent / "migrations/versions").glob("[0-9]*.py"))
    if revision not in older or before not in older or revision > before:
        hint = f"Known ones: {', '.join(older)}."
        raise SchemaError.of("revision", revision, f"the database has schema {before or 'none'}", hint)
    command.downgrade(_config(connection), revision)


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config
