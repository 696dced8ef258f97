"""The merge: from sealed segments to output.jsonl and errors.jsonl, one line a row, in input order.

It reads every sealed segment once to learn where each row's line lies, then writes the lines in the
order of the rows. Nothing is kept in memory but an index of 20 bytes a row, mapped from a file. It can
be run at any time, any number of times, by any number of processes, with the same result: each writes
files of its own and renames them over the others'.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from millrace.batch.folder import BatchFolder, storage_errors, sync_folder
from millrace.batch.lease import Sealed
from millrace.batch.ledger import Ledger
from millrace.batch.life import FileRecord
from millrace.batch.lines import decode_input, failure_line
from millrace.batch.schema import Status
from millrace.batch.segments import check_there, read_lines, recover
from millrace.batch.suspects import discard_all_flights
from millrace.crashpoints import crashpoint
from millrace.errors import InputError, IntegrityError, MillraceError

#: Where a row's line lies: segment number + 1 (0: nowhere), offset, length, whether it is an answer.
_ENTRY = struct.Struct("<IQII")
#: What the errors file says of a row that was never answered: its code and message, by the batch's end.
NEVER_RUN = {
    Status.CANCELLED: ("batch_cancelled", "The batch was cancelled before this row was run."),
    Status.EXPIRED: ("batch_expired", "The batch's completion window was over before this row was run."),
}


def merge(ledger: Ledger, data_dir: Path, batch_id: str) -> Status:
    """Write a batch's files and end the batch; return its status.

    Nothing happens to a batch that has ended or whose shards have not.

    Raises:
        IntegrityError: A row has no sealed answer, or two.
        StorageError: A file cannot be read or written.
    """
    folder = BatchFolder.of(data_dir, batch_id)
    if batch_id not in ledger.ready_to_merge():
        return ledger.status(batch_id)
    with alone_with(folder) as alone:
        if alone and batch_id in ledger.ready_to_merge():
            try:
                _merge(ledger, data_dir, folder, batch_id)
            except IntegrityError as error:
                ledger.fail(batch_id, error.code, str(error))
                raise
    return ledger.status(batch_id)


@contextlib.contextmanager
def alone_with(folder: BatchFolder) -> Iterator[bool]:
    """Hold the batch's files for one merge, retry or removal; yield False where another one has them.

    Two merges would do no harm but for the disk: each writes as much again as all answers.

    Raises:
        StorageError: The folder is not there.
    """
    with storage_errors(folder.root):
        descriptor = os.open(folder.root, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        else:
            for left in folder.root.glob(".*.part"):
                left.unlink()  # of a merge that was killed
        yield alone
    finally:
        os.close(descriptor)


def rewrite(ledger: Ledger, data_dir: Path, batch_id: str) -> None:
    """Write the files of an ended batch again, byte for byte as they were recorded, from its segments.

    Raises:
        InputError: The batch has no files to be written again (batch_not_ended).
        IntegrityError: The segments do not give what was recorded; nothing was changed.
        MillraceError: Another process has its files (batch_busy).
        StorageError: A file cannot be read or written.
    """
    folder = BatchFolder.there(data_dir, batch_id)
    with alone_with(folder) as alone:
        batch = ledger.batch(batch_id)
        status = Status(batch["millrace"]["status"])
        if status not in (Status.COMPLETED, Status.CANCELLED, Status.EXPIRED):
            raise InputError(f"{batch_id} is {status}; it has no files.", code="batch_not_ended")
        if not alone:
            raise MillraceError(
                f"Another process has the files of {batch_id} in hand; nothing was changed.",
                "Try again in a moment.",
                code="batch_busy",
            )
        with _written(ledger, folder, batch_id, status) as targets:
            for target, file_id in zip(targets, (batch["output_file_id"], batch["error_file_id"]), strict=True):
                recorded = ledger.file(file_id).sha256 if file_id else hashlib.sha256().hexdigest()
                if target.sha256 != recorded:
                    raise IntegrityError(
                        f"The segments of {batch_id} do not give the {target.path.name} that was recorded; "
                        "nothing was changed.",
                        "Restore the segments or input.jsonl from a backup.",
                    )
            for target in targets:
                target.finish()
        sync_folder(folder.root)


def _merge(ledger: Ledger, data_dir: Path, folder: BatchFolder, batch_id: str) -> None:
    final = ledger.end_of(batch_id)
    if final is not Status.COMPLETED:
        _seal_cancelled(ledger, folder, batch_id)
    with _written(ledger, folder, batch_id, final) as (output, errors):
        crashpoint("merge.written")
        for target in (output, errors):
            target.finish()
    with storage_errors(folder.root):
        sync_folder(folder.root)
    crashpoint("merge.placed")
    discard_all_flights(folder)
    ledger.complete(
        batch_id,
        final,
        output.record(f"{batch_id}_output", data_dir),
        errors.record(f"{batch_id}_errors", data_dir) if errors.rows else None,
    )
    crashpoint("merge.completed")


@contextlib.contextmanager
def _written(ledger: Ledger, folder: BatchFolder, batch_id: str, final: Status) -> Iterator[tuple[_Target, _Target]]:
    """Yield output and errors, written and not yet under their names; what is not finished is removed."""
    rows = ledger.batch(batch_id)["request_counts"]["total"]
    output, errors = _Target(folder.output), _Target(folder.errors)
    with storage_errors(folder.root):
        try:
            with tempfile.TemporaryFile(dir=folder.root) as index:
                index.truncate(rows * _ENTRY.size)
                with mmap.mmap(index.fileno(), rows * _ENTRY.size) as entries:
                    segments = _index(ledger, folder, batch_id, entries)
                    crashpoint("merge.indexed")
                    _write(batch_id, folder, entries, segments, output, errors, final)
            yield output, errors
        finally:
            output.discard()
            errors.discard()


def _seal_cancelled(ledger: Ledger, folder: BatchFolder, batch_id: str) -> None:
    """Seal what runners had answered that died before their batch was cancelled or expired."""
    for shard in ledger.shards(batch_id):
        sealed = [Sealed(**one) for one in shard.segments]
        found = recover(folder, shard.number, shard.epoch + 1, sealed)
        if found.sealed != sealed:
            ledger.seal_cancelled(shard.id, [asdict(one) for one in found.sealed], asdict(found.counts))


def sealed_segments(ledger: Ledger, folder: BatchFolder, batch_id: str) -> Iterator[tuple[Path, Sealed]]:
    """Yield the sealed segments of a batch, in the order of its shards."""
    for shard in ledger.shards(batch_id):
        for sealed in shard.segments:
            yield folder.segment(shard.number, sealed["epoch"]), Sealed(**sealed)


def _index(ledger: Ledger, folder: BatchFolder, batch_id: str, entries: mmap.mmap) -> list[Path]:
    """Note where each row's line lies, and return the segments' paths."""
    paths: list[Path] = []
    for path, seal in sealed_segments(ledger, folder, batch_id):
        paths.append(path)
        offset = 0
        digest = hashlib.sha256()
        check_there(path)
        for line, raw in read_lines(path, seal.bytes):
            at = line.row * _ENTRY.size
            if at + _ENTRY.size > len(entries) or _ENTRY.unpack_from(entries, at)[0]:
                raise IntegrityError(
                    f"Row {line.row} of {batch_id} has two sealed answers, or is none of its rows.",
                    "Please report this: it must not happen.",
                )
            # The line is the last member of its object: `…,"line":{…}}` and a newline.
            length = len(line.line)
            _ENTRY.pack_into(entries, at, len(paths), offset + len(raw) - 2 - length, length, line.ok)
            offset += len(raw)
            digest.update(raw)
        if offset != seal.bytes or digest.hexdigest() != seal.sha256:
            raise IntegrityError(
                f"{path} is not what was sealed: {offset} good bytes of {seal.bytes}, or other content.",
                "The file was changed or lost after it was written; restore it from a backup, "
                f"or run its rows again: `millrace batch resume {batch_id}`.",
            )
    return paths


def _write(
    batch_id: str,
    folder: BatchFolder,
    entries: mmap.mmap,
    segments: list[Path],
    output: _Target,
    errors: _Target,
    final: Status,
) -> None:
    read = _Segments(segments)
    with folder.input.open("rb") as source:
        try:
            for row, (segment, offset, length, ok) in enumerate(_ENTRY.iter_unpack(entries)):
                line = source.readline()
                if segment:
                    (output if ok else errors).write(read(segment - 1, offset, length))
                elif final in NEVER_RUN:
                    custom_id = decode_input(line).custom_id
                    errors.write(failure_line(batch_id, row, custom_id, *NEVER_RUN[final]))
                else:
                    raise IntegrityError(
                        f"Row {row} of {batch_id} has no sealed answer.",
                        "Please report this: it must not happen.",
                    )
        finally:
            read.close()


class _Segments:
    """Reads pieces of many files, keeping few of them open."""

    _MOST_OPEN = 64

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: dict[int, int] = {}

    def __call__(self, number: int, offset: int, length: int) -> bytes:
        descriptor = self._open.get(number)
        if descriptor is None:
            if len(self._open) >= self._MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = self._open[number] = os.open(self._paths[number], os.O_RDONLY)
        return os.pread(descriptor, length, offset)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


@dataclass
class _Target:
    """A file that appears under its name only when it is whole."""

    path: Path
    rows: int = 0
    size: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self._part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        with storage_errors(self.path):
            self._file: BinaryIO = self._part.open("wb", buffering=1 << 20)

    @property
    def sha256(self) -> str:
        """The hash of what was written, in hex."""
        return str(self._digest.hexdigest())

    def write(self, line: bytes) -> None:
        line += b"\n"
        self._file.write(line)
        self._digest.update(line)
        self.rows += 1
        self.size += len(line)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        crashpoint("merge.synced")
        self._part.rename(self.path)
        crashpoint("merge.renamed")

    def discard(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)

    def record(self, file_id: str, data_dir: Path) -> FileRecord:
        return FileRecord(
            id=file_id,
            purpose="batch_output",
            filename=self.path.name,
            path=str(self.path.relative_to(data_dir)),
            bytes=self.size,
            sha256=self.sha256,
            rows=self.rows,
        )
