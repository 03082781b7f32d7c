"""The tables of the database. A change here needs a migration beside it (`service/migrations`): a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)


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
    Column("owner", String(64), nullable=False, server_default="local"),
    Column("priority", Integer, nullable=False, server_default="50"),
    Column("rank", Float, nullable=False, server_default="0"),
    Column("labels", JSON, nullable=False, server_default="{}"),
    Column("dataset", String(128), nullable=False, server_default=""),
    Column("method", String(64), nullable=False, server_default=""),
    Column("spec_digest", String(80), nullable=False, server_default=""),
    Column("parent_id", String(64)),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("cancel", JSON(none_as_null=True)),
    Column("publication", String(16), nullable=False, server_default="none"),
    Column("publish_tries", Integer, nullable=False, server_default="0"),
    Column("publish_at", UtcDateTime),
    Column("deleted_at", UtcDateTime),
    Index("jobs_by_state", "state", "id"),
    Index("jobs_by_rank", "state", "rank", "id"),
    Index("jobs_by_reason", "state", "reason", "rank", "id"),
    Index("jobs_by_owner", "owner", "id"),
    Index("jobs_by_publication", "publication", "publish_at"),
    Index("jobs_by_dataset", "dataset", "id"),
    Index("jobs_by_method", "method", "id"),
    Index("jobs_by_end", "finished_at", "id"),
    Index("jobs_by_count", "state", "owner", "deleted_at"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("outcome", String(16)),
    Column("reason", String(64)),
    Column("message", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("type", String(16), nullable=False),
    Column("data", JSON, nullable=False),
    Column("actor", String(80), nullable=False, server_default="controller"),
    Column("request_id", String(64), nullable=False, server_default=""),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("operation", String(128), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("job_id", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index("idempotency_by_time", "created_at"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("used_at", UtcDateTime),
    Column("previous_digest", String(64)),
    Column("previous_until", UtcDateTime),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("deleted_at", UtcDateTime),
)

upload_claims = Table(
    "upload_claims",
    metadata,
    Column("upload_id", ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
    Column("owner", String(64), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", String(80), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", String(128), nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("address", String(64), nullable=False),
    Column("data", JSON, nullable=False),
    Index("audit_by_time", "at"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("token", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
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
    Column("nodes", JSON, nullable=False, server_default="[]"),
)
