"""Who has sent the bytes of an upload: several may have, and each removes for itself."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.tables import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "upload_claims",
        sa.Column("upload_id", sa.String(64), sa.ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
    )
    names = "owner, name, created_at"
    op.execute(
        f"INSERT INTO upload_claims (upload_id, {names}) SELECT id, {names} FROM uploads WHERE deleted_at IS NULL"
    )


def downgrade() -> None:
    op.drop_table("upload_claims")
