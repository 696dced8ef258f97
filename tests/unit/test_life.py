"""What becomes of a batch: every change from every status, who comes second, and what a clock can do. On both ledgers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from millrace.batch.again import resume
from millrace.batch.database import REVISION
from millrace.batch.lease import Finish, Lease, Leases, Renewal, Sealed, free_expired, waiting_shards
from millrace.batch.ledger import Ledger, ShardPlan, Window, new_id
from millrace.batch.life import FileRecord
from millrace.batch.schema import Priority, ShardState, Status, batches, clock, shards
from millrace.errors import InputError, NotFound
from millrace.settings import Settings
from tests.unit.batches import TTL, counts, expire, recorded, shard_row

SEAL = Sealed(1, 10, 2, "a" * 64)
ENDED = (Status.COMPLETED, Status.CANCELLED, Status.EXPIRED, Status.FAILED)


@pytest.fixture
def settings(either_settings: Settings) -> Settings:
    return either_settings


@pytest.fixture
def leases(ledger: Ledger) -> Leases:
    return Leases(ledger, "me", TTL)


def claimed(leases: Leases) -> Lease:
    lease = leases.claim()
    assert lease is not None
    return lease


def update(ledger: Ledger, batch_id: str, **values: Any) -> None:
    with ledger.write() as connection:
        connection.execute(batches.update().where(batches.c.id == batch_id).values(**values))


def overdue(ledger: Ledger, batch_id: str) -> None:
    update(ledger, batch_id, expires_at=1.0)


def row(ledger: Ledger, batch_id: str) -> Any:
    with ledger.read() as connection:
        return connection.execute(sa.select(batches).where(batches.c.id == batch_id)).one()


def states(ledger: Ledger, batch_id: str) -> list[str]:
    return [shard.state for shard in ledger.shards(batch_id)]


def output(batch_id: str) -> FileRecord:
    return FileRecord(f"{batch_id}_output", "batch_output", "output.jsonl", "x", 5, "1" * 64, 1)


# Pausing


def test_a_paused_batch_is_not_claimed_from_and_drains_and_goes_on(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [2, 2])
    lease = claimed(leases)
    assert ledger.canary(batch)
    assert ledger.pause(batch, "the first rows fail alike") is Status.PAUSED
    assert ledger.pause(batch, "later") is Status.PAUSED
    assert ledger.batch(batch)["millrace"]["reason"] == "the first rows fail alike"
    assert leases.claim() is None
    assert waiting_shards(ledger, 10) == 0
    assert leases.renew(lease, counts(1)) is Renewal.DRAIN
    assert leases.release(lease, [SEAL], counts(1), 1.0)
    assert resume(ledger, Path("nowhere"), batch) is Status.IN_PROGRESS  # it needs no files
    assert not ledger.canary(batch)
    assert ledger.batch(batch)["millrace"]["reason"] == ""
    again = claimed(leases)
    assert (again.shard_id, again.sealed, shard_row(ledger, again.shard_id).attempts) == (lease.shard_id, [SEAL], 1)
    assert resume(ledger, Path("nowhere"), batch) is Status.IN_PROGRESS


@pytest.mark.parametrize("by_the_reaper", [False, True])
def test_finalization_strand_the_last_shard_ends_while_the_batch_is_paused(
    ledger: Ledger, leases: Leases, by_the_reaper: bool
) -> None:
    batch = recorded(ledger, [2])
    lease = claimed(leases)
    if by_the_reaper:
        assert leases.finish(lease, [SEAL], counts(2), 1.0)
        update(ledger, batch, status=Status.PAUSED, finalizing_at=None, reason="x")
        free_expired(ledger)
    else:
        ledger.pause(batch, "x")
        assert leases.finish(lease, [SEAL], counts(2), 1.0) is Finish.BATCH
    assert ledger.status(batch) is Status.FINALIZING
    assert ledger.batch(batch)["millrace"]["reason"] == ""
    assert ledger.ready_to_merge() == [batch]


@pytest.mark.parametrize("status", [*ENDED, Status.FINALIZING, Status.CANCELLING])
def test_what_ends_or_has_ended_is_not_paused(ledger: Ledger, status: Status) -> None:
    batch = recorded(ledger, [1])
    update(ledger, batch, status=status)
    assert ledger.pause(batch) is status
    assert ledger.status(batch) is status


def test_a_paused_batch_can_be_cancelled(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1, 1])
    lease = claimed(leases)
    ledger.pause(batch, "x")
    assert ledger.cancel(batch) is Status.CANCELLING
    assert leases.renew(lease, counts()) is Renewal.CANCEL
    assert (states(ledger, batch), ledger.batch(batch)["millrace"]["reason"]) == (["leased", "cancelled"], "")


def test_a_batch_that_is_not_there(ledger: Ledger) -> None:
    for change in (ledger.pause, ledger.forget, lambda batch: ledger.set_priority(batch, Priority.LOW)):
        with pytest.raises(NotFound):
            change("batch_none")


# Names of peers.md §7


def test_cancel_racing_completion_whoever_comes_first_decides(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1])
    lease = claimed(leases)
    assert leases.finish(lease, [SEAL], counts(1), 1.0) is Finish.BATCH
    assert ledger.cancel(batch) is Status.FINALIZING
    assert ledger.complete(batch, ledger.end_of(batch), output(batch), None)
    assert ledger.cancel(batch) is Status.COMPLETED
    other = recorded(ledger, [1])
    lease = claimed(leases)
    assert ledger.cancel(other) is Status.CANCELLING
    assert leases.finish(lease, [SEAL], counts(1), 1.0) is Finish.SHARD
    assert ledger.ready_to_merge() == [other]
    assert ledger.end_of(other) is Status.CANCELLED


def test_cancel_reverted_nothing_takes_a_cancel_back(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1, 1])
    lease = claimed(leases)
    ledger.cancel(batch)
    assert ledger.pause(batch) is Status.CANCELLING
    with pytest.raises(InputError) as caught:
        resume(ledger, Path("nowhere"), batch)
    assert caught.value.code == "batch_ending"
    overdue(ledger, batch)
    assert ledger.expire_overdue() == []
    assert leases.release(lease, [SEAL], counts(1), 1.0)  # a runner that had not heard of it
    assert leases.claim() is None
    free_expired(ledger)
    assert ledger.status(batch) is Status.CANCELLING
    assert states(ledger, batch) == ["cancelled", "cancelled"]


@pytest.mark.parametrize("status", ENDED)
def test_terminal_overwrite_an_end_stays(ledger: Ledger, leases: Leases, status: Status) -> None:
    batch = recorded(ledger, [1])
    lease = claimed(leases)
    update(ledger, batch, status=status, **{f"{status}_at": 5.0}, expires_at=1.0)
    before = row(ledger, batch)
    assert leases.renew(lease, counts()) is Renewal.CANCEL
    for change in (ledger.cancel, ledger.pause):
        assert change(batch) is status
    ledger.set_priority(batch, Priority.LOW)
    ledger.fail(batch, "x", "x")
    assert ledger.expire_overdue() == []
    leases.finish(lease, [SEAL], counts(1), 1.0)
    free_expired(ledger)
    assert not ledger.complete(batch, Status.COMPLETED, output(batch), None)
    assert row(ledger, batch) == before


def test_zombie_owner_burns_inference_not_longer_than_to_its_renewal(ledger: Ledger, leases: Leases) -> None:
    """Of a batch that failed, another runner's renewal hears of it."""
    batch = recorded(ledger, [1, 1])
    lease = claimed(leases)
    ledger.pause(batch)
    ledger.fail(batch, "integrity", "A segment was changed.")
    assert ledger.status(batch) is Status.FAILED
    assert leases.renew(lease, counts()) is Renewal.CANCEL


# The completion window


@pytest.mark.parametrize("pause", [False, True])
def test_an_overdue_batch_expires_and_keeps_what_is_answered(ledger: Ledger, leases: Leases, pause: bool) -> None:
    batch, other = recorded(ledger, [1] * 4), recorded(ledger, [1])
    done, held, died = (next(lease for lease in iter(leases.claim, None) if lease.batch_id == batch) for _ in range(3))
    assert leases.finish(done, [SEAL], counts(1), 1.0)
    if pause:
        ledger.pause(batch, "x")
    assert ledger.expire_overdue() == []
    overdue(ledger, batch)
    assert ledger.expire_overdue() == [batch]
    assert ledger.expire_overdue() == []
    shown = ledger.batch(batch)
    assert (shown["status"], shown["millrace"]["ended"], shown["millrace"]["reason"]) == ("finalizing", None, "")
    assert states(ledger, batch) == ["done", "leased", "leased", "cancelled"]
    assert ledger.ready_to_merge() == []
    assert leases.claim() is None
    assert leases.renew(held, counts()) is Renewal.CANCEL
    assert leases.end_cancelled(held, [SEAL], counts(), 1.0)
    expire(ledger, died.shard_id)
    free_expired(ledger)
    assert ledger.ready_to_merge() == [batch]
    assert ledger.cancel(batch) is Status.FINALIZING
    assert ledger.end_of(batch) is Status.EXPIRED
    assert ledger.complete(batch, Status.EXPIRED, output(batch), None)
    assert ledger.batch(batch)["status"] == "expired"
    assert ledger.batch(batch)["expired_at"]
    assert ledger.status(other) is Status.IN_PROGRESS


def made(ledger: Ledger, **more: Any) -> str:
    batch_id = new_id("batch")
    record = FileRecord(new_id("file"), "batch", "x.jsonl", "x", 1, "0" * 64, 1)
    ledger.create_batch(
        batch_id=batch_id,
        input_file=record,
        plan=[ShardPlan(0, "m", 0, 1)],
        endpoint="/v1/chat/completions",
        priority=Priority.NORMAL,
        **more,
    )
    return batch_id


def test_a_window_is_kept_as_it_was_given(ledger: Ledger) -> None:
    shown = ledger.batch(made(ledger, window=Window.parse("30m")))
    assert shown["completion_window"] == "30m"
    assert shown["expires_at"] - shown["created_at"] in (1800, 1801)
    shown = ledger.batch(made(ledger))
    assert (shown["completion_window"], shown["expires_at"]) == ("24h", None)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 7 * 86400)])
def test_windows(text: str, seconds: int) -> None:
    assert Window.parse(text).seconds == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "m", "0m", "-1h", "1.5h", "1h30m", "1 h", "367d", "٣h", "1H", "9" * 40 + "s"]
)
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Window.parse(text)
    assert caught.value.code == "invalid_window"


# Priority, keys, removal


def test_a_priority_holds_from_the_next_claim_on(ledger: Ledger, leases: Leases) -> None:
    old, new = recorded(ledger, [1] * 3), recorded(ledger, [1] * 3)
    assert claimed(leases).batch_id == old
    assert ledger.set_priority(new, Priority.HIGH) is Status.IN_PROGRESS
    assert [claimed(leases).batch_id for _ in range(4)] == [new, new, new, old]
    assert ledger.batch(new)["millrace"]["priority"] == "high"


def test_one_batch_has_a_key(ledger: Ledger) -> None:
    batch = made(ledger, idempotency_key="k")
    assert ledger.keyed_batch("k") == (batch, "0" * 64)
    assert ledger.keyed_batch("other") is None
    with pytest.raises(sa.exc.IntegrityError):
        made(ledger, idempotency_key="k")
    twin = made(ledger)
    assert ledger.same_rows("0" * 64) == twin
    assert ledger.same_rows("1" * 64) is None


def test_only_what_has_ended_is_forgotten_with_all_its_rows(ledger: Ledger, leases: Leases) -> None:
    batch, other = recorded(ledger, [1]), recorded(ledger, [1])
    for status in set(Status) - set(ENDED):
        update(ledger, batch, status=status)
        with pytest.raises(InputError) as caught:
            ledger.forget(batch)
        assert caught.value.code == "batch_not_ended"
    update(ledger, batch, status=Status.IN_PROGRESS)
    leases.finish(claimed(leases), [SEAL], counts(1), 1.0)
    ledger.complete(batch, Status.COMPLETED, output(batch), None)
    named = ledger.batch(batch)
    ledger.forget(batch)
    for look, name in (
        (ledger.batch, batch),
        (ledger.file, named["input_file_id"]),
        (ledger.file, named["output_file_id"]),
    ):
        with pytest.raises(NotFound):
            look(name)
    assert ledger.shards(batch) == []
    assert len(ledger.shards(other)) == 1


def test_what_is_over_comes_oldest_first(ledger: Ledger) -> None:
    new, old, runs = recorded(ledger, [1]), recorded(ledger, [1]), recorded(ledger, [1])
    update(ledger, new, status=Status.CANCELLED, cancelled_at=2000.0)
    update(ledger, old, status=Status.EXPIRED, expired_at=1000.0)
    assert ledger.over(60) == [old, new]
    with ledger.read() as connection:
        now = float(connection.execute(sa.select(clock())).scalar_one())
    assert ledger.over(now - 1500) == [old]
    assert ledger.status(runs) is Status.IN_PROGRESS


def test_an_end_after_an_end_replaces_its_files(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1])
    leases.finish(claimed(leases), [SEAL], counts(1), 1.0)
    assert ledger.complete(batch, Status.COMPLETED, output(batch), None)
    update(ledger, batch, status=Status.FINALIZING, output_file_id=None)
    newer = FileRecord(f"{batch}_output", "batch_output", "output.jsonl", "x", 6, "2" * 64, 1)
    assert ledger.complete(batch, Status.COMPLETED, newer, None)
    assert ledger.file(f"{batch}_output") == newer


# Clocks and versions


def test_a_lease_from_before_the_clock_was_set_back_is_not_held_for_hours(ledger: Ledger, leases: Leases) -> None:
    batch = recorded(ledger, [1, 1])
    lease = claimed(leases)
    with ledger.write() as connection:
        connection.execute(
            shards.update().where(shards.c.id == lease.shard_id).values(lease_until=shards.c.lease_until + 7200)
        )
    assert (leases.owners(), waiting_shards(ledger, 10)) == (0, 2)
    successor = Leases(ledger, "successor", TTL)
    assert [claimed(successor).number, claimed(successor).number] == [1, 0]
    assert leases.renew(lease, counts(1)) is Renewal.LOST  # its runner, if it lives
    assert free_expired(ledger) == 0
    assert states(ledger, batch) == ["leased", "leased"]


def test_a_runner_that_lives_puts_its_lease_right_when_the_clock_was_set_back(ledger: Ledger, leases: Leases) -> None:
    recorded(ledger, [1])
    lease = claimed(leases)
    with ledger.write() as connection:
        connection.execute(shards.update().values(lease_until=shards.c.lease_until + 7200))
    assert leases.renew(lease, counts()) is Renewal.OK
    assert leases.claim() is None
    assert free_expired(ledger) == 0


def test_a_lease_is_as_long_as_its_own_runner_says(ledger: Ledger) -> None:
    """Runners of other machines may have other settings: a longer lease than ours is no clock set back."""
    recorded(ledger, [1])
    assert claimed(Leases(ledger, "long", 3600.0))
    assert free_expired(ledger) == 0
    assert Leases(ledger, "short", 3.0).claim() is None


def test_a_ledger_of_the_first_version_goes_on_as_it_was(settings: Settings) -> None:
    from alembic import command
    from alembic.config import Config

    from millrace.batch import database

    old = Ledger.connect(settings)
    if old.engine.dialect.name == "sqlite":
        settings.data_dir.mkdir()
    config = Config()
    config.set_main_option("script_location", str(database.Path(database.__file__).parent / "migrations"))
    with old.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        values = {"id": "f", "purpose": "batch", "filename": "x", "path": "x", "bytes": 1, "sha256": "0", "rows": 1}
        columns = ", ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in values.values())
        connection.execute(sa.text(f"INSERT INTO files VALUES ({columns}, 1.0)"))
        connection.execute(
            sa.text(
                "INSERT INTO batches (id, status, priority, name, endpoint, completion_window, input_file_id, total,"
                " created_at, metadata, errors) VALUES ('batch_x', 'in_progress', 2, '', '', '24h', 'f', 1, 1.0,"
                " '{}', '[]')"
            )
        )
        connection.execute(
            sa.text(
                "INSERT INTO shards (batch_id, number, model, first, rows, state, epoch, owner, lease_until, attempts,"
                " completed, failed, prompt_tokens, completion_tokens, seconds, segments)"
                " VALUES ('batch_x', 0, 'm', 0, 1, 'leased', 1, 'old', 1.0, 1, 0, 0, 0, 0, 0, '[]')"
            )
        )
    old.close()
    ledger = Ledger.open(settings)
    try:
        assert ledger.revision() == REVISION
        assert ledger.canary("batch_x")
        assert ledger.batch("batch_x")["millrace"]["reason"] == ""
        lease = claimed(Leases(ledger, "new", TTL))
        assert (lease.batch_id, lease.epoch) == ("batch_x", 2)
    finally:
        ledger.close()


def test_the_states_that_a_shard_can_have_are_all_in_a_batchs_object(ledger: Ledger) -> None:
    assert set(ledger.batch(recorded(ledger, [1]))["millrace"]["shards"]) == {state.value for state in ShardState}
