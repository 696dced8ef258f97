"""Leases and the ledger: who may run a shard, and that nobody else's word counts. On SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from millrace.batch import database as database_module
from millrace.batch.database import REVISION
from millrace.batch.lease import (
    MARGIN,
    Counts,
    Lease,
    Leases,
    Renewal,
    Sealed,
    free_expired,
    waiting_shards,
)
from millrace.batch.ledger import Ledger, new_id
from millrace.batch.life import FileRecord
from millrace.batch.schema import Priority, ShardState, Status, batches, clock, metadata, shards
from millrace.errors import InputError, NotFound, StorageError, Unreachable
from millrace.settings import Settings
from tests.unit.batches import TTL, counts, expire, recorded, shard_row

SEAL = Sealed(1, 10, 2, "a" * 64)


@pytest.fixture
def settings(either_settings: Settings) -> Settings:
    return either_settings


@pytest.fixture
def leases(ledger: Ledger) -> Leases:
    return Leases(ledger, "me", TTL)


def claimed(leases: Leases, loaded_model: str = "") -> Lease:
    lease = leases.claim(loaded_model)
    assert lease is not None
    return lease


def update_batch(ledger: Ledger, batch_id: str, **values: Any) -> None:
    with ledger.write() as connection:
        connection.execute(batches.update().where(batches.c.id == batch_id).values(**values))


def now(ledger: Ledger) -> float:
    with ledger.read() as connection:
        return float(connection.scalar(sa.select(clock())))


# What a claim takes


def test_the_ledgers_clock_is_utc_seconds(ledger: Ledger) -> None:
    assert abs(now(ledger) - time.time()) < 5


def test_a_claim_leases_a_shard(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [3, 2])
    before = time.monotonic()
    lease = claimed(leases)
    after = time.monotonic()
    assert (lease.batch_id, lease.number, lease.first, lease.rows, lease.epoch) == (batch, 0, 0, 3, 1)
    assert lease.sealed == []
    assert before + TTL - MARGIN <= lease.trusted_until <= after + TTL - MARGIN
    assert lease.trusted
    row = shard_row(ledger, lease.shard_id)
    assert (row.state, row.owner, row.epoch, row.attempts) == (ShardState.LEASED, "me", 1, 1)
    assert 0 < row.lease_until - now(ledger) <= TTL
    assert (claimed(leases).number, leases.claim()) == (1, None)


def test_an_empty_ledger_has_nothing_to_claim(leases: Leases) -> None:
    assert leases.claim() is None


def test_priority_comes_first(ledger: Ledger, leases: Leases) -> None:
    order = [Priority.NORMAL, Priority.IDLE, Priority.URGENT, Priority.LOW, Priority.HIGH]
    made = {priority: recorded(ledger, [1], priority=priority) for priority in order}
    assert [claimed(leases).batch_id for _ in order] == [made[priority] for priority in Priority]


def test_then_the_deadline(ledger: Ledger, leases: Leases) -> None:
    none, late, soon = (recorded(ledger, [1]) for _ in range(3))
    update_batch(ledger, late, expires_at=now(ledger) + 1000)
    update_batch(ledger, soon, expires_at=now(ledger) + 100)
    assert [claimed(leases).batch_id for _ in range(3)] == [soon, late, none]


def test_a_deadline_does_not_beat_a_priority(ledger: Ledger, leases: Leases) -> None:
    soon = recorded(ledger, [1])
    update_batch(ledger, soon, expires_at=now(ledger) + 1)
    urgent = recorded(ledger, [1], priority=Priority.URGENT)
    assert [claimed(leases).batch_id for _ in range(2)] == [urgent, soon]


def test_then_batches_of_one_class_take_turns(ledger: Ledger, leases: Leases) -> None:
    old, new = recorded(ledger, [1] * 4), recorded(ledger, [1] * 4)
    taken = [claimed(leases).batch_id for _ in range(8)]
    assert taken == [old, new] * 4


def test_leases_that_ran_out_do_not_count_as_running(ledger: Ledger, leases: Leases) -> None:
    old, new = recorded(ledger, [1] * 4), recorded(ledger, [1] * 4)
    first = [claimed(leases), claimed(leases), claimed(leases)]
    assert [lease.batch_id for lease in first] == [old, new, old]
    expire(ledger, first[0].shard_id, first[2].shard_id)
    assert claimed(leases).batch_id == old


def test_within_a_batch_the_loaded_model_comes_first_then_the_users_order(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [1] * 4, models=["a", "b", "a", "b"])
    taken = [claimed(leases, "b"), claimed(leases, "b"), claimed(leases, "b"), claimed(leases, "b")]
    assert [(lease.number, lease.model) for lease in taken] == [(1, "b"), (3, "b"), (0, "a"), (2, "a")]


def test_the_loaded_model_does_not_beat_an_older_batch(ledger: Ledger, leases: Leases) -> None:
    old = recorded(ledger, [1], models=["a"])
    recorded(ledger, [1], models=["b"])
    assert claimed(leases, "b").batch_id == old


@pytest.mark.parametrize(
    "status",
    [
        Status.PAUSED,
        Status.CANCELLING,
        Status.CANCELLED,
        Status.FINALIZING,
        Status.COMPLETED,
        Status.FAILED,
        Status.EXPIRED,
    ],
)
def test_only_batches_in_progress_are_claimed_from(ledger: Ledger, leases: Leases, status: Status) -> None:
    update_batch(ledger, recorded(ledger, [1]), status=status)
    assert leases.claim() is None
    assert waiting_shards(ledger, 10) == 0


def test_waiting_shards_and_owners(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [1] * 3)
    assert (waiting_shards(ledger, 10), leases.owners()) == (3, 0)
    lease = claimed(leases)
    claimed(leases)
    assert (waiting_shards(ledger, 10), leases.owners()) == (1, 1)
    claimed(Leases(ledger, "you", TTL))
    assert leases.owners() == 2
    expire(ledger, lease.shard_id)
    assert leases.owners() == 2


# Fencing


@pytest.fixture
def two(ledger: Ledger, leases: Leases) -> tuple[Lease, Lease]:
    """The lease of a runner that was replaced, and its successor's."""
    recorded(ledger, [5])
    first = claimed(leases)
    expire(ledger, first.shard_id)
    second = claimed(Leases(ledger, "successor", TTL))
    assert (second.shard_id, second.epoch) == (first.shard_id, 2)
    return first, second


@pytest.mark.parametrize("call", ["renew", "seal", "finish", "release", "end_cancelled"])
def test_a_runner_that_was_replaced_changes_nothing(
    ledger: Ledger, leases: Leases, two: tuple[Lease, Lease], call: str
) -> None:
    first, second = two
    before = shard_row(ledger, first.shard_id)
    match call:
        case "renew":
            assert leases.renew(first, counts(4)) is Renewal.LOST
            assert not first.trusted
        case "seal":
            assert not leases.seal(first, [SEAL], counts(4))
            assert first.sealed == []
        case "finish":
            assert not leases.finish(first, [SEAL], counts(5), 1.0)
        case "release":
            assert not leases.release(first, [SEAL], counts(4), 1.0)
        case "end_cancelled":
            assert not leases.end_cancelled(first, [SEAL], counts(4), 1.0)
    assert shard_row(ledger, first.shard_id) == before
    assert ledger.status(first.batch_id) is Status.IN_PROGRESS
    assert leases.renew(second, counts(1)) is Renewal.OK


def test_a_lease_that_ran_out_but_that_nobody_took_is_still_held(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [2])
    lease = claimed(leases)
    expire(ledger, lease.shard_id)
    assert leases.renew(lease, counts(1)) is Renewal.OK
    assert leases.claim() is None


def test_a_shard_that_was_freed_is_lost_to_its_runner(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [2])
    lease = claimed(leases)
    expire(ledger, lease.shard_id)
    assert free_expired(ledger) == 1
    assert leases.renew(lease, counts(1)) is Renewal.LOST
    assert not leases.finish(lease, [SEAL], counts(2), 1.0)


def test_a_finished_shard_cannot_be_finished_or_released_again(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [2, 2])
    lease = claimed(leases)
    assert leases.finish(lease, [SEAL], counts(2), 1.5)
    done = shard_row(ledger, lease.shard_id)
    assert (done.state, done.completed, done.seconds, done.lease_until) == (ShardState.DONE, 2, 1.5, None)
    assert not leases.finish(lease, [], counts(), 1.5)
    assert not leases.release(lease, [], counts(), 1.5)
    assert leases.renew(lease, counts()) is Renewal.LOST
    assert shard_row(ledger, lease.shard_id) == done
    assert claimed(leases).number == 1


def test_trust_ends_before_the_lease_does(ledger: Ledger) -> None:
    recorded(ledger, [1])
    lease = claimed(Leases(ledger, "me", MARGIN))  # trusted until the moment it was asked for
    assert not lease.trusted
    assert shard_row(ledger, lease.shard_id).lease_until > now(ledger)
    assert Leases(ledger, "me", TTL).renew(lease, counts()) is Renewal.OK
    assert lease.trusted


# Ends


def test_a_renewal_extends_the_lease_and_records_counts(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [5])
    lease = claimed(leases)
    with ledger.write() as connection:
        connection.execute(shards.update().values(lease_until=now(ledger) + 1))
    assert leases.renew(lease, Counts(2, 1, 30, 40)) is Renewal.OK
    assert shard_row(ledger, lease.shard_id).lease_until > now(ledger) + TTL / 2
    assert ledger.batch(batch)["request_counts"] == {"total": 5, "completed": 2, "failed": 1}


def test_the_last_shard_sets_the_batch_finalizing(ledger: Ledger, leases: Leases) -> None:
    batch, other = recorded(ledger, [2, 2]), recorded(ledger, [1])
    one, foreign, two = claimed(leases), claimed(leases), claimed(leases)
    assert (one.batch_id, foreign.batch_id, two.batch_id) == (batch, other, batch)
    assert leases.finish(two, [SEAL], counts(2), 1.0)
    assert ledger.status(batch) is Status.IN_PROGRESS
    assert ledger.ready_to_merge() == []
    assert leases.finish(one, [SEAL], counts(1, 1), 1.0)
    assert ledger.status(batch) is Status.FINALIZING
    assert ledger.batch(batch)["finalizing_at"] is not None
    assert ledger.status(other) is Status.IN_PROGRESS
    assert ledger.ready_to_merge() == [batch]


def test_two_who_finish_the_last_two_shards_at_once_leave_it_finalizing(ledger: Ledger) -> None:
    for _ in range(5):
        batch = recorded(ledger, [1] * 4)
        each = [Leases(ledger, f"runner {number}", TTL) for number in range(4)]
        held = [claimed(leases) for leases in each]
        barrier = threading.Barrier(4)

        def finish(number: int, held: list[Lease] = held, each: list[Leases] = each, barrier: Any = barrier) -> bool:
            barrier.wait()
            return each[number].finish(held[number], [SEAL], counts(1), 1.0)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(finish, range(4)))
        assert ledger.status(batch) is Status.FINALIZING


def test_a_release_counts_no_attempt_and_keeps_the_seals(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [5])
    lease = claimed(leases)
    assert leases.release(lease, [SEAL], counts(2), 3.0)
    row = shard_row(ledger, lease.shard_id)
    assert (row.state, row.attempts, row.owner, row.lease_until) == (ShardState.READY, 0, None, None)
    assert (row.completed, row.seconds) == (2, 3.0)
    again = claimed(leases)
    assert (again.epoch, again.sealed) == (2, [SEAL])
    assert leases.finish(again, [SEAL, Sealed(2, 1, 1, "b" * 64)], counts(5), 4.0)
    row = shard_row(ledger, lease.shard_id)
    assert (row.attempts, row.seconds) == (1, 7.0)
    assert ledger.rate() == pytest.approx(15 / 7)


def test_seals_are_kept_for_the_next_owner(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [5])
    first = claimed(leases)
    expire(ledger, first.shard_id)
    second = claimed(leases)
    assert leases.seal(second, [SEAL], counts(2))
    assert second.sealed == [SEAL]
    expire(ledger, first.shard_id)
    third = claimed(leases)
    assert (third.epoch, third.sealed) == (3, [SEAL])
    assert shard_row(ledger, third.shard_id).attempts == 3


# Cancelling and pausing


def test_cancel_ends_what_nobody_runs_and_tells_the_others_at_their_renewal(ledger: Ledger, leases: Leases) -> None:
    batch, other = recorded(ledger, [2, 2]), recorded(ledger, [1])
    lease = claimed(leases)
    assert ledger.cancel(batch) is Status.CANCELLING
    assert [shard.state for shard in ledger.shards(batch)] == [ShardState.LEASED, ShardState.CANCELLED]
    assert ledger.ready_to_merge() == []
    assert leases.renew(lease, counts(1)) is Renewal.CANCEL
    assert leases.end_cancelled(lease, [SEAL], counts(1), 1.0)
    assert ledger.ready_to_merge() == [batch]
    assert ledger.status(other) is Status.IN_PROGRESS
    assert ledger.cancel(batch) is Status.CANCELLING
    assert ledger.complete(batch, Status.CANCELLED, None, None)
    assert ledger.cancel(batch) is Status.CANCELLED
    assert ledger.batch(batch)["cancelled_at"] is not None


def test_a_batch_that_has_ended_or_is_not_there_cannot_be_cancelled(ledger: Ledger) -> None:
    batch = recorded(ledger, [1])
    update_batch(ledger, batch, status=Status.COMPLETED)
    assert ledger.cancel(batch) is Status.COMPLETED
    with pytest.raises(NotFound):
        ledger.cancel("batch_none")


def test_a_shard_that_is_finished_while_the_batch_is_cancelled_counts(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [2])
    lease = claimed(leases)
    ledger.cancel(batch)
    assert leases.finish(lease, [SEAL], counts(2), 1.0)
    assert ledger.status(batch) is Status.CANCELLING
    assert ledger.ready_to_merge() == [batch]


def test_pausing_drains(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [2])
    lease = claimed(leases)
    update_batch(ledger, batch, status=Status.PAUSED)
    assert leases.renew(lease, counts(1)) is Renewal.DRAIN
    assert leases.release(lease, [SEAL], counts(1), 1.0)
    assert leases.claim() is None
    assert ledger.batch(batch)["status"] == "in_progress"
    assert ledger.batch(batch)["millrace"]["status"] == "paused"


# The reaper


def test_the_reaper_frees_what_ran_out_and_nothing_else(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1] * 4)
    held = [claimed(leases) for _ in range(3)]
    assert free_expired(ledger) == 0
    expire(ledger, held[0].shard_id, held[1].shard_id)
    assert free_expired(ledger) == 2
    assert free_expired(ledger) == 0
    assert [shard.state for shard in ledger.shards(batch)] == ["ready", "ready", "leased", "ready"]
    assert shard_row(ledger, held[0].shard_id).attempts == 1
    assert waiting_shards(ledger, 10) == 3


def test_the_reaper_ends_the_shards_of_a_cancelling_batch(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1] * 4)
    died, lives, late = claimed(leases), claimed(leases), claimed(leases)
    ledger.cancel(batch)
    # A runner that was draining as the batch was cancelled gives its shard back.
    assert leases.release(late, [SEAL], counts(), 1.0)
    expire(ledger, died.shard_id)
    assert free_expired(ledger) == 2
    assert [shard.state for shard in ledger.shards(batch)] == ["cancelled", "leased", "cancelled", "cancelled"]
    assert ledger.ready_to_merge() == []
    expire(ledger, lives.shard_id)
    assert free_expired(ledger) == 1
    assert ledger.ready_to_merge() == [batch]


def test_the_reaper_finalizes_what_was_left_behind(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1])
    leases.finish(claimed(leases), [SEAL], counts(1), 1.0)
    update_batch(ledger, batch, status=Status.IN_PROGRESS, finalizing_at=None)
    free_expired(ledger)
    assert ledger.status(batch) is Status.FINALIZING


# Many at once


def test_no_shard_is_claimed_twice(ledger: Ledger) -> None:
    first, second = recorded(ledger, [1] * 25), recorded(ledger, [1] * 25)
    barrier = threading.Barrier(4)

    def work(number: int) -> list[tuple[str, int, int]]:
        leases, mine = Leases(ledger, f"runner {number}", TTL), []
        barrier.wait()
        while lease := leases.claim():
            mine.append((lease.batch_id, lease.number, lease.epoch))
        return mine

    with ThreadPoolExecutor(4) as pool:
        taken = [lease for mine in pool.map(work, range(4)) for lease in mine]
    assert Counter(taken) == {(batch, number, 1): 1 for batch in (first, second) for number in range(25)}


def test_a_claim_does_not_wait_for_one_that_is_being_made(ledger: Ledger, leases: Leases) -> None:
    if ledger.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    recorded(ledger, [1, 1])
    with ledger.write() as connection:
        first = connection.execute(sa.select(shards).order_by(shards.c.number).limit(1).with_for_update()).one()
        assert claimed(leases).shard_id != first.id


def test_claims_finishes_and_the_reaper_at_once_lose_nothing(ledger: Ledger) -> None:
    batch = recorded(ledger, [1] * 50)
    ended = threading.Event()

    def work(number: int) -> int:
        leases, finished = Leases(ledger, f"runner {number}", TTL), 0
        while lease := leases.claim():
            leases.renew(lease, counts())
            finished += bool(leases.finish(lease, [SEAL], counts(1), 0.1))
        return finished

    def reap() -> None:
        while not ended.is_set():
            free_expired(ledger)

    with ThreadPoolExecutor(4) as pool:
        reaper = pool.submit(reap)
        done = sum(pool.map(work, range(3)))
        ended.set()
        reaper.result()
    assert done == 50
    assert ledger.status(batch) is Status.FINALIZING
    assert ledger.batch(batch)["request_counts"]["completed"] == 50


# The ledger


def test_a_batch_is_recorded_with_its_file_and_found_again(ledger: Ledger) -> None:
    batch = recorded(ledger, [3, 4], models=["a", "b"])
    got = ledger.batch(batch)
    assert (got["object"], got["status"], got["request_counts"]["total"]) == ("batch", "in_progress", 7)
    file = ledger.file(got["input_file_id"])
    assert (file.rows, file.filename) == (7, "x.jsonl")
    assert [(s.number, s.model, s.first, s.rows) for s in ledger.shards(batch)] == [(0, "a", 0, 3), (1, "b", 3, 4)]
    assert ledger.unfinished_batch("0" * 64, {}) == batch
    assert ledger.unfinished_batch("0" * 64, {"other": "metadata"}) is None
    newest = recorded(ledger, [1])
    assert [one["id"] for one in ledger.batches()] == [newest, batch]
    for missing in (ledger.batch, ledger.file, ledger.status):
        with pytest.raises(NotFound):
            missing("none")


def test_a_batch_that_cannot_be_recorded_leaves_nothing(ledger: Ledger) -> None:
    batch = recorded(ledger, [1])
    file = FileRecord(new_id("file"), "batch", "x", "x", 1, "0" * 64, 1)
    with pytest.raises(sa.exc.IntegrityError):
        ledger.create_batch(batch_id=batch, input_file=file, plan=[], endpoint="", priority=Priority.LOW)
    with pytest.raises(NotFound):
        ledger.file(file.id)


def test_ending_a_batch_twice_changes_nothing(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1])
    leases.finish(claimed(leases), [SEAL], counts(1), 1.0)
    output = FileRecord(f"{batch}_output", "batch_output", "output.jsonl", "x", 5, "1" * 64, 1)
    assert ledger.complete(batch, Status.COMPLETED, output, None)
    before = ledger.batch(batch)
    assert not ledger.complete(batch, Status.COMPLETED, output, None)
    assert not ledger.complete(batch, Status.CANCELLED, output, None)
    assert ledger.batch(batch) == before
    assert ledger.file(f"{batch}_output") == output


def test_migrations_bring_an_empty_database_up_to_what_the_code_expects(ledger: Ledger) -> None:
    assert ledger.revision() == REVISION
    with ledger.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_opening_again_changes_nothing(ledger: Ledger, settings: Settings) -> None:
    batch = recorded(ledger, [1])
    again = Ledger.open(settings)
    assert again.batch(batch) == ledger.batch(batch)
    again.close()


def test_many_may_open_an_empty_ledger_at_once(settings: Settings) -> None:
    barrier = threading.Barrier(4)

    def open_it(_: int) -> str | None:
        barrier.wait()
        ledger = Ledger.open(settings)
        try:
            return ledger.revision()
        finally:
            ledger.close()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(open_it, range(4))) == [REVISION] * 4


OPEN = """
import sys
from millrace.batch.ledger import Ledger
from millrace.settings import Settings
settings = Settings(data_dir=sys.argv[1], database_url=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
Ledger.open(settings).close()
"""


def test_many_processes_may_open_an_empty_ledger_at_once(settings: Settings) -> None:
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", OPEN, str(settings.data_dir), settings.ledger_url],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            _, stderr = process.communicate(timeout=30)
            assert (process.returncode, stderr) == (0, b"")


def test_a_newer_ledger_is_refused(ledger: Ledger, settings: Settings) -> None:
    with ledger.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Unreachable) as caught:
        Ledger.open(settings).close()
    assert (caught.value.code, caught.value.exit_code) == ("ledger_newer", 3)
    assert "9999" in caught.value.message
    assert REVISION in caught.value.message


# What only SQLite or only PostgreSQL can have


@pytest.fixture
def sqlite_settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


def test_a_locked_ledger_is_an_error_with_a_name(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.open(sqlite_settings).close()
    monkeypatch.setattr(database_module, "LOCK_WAIT", 0.2)
    ledger = Ledger.open(sqlite_settings)
    holder = sqlite3.connect(sqlite_settings.data_dir / "ledger.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(Unreachable) as caught:
            Leases(ledger, "me", TTL).claim()
        assert (caught.value.code, caught.value.exit_code) == ("ledger_locked", 3)
        assert ledger.batches() == []  # readers wait for no writer
    finally:
        holder.close()
        ledger.close()


@pytest.mark.parametrize(
    "content", [b"this is no database, but a text of some length" * 50, b"SQLite format 3\0" + b"\1" * 4096]
)
def test_a_file_that_is_no_database_is_an_error_with_a_name(sqlite_settings: Settings, content: bytes) -> None:
    path = sqlite_settings.data_dir / "ledger.db"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(Unreachable) as caught:
        Ledger.open(sqlite_settings).close()
    assert caught.value.code == "ledger_unreachable"
    assert str(path) in caught.value.message
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="DATA_DIR"):
        Ledger.open(Settings(data_dir=tmp_path / "file" / "data"))


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg")
    ledger = Ledger.connect(Settings(database_url="postgresql+psycopg://me:hunter2@127.0.0.1:1/db?connect_timeout=2"))
    with pytest.raises(Unreachable) as caught:
        ledger.batches()
    ledger.close()
    assert caught.value.code == "ledger_unreachable"
    assert "127.0.0.1:1" in caught.value.message
    assert "hunter2" not in str(caught.value.as_dict())


# Words


@pytest.mark.parametrize("priority", list(Priority))
def test_priorities_go_by_name(priority: Priority) -> None:
    assert Priority.parse(priority.name.lower()) is priority
    assert Priority.parse(priority.name) is priority


@pytest.mark.parametrize("name", ["", "0", "highest", "mro"])
def test_other_priorities_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="urgent, high, normal, low, idle"):
        Priority.parse(name)
