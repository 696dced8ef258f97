"""The life of a batch: what may become of it, each change one transaction that looks at the status first.

Nothing overwrites an end: every update names the statuses it may start from, so that whoever comes second
(a cancel after the merge, a merge after another one, a reaper that was slow) changes nothing and is told.
What goes on after an end is in `millrace.batch.again`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from millrace.batch.database import Database
from millrace.batch.schema import Priority, ShardState, Status, batches, clock, files, shards
from millrace.errors import InputError, NotFound

#: Where rows are still to be run.
RUNNING = (Status.IN_PROGRESS, Status.PAUSED)
ENDED = tuple(status for status in Status if status.final)


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


def no_such_batch(batch_id: str) -> NotFound:
    """Return the error for an id that is no batch's."""
    return NotFound(f"There is no batch {batch_id}.", "`millrace batch list` shows those there are.")


class Life(Database):
    """The changes of a batch's status."""

    def status(self, batch_id: str) -> Status:
        """Return a batch's status alone.

        Raises:
            NotFound: There is no such batch.
        """
        with self.read() as connection:
            found = connection.scalar(sa.select(batches.c.status).where(batches.c.id == batch_id))
        if found is None:
            raise no_such_batch(batch_id)
        return Status(found)

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
                _batch(batch_id, *RUNNING).values(status=Status.CANCELLING, cancelling_at=clock(), reason="")
            )
            connection.execute(
                shards.update()
                .where(shards.c.batch_id == batch_id, shards.c.state == ShardState.READY)
                .where(sa.exists().where(batches.c.id == batch_id, batches.c.status == Status.CANCELLING))
                .values(state=ShardState.CANCELLED)
            )
        return self.status(batch_id)

    def pause(self, batch_id: str, reason: str = "") -> Status:
        """Claim no more of a batch; runners hear of it at their renewal and give back what they hold.

        Returns the status after the call: `paused`, or what it was when there was nothing to pause.
        `reason` is shown to people; that of an earlier pause stays.

        Raises:
            NotFound: There is no such batch.
        """
        with self.write() as connection:
            connection.execute(_batch(batch_id, Status.IN_PROGRESS).values(status=Status.PAUSED, reason=reason))
        return self.status(batch_id)

    def canary(self, batch_id: str) -> bool:
        """Return whether the batch's first rows are still to be watched for failing all alike."""
        with self.read() as connection:
            return bool(connection.scalar(sa.select(batches.c.canary).where(batches.c.id == batch_id)))

    def set_priority(self, batch_id: str, priority: Priority) -> Status:
        """Change the priority of a batch that has not ended, for the claims from now on; return its status.

        Raises:
            NotFound: There is no such batch.
        """
        with self.write() as connection:
            still_open = batches.c.status.not_in(ENDED)
            connection.execute(batches.update().where(batches.c.id == batch_id, still_open).values(priority=priority))
        return self.status(batch_id)

    def expire_overdue(self) -> list[str]:
        """Stop the batches whose completion window is over, as `cancel` does; return them.

        They are `finalizing` until their merge ends them as `expired`.
        """
        overdue = sa.select(batches.c.id).where(batches.c.status.in_(RUNNING), batches.c.expires_at < clock())
        with self.read() as connection:
            if not list(connection.scalars(overdue)):
                return []
        expired = []
        with self.write() as connection:
            for batch_id in connection.scalars(overdue).all():
                now = connection.scalar(sa.select(clock()))
                ended = connection.execute(
                    _batch(batch_id, *RUNNING).values(
                        status=Status.FINALIZING, finalizing_at=now, expired_at=now, reason=""
                    )
                )
                if ended.rowcount:
                    expired.append(batch_id)
                    connection.execute(
                        shards.update()
                        .where(shards.c.batch_id == batch_id, shards.c.state == ShardState.READY)
                        .values(state=ShardState.CANCELLED)
                    )
        return expired

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

    def end_of(self, batch_id: str) -> Status:
        """Return how the merge is to end a batch: cancelled, expired, or completed."""
        query = sa.select(batches.c.status, batches.c.expired_at).where(batches.c.id == batch_id)
        with self.read() as connection:
            row = connection.execute(query).one()
        if row.status == Status.CANCELLING:
            return Status.CANCELLED
        return Status.COMPLETED if row.expired_at is None else Status.EXPIRED

    def complete(self, batch_id: str, final: Status, output: FileRecord | None, errors: FileRecord | None) -> bool:
        """Record the merged files and end the batch, in one transaction; False if it had ended before."""
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
                    # The batch may have ended before: the files of that end are replaced by these.
                    connection.execute(files.delete().where(files.c.id == record.id))
                    connection.execute(files.insert().values(created_at=now, **vars(record)))
            connection.execute(
                batches.update()
                .where(batches.c.id == batch_id)
                .values(
                    status=final,
                    output_file_id=output.id if output else None,
                    error_file_id=errors.id if errors else None,
                    **{f"{final}_at": now},
                )
            )
        return True

    def fail(self, batch_id: str, code: str, message: str) -> None:
        """End a batch that cannot be completed, saying why; what is answered stays where it is."""
        with self.write() as connection:
            connection.execute(
                _batch(batch_id, *RUNNING, Status.FINALIZING, Status.CANCELLING).values(
                    status=Status.FAILED, failed_at=clock(), errors=[{"code": code, "message": message}], reason=""
                )
            )

    def seal_cancelled(self, shard_id: int, segments: list[dict[str, Any]], counts: dict[str, int]) -> None:
        """Record what a cancelled shard's last runner had answered when it died."""
        with self.write() as connection:
            connection.execute(
                shards.update()
                .where(shards.c.id == shard_id, shards.c.state == ShardState.CANCELLED)
                .values(segments=segments, **counts)
            )

    def over(self, seconds: float) -> list[str]:
        """Return the batches that ended longer than `seconds` ago, oldest first."""
        ended = sa.func.coalesce(*(batches.c[f"{status}_at"] for status in ENDED))
        query = sa.select(batches.c.id).where(batches.c.status.in_(ENDED), ended < clock() - seconds).order_by(ended)
        with self.read() as connection:
            return list(connection.scalars(query))

    def forget(self, batch_id: str) -> None:
        """Remove an ended batch with its shards and files from the ledger.

        Raises:
            InputError: It has not ended (batch_not_ended).
            NotFound: There is no such batch.
        """
        with self.write() as connection:
            found = connection.execute(sa.select(batches).where(batches.c.id == batch_id).with_for_update())
            row = found.mappings().one_or_none()
            if row is None:
                raise no_such_batch(batch_id)
            if row["status"] not in ENDED:
                raise InputError(
                    f"{batch_id} is {row['status']}; only a batch that has ended can be deleted.",
                    f"Stop it first: `millrace batch cancel {batch_id}`.",
                    code="batch_not_ended",
                )
            connection.execute(shards.delete().where(shards.c.batch_id == batch_id))
            connection.execute(batches.delete().where(batches.c.id == batch_id))
            # Also those of an earlier end, which the batch itself does not name any more.
            named = [row["input_file_id"], *(f"{batch_id}_{kind}" for kind in ("output", "errors"))]
            connection.execute(files.delete().where(files.c.id.in_(named)))


def _batch(batch_id: str, *of: Status) -> sa.Update:
    """Return an update of a batch, while it is in one of these statuses."""
    return batches.update().where(batches.c.id == batch_id, batches.c.status.in_(of))
