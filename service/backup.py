"""Copies of the database: one .tar with the data as its engine writes it, and a manifest that proves it whole.

The storage root is not in it: it is copied by its own means, and `ncfm doctor` says whether the two agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Connection, func, inspect, select, text

from ncfm_core.errors import NcfmError
from service.database import Database, open_unchecked, sqlite_file
from service.schema import SCHEMA, revision_of
from service.tables import metadata
from worker.records import now

MANIFEST = "manifest.json"
DATA = {"sqlite": "database.sqlite", "postgresql": "database.dump"}


class BackupError(NcfmError):
    """A copy cannot be made, is not whole, or may not go where it should."""

    code = "backup_failed"


class Manifest(BaseModel):
    """What a copy says of itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    release: str
    engine: Literal["sqlite", "postgresql"]
    schema_revision: str
    created_at: datetime
    counts: dict[str, int]
    """Rows by table."""
    size: int
    sha256: str


def backup(url: str, target: Path, *, overwrite: bool = False) -> Manifest:
    """Copy a database while it is in use, as it is at one moment.

    Raises:
        BackupError: the file is there already, or a tool is missing or fails.
        StoreError: there is no database, or it cannot be read.
    """
    target = target.expanduser().absolute()
    if target.exists() and not overwrite:
        raise BackupError.of("file", str(target), "is there already", "Name another file, or give --force.")
    database = open_unchecked(url, is_look=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".ncfm-backup-") as folder:
            manifest = _copy(database, Path(folder))
            whole = Path(folder, "whole.tar")
            with tarfile.open(whole, "w") as archive:
                for name in (MANIFEST, DATA[manifest.engine]):
                    archive.add(Path(folder, name), name)
            _sync(whole)
            os.replace(whole, target)
        return manifest
    except OSError as error:
        raise BackupError.of("file", str(target), f"cannot be written: {error}", "Name a file with room.") from error
    finally:
        database.close()


def restore(url: str, source: Path, *, force: bool = False) -> Manifest:
    """Put a copy in place of a database that is empty, or of any where that is forced; then compare the two.

    Raises:
        BackupError: the copy is not whole, is of another engine or a newer release; the database has jobs, or is in use.
        StoreError: the database cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="ncfm-restore-") as folder:
        manifest = read_backup(source, Path(folder))
        database = open_unchecked(url)
        engine = database.engine.dialect.name
        try:
            if engine != manifest.engine:
                hint = f"Name a {manifest.engine} database in NCFM_DATABASE_URL."
                raise BackupError.of("file", str(source), f"is of {manifest.engine}, and this is {engine}", hint)
            if manifest.schema_revision > SCHEMA:
                message = f"has schema {manifest.schema_revision}, this release knows {SCHEMA}"
                raise BackupError.of("file", str(source), message, "Use the newer release.")
            file = sqlite_file(database.engine)
            if not force and (file is None or file.exists()):
                _check_empty(database)
            data = Path(folder, DATA[manifest.engine])
            if engine == "sqlite":
                _replace_sqlite(database, data)
            else:
                _replace_postgresql(database, data)
            with database.reading() as connection:
                counts = _counts(connection)
            if counts != manifest.counts:
                raise BackupError.of("database", str(counts), f"is not what the copy has: {manifest.counts}")
        finally:
            database.close()
    return manifest


def read_backup(source: Path, folder: Path) -> Manifest:
    """Unpack a copy into a folder, and make sure that it is whole."""
    try:
        with tarfile.open(source.expanduser(), "r:") as archive:
            told = archive.extractfile(MANIFEST)
            manifest = Manifest.model_validate_json(told.read(1 << 20) if told else b"")
            data = archive.extractfile(DATA[manifest.engine])
            if data is None:
                raise KeyError(DATA[manifest.engine])
            digest, size = hashlib.sha256(), 0
            with Path(folder, DATA[manifest.engine]).open("wb") as target:
                while chunk := data.read(1 << 20):
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
    except (OSError, tarfile.TarError, KeyError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise BackupError.of("file", str(source), f"not a whole copy: {said}", "Take another one.") from error
    if (size, digest.hexdigest()) != (manifest.size, manifest.sha256):
        raise BackupError.of("file", str(source), "damaged: its sha256 differs", "Take another one.")
    return manifest


def _copy(database: Database, folder: Path) -> Manifest:
    engine: Literal["sqlite", "postgresql"] = "sqlite" if database.engine.dialect.name == "sqlite" else "postgresql"
    data = folder / DATA[engine]
    if engine == "sqlite":
        _copy_sqlite(database, data)
        copied = open_unchecked(f"sqlite:///{data}")
        with copied.reading() as connection:
            revision, counts = revision_of(connection), _counts(connection)
        # One file again: what this look at it put beside it goes back in.
        with copied.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA journal_mode=DELETE")
            connection.exec_driver_sql("BEGIN")
        copied.close()
    else:
        with _snapshot(database) as (connection, snapshot):
            revision, counts = revision_of(connection), _counts(connection)
            options = ["--format=custom", "--no-owner", f"--snapshot={snapshot}", f"--file={data}"]
            _run_tool("pg_dump", *options, _address(database), of=database)
    if revision is None:
        raise BackupError.of("database", database.shown_url, "is empty", "Start the service first.")
    manifest = Manifest(
        release=version("ncfm"),
        engine=engine,
        schema_revision=revision,
        created_at=now(),
        counts=counts,
        size=data.stat().st_size,
        sha256=_sha256(data),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    return manifest


def _copy_sqlite(database: Database, target: Path) -> None:
    """By SQLite's own backup interface: writers go on meanwhile, and the copy is of one moment."""
    path = Path(str(database.engine.url.database)).expanduser()
    with closing(sqlite3.connect(path, timeout=20)) as source, closing(sqlite3.connect(target)) as copy:
        try:
            source.backup(copy)
            [said] = copy.execute("PRAGMA integrity_check(1)").fetchone()
        except sqlite3.Error as error:
            raise BackupError.of("database", str(path), f"cannot be copied: {error}", "Run `ncfm db check`.") from error
    if said != "ok":
        raise BackupError.of("database", str(path), f"is damaged: {said}", "Restore the last copy that is whole.")


def _replace_sqlite(database: Database, data: Path) -> None:
    """The old file is kept beside the new one."""
    path = Path(str(database.engine.url.database)).expanduser()
    database.close()
    if not path.exists():
        os.replace(_copied(data, path), path)
        return
    try:
        with closing(sqlite3.connect(path, timeout=1)) as old:
            # Only where nobody else has it open: they would go on with a file that is not there any more.
            [mode] = old.execute("PRAGMA journal_mode=DELETE").fetchone()
            is_used = mode != "delete"
    except sqlite3.OperationalError as error:
        is_used = "locked" in str(error)
    except sqlite3.DatabaseError:
        is_used = False
    if is_used:
        raise BackupError.of("database", str(path), "is in use", "Stop API and controller (`ncfm up`) first.")
    fresh = _copied(data, path)
    kept = path.with_name(f"{path.name}.replaced-{now():%Y%m%dT%H%M%S}")
    if path.stat().st_size:
        os.replace(path, kept)
    for ending in ("-wal", "-shm", "-journal"):
        beside = path.with_name(path.name + ending)
        if beside.exists():
            os.replace(beside, kept.with_name(kept.name + ending))
    os.replace(fresh, path)


def _replace_postgresql(database: Database, data: Path) -> None:
    """In one transaction. All our tables go first: one that came after the copy would hold those that it refers to."""
    script = data.with_suffix(".sql")
    _run_tool("pg_restore", "--clean", "--if-exists", "--no-owner", f"--file={script}", str(data), of=database)
    drops = [f"DROP TABLE IF EXISTS {name} CASCADE" for name in (*metadata.tables, "alembic_version")]
    options = ["--no-psqlrc", "--quiet", "--output=/dev/null", "--single-transaction", "--set=ON_ERROR_STOP=1"]
    steps = [f"--command={drop}" for drop in drops]
    _run_tool("psql", *options, _address(database), *steps, f"--file={script}", of=database)


def _copied(data: Path, path: Path) -> Path:
    """A durable copy of a file beside the place that it is meant for."""
    fresh = path.with_name(path.name + ".restoring")
    shutil.copyfile(data, fresh)
    _sync(fresh)
    return fresh


def _check_empty(database: Database) -> None:
    with database.reading() as connection:
        jobs = _counts(connection).get("jobs", 0)
    if jobs:
        hint = "Give --force to put the copy in its place."
        raise BackupError.of("database", database.shown_url, f"has {jobs} jobs", hint)


def _counts(connection: Connection) -> dict[str, int]:
    there = set(inspect(connection).get_table_names())
    return {
        table.name: int(connection.execute(select(func.count()).select_from(table)).scalar_one())
        for table in metadata.sorted_tables
        if table.name in there
    }


@contextmanager
def _snapshot(database: Database) -> Iterator[tuple[Connection, str]]:
    """One moment of PostgreSQL, for us and for its tools."""
    with database.engine.connect() as connection:
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        yield connection, str(connection.execute(text("SELECT pg_export_snapshot()")).scalar_one())


def _address(database: Database) -> str:
    """For PostgreSQL's tools, without the password: others can read a command line."""
    url = database.engine.url.set(drivername="postgresql", password=None)
    return f"--dbname={url.render_as_string(hide_password=False)}"


def _run_tool(tool: str, *arguments: str, of: Database) -> None:
    found = shutil.which(tool)
    if found is None:
        hint = "Install PostgreSQL's client tools of the server's version, or copy the database by its own means."
        raise BackupError.of("PATH", tool, "there is no such command", hint)
    password = of.engine.url.password
    # Notices would stand before the error.
    environment = {"PGOPTIONS": "--client-min-messages=warning"} | ({"PGPASSWORD": str(password)} if password else {})
    ran = subprocess.run([found, *arguments], env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or ["it does not say why"]
        raise BackupError.of("database", of.shown_url, f"{tool}: {said[0]}", "See what it says, and try again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def described(manifest: Manifest) -> str:
    """A line for a person."""
    rows = ", ".join(f"{count} {name}" for name, count in manifest.counts.items() if name in ("jobs", "events"))
    at = f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC"
    return f"{manifest.engine}, schema {manifest.schema_revision}, {rows}, {at}, sha256 {manifest.sha256[:12]}"


def as_document(manifest: Manifest) -> dict[str, object]:
    document: dict[str, object] = json.loads(manifest.model_dump_json())
    return document
