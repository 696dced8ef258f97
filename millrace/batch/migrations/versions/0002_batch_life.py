"""Batches get an idempotency key, the reason of a pause and a canary; leases their length."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batches", sa.Column("idempotency_key", sa.Text))
    op.add_column("batches", sa.Column("reason", sa.Text, nullable=False, server_default=sa.text("''")))
    op.add_column("batches", sa.Column("canary", sa.Boolean, nullable=False, server_default=sa.true()))
    op.create_index("batches_by_idempotency_key", "batches", ["idempotency_key"], unique=True)
    op.add_column("shards", sa.Column("lease_seconds", sa.Float))


def downgrade() -> None:
    op.drop_column("shards", "lease_seconds")
    op.drop_index("batches_by_idempotency_key", "batches")
    for column in ("canary", "reason", "idempotency_key"):
        op.drop_column("batches", column)
