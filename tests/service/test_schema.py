"""Migrations, forwards and back, of a database that 0.1.0 made, on both engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from ncfm_core.submission import resolve
from service.database import Database, StoreError, open_unchecked
from service.jobs import Reason, State
from service.schema import SCHEMA, UNVERSIONED, downgrade, revision_of, upgrade
from service.store import Store
from service.tables import metadata

JOB_ID = "01hzzzzzzzzzzzzzzzzzzzzzz0"
SPEC = resolve({"dataset": "digits", "ipc": 1}).document()
AT = "2026-05-01 12:00:00.250000"

OPEN = """
import sys
from service.store import Store
store = Store(sys.argv[1])
sys.stdout.write(str(sum(store.counts().values())))
store.close()
"""


def make_old(url: str) -> Database:
    """A database as 0.1.0 left it: its tables, no word of a revision, and a job that ran."""
    database = open_unchecked(url)
    with database.writing() as connection:
        upgrade(connection, UNVERSIONED)
        connection.execute(text("DROP TABLE alembic_version"))
        columns = {
            "id": JOB_ID, "version": 3, "event_seq": 2, "state": "running", "reason": None, "message": "old",
            "requested": json.dumps({"dataset": "digits", "ipc": 1}), "spec": json.dumps(SPEC), "warnings": "[]",
            "attempt": 1, "losses": 2, "stages": json.dumps({"inspect": "done"}), "artifacts": "[]",
            "mlflow_run_id": "run-1", "created_at": AT, "started_at": AT,
        }  # fmt: skip
        insert(connection, "jobs", columns)
        for seq, kind in ((1, "created"), (2, "state")):
            insert(connection, "events", {"job_id": JOB_ID, "seq": seq, "at": AT, "type": kind, "data": '{"n": 1}'})
        insert(connection, "cluster", {"id": 1, "cpus": 2.0, "checked_at": AT, "ray_error": "", "mlflow_error": ""})
    return database


def insert(connection: Connection, table: str, row: dict[str, Any]) -> None:
    names = ", ".join(row)
    types = {column["name"]: column["type"] for column in inspect(connection).get_columns(table)}
    values = ", ".join(f"CAST(:{name} AS {types[name]})" if "JSON" in str(types[name]) else f":{name}" for name in row)
    if connection.dialect.name == "sqlite":
        values = ", ".join(f":{name}" for name in row)
    else:
        row = {name: f"{value}+00" if name.endswith("at") else value for name, value in row.items()}
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)


def test_upgrade_when_the_database_is_of_0_1_0_keeps_every_row(database_url: str) -> None:
    old = make_old(database_url)
    with old.reading() as connection:
        assert revision_of(connection) == UNVERSIONED
    with pytest.raises(StoreError, match="ncfm db upgrade"):
        Store(database_url)
    assert old.upgrade() == (UNVERSIONED, SCHEMA)
    assert old.upgrade() == (SCHEMA, SCHEMA)
    old.close()
    store = Store(database_url)
    job = store.get(JOB_ID)
    assert job is not None
    assert (job.state, job.message, job.losses, job.spec) == (State.RUNNING, "old", 2, SPEC)
    assert (job.owner, job.priority, job.labels, job.publication) == ("local", 50, {}, "none")
    assert job.created_at.isoformat() == "2026-05-01T12:00:00.250000+00:00"
    with store.reading() as connection:
        row = connection.execute(text("SELECT rank, dataset, method FROM jobs")).one()
    assert tuple(row) == (job.rank, "digits", "ncfm")
    assert [(event.seq, event.type, event.actor) for event in store.events(JOB_ID, after=0, limit=9)] == [
        (1, "created", "controller"), (2, "state", "controller")
    ]  # fmt: skip
    sighting = store.sighting()
    assert sighting is not None and (sighting.cpus, sighting.nodes) == (2.0, ())
    moved = store.move(job, State.FAILED, reason=Reason.INTERNAL)
    assert moved is not None and moved.event_seq == 3
    store.close()


def test_downgrade_when_taken_back_one_step_and_forth_again_keeps_the_jobs(database_url: str) -> None:
    database = make_old(database_url)
    database.upgrade()
    with database.writing() as connection:
        downgrade(connection, UNVERSIONED)
        assert revision_of(connection) == UNVERSIONED
        assert {"jobs", "events", "cluster"} <= set(inspect(connection).get_table_names())
        assert "attempts" not in inspect(connection).get_table_names()
        assert connection.execute(text("SELECT id, state FROM jobs")).all() == [(JOB_ID, "running")]
        assert connection.execute(text("SELECT count(*) FROM events")).scalar_one() == 2
    assert database.upgrade() == (UNVERSIONED, SCHEMA)
    database.close()
    store = Store(database_url)
    assert store.get(JOB_ID) is not None
    store.close()


def test_migrations_when_all_have_run_give_the_tables_of_the_code(database_url: str) -> None:
    store = Store(database_url)
    with store.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": False})
        assert compare_metadata(context, metadata) == []
    store.close()


def test_store_when_the_schema_is_of_a_newer_release_asks_for_that(database_url: str) -> None:
    store = Store(database_url)
    with store.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(StoreError, match="Use the newer release"):
        Store(database_url)
    other = open_unchecked(database_url)
    assert other.upgrade() == ("9999", "9999")
    other.close()


def test_store_when_processes_open_an_empty_database_at_once(database_url: str, tmp_path: Path) -> None:
    for _ in range(2 if database_url.startswith("sqlite") else 1):
        running = [
            subprocess.Popen(
                [sys.executable, "-c", OPEN, database_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        for process in running:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (0, "0"), err
        for file in (tmp_path / "deep/er").glob("ncfm.db*"):
            file.unlink()
