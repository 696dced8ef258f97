"""Resume and retry: answers stay, the rest is run, and a crash in between changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.batch.again import resume, retry
from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Leases
from millrace.batch.ledger import Ledger
from millrace.batch.merge import alone_with, merge
from millrace.batch.schema import Status, batches
from millrace.batch.segments import SegmentWriter
from millrace.batch.verify import verify
from millrace.errors import InputError, IntegrityError, MillraceError, StorageError
from millrace.settings import Settings, environment
from tests.unit.batches import TTL, answer, expire, planned, request, run_all, run_shard

ROWS = 48  # three in a shard
FAILED = {1, 5, 6, 11, 47}


@pytest.fixture
def settings(either_settings: Settings) -> Settings:
    return either_settings


def rows(path: Path) -> dict[int, Any]:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return {int(line["id"].rpartition("_")[2]): line for line in lines}


def text(line: Any) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def completed(settings: Settings, ledger: Ledger, failed: Callable[[int], bool] = FAILED.__contains__) -> str:
    batch = planned(settings, ledger, [request(f"id-{n:02}") for n in range(ROWS)])
    run_all(settings, ledger, failed)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    return batch


def refused(call: Callable[[], object], code: str, error: type[MillraceError] = InputError) -> MillraceError:
    with pytest.raises(error) as caught:
        call()
    assert caught.value.code == code
    return caught.value


# Retry


def test_a_retry_runs_the_failed_rows_and_no_other(settings: Settings, ledger: Ledger) -> None:
    batch = completed(settings, ledger)
    folder = BatchFolder.of(settings.data_dir, batch)
    before, old_errors = rows(folder.output), folder.errors.read_bytes()
    assert len(ledger.shards(batch)) == ROWS // 3
    assert retry(ledger, settings.data_dir, batch) == len(FAILED)
    shown = ledger.batch(batch)
    assert (shown["status"], shown["completed_at"], shown["output_file_id"]) == ("in_progress", None, None)
    assert shown["request_counts"] == {"total": ROWS, "completed": ROWS - len(FAILED), "failed": 0}
    assert not ledger.canary(batch)
    assert folder.errors.read_bytes() == old_errors, "until the merge"
    refused(lambda: retry(ledger, settings.data_dir, batch), "batch_not_ended")
    run_all(settings, ledger, {6}.__contains__)  # one fails again
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    after = rows(folder.output)
    assert set(after) == set(range(ROWS)) - {6}
    assert {row: after[row] for row in before} == before
    assert all(text(after[row]) != "epoch 1" for row in FAILED - {6})
    assert set(rows(folder.errors)) == {6}
    report = verify(ledger, settings.data_dir, batch)
    assert report.ok, report.findings
    assert report.wasted_rows == 0, "copies of answers are none"
    assert report.extra_claims == len({row // 3 for row in FAILED})

    assert retry(ledger, settings.data_dir, batch) == 1
    run_all(settings, ledger)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    assert ledger.batch(batch)["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}
    assert ledger.batch(batch)["error_file_id"] is None
    assert verify(ledger, settings.data_dir, batch).ok
    refused(lambda: retry(ledger, settings.data_dir, batch), "nothing_failed")


def test_a_retry_whose_runner_dies_is_recovered_like_any(settings: Settings, ledger: Ledger) -> None:
    batch = completed(settings, ledger, lambda row: True)
    retry(ledger, settings.data_dir, batch)
    leases = Leases(ledger, "dies", TTL)
    lease = leases.claim()
    assert lease is not None
    writer = SegmentWriter(BatchFolder.of(settings.data_dir, batch).segment(lease.number, lease.epoch), lease.epoch)
    writer.append(lease.first, True, 1, 1, answer(batch, lease.first, f"id-{lease.first:02}", "before it died"))
    writer.flush()
    writer.close()
    expire(ledger, lease.shard_id)
    run_all(settings, ledger)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    answered = rows(BatchFolder.of(settings.data_dir, batch).output)
    assert len(answered) == ROWS
    assert text(answered[lease.first]) == "before it died"
    assert verify(ledger, settings.data_dir, batch).ok


CRASH = """
import sys
from millrace.batch.again import retry
from millrace.batch.ledger import Ledger
from millrace.settings import get_settings
retry(Ledger.open(get_settings()), get_settings().data_dir, sys.argv[1])
"""


def test_a_retry_that_is_killed_before_its_commit_changed_nothing(settings: Settings, ledger: Ledger) -> None:
    batch = completed(settings, ledger)
    before, shards = ledger.batch(batch), ledger.shards(batch)
    env = environment(data_dir=settings.data_dir, database_url=settings.ledger_url, crash_at="retry.rewritten")
    done = subprocess.run([sys.executable, "-c", CRASH, batch], env=env, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (137, b"")
    assert (ledger.batch(batch), ledger.shards(batch)) == (before, shards)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    assert verify(ledger, settings.data_dir, batch).ok
    assert retry(ledger, settings.data_dir, batch) == len(FAILED)
    run_all(settings, ledger)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    report = verify(ledger, settings.data_dir, batch)
    assert (report.ok, report.output_lines, report.wasted_rows) == (True, ROWS, 0), report


def test_a_retry_that_fails_changed_nothing(settings: Settings, ledger: Ledger) -> None:
    batch = completed(settings, ledger)
    folder = BatchFolder.of(settings.data_dir, batch)
    before, shards = ledger.batch(batch), ledger.shards(batch)
    with alone_with(folder):
        refused(lambda: retry(ledger, settings.data_dir, batch), "batch_busy", MillraceError)
    path = folder.segment(0, 1)
    path.write_bytes(path.read_bytes().replace(b"epoch 1", b"epoch X"))
    refused(lambda: retry(ledger, settings.data_dir, batch), "integrity", IntegrityError)
    assert {path.name.split(".")[1] for path in folder.segments.iterdir()} == {"1"}
    folder.input.rename(folder.root / "moved")
    refused(lambda: retry(ledger, settings.data_dir, batch), "batch_files_missing", StorageError)
    assert (ledger.batch(batch), ledger.shards(batch)) == (before, shards)


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.EXPIRED, Status.FAILED])
def test_a_retry_of_a_batch_with_rows_that_were_never_run_points_to_resume(
    settings: Settings, ledger: Ledger, status: Status
) -> None:
    batch = completed(settings, ledger)
    with ledger.write() as connection:
        connection.execute(batches.update().values(status=status))
    error = refused(lambda: retry(ledger, settings.data_dir, batch), "batch_not_completed")
    assert "resume" in error.hint


# Resume


def stopped(settings: Settings, ledger: Ledger, how: str) -> str:
    """A batch of which one shard is done and one was begun by a runner that died, and which was then stopped."""
    batch = planned(settings, ledger, [request(f"id-{n:02}") for n in range(ROWS)])
    leases = Leases(ledger, "test", TTL)
    lease = leases.claim()
    assert lease is not None
    run_shard(settings, leases, lease, lambda row: row == lease.first)
    died = leases.claim()
    assert died is not None
    writer = SegmentWriter(BatchFolder.of(settings.data_dir, batch).segment(died.number, 1), 1)
    writer.append(died.first, True, 1, 1, answer(batch, died.first, f"id-{died.first:02}", "before it died"))
    writer.flush()
    writer.close()
    expire(ledger, died.shard_id)
    if how == "cancelled":
        ledger.cancel(batch)
    else:
        with ledger.write() as connection:
            connection.execute(batches.update().values(expires_at=1.0))
        assert ledger.expire_overdue() == [batch]
    from millrace.batch.lease import free_expired

    free_expired(ledger)
    assert merge(ledger, settings.data_dir, batch) is Status(how)
    return batch


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_stopped_batch_keeps_its_answers_and_goes_on(settings: Settings, ledger: Ledger, how: str) -> None:
    batch = stopped(settings, ledger, how)
    folder = BatchFolder.of(settings.data_dir, batch)
    counts = ledger.batch(batch)["request_counts"]
    before = rows(folder.output)
    assert len(before) == counts["completed"] > 1
    codes = [line["error"]["code"] for line in rows(folder.errors).values()]
    assert sorted(codes) == sorted(["some_code"] + [f"batch_{how}"] * (ROWS - len(before) - 1))
    report = verify(ledger, settings.data_dir, batch)
    assert (report.ok, report.never_run) == (True, ROWS - len(before) - 1), report
    assert resume(ledger, settings.data_dir, batch) is Status.IN_PROGRESS
    shown = ledger.batch(batch)
    assert (shown["request_counts"], shown["expires_at"], shown[f"{how}_at"]) == (counts, None, None)
    assert resume(ledger, settings.data_dir, batch) is Status.IN_PROGRESS
    run_all(settings, ledger)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    after = rows(folder.output)
    assert {row: after[row] for row in before} == before
    assert [line["error"]["code"] for line in rows(folder.errors).values()] == ["some_code"], "it stays failed"
    report = verify(ledger, settings.data_dir, batch)
    assert (report.ok, report.wasted_rows, report.never_run) == (True, 0, 0), report
    error = refused(lambda: resume(ledger, settings.data_dir, batch), "batch_completed")
    assert "retry" in error.hint


def test_a_batch_that_was_cancelled_with_every_row_answered_is_merged(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request("a")])
    leases = Leases(ledger, "test", TTL)
    lease = leases.claim()
    assert lease is not None
    ledger.cancel(batch)
    run_shard(settings, leases, lease)
    assert merge(ledger, settings.data_dir, batch) is Status.CANCELLED
    assert resume(ledger, settings.data_dir, batch) is Status.FINALIZING
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED


@pytest.mark.parametrize("damage", ["lost", "edited", "cut"])
def test_a_batch_whose_segments_were_damaged_runs_their_rows_again(
    settings: Settings, ledger: Ledger, damage: str
) -> None:
    batch = planned(settings, ledger, [request(f"id-{n:02}") for n in range(ROWS)])
    run_all(settings, ledger, {0}.__contains__)
    folder = BatchFolder.of(settings.data_dir, batch)
    path = folder.segment(1, 1)
    raw = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(raw.replace(b"epoch 1", b"epoch X") if damage == "edited" else raw[:-20])
    with pytest.raises(MillraceError):
        merge(ledger, settings.data_dir, batch)
    if damage == "lost":  # a file that cannot be read may come back, so the batch has not failed
        ledger.fail(batch, "integrity", "lost")
    assert ledger.status(batch) is Status.FAILED
    refused(lambda: verify(ledger, settings.data_dir, batch), "batch_failed")
    assert resume(ledger, settings.data_dir, batch) is Status.IN_PROGRESS
    assert ledger.batch(batch)["errors"] is None
    run_all(settings, ledger)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    answered = rows(folder.output)
    again = {row for row, line in answered.items() if text(line) != "epoch 1"}
    assert len(again) == ledger.shards(batch)[1].rows
    assert not any("epoch X" in text(line) for line in answered.values())
    assert set(rows(folder.errors)) == {0}
    assert verify(ledger, settings.data_dir, batch).ok


def test_a_resume_without_its_files_changes_nothing(settings: Settings, ledger: Ledger) -> None:
    batch = stopped(settings, ledger, "cancelled")
    before = ledger.batch(batch)
    folder = BatchFolder.of(settings.data_dir, batch)
    folder.root.rename(folder.root.with_name("moved"))
    error = refused(lambda: resume(ledger, settings.data_dir, batch), "batch_files_missing", StorageError)
    assert error.exit_code == 3
    assert ledger.batch(batch) == before
