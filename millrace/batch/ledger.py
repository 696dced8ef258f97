"""The ledger: what is to be done, what is being done and what is done, in SQLite or PostgreSQL.

This module keeps files and batches; the life of a shard is in `millrace.batch.lease`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from millrace.batch.database import Database
from millrace.batch.schema import Priority, ShardState, Status, batches, clock, files, shards
from millrace.batch.view import batch_object
from millrace.errors import NotFound


@dataclass(frozen=True)
class ShardPlan:
    """A shard as the planner cut it: `rows` entries of the plan file, from entry `first`."""

    number: int
    model: str
    first: int
    rows: int


@dataclass(frozen=True)
class FileRecord:
    """A file the ledger knows. `path` is relative to DATA_DIR, `sha256` in hex."""

    id: str
    purpose: str
    filename: str
    path: str
    bytes: int
    sha256: str
    rows: int


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


class Ledger(Database):
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
        completion_window: str = "24h",
    ) -> None:
        """Record a planned batch: its input file, itself and its shards, in one transaction."""
        with self.write() as connection:
            now = connection.scalar(sa.select(clock()))
            connection.execute(files.insert().values(created_at=now, **vars(input_file)))
            connection.execute(
                batches.insert().values(
                    id=batch_id,
                    status=Status.IN_PROGRESS,
                    priority=priority,
                    name=name,
                    endpoint=endpoint,
                    completion_window=completion_window,
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
            raise NotFound(f"There is no batch {batch_id}.", "`millrace batch list` shows those there are.")
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

    def set_metadata(self, batch_id: str, metadata: dict[str, str]) -> None:
        """Replace a batch's metadata."""
        with self.write() as connection:
            connection.execute(batches.update().where(batches.c.id == batch_id).values(metadata=metadata))

    def status(self, batch_id: str) -> Status:
        """Return a batch's status alone.

        Raises:
            NotFound: There is no such batch.
        """
        with self.read() as connection:
            found = connection.scalar(sa.select(batches.c.status).where(batches.c.id == batch_id))
        if found is None:
            return Status(self.batch(batch_id)["status"])  # raises NotFound
        return Status(found)

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

    def cancel(self, batch_id: str) -> Status:
        """Ask a batch to stop: shards that nobody runs end here, runners hear of it at their renewal.

        Returns the status after the call: `cancelling`, or what it was when it was too late to cancel.

        Raises:
            NotFound: There is no such batch.
        """
        if (status := self.status(batch_id)).final:
            return status
        with self.write() as connection:
            connection.execute(
                batches.update()
                .where(batches.c.id == batch_id)
                .where(batches.c.status.in_([Status.IN_PROGRESS, Status.PAUSED]))
                .values(status=Status.CANCELLING, cancelling_at=clock())
            )
            connection.execute(
                shards.update()
                .where(shards.c.batch_id == batch_id, shards.c.state == ShardState.READY)
                .where(sa.exists().where(batches.c.id == batch_id, batches.c.status == Status.CANCELLING))
                .values(state=ShardState.CANCELLED)
            )
        return self.status(batch_id)

    def complete(self, batch_id: str, final: Status, output: FileRecord | None, errors: FileRecord | None) -> bool:
        """Record the merged files and end the batch, in one transaction; False if it had ended before."""
        stamp = {Status.COMPLETED: "completed_at", Status.CANCELLED: "cancelled_at"}[final]
        with self.write() as connection:
            # Two merges of a batch may end at once; the second one finds it ended and changes nothing.
            open_batch = sa.select(batches.c.id).where(
                batches.c.id == batch_id, batches.c.status.in_([Status.FINALIZING, Status.CANCELLING])
            )
            if connection.scalar(open_batch.with_for_update()) is None:
                return False
            now = connection.scalar(sa.select(clock()))
            for record in (output, errors):
                if record is not None:
                    connection.execute(files.insert().values(created_at=now, **vars(record)))
            connection.execute(
                batches.update()
                .where(batches.c.id == batch_id)
                .values(
                    status=final,
                    output_file_id=output.id if output else None,
                    error_file_id=errors.id if errors else None,
                    **{stamp: now},
                )
            )
        return True

    def fail(self, batch_id: str, code: str, message: str) -> None:
        """End a batch that cannot be completed, saying why; what is answered stays where it is."""
        with self.write() as connection:
            connection.execute(
                batches.update()
                .where(batches.c.id == batch_id)
                .where(batches.c.status.in_([Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING]))
                .values(status=Status.FAILED, failed_at=clock(), errors=[{"code": code, "message": message}])
            )

    def seal_cancelled(self, shard_id: int, segments: list[dict[str, Any]], counts: dict[str, int]) -> None:
        """Record what a cancelled shard's last runner had answered when it died."""
        with self.write() as connection:
            connection.execute(
                shards.update()
                .where(shards.c.id == shard_id, shards.c.state == ShardState.CANCELLED)
                .values(segments=segments, **counts)
            )

    def ready_to_merge(self) -> list[str]:
        """Return the batches whose shards have all ended and whose files are not written yet."""
        open_shards = sa.exists().where(
            shards.c.batch_id == batches.c.id,
            shards.c.state.in_([ShardState.READY, ShardState.LEASED]),
        )
        query = sa.select(batches.c.id).where(
            batches.c.status.in_([Status.FINALIZING, Status.CANCELLING]), ~open_shards
        )
        with self.read() as connection:
            return list(connection.scalars(query))

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
