"""Verify: a good batch is good, and whatever was done to its files is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Leases
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge, rewrite
from millrace.batch.schema import shards
from millrace.batch.segments import SegmentWriter
from millrace.batch.verify import MAX_FINDINGS, verify
from millrace.errors import InputError, IntegrityError, NotFound, StorageError
from millrace.settings import Settings
from tests.unit.batches import TTL, answer, expire, planned, request, run_all

ROWS = 30
FAILED = {4, 17, 29}


def ended(settings: Settings, ledger: Ledger) -> str:
    batch = planned(settings, ledger, [request(f"id-{n:02}") for n in range(ROWS)])
    run_all(settings, ledger, FAILED.__contains__)
    merge(ledger, settings.data_dir, batch)
    return batch


@pytest.fixture
def batch(settings: Settings, ledger: Ledger) -> str:
    return ended(settings, ledger)


@pytest.fixture
def folder(settings: Settings, batch: str) -> BatchFolder:
    return BatchFolder.of(settings.data_dir, batch)


def test_a_good_batch_is_good(settings: Settings, ledger: Ledger, batch: str) -> None:
    report = verify(ledger, settings.data_dir, batch)
    assert report.ok
    assert (report.rows, report.output_lines, report.error_lines) == (ROWS, ROWS - len(FAILED), len(FAILED))
    assert report.segments == len(ledger.shards(batch))
    assert (report.extra_claims, report.unsealed_bytes) == (0, 0)
    assert report.as_dict()["ok"] is True


def test_claims_after_crashes_and_bytes_of_zombies_are_told_and_are_no_fault(
    settings: Settings, ledger: Ledger
) -> None:
    batch = planned(settings, ledger, [request("a")])
    lease = Leases(ledger, "crashes", TTL).claim()
    assert lease is not None
    expire(ledger, lease.shard_id)
    run_all(settings, ledger)
    merge(ledger, settings.data_dir, batch)
    with BatchFolder.of(settings.data_dir, batch).segment(0, 2).open("ab") as file:
        file.write(b"zombie")
    report = verify(ledger, settings.data_dir, batch)
    assert report.ok
    assert (report.extra_claims, report.unsealed_bytes) == (1, 6)


def swap(raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    lines[2], lines[1] = lines[1], lines[2]
    return b"".join(lines)


def without(raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    return b"".join(lines[:1] + lines[2:])


def doubled(raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    return b"".join([*lines[:2], lines[1], *lines[2:]])


def edited(raw: bytes) -> bytes:
    return raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]


def last_doubled(raw: bytes) -> bytes:
    return raw + raw.splitlines(keepends=True)[-1]


def shortened(raw: bytes) -> bytes:
    return raw[:-1]


def longer(raw: bytes) -> bytes:
    return raw + b"\n"


def renamed(raw: bytes) -> bytes:
    return raw.replace(b'"custom_id":"id-17"', b'"custom_id":"id-xx"').replace(
        b'"custom_id":"id-02"', b'"custom_id":"id-yy"'
    )


@pytest.mark.parametrize("name", ["output", "errors", "input"])
@pytest.mark.parametrize("change", [swap, without, doubled, edited, last_doubled, shortened, longer])
def test_a_changed_file_is_found(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder, name: str, change: Callable[[bytes], bytes]
) -> None:
    path = {"output": folder.output, "errors": folder.errors, "input": folder.input}[name]
    path.write_bytes(change(path.read_bytes()))
    report = verify(ledger, settings.data_dir, batch)
    assert not report.ok
    assert any(str(path) in finding and "was changed" in finding for finding in report.findings) or (
        len(report.findings) == MAX_FINDINGS
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without, "input line 2 (id-01) has no line at its place"),
        (doubled, "is that of input line 2 (id-01), there twice or out of order"),
        (last_doubled, "there twice or out of order"),
        (swap, "input line 2 (id-01) has no line at its place"),
        (renamed, "input line 3 is id-02, id-yy in its line"),
        (longer, "is not an output line"),
    ],
)
def test_what_is_found_names_the_row(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder, change: Callable[[bytes], bytes], said: str
) -> None:
    folder.output.write_bytes(change(folder.output.read_bytes()))
    report = verify(ledger, settings.data_dir, batch)
    assert any(said in finding for finding in report.findings), report.findings


def test_lines_that_were_swapped_are_no_lines_lost(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder
) -> None:
    folder.output.write_bytes(swap(folder.output.read_bytes()))
    report = verify(ledger, settings.data_dir, batch)
    assert not any("the output has" in finding for finding in report.findings), report.findings
    folder.output.write_bytes(without(folder.output.read_bytes()))
    report = verify(ledger, settings.data_dir, batch)
    assert any(f"the output has {report.output_lines} lines" in finding for finding in report.findings)


def test_a_row_in_both_files_is_found(settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder) -> None:
    line = folder.errors.read_bytes().splitlines(keepends=True)[0]
    lines = folder.output.read_bytes().splitlines(keepends=True)
    folder.output.write_bytes(b"".join([*lines[:4], line, *lines[4:]]))
    findings = verify(ledger, settings.data_dir, batch).findings
    assert "input line 5 (id-04) stands in the output and in the errors" in findings


def test_a_line_of_another_batch_is_found(settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder) -> None:
    other = BatchFolder.of(settings.data_dir, ended(settings, ledger)).output.read_bytes().splitlines(keepends=True)
    lines = folder.output.read_bytes().splitlines(keepends=True)
    assert len(other[3]) == len(lines[3])
    folder.output.write_bytes(b"".join([*lines[:3], other[3], *lines[4:]]))
    findings = verify(ledger, settings.data_dir, batch).findings
    assert "input line 4 (id-03) has no line at its place" in findings


@pytest.mark.parametrize("name", ["output.jsonl", "errors.jsonl", "input.jsonl"])
def test_a_missing_file_is_found(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder, name: str
) -> None:
    (folder.root / name).unlink()
    report = verify(ledger, settings.data_dir, batch)
    assert not report.ok
    assert report.findings


def test_a_missing_segment_is_found(settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder) -> None:
    folder.segment(2, 1).unlink()
    (finding,) = verify(ledger, settings.data_dir, batch).findings
    assert str(folder.segment(2, 1)) in finding
    assert "cannot be read" in finding


@pytest.mark.parametrize("change", [edited, shortened, swap])
def test_a_changed_segment_is_found(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder, change: Callable[[bytes], bytes]
) -> None:
    path = folder.segment(1, 1)
    raw = path.read_bytes()
    path.write_bytes(change(raw) if change is not swap else b"".join(reversed(raw.splitlines(keepends=True))))
    (finding,) = verify(ledger, settings.data_dir, batch).findings
    assert finding == f"{path} is not what was sealed"


@pytest.mark.parametrize("name", ["output", "errors"])
@pytest.mark.parametrize("change", [edited, shortened, longer, None])
def test_files_are_written_again_as_they_were(
    settings: Settings,
    ledger: Ledger,
    batch: str,
    folder: BatchFolder,
    name: str,
    change: Callable[[bytes], bytes] | None,
) -> None:
    path = {"output": folder.output, "errors": folder.errors}[name]
    before = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(before))
    rewrite(ledger, settings.data_dir, batch)
    assert path.read_bytes() == before
    assert verify(ledger, settings.data_dir, batch).ok


def test_files_are_not_written_again_from_what_was_changed(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder
) -> None:
    folder.output.write_bytes(b"edited")
    segment = next(iter(sorted(folder.segments.glob("*.jsonl"))))
    kept = segment.read_bytes()
    segment.write_bytes(kept.replace(b'"content"', b'"CONTENT"') if b'"content"' in kept else kept[:-5])
    with pytest.raises(IntegrityError):
        rewrite(ledger, settings.data_dir, batch)
    segment.write_bytes(kept)
    with folder.input.open("ab") as file:  # which gives the failures their names; more of it is no harm
        file.write(b"\n")
    rewrite(ledger, settings.data_dir, batch)
    assert folder.output.read_bytes() != b"edited"


def test_a_batch_that_goes_on_has_no_files(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request("a")])
    with pytest.raises(InputError, match="is in_progress"):
        rewrite(ledger, settings.data_dir, batch)


def test_findings_are_bounded(settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder) -> None:
    folder.output.write_bytes(b"")
    report = verify(ledger, settings.data_dir, batch)
    assert len(report.findings) == MAX_FINDINGS
    assert report.more_findings > 0


def zombie(folder: BatchFolder, batch: str, name: str, rows: range, *, copy: bytes = b"") -> None:
    """Let a runner that was replaced write what nobody counts."""
    writer = SegmentWriter(folder.segments / name, 1)
    for row in rows:
        writer.append(row, True, 5, 7, answer(batch, row, f"id-{row:02}", "once more"))
    writer.flush()
    writer.close()
    with (folder.segments / name).open("ab") as file:
        file.write(copy)


def test_wasted_work_is_counted_and_is_no_fault(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder
) -> None:
    copies = folder.segment(0, 1).read_bytes()
    zombie(folder, batch, "000000.2.jsonl", range(2), copy=copies + b'{"row":1,"ok":true,"in":1')
    with folder.segment(1, 1).open("ab") as file:
        file.write(copies[: copies.index(b"\n") + 1].replace(b"epoch 1", b"epoch 0"))
    zombie(folder, batch, "000099.1.jsonl", range(3))  # no shard of this batch
    report = verify(ledger, settings.data_dir, batch)
    assert report.ok, report.findings
    assert (report.wasted_rows, report.wasted_tokens) == (3, 2 * 12 + 5)
    assert report.claims == len(ledger.shards(batch))


@pytest.mark.parametrize("column", ["completed", "failed"])
def test_counts_that_are_not_those_of_the_lines_are_found(
    settings: Settings, ledger: Ledger, batch: str, column: str
) -> None:
    with ledger.write() as connection:
        connection.execute(shards.update().where(shards.c.number == 3).values({column: shards.c[column] + 1}))
    (finding,) = verify(ledger, settings.data_dir, batch).findings
    assert "the ledger counts" in finding
    assert ("output has 27 lines" in finding) == (column == "completed")


def test_a_folder_that_was_moved_is_one_sentence(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder
) -> None:
    folder.root.rename(folder.root.with_name("moved"))
    with pytest.raises(StorageError) as caught:
        verify(ledger, settings.data_dir, batch)
    assert (caught.value.code, caught.value.exit_code) == ("batch_files_missing", 3)
    assert str(folder.root) in caught.value.message


@pytest.mark.parametrize("name", ["input.jsonl", "output.jsonl", "errors.jsonl", "segments", "segments/000003.1.jsonl"])
@pytest.mark.parametrize("now", ["gone", "a folder", "noise"])
def test_half_deleted_files_are_findings(
    settings: Settings, ledger: Ledger, batch: str, folder: BatchFolder, name: str, now: str
) -> None:
    path = folder.root / name
    path.rename(folder.root / "moved")
    if now == "a folder":
        path.mkdir()
    elif now == "noise":
        path.write_bytes(bytes(range(256)) * 8)
    report = verify(ledger, settings.data_dir, batch)
    assert any(name in finding for finding in report.findings), report.findings
    results = name in ("output.jsonl", "errors.jsonl")
    assert (report.damaged_results, report.damaged_sources, report.repairable) == (results, not results, results)


def test_a_batch_that_has_not_ended_cannot_be_verified(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request("a")])
    with pytest.raises(InputError) as caught:
        verify(ledger, settings.data_dir, batch)
    assert caught.value.code == "batch_not_ended"
    with pytest.raises(NotFound):
        verify(ledger, settings.data_dir, "batch_none")
