"""The ledger's tables and vocabulary: statuses, shard states, priorities.

A batch's life, in OpenAI's words:

    validating ──> in_progress ──> finalizing ──> completed, or expired: its completion window ran out
        │           │  ↕ paused
        └─> failed  └──> cancelling ──> cancelled

What has ended may go on: `resume` takes up a cancelled, expired or failed batch, and `retry` runs the failed
rows of a completed one (millrace.batch.again).

A shard's life: ready ──claim──> leased ──finish──> done, back to ready when its lease runs out or its
runner is asked to stop, and cancelled when its batch is or expires. `epoch` grows at every claim; every
later write of that runner is `UPDATE … WHERE epoch = ?`, so a runner that was replaced writes nothing.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from millrace.errors import InputError


class Status(StrEnum):
    """A batch's status."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    PAUSED = "paused"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing changes any more by itself."""
        return self in (Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED)


class ShardState(StrEnum):
    """A shard's state."""

    READY = "ready"
    LEASED = "leased"
    DONE = "done"
    CANCELLED = "cancelled"


class Priority(IntEnum):
    """A priority; people write its name. The ledger orders by number, lowest first."""

    URGENT = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    IDLE = 4

    @classmethod
    def parse(cls, name: str) -> Priority:
        """Return the priority called `name`.

        Raises:
            InputError: There is none of that name.
        """
        try:
            return cls[name.upper()]
        except (KeyError, AttributeError):
            names = ", ".join(member.name.lower() for member in cls)
            raise InputError(
                f"There is no priority {name!r}.", f"Use one of {names}.", code="invalid_priority"
            ) from None


class clock(FunctionElement[float]):  # noqa: N801  # it reads like the SQL function it is
    """The ledger's own clock, seconds since 1970, UTC: the only clock that leases are compared with."""

    type = sa.Float()
    inherit_cache = True


@compiles(clock, "sqlite")
def _sqlite_clock(element: Any, compiler: Any, **kw: Any) -> str:
    # unixepoch('subsec') needs SQLite 3.42; Debian 12 has 3.40.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(clock, "postgresql")
def _postgresql_clock(element: Any, compiler: Any, **kw: Any) -> str:
    # clock_timestamp, not now(): now() stands still within a transaction.
    return "extract(epoch from clock_timestamp())"


metadata = sa.MetaData()

files = sa.Table(
    "files",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("purpose", sa.String(16), nullable=False),  # batch, batch_output
    sa.Column("filename", sa.Text, nullable=False),  # as the user named it
    sa.Column("path", sa.Text, nullable=False),  # relative to DATA_DIR
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),  # of the first row; rows may differ
    sa.Column("completion_window", sa.String(16), nullable=False),
    sa.Column("input_file_id", sa.String(64), sa.ForeignKey("files.id"), nullable=False),
    sa.Column("output_file_id", sa.String(64), sa.ForeignKey("files.id")),
    sa.Column("error_file_id", sa.String(64), sa.ForeignKey("files.id")),
    sa.Column("total", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("in_progress_at", sa.Float),
    sa.Column("finalizing_at", sa.Float),
    sa.Column("completed_at", sa.Float),
    sa.Column("failed_at", sa.Float),
    sa.Column("expired_at", sa.Float),
    sa.Column("expires_at", sa.Float),
    sa.Column("cancelling_at", sa.Float),
    sa.Column("cancelled_at", sa.Float),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("errors", sa.JSON, nullable=False),  # problems that ended the batch
    sa.Column("idempotency_key", sa.Text),  # the user's: at most one batch has it
    sa.Column("reason", sa.Text, nullable=False, server_default=sa.text("''")),  # why it is paused
    # Whether its first rows are watched for failing all alike; not after a person has seen them.
    sa.Column("canary", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.Index("batches_by_idempotency_key", "idempotency_key", unique=True),
)

shards = sa.Table(
    "shards",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("batch_id", sa.String(64), sa.ForeignKey("batches.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),  # from 0 within the batch
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("first", sa.BigInteger, nullable=False),  # first entry in the plan file
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False, default=0),
    sa.Column("owner", sa.Text),
    sa.Column("lease_until", sa.Float),
    sa.Column("lease_seconds", sa.Float),  # how long that lease was when it was given
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("completed", sa.Integer, nullable=False, default=0),
    sa.Column("failed", sa.Integer, nullable=False, default=0),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False, default=0),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False, default=0),
    sa.Column("seconds", sa.Float, nullable=False, default=0.0),  # under lease, all owners together
    sa.Column("segments", sa.JSON, nullable=False),  # sealed: [{epoch, bytes, rows, sha256}]
    sa.UniqueConstraint("batch_id", "number"),
    sa.Index("shards_by_state", "batch_id", "state", "number"),
    sa.Index("shards_by_lease", "state", "lease_until"),
)
