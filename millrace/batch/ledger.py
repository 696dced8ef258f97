"""The ledger: what is to be done, what is being done and what is done, in SQLite or PostgreSQL.

This module keeps files and batches; what happens to a batch is in `millrace.batch.life`, to a shard in
`millrace.batch.lease`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from millrace.batch.life import FileRecord, Life, no_such_batch
from millrace.batch.schema import Priority, ShardState, Status, batches, clock, files, shards
from millrace.batch.view import batch_object
from millrace.errors import InputError, NotFound

MAX_WINDOW = 366 * 86400.0  # seconds


@dataclass(frozen=True)
class ShardPlan:
    """A shard as the planner cut it: `rows` entries of the plan file, from entry `first`."""

    number: int
    model: str
    first: int
    rows: int


@dataclass(frozen=True)
class Window:
    """How long a batch may take: as the user wrote it, and in seconds."""

    text: str
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Window:
        """Return the window written as a number and s, m, h or d, such as 30m.

        Raises:
            InputError: It is not written so, or is longer than a year.
        """
        found = re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII)
        seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0
        if not 0 < seconds <= MAX_WINDOW:
            raise InputError(
                f"{text!r} is no completion window.",
                "Write a number and its unit, such as 30m, 24h or 7d; at most 366d.",
                code="invalid_window",
            )
        return cls(text, seconds)


@dataclass(frozen=True)
class OpenWork:
    """What has not ended: batches by status, their shards by state, their rows, and the oldest one's age."""

    batches: dict[str, int]
    shards: dict[str, int]
    total: int
    completed: int
    failed: int
    #: Seconds since the oldest was created; 0 where there is none.
    age: float


def new_id(kind: str) -> str:
    """Return an id such as batch_0f3c…, unguessable and unique."""
    return f"{kind}_{secrets.token_hex(12)}"


class Ledger(Life):
    """An open ledger. Each method is one transaction."""

    def create_batch(
        self,
        *,
        batch_id: str,
        input_file: FileRecord,
        plan: Sequence[ShardPlan],
        endpoint: str,
        priority: Priority,
        name: str = "",
        metadata: dict[str, str] | None = None,
        window: Window | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Record a planned batch: its input file, itself and its shards, in one transaction.

        Raises:
            sqlalchemy.exc.IntegrityError: Another batch has the idempotency key.
        """
        with self.write() as connection:
            now = connection.execute(sa.select(clock())).scalar_one()
            connection.execute(files.insert().values(created_at=now, **vars(input_file)))
            connection.execute(
                batches.insert().values(
                    id=batch_id,
                    status=Status.IN_PROGRESS,
                    priority=priority,
                    name=name,
                    endpoint=endpoint,
                    # OpenAI's only one; a batch without a window of its own never expires.
                    completion_window=window.text if window else "24h",
                    expires_at=now + window.seconds if window else None,
                    idempotency_key=idempotency_key,
                    input_file_id=input_file.id,
                    total=input_file.rows,
                    created_at=now,
                    in_progress_at=now,
                    metadata=metadata or {},
                    errors=[],
                )
            )
            connection.execute(
                shards.insert(),
                [{**vars(shard), "batch_id": batch_id, "state": ShardState.READY, "segments": []} for shard in plan],
            )

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch as OpenAI's batch object, and more under `millrace`.

        Raises:
            NotFound: There is no such batch.
        """
        found = self._batches(batches.c.id == batch_id)
        if not found:
            raise no_such_batch(batch_id)
        return found[0]

    def batches(self, limit: int = 20) -> list[dict[str, Any]]:
        """Return the newest batches, newest first, in the form of `batch`."""
        return self._batches(sa.true(), limit)

    def unfinished_batch(self, input_sha256: str, metadata: dict[str, str]) -> str | None:
        """Return the newest batch of the same input and metadata whose answers are still to come or to fetch."""
        query = (
            sa.select(batches.c.id, batches.c.metadata)
            .join(files, files.c.id == batches.c.input_file_id)
            .where(files.c.sha256 == input_sha256)
            .where(batches.c.status.in_([Status.IN_PROGRESS, Status.PAUSED, Status.FINALIZING, Status.COMPLETED]))
            .order_by(batches.c.created_at.desc())
        )
        with self.read() as connection:
            for row in connection.execute(query):
                if row.metadata == metadata:
                    return str(row.id)
        return None

    def keyed_batch(self, idempotency_key: str) -> tuple[str, str] | None:
        """Return the batch of an idempotency key, and the sha256 of its rows."""
        return self._with_rows(batches.c.idempotency_key == idempotency_key)

    def same_rows(self, input_sha256: str) -> str | None:
        """Return the newest batch of the same rows."""
        found = self._with_rows(files.c.sha256 == input_sha256)
        return found[0] if found else None

    def _with_rows(self, where: sa.ColumnElement[bool]) -> tuple[str, str] | None:
        query = (
            sa.select(batches.c.id, files.c.sha256)
            .join(files, files.c.id == batches.c.input_file_id)
            .where(where)
            .order_by(batches.c.created_at.desc())
            .limit(1)
        )
        with self.read() as connection:
            row = connection.execute(query).one_or_none()
        return (row.id, row.sha256) if row else None

    def set_metadata(self, batch_id: str, metadata: dict[str, str]) -> None:
        """Replace a batch's metadata."""
        with self.write() as connection:
            connection.execute(batches.update().where(batches.c.id == batch_id).values(metadata=metadata))

    def file(self, file_id: str) -> FileRecord:
        """Return what is known of a file.

        Raises:
            NotFound: There is no such file.
        """
        columns = [files.c[name] for name in FileRecord.__dataclass_fields__]
        with self.read() as connection:
            row = connection.execute(sa.select(*columns).where(files.c.id == file_id)).one_or_none()
        if row is None:
            raise NotFound(f"There is no file {file_id}.")
        return FileRecord(**row._mapping)

    def waiting_models(self) -> dict[str, int]:
        """Return the models that open shards ask for, each with its number of rows."""
        query = (
            sa.select(shards.c.model, sa.func.sum(shards.c.rows))
            .where(shards.c.state.in_([ShardState.READY, ShardState.LEASED]))
            .group_by(shards.c.model)
        )
        with self.read() as connection:
            return {model: int(rows) for model, rows in connection.execute(query)}

    def shards(self, batch_id: str) -> list[sa.Row[Any]]:
        """Return every shard of a batch, whole rows, in order."""
        query = sa.select(shards).where(shards.c.batch_id == batch_id).order_by(shards.c.number)
        with self.read() as connection:
            return list(connection.execute(query))

    def open_work(self) -> OpenWork:
        """Return what has not ended, counted."""
        where = batches.c.status.in_([status for status in Status if not status.final])
        ages = sa.select(
            batches.c.status, sa.func.count(), sa.func.sum(batches.c.total), sa.func.max(clock() - batches.c.created_at)
        )
        states = (
            sa.select(shards.c.state, sa.func.count(), sa.func.sum(shards.c.completed), sa.func.sum(shards.c.failed))
            .join(batches, batches.c.id == shards.c.batch_id)
            .where(where)
            .group_by(shards.c.state)
        )
        with self.read() as connection:
            by_status = connection.execute(ages.where(where).group_by(batches.c.status)).all()
            by_state = connection.execute(states).all()
        return OpenWork(
            batches={status: count for status, count, _, _ in by_status},
            shards={state: count for state, count, _, _ in by_state},
            total=sum(int(total) for _, _, total, _ in by_status),
            completed=sum(int(completed) for _, _, completed, _ in by_state),
            failed=sum(int(failed) for _, _, _, failed in by_state),
            age=max((float(age) for _, _, _, age in by_status), default=0.0),
        )

    def rate(self) -> float | None:
        """Return the generated tokens a second of one runner, over the newest shards; None if unknown."""
        recent = (
            sa.select(shards.c.completion_tokens, shards.c.seconds)
            .where(shards.c.state == ShardState.DONE, shards.c.completion_tokens > 0)
            .order_by(shards.c.id.desc())
            .limit(64)
            .subquery()
        )
        with self.read() as connection:
            tokens, seconds = connection.execute(
                sa.select(sa.func.sum(recent.c.completion_tokens), sa.func.sum(recent.c.seconds))
            ).one()
        return float(tokens) / float(seconds) if seconds else None

    def _batches(self, where: Any, limit: int = 1) -> list[dict[str, Any]]:
        chosen = (
            sa.select(batches, files.c.filename)
            .join(files, files.c.id == batches.c.input_file_id)
            .where(where)
            .order_by(batches.c.created_at.desc())
            .limit(limit)
        )
        sums = [sa.func.sum(shards.c[name]).label(name) for name in _SUMS]
        states = [sa.func.count().filter(shards.c.state == state).label(state) for state in ShardState]
        with self.read() as connection:
            rows = connection.execute(chosen).mappings().all()
            counts = {
                row["batch_id"]: row
                for row in connection.execute(
                    sa.select(shards.c.batch_id, *sums, *states)
                    .where(shards.c.batch_id.in_([row["id"] for row in rows]))
                    .group_by(shards.c.batch_id)
                ).mappings()
            }
        return [batch_object(row, counts[row["id"]]) for row in rows]


_SUMS = ("completed", "failed", "prompt_tokens", "completion_tokens", "attempts")
