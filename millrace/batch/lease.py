"""Leases: who may run a shard, until when, and what counts of what they did.

    claim(owner)     ready, or leased and run out ──> leased, epoch + 1
    renew(lease)     ──> ok | lost | cancel | drain, and the rows done so far
    seal(lease)      fixes how much of an older segment counts
    finish(lease)    leased ──> done; the last one of a batch sets it finalizing, paused or not
    release(lease)   leased ──> ready, without an attempt counted
    free_expired()   what the reaper does: leased and run out ──> ready

**Fencing.** Every statement after the claim is `UPDATE … WHERE id = ? AND epoch = ?`: a runner whose
shard was claimed by another one changes nothing, however late it wakes up.

**Trust window.** A runner may believe in its lease only until

    trusted_until = moment before the renewal was asked for (monotonic) + ttl - MARGIN

never from the moment the answer came. Past it, it stops writing by itself, before the ledger's clock
lets anyone else claim the shard.

**A clock that was set back** would hold shards for as long as it was set back. So a lease that ends later
than two of its own lengths from now counts as run out. Its runner, if it lives, finds that out at its next
renewal like any other that was replaced; what it wrote meanwhile lies beyond the seal.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import sqlalchemy as sa

from millrace.batch.ledger import Ledger
from millrace.batch.life import RUNNING
from millrace.batch.schema import ShardState, Status, batches, clock, shards
from millrace.crashpoints import crashpoint

MARGIN = 1.0  # seconds; covers the difference in speed of two clocks within one lease
CLAIM_TRIES = 5  # another runner may take the chosen shard first, on PostgreSQL


class Renewal(StrEnum):
    """What a renewal answers."""

    OK = "ok"
    #: Someone else has the shard: stop, write nothing.
    LOST = "lost"
    #: The batch is being cancelled, has expired or has ended: stop, seal, `end_cancelled`.
    CANCEL = "cancel"
    #: The batch is paused: stop, seal, `release`.
    DRAIN = "drain"


class Finish(IntEnum):
    """What ended with a shard; false where nothing did."""

    #: Nothing: someone else has the shard.
    LOST = 0
    SHARD = 1
    #: It was the last one: the batch is ready to merge.
    BATCH = 2


@dataclass(frozen=True, slots=True)
class Sealed:
    """The part of a segment that counts: the first `bytes` bytes of what epoch `epoch` wrote."""

    epoch: int
    bytes: int
    rows: int
    sha256: str


@dataclass(slots=True)
class Counts:
    """What is done of a shard, over all its segments."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, ok: bool, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one more row."""
        if ok:
            self.completed += 1
        else:
            self.failed += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens


@dataclass(slots=True)
class Lease:
    """A claimed shard. `trusted_until` is on this process's monotonic clock, seconds."""

    shard_id: int
    batch_id: str
    number: int
    model: str
    first: int
    rows: int
    epoch: int
    trusted_until: float
    sealed: list[Sealed] = field(default_factory=list)

    @property
    def trusted(self) -> bool:
        """Whether the runner may still write."""
        return time.monotonic() < self.trusted_until


class Leases:
    """The transitions of shards, for one `owner`.

    Args:
        ledger: The open ledger.
        owner: Names the process in the ledger, for people.
        ttl: A lease's length, seconds; renew at a third.
    """

    def __init__(self, ledger: Ledger, owner: str, ttl: float) -> None:
        self.ledger = ledger
        self.owner = owner
        self.ttl = ttl

    def claim(self, loaded_model: str = "", served: Collection[str] = ()) -> Lease | None:
        """Take the shard that should run next, or None where there is nothing to do.

        Shards of a model that is not among the `served` stay where they are; none given means any.

        The order: priority class, then deadline, then the batch with the fewest shards running (so
        that batches of one class share the engine), then the older batch; within the batch the model
        that is already loaded, then the user's order.
        """
        wanted = shards.c.model.in_(served) if served else sa.true()
        claimable = sa.or_(shards.c.state == ShardState.READY, _run_out()) & wanted
        running = (
            sa.select(sa.func.count())
            .where(shards.c.batch_id == batches.c.id, shards.c.state == ShardState.LEASED)
            .where(~_run_out())
            .scalar_subquery()
        )
        next_batch = (
            sa.select(batches.c.id)
            .where(batches.c.status == Status.IN_PROGRESS)
            .where(sa.exists().where(shards.c.batch_id == batches.c.id, claimable))
            .order_by(
                batches.c.priority,
                sa.func.coalesce(batches.c.expires_at, 1e18),
                running,
                batches.c.created_at,
            )
            .limit(1)
        )
        for _ in range(CLAIM_TRIES):
            asked = time.monotonic()
            with self.ledger.write() as connection:
                batch_id = connection.scalar(next_batch)
                if batch_id is None:
                    return None
                row = self._next_shard(connection, batch_id, loaded_model, wanted)
                if row is None:
                    continue
                taken = connection.execute(
                    shards.update()
                    .where(shards.c.id == row.id, shards.c.epoch == row.epoch, claimable)
                    .values(
                        state=ShardState.LEASED,
                        epoch=row.epoch + 1,
                        attempts=shards.c.attempts + 1,
                        owner=self.owner,
                        **self._term(),
                    )
                )
            if taken.rowcount:
                crashpoint("lease.claimed")
                return Lease(
                    shard_id=row.id,
                    batch_id=row.batch_id,
                    number=row.number,
                    model=row.model,
                    first=row.first,
                    rows=row.rows,
                    epoch=row.epoch + 1,
                    trusted_until=asked + self.ttl - MARGIN,
                    sealed=[Sealed(**sealed) for sealed in row.segments],
                )
        return None

    def _next_shard(
        self, connection: sa.Connection, batch_id: str, loaded_model: str, wanted: sa.ColumnElement[bool]
    ) -> sa.Row[Any] | None:
        """Return the batch's next shard; three look-ups in an index, where one query would sort them all."""
        ready = shards.c.state == ShardState.READY
        for condition in (ready & (shards.c.model == loaded_model), ready, _run_out()):
            row = connection.execute(
                sa.select(shards)
                .where(shards.c.batch_id == batch_id, condition, wanted)
                .order_by(shards.c.number)
                .limit(1)
                # PostgreSQL: those who claim at once each see another shard.
                .with_for_update(skip_locked=True)
            ).one_or_none()
            if row is not None:
                return row
        return None

    def renew(self, lease: Lease, counts: Counts) -> Renewal:
        """Extend a lease by the ttl from now, and record the rows done so far."""
        asked = time.monotonic()
        with self.ledger.write() as connection:
            held = self._update(connection, lease, **self._term(), **_columns(counts))
            status = connection.scalar(sa.select(batches.c.status).where(batches.c.id == lease.batch_id))
        if not held:
            lease.trusted_until = 0.0
            return Renewal.LOST
        lease.trusted_until = asked + self.ttl - MARGIN
        crashpoint("lease.renewed")
        match status:
            case Status.IN_PROGRESS:
                return Renewal.OK
            case Status.PAUSED:
                return Renewal.DRAIN
            case _:
                # Nobody waits for its rows any more, whatever the reason.
                return Renewal.CANCEL

    def seal(self, lease: Lease, sealed: Sequence[Sealed], counts: Counts) -> bool:
        """Record which part of each segment counts; False if the lease is lost."""
        with self.ledger.write() as connection:
            held = self._update(connection, lease, segments=_json(sealed), **_columns(counts))
        if held:
            lease.sealed = list(sealed)
        return held

    def finish(self, lease: Lease, sealed: Sequence[Sealed], counts: Counts, seconds: float) -> Finish:
        """End a shard whose rows are all answered.

        The last shard of a batch sets the batch `finalizing` in the same transaction.
        """
        with self.ledger.write() as connection:
            # Two finishers of a batch's last two shards must see each other: the batch's row is the
            # lock that makes them follow one another on PostgreSQL.
            connection.execute(sa.select(batches.c.id).where(batches.c.id == lease.batch_id).with_for_update())
            held = self._end(connection, lease, ShardState.DONE, sealed, counts, seconds)
            if not held:
                return Finish.LOST
            last = finalize_done(connection, lease.batch_id)
        return Finish.BATCH if last else Finish.SHARD

    def end_cancelled(self, lease: Lease, sealed: Sequence[Sealed], counts: Counts, seconds: float) -> bool:
        """End a shard of a batch that is being cancelled or has expired; its answered rows count.

        Of a batch that was resumed meanwhile, it goes back to ready.
        """
        with self.ledger.write() as connection:
            chosen = sa.select(batches.c.status).where(batches.c.id == lease.batch_id).with_for_update()
            runs = connection.scalar(chosen) in (Status.IN_PROGRESS, Status.PAUSED)
            state = ShardState.READY if runs else ShardState.CANCELLED
            return self._end(connection, lease, state, sealed, counts, seconds)

    def hand_back(self, lease: Lease) -> None:
        """Give back a shard that this process cannot run, as it was claimed; the attempt is counted."""
        with self.ledger.write() as connection:
            self._update(connection, lease, state=ShardState.READY, owner=None, lease_until=None)

    def release(self, lease: Lease, sealed: Sequence[Sealed], counts: Counts, seconds: float) -> bool:
        """Give a shard back, its answered rows sealed; no attempt is counted."""
        with self.ledger.write() as connection:
            return self._update(
                connection,
                lease,
                state=ShardState.READY,
                owner=None,
                lease_until=None,
                attempts=shards.c.attempts - 1,
                segments=_json(sealed),
                seconds=shards.c.seconds + seconds,
                **_columns(counts),
            )

    def owners(self) -> int:
        """Return how many processes hold a live lease: the engine's limit is shared among them."""
        with self.ledger.read() as connection:
            count = connection.scalar(
                sa.select(sa.func.count(sa.distinct(shards.c.owner))).where(
                    shards.c.state == ShardState.LEASED, ~_run_out()
                )
            )
        return int(count or 0)

    def _term(self) -> dict[str, Any]:
        return {"lease_until": clock() + self.ttl, "lease_seconds": self.ttl}

    def _end(
        self,
        connection: sa.Connection,
        lease: Lease,
        state: ShardState,
        sealed: Sequence[Sealed],
        counts: Counts,
        seconds: float,
    ) -> bool:
        return self._update(
            connection,
            lease,
            state=state,
            lease_until=None,
            segments=_json(sealed),
            seconds=shards.c.seconds + seconds,
            **_columns(counts),
        )

    def _update(self, connection: sa.Connection, lease: Lease, **values: Any) -> bool:
        changed = connection.execute(
            shards.update()
            .where(shards.c.id == lease.shard_id)
            .where(shards.c.epoch == lease.epoch, shards.c.state == ShardState.LEASED)
            .values(**values)
        )
        return bool(changed.rowcount)


def free_expired(ledger: Ledger) -> int:
    """Free the shards whose leases ran out, and finalize what was left behind; return how many.

    A shard of a batch that is being cancelled or has expired ends as cancelled. This is the reaper's part in the
    ledger; it may run any number of times, in any number of processes.
    """
    gone = _run_out()
    ready = shards.c.state == ShardState.READY
    # Finalizing with a shard that has not ended: it has expired.
    stopped = batches.c.status.in_([Status.CANCELLING, Status.FINALIZING])
    cancelling = shards.c.batch_id.in_(sa.select(batches.c.id).where(stopped))
    with ledger.read() as connection:
        # Almost always there is nothing to do, and then nobody waits for a writer's lock.
        anything = connection.scalar(
            sa.select(sa.func.count()).select_from(shards).where(sa.or_(gone, cancelling & ready))
        ) or connection.scalar(_finalizable())
    if not anything:
        return 0
    with ledger.write() as connection:
        ended = connection.execute(
            shards.update().where(sa.or_(ready, gone), cancelling).values(state=ShardState.CANCELLED, lease_until=None)
        )
        freed = connection.execute(
            shards.update().where(gone).values(state=ShardState.READY, owner=None, lease_until=None)
        )
        connection.execute(_finalize())
    return int(ended.rowcount + freed.rowcount)


def waiting_shards(ledger: Ledger, most: int = 1) -> int:
    """Return how many shards could be claimed now, counted up to `most`."""
    waiting = (
        sa.select(shards.c.id)
        .join(batches, batches.c.id == shards.c.batch_id)
        .where(batches.c.status == Status.IN_PROGRESS)
        .where(sa.or_(shards.c.state == ShardState.READY, _run_out()))
        .limit(most)
        .subquery()
    )
    with ledger.read() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(waiting)) or 0)


def waiting_models(ledger: Ledger) -> list[str]:
    """Return the models of the shards that could be claimed now."""
    waiting = (
        sa.select(shards.c.model)
        .join(batches, batches.c.id == shards.c.batch_id)
        .where(batches.c.status == Status.IN_PROGRESS)
        .where(sa.or_(shards.c.state == ShardState.READY, _run_out()))
        .distinct()
    )
    with ledger.read() as connection:
        return list(connection.scalars(waiting))


def _run_out() -> sa.ColumnElement[bool]:
    # A lease of an older Millrace does not say how long it is; none is longer than an hour.
    length = sa.func.coalesce(shards.c.lease_seconds, 3600.0)
    ahead = shards.c.lease_until > clock() + 2 * length  # the clock was set back
    return sa.and_(shards.c.state == ShardState.LEASED, sa.or_(shards.c.lease_until < clock(), ahead))


def finalize_done(connection: sa.Connection, batch_id: str) -> bool:
    """Set a batch `finalizing` if all its shards are done; say whether it was so."""
    return bool(connection.execute(_finalize().where(batches.c.id == batch_id)).rowcount)


def _all_done() -> sa.ColumnElement[bool]:
    ended = ~sa.exists().where(shards.c.batch_id == batches.c.id, shards.c.state != ShardState.DONE)
    return sa.and_(batches.c.status.in_(RUNNING), ended)


def _finalize() -> sa.Update:
    return batches.update().where(_all_done()).values(status=Status.FINALIZING, finalizing_at=clock(), reason="")


def _finalizable() -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(batches).where(_all_done())


def _json(sealed: Sequence[Sealed]) -> list[dict[str, Any]]:
    return [{"epoch": one.epoch, "bytes": one.bytes, "rows": one.rows, "sha256": one.sha256} for one in sealed]


def _columns(counts: Counts) -> dict[str, int]:
    return {
        "completed": counts.completed,
        "failed": counts.failed,
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
    }
