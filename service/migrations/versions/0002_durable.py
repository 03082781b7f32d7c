"""Owners, priorities, attempts, idempotency keys, API keys, uploads, audit and leases."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from service.tables import UtcDateTime

revision = "0002"
down_revision = "0001"

INDEXES = (
    ("jobs_by_rank", "jobs", ["state", "rank", "id"]),
    ("jobs_by_reason", "jobs", ["state", "reason", "rank", "id"]),
    ("jobs_by_owner", "jobs", ["owner", "id"]),
    ("jobs_by_publication", "jobs", ["publication", "publish_at"]),
    ("jobs_by_dataset", "jobs", ["dataset", "id"]),
    ("jobs_by_method", "jobs", ["method", "id"]),
    ("jobs_by_end", "jobs", ["finished_at", "id"]),
    ("jobs_by_count", "jobs", ["state", "owner", "deleted_at"]),
    ("idempotency_by_time", "idempotency", ["created_at"]),
    ("audit_by_time", "audit", ["at"]),
)
TABLES = ("attempts", "idempotency", "api_keys", "uploads", "audit", "leases")


def _of_jobs() -> list[sa.Column[Any]]:
    return [
        sa.Column("owner", sa.String(64), nullable=False, server_default="local"),
        sa.Column("priority", sa.Integer, nullable=False, server_default="50"),
        sa.Column("rank", sa.Float, nullable=False, server_default="0"),
        sa.Column("labels", sa.JSON, nullable=False, server_default="{}"),
        sa.Column("dataset", sa.String(128), nullable=False, server_default=""),
        sa.Column("method", sa.String(64), nullable=False, server_default=""),
        sa.Column("spec_digest", sa.String(80), nullable=False, server_default=""),
        sa.Column("parent_id", sa.String(64)),
        sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
        sa.Column("cancel", sa.JSON(none_as_null=True)),
        sa.Column("publication", sa.String(16), nullable=False, server_default="none"),
        sa.Column("publish_tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("publish_at", UtcDateTime),
        sa.Column("deleted_at", UtcDateTime),
    ]


def _of_events() -> list[sa.Column[Any]]:
    return [
        sa.Column("actor", sa.String(80), nullable=False, server_default="controller"),
        sa.Column("request_id", sa.String(64), nullable=False, server_default=""),
    ]


def upgrade() -> None:
    for column in _of_jobs():
        op.add_column("jobs", column)
    for column in _of_events():
        op.add_column("events", column)
    op.add_column("cluster", sa.Column("nodes", sa.JSON, nullable=False, server_default="[]"))
    _create_tables_of_jobs()
    _create_tables_of_users()
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns)
    _place_old_jobs()


def _create_tables_of_jobs() -> None:
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("started_at", UtcDateTime, nullable=False),
        sa.Column("ended_at", UtcDateTime),
        sa.Column("outcome", sa.String(16)),
        sa.Column("reason", sa.String(64)),
        sa.Column("message", sa.Text, nullable=False),
    )
    op.create_table(
        "idempotency",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("operation", sa.String(128), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("holder", sa.String(128), nullable=False),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )


def _create_tables_of_users() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("expires_at", UtcDateTime),
        sa.Column("revoked_at", UtcDateTime),
        sa.Column("used_at", UtcDateTime),
        sa.Column("previous_digest", sa.String(64)),
        sa.Column("previous_until", UtcDateTime),
    )
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("deleted_at", UtcDateTime),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", UtcDateTime, nullable=False),
        sa.Column("actor", sa.String(80), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("address", sa.String(64), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )


def _place_old_jobs() -> None:
    """Ranks and names of the jobs that are there: as if their priority had always been the usual one."""
    jobs = sa.table(
        "jobs",
        sa.column("id"),
        sa.column("spec", sa.JSON),
        sa.column("created_at", UtcDateTime),
        *(sa.column(name) for name in ("dataset", "method", "rank")),
    )
    connection = op.get_bind()
    for row in connection.execute(sa.select(jobs.c.id, jobs.c.spec, jobs.c.created_at)).all():
        names = {part: row.spec[part]["name"] for part in ("dataset", "method")}
        rank = row.created_at.timestamp() - 60 * 50
        connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(rank=rank, **names))


def downgrade() -> None:
    for name, table, _ in INDEXES:
        op.drop_index(name, table)
    for name in TABLES:
        op.drop_table(name)
    op.drop_column("cluster", "nodes")
    for table, columns in (("events", _of_events()), ("jobs", _of_jobs())):
        for column in columns:
            op.drop_column(table, str(column.name))
