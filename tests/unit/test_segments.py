"""Segments, recovery and merge: whatever crashes leave behind, every row has one answer, in order."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Leases, Sealed, free_expired
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge
from millrace.batch.planner import read_rows
from millrace.batch.schema import Status
from millrace.batch.segments import SegmentWriter, read_lines, recover
from millrace.batch.suspects import Flight
from millrace.batch.verify import verify
from millrace.errors import IntegrityError, StorageError
from millrace.settings import Settings
from tests.unit.batches import TTL, answer, expire, failure, planned, request, run_all, run_shard, shard_row

BATCH = "batch_x"


def write_segment(folder: BatchFolder, epoch: int, rows: list[int], shard: int = 0) -> SegmentWriter:
    writer = SegmentWriter(folder.segment(shard, epoch), epoch)
    for row in rows:
        writer.append(row, True, 1, 2, answer(BATCH, row, f"id {row}", f"epoch {epoch}"))
    writer.flush()
    writer.close()
    return writer


def segment_line(row: int, text: str) -> bytes:
    return b'{"row":%d,"ok":true,"in":9,"out":9,"line":%b}\n' % (row, answer(BATCH, row, f"id {row}", text))


# The writer


def test_a_segment_holds_what_was_flushed_and_its_seal_says_so(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "s" / "000000.1.jsonl", 1)
    assert writer.sealed() == Sealed(1, 0, 0, hashlib.sha256().hexdigest())
    writer.append(3, True, 5, 7, answer(BATCH, 3, "ä\u2028\n", "text"))
    assert writer.waiting
    assert writer.path.read_bytes() == b""
    writer.flush()
    writer.append(1, False, 0, 0, failure(BATCH, 1, "b", "why"))
    writer.flush()
    assert writer.unsynced
    writer.sync()
    assert not writer.unsynced
    assert not writer.waiting
    raw = writer.path.read_bytes()
    assert writer.sealed() == Sealed(1, len(raw), 2, hashlib.sha256(raw).hexdigest())
    writer.append(2, True, 0, 0, answer(BATCH, 2, "c", "never flushed"))
    writer.close()
    assert writer.path.read_bytes() == raw
    lines = [line for line, _ in read_lines(writer.path, None)]
    assert [(line.row, line.ok, line.prompt_tokens, line.completion_tokens) for line in lines] == [
        (3, True, 5, 7),
        (1, False, 0, 0),
    ]
    assert json.loads(bytes(lines[0].line))["custom_id"] == "ä\u2028\n"


def test_an_epoch_has_one_segment(tmp_path: Path) -> None:
    SegmentWriter(tmp_path / "000000.1.jsonl", 1).close()
    with pytest.raises(StorageError):
        SegmentWriter(tmp_path / "000000.1.jsonl", 1)


# Recovery


@pytest.fixture
def folder(tmp_path: Path) -> BatchFolder:
    return BatchFolder(tmp_path)


def test_the_last_whole_line_ends_what_counts_wherever_the_file_is_cut(folder: BatchFolder) -> None:
    writer = write_segment(folder, 1, [4, 2, 9])
    raw = writer.path.read_bytes()
    ends = [end + 1 for end, byte in enumerate(raw) if byte == 10]
    for size in range(len(raw) + 1):
        writer.path.write_bytes(raw[:size])
        got = recover(folder, 0, 2, [])
        whole = [end for end in ends if end <= size]
        assert got.rows == set([4, 2, 9][: len(whole)])
        assert got.counts.completed == len(whole)
        assert (got.counts.prompt_tokens, got.counts.completion_tokens) == (len(whole), 2 * len(whole))
        kept = raw[: whole[-1] if whole else 0]
        assert got.sealed == [Sealed(1, len(kept), len(whole), hashlib.sha256(kept).hexdigest())]


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 4096, b"\0" * 4096 + b"\n", b"garbage\n", b"\xff\xfe\n", b"{}\n", b"\n", b'{"row":1,"ok":tr', b"[" * 50],
)
def test_a_tail_of_garbage_does_not_count(folder: BatchFolder, tail: bytes) -> None:
    writer = write_segment(folder, 1, [0, 1])
    whole = writer.sealed()
    with writer.path.open("ab") as file:
        file.write(tail)
    assert recover(folder, 0, 2, []).sealed == [whole]


def test_what_follows_a_torn_line_does_not_count(folder: BatchFolder) -> None:
    writer = write_segment(folder, 1, [0, 1])
    raw = writer.path.read_bytes()
    writer.path.write_bytes(raw[:-10] + segment_line(2, "after the tear") + segment_line(3, "and whole"))
    assert recover(folder, 0, 2, []).rows == {0}


def test_a_seal_wins_over_what_a_zombie_appends(folder: BatchFolder) -> None:
    writer = write_segment(folder, 1, [0, 1])
    first = recover(folder, 0, 2, [])
    with writer.path.open("ab") as file:
        file.write(segment_line(2, "zombie") + segment_line(3, "zombie"))
    again = recover(folder, 0, 3, first.sealed)
    assert again.rows == {0, 1}
    assert again.sealed == first.sealed


def test_a_row_that_two_epochs_answered_counts_once(folder: BatchFolder) -> None:
    write_segment(folder, 1, [0, 1])
    later = write_segment(folder, 2, [5, 1, 6])
    got = recover(folder, 0, 3, [])
    assert got.rows == {0, 1, 5}
    assert got.counts.completed == 3
    assert [(one.epoch, one.rows) for one in got.sealed] == [(1, 2), (2, 1)]
    assert got.sealed[1].bytes == later.path.read_bytes().index(b"\n") + 1


def test_segments_of_other_shards_and_of_ones_own_epoch_do_not_count(folder: BatchFolder) -> None:
    write_segment(folder, 1, [0], shard=1)
    write_segment(folder, 3, [1])
    assert recover(folder, 0, 3, []).sealed == []


@pytest.mark.parametrize("change", ["shortened", "edited", "gone", "emptied"])
def test_a_sealed_segment_that_was_changed_is_an_integrity_error(folder: BatchFolder, change: str) -> None:
    writer = write_segment(folder, 1, [0, 1])
    sealed = recover(folder, 0, 2, []).sealed
    raw = writer.path.read_bytes()
    if change == "gone":
        writer.path.unlink()
        with pytest.raises(IntegrityError, match="is gone"):
            recover(folder, 0, 3, sealed)
        return
    writer.path.write_bytes(
        {"shortened": raw[:-1], "edited": raw.replace(b'{"row":1', b'{"row":x'), "emptied": b""}[change]
    )
    with pytest.raises(IntegrityError, match="were sealed"):
        recover(folder, 0, 3, sealed)


# Everything together

#: How an epoch ends: cut at this share of the segment, then this is left behind it.
CRASHES = st.tuples(st.floats(0, 1), st.sampled_from([b"", b"\0", b"\0\0\n", b"}\n", b"\xff", b"junk\n", b'{"row":0,']))
EPOCH = st.fixed_dictionaries(
    {
        "answers": st.integers(0, 6),
        "crash": st.one_of(st.none(), CRASHES),
        "late": st.booleans(),
        "zombie": st.lists(st.integers(0, 11), max_size=3),
        "release": st.booleans(),
    }
)


@hypothesis_settings(max_examples=60)
@given(
    st.integers(1, 12),
    st.sampled_from([0.001, 10.0, 1000.0]),
    st.lists(EPOCH, max_size=10),
    st.sets(st.integers(0, 11), max_size=4),
)
def test_every_row_is_answered_once_in_order_whatever_crashed(
    settings: Settings, ledger: Ledger, size: int, rate: float, epochs: list[dict[str, object]], failed: set[int]
) -> None:
    ids = [f"ü {number}" for number in range(size)]
    # Two system prompts: the plan's order is not the input's.
    rows = [request(name, messages=[{"role": "system", "content": str(n % 2)}, {}]) for n, name in enumerate(ids)]
    batch = planned(settings, ledger, rows, rate=rate)
    folder = BatchFolder.of(settings.data_dir, batch)
    leases = Leases(ledger, "test", TTL)
    written: dict[int, list[bytes]] = {row: [] for row in range(size)}

    def line_of(row: int, text: str) -> bytes:
        line = (failure if row in failed else answer)(batch, row, ids[row], text)
        written[row].append(line)
        return line

    for number, epoch in enumerate(epochs):
        lease = leases.claim()
        if lease is None:
            break
        mine = [row for row, _ in read_rows(folder, lease.first, lease.rows)]
        older = recover(folder, lease.number, lease.epoch, lease.sealed)
        assert all(seal in older.sealed for seal in lease.sealed)
        assert older.rows <= set(mine)
        assert leases.seal(lease, older.sealed, older.counts)
        # Those who lost the shard go on writing, now that the seals are set.
        for earlier in older.sealed:
            with folder.segment(lease.number, earlier.epoch).open("ab") as file:
                for row in epoch["zombie"]:  # type: ignore[attr-defined]
                    file.write(segment_line(row % size, "zombie"))
        todo = [row for row in mine if row not in older.rows][: epoch["answers"]]  # type: ignore[misc]
        path = folder.segment(lease.number, lease.epoch)
        writer = SegmentWriter(path, lease.epoch)
        for row in todo:
            writer.append(row, row not in failed, 2, 3, line_of(row, f"epoch {number}"))
        writer.flush()
        writer.close()
        if epoch["crash"] is not None:
            share, tail = epoch["crash"]  # type: ignore[misc]
            os.truncate(path, int(path.stat().st_size * share))
            with path.open("ab") as file:
                file.write(tail)
            if epoch["late"] and not path.read_bytes():
                path.unlink()  # it died before it had made the file
        elif epoch["release"]:
            for row in todo:
                older.counts.failed += row in failed
                older.counts.completed += row not in failed
            before = shard_row(ledger, lease.shard_id).attempts
            assert leases.release(lease, [*older.sealed, writer.sealed()], older.counts, 0.1)
            assert shard_row(ledger, lease.shard_id).attempts == before - 1
            continue
        expire(ledger, lease.shard_id)

    while lease := leases.claim():
        for row, _ in read_rows(folder, lease.first, lease.rows):
            line_of(row, f"epoch {lease.epoch}")
        run_shard(settings, leases, lease, failed.__contains__)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED

    output, errors = (path.read_bytes().splitlines() for path in (folder.output, folder.errors))
    wrong = sorted(row for row in failed if row < size)
    assert [json.loads(line)["custom_id"] for line in errors] == [ids[row] for row in wrong]
    right = [row for row in range(size) if row not in failed]
    assert [json.loads(line)["custom_id"] for line in output] == [ids[row] for row in right]
    for row, line in [*zip(right, output, strict=True), *zip(wrong, errors, strict=True)]:
        assert line in written[row], "this answer was never given to this row"
    got = ledger.batch(batch)
    assert got["request_counts"] == {"total": size, "completed": len(right), "failed": len(wrong)}
    report = verify(ledger, settings.data_dir, batch)
    assert report.ok, report.findings


# The merge


def test_a_merge_waits_until_every_shard_has_ended(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request("a"), request("b")])
    lease = Leases(ledger, "test", TTL).claim()
    assert lease is not None
    run_shard(settings, Leases(ledger, "test", TTL), lease)
    assert merge(ledger, settings.data_dir, batch) is Status.IN_PROGRESS
    assert not BatchFolder.of(settings.data_dir, batch).output.exists()


def test_a_merge_can_be_repeated_and_two_can_end_at_once(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request("a"), request("b"), request("c")])
    run_all(settings, ledger, lambda row: row == 1)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    folder = BatchFolder.of(settings.data_dir, batch)
    first = folder.output.read_bytes(), folder.errors.read_bytes(), ledger.batch(batch)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    # The slower of two merges that began together.
    output, errors = (ledger.file(f"{batch}_{kind}") for kind in ("output", "errors"))
    assert ledger.complete(batch, Status.COMPLETED, output, errors) is False
    assert (folder.output.read_bytes(), folder.errors.read_bytes(), ledger.batch(batch)) == first
    assert {path.name for path in folder.root.iterdir()} == {
        "input.jsonl",
        "plan",
        "segments",
        "output.jsonl",
        "errors.jsonl",
    }


def test_a_merge_removes_the_journals_that_killed_owners_left(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request("row")])
    run_all(settings, ledger)
    folder = BatchFolder.of(settings.data_dir, batch)
    left, lives = (Flight(folder.flight(0, epoch), epoch, 1) for epoch in (1, 2))
    left.start(0)
    left.close(keep=True)
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    assert not list(folder.segments.glob("*.flight"))
    lives.close()


def test_a_cancelled_batch_keeps_its_answers_and_names_the_rows_never_run(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request(str(n)) for n in range(4)], rate=0.001)
    leases = Leases(ledger, "test", TTL)
    lease = leases.claim()
    assert lease is not None
    run_shard(settings, leases, lease)
    assert ledger.cancel(batch) is Status.CANCELLING
    assert merge(ledger, settings.data_dir, batch) is Status.CANCELLED
    folder = BatchFolder.of(settings.data_dir, batch)
    assert [json.loads(line)["custom_id"] for line in folder.output.read_bytes().splitlines()] == ["0"]
    errors = [json.loads(line) for line in folder.errors.read_bytes().splitlines()]
    assert [line["custom_id"] for line in errors] == ["1", "2", "3"]
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert verify(ledger, settings.data_dir, batch).ok


@pytest.mark.parametrize("change", ["shortened", "edited"])
def test_a_merge_refuses_a_segment_that_was_changed(settings: Settings, ledger: Ledger, change: str) -> None:
    batch = planned(settings, ledger, [request("a"), request("b")])
    run_all(settings, ledger)
    folder = BatchFolder.of(settings.data_dir, batch)
    path = folder.segment(0, 1)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] if change == "shortened" else raw.replace(b"epoch 1", b"epoch X"))
    with pytest.raises(IntegrityError, match="not what was sealed"):
        merge(ledger, settings.data_dir, batch)
    assert ledger.status(batch) is Status.FAILED
    assert {path.name for path in folder.root.iterdir()} == {"input.jsonl", "plan", "segments"}
    assert "not what was sealed" in ledger.batch(batch)["errors"]["data"][0]["message"]


def test_a_merge_reads_more_segments_than_may_be_open(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request(str(n)) for n in range(100)], rate=0.001)
    run_all(settings, ledger)
    assert len(ledger.shards(batch)) == 100
    assert merge(ledger, settings.data_dir, batch) is Status.COMPLETED
    output = BatchFolder.of(settings.data_dir, batch).output.read_bytes().splitlines()
    assert [json.loads(line)["custom_id"] for line in output] == [str(n) for n in range(100)]


def test_a_segment_that_appears_below_a_sealed_one_does_not_count(tmp_path: Path) -> None:
    """Epoch 1 stalls before its file is there, epoch 2 answers and seals, then epoch 1 wakes up."""
    folder = BatchFolder(tmp_path)
    sealed = [write_segment(folder, 2, [0]).sealed()]
    write_segment(folder, 1, [0])
    found = recover(folder, 0, 3, sealed)
    assert (found.sealed, found.rows) == (sealed, {0})


def test_a_segment_whose_sync_failed_is_never_sealed(tmp_path: Path) -> None:
    """After a failed fsync the next one succeeds, with the bytes gone all the same."""
    writer = SegmentWriter(tmp_path / "segment", 1)
    writer.append(0, True, 1, 1, b"{}")
    writer.flush()
    descriptor, writer._descriptor = writer._descriptor, os.open(os.devnull, os.O_RDONLY)
    os.close(writer._descriptor)  # an fsync of it fails
    with pytest.raises(StorageError):
        writer.sync()
    writer._descriptor = descriptor
    for use in (writer.sync, writer.sealed):
        with pytest.raises(StorageError):
            use()
    writer.close()
    writer.sync()  # a ticker that comes too late does nothing


def test_a_cancelled_batch_keeps_what_a_dead_runner_had_answered(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request(str(n)) for n in range(4)])
    lease = Leases(ledger, "dies", TTL).claim()
    assert lease is not None
    folder = BatchFolder.of(settings.data_dir, batch)
    writer = SegmentWriter(folder.segment(lease.number, lease.epoch), lease.epoch)
    writer.append(0, True, 1, 1, answer(batch, 0, "0", "text"))
    writer.flush()
    writer.close()  # and now it dies: nothing is sealed
    ledger.cancel(batch)
    expire(ledger, lease.shard_id)
    assert free_expired(ledger) == 1
    assert merge(ledger, settings.data_dir, batch) is Status.CANCELLED
    assert len(folder.output.read_bytes().splitlines()) == 1
    assert ledger.batch(batch)["request_counts"] == {"total": 4, "completed": 1, "failed": 0}
    assert verify(ledger, settings.data_dir, batch).ok
