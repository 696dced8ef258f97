"""Verify: proof that every row of a batch has exactly one line, in order, and nobody changed it.

It reads the input file, the output files and the segments, and the ledger only for what it promised about
them. Memory does not grow with the rows: output and errors follow the input's order, so one pass over the
three files side by side is enough.

Wasted work is what was answered and does not count: answers beyond a seal, in segments that others replaced,
or of rows that were answered elsewhere. It is no fault, but the price of what was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import sqlalchemy as sa

from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Sealed
from millrace.batch.ledger import Ledger
from millrace.batch.lines import decode_input, request_name
from millrace.batch.merge import NEVER_RUN
from millrace.batch.schema import Status
from millrace.batch.segments import read_lines
from millrace.errors import InputError, StorageError

MAX_FINDINGS = 20
_NEVER_RUN = {code for code, _ in NEVER_RUN.values()}


class _Error(msgspec.Struct):
    code: str | None = None


class _Line(msgspec.Struct):
    id: str
    custom_id: str
    error: _Error | None = None


@dataclass
class Report:
    """What verify found. `ok` is the verdict."""

    batch_id: str
    status: str
    rows: int = 0
    output_lines: int = 0
    error_lines: int = 0
    #: Rows of the errors file that were never run: the batch was cancelled or expired.
    never_run: int = 0
    segments: int = 0
    #: How often shards were claimed.
    claims: int = 0
    #: …beyond once each: after crashes, lost leases and shutdowns, and for retries.
    extra_claims: int = 0
    #: Answers that do not count, and their tokens.
    wasted_rows: int = 0
    wasted_tokens: int = 0
    #: Bytes that were written and do not count: torn tails and what replaced runners went on writing.
    unsealed_bytes: int = 0
    #: Whether the output or the errors are not what was recorded, and whether the input or a segment is not.
    damaged_results: bool = False
    damaged_sources: bool = False
    findings: list[str] = field(default_factory=list)
    more_findings: int = 0

    @property
    def ok(self) -> bool:
        """Whether every row has exactly one line and every file is what was recorded."""
        return not self.findings

    @property
    def found(self) -> int:
        """How many findings there are."""
        return len(self.findings) + self.more_findings

    @property
    def repairable(self) -> bool:
        """Whether output and errors are damaged, and what they are made from is not."""
        return self.damaged_results and not self.damaged_sources

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {"ok": self.ok, **asdict(self)}

    def find(self, what: str) -> None:
        """Add a finding; those beyond MAX_FINDINGS are counted."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(what)
        else:
            self.more_findings += 1


def verify(ledger: Ledger, data_dir: Path, batch_id: str) -> Report:
    """Check a batch that has ended.

    Raises:
        NotFound: There is no such batch.
        InputError: It has not ended yet (batch_not_ended), or has failed (batch_failed).
        StorageError: Its folder is not there (batch_files_missing).
    """
    batch = ledger.batch(batch_id)
    status = Status(batch["millrace"]["status"])
    if status is Status.FAILED:
        raise InputError(
            f"{batch_id} has failed and has no files to verify: {batch['errors']['data'][0]['message']}",
            f"`millrace batch resume {batch_id}` runs what is missing.",
            code="batch_failed",
        )
    if not status.final:
        raise InputError(
            f"{batch_id} is {status}; there is nothing to verify yet.",
            f"`millrace batch resume {batch_id}` goes on with it."
            if status is Status.PAUSED
            else f"Wait for it: `millrace batch watch {batch_id}`.",
            code="batch_not_ended",
        )
    folder = BatchFolder.there(data_dir, batch_id)
    report = Report(batch_id, status)

    def changed(file_id: str | None, path: Path) -> bool:
        record = None if file_id is None else ledger.file(file_id)
        return record is not None and not _check_hash(report, path, record.bytes, record.sha256)

    # The files and segments as such first: of a missing one, every row's finding would hide that.
    other_input = changed(batch["input_file_id"], folder.input)
    other_results = [changed(batch["output_file_id"], folder.output), changed(batch["error_file_id"], folder.errors)]
    shards = ledger.shards(batch_id)
    before = report.found
    _check_segments(report, folder, shards)
    report.damaged_sources = other_input or report.found > before
    before = report.found
    compared = not other_input and _check_rows(report, folder, batch_id)
    counts = batch["request_counts"]
    for what, found, promised in (
        ("the input has {} rows", report.rows, counts["total"]),
        ("the output has {} lines", report.output_lines, counts["completed"]),
        ("the errors file has {} lines of rows that failed", report.error_lines - report.never_run, counts["failed"]),
    ):
        if compared and found != promised:
            report.find(f"{what.format(found)}, the ledger counts {promised}")
    report.damaged_results = any(other_results) or report.found > before
    report.claims = batch["millrace"]["claims"]
    report.extra_claims = report.claims - sum(shard.attempts > 0 for shard in shards)
    return report


def _check_rows(report: Report, folder: BatchFolder, batch_id: str) -> bool:
    """Compare the files row by row; False where there is no input to compare with."""
    output, errors = _Lines(report, folder.output, batch_id), _Lines(report, folder.errors, batch_id)
    try:
        source = folder.input.open("rb")
    except OSError:  # gone since its hash was taken
        return False
    with source:
        for row, raw in enumerate(source):
            report.rows += 1
            try:
                custom_id = decode_input(raw).custom_id
            except (msgspec.MsgspecError, UnicodeDecodeError):
                report.find(f"{folder.input} line {row + 1} is not an input line")
                custom_id = "?"
            answered, failed = output.take(row), errors.take(row)
            if answered is not None and failed is not None:
                report.find(f"input line {row + 1} ({custom_id}) stands in the output and in the errors")
            elif answered is None and failed is None:
                report.find(f"input line {row + 1} ({custom_id}) has no line at its place")
            for found in (answered, failed):
                if found is not None and found != custom_id:
                    report.find(f"input line {row + 1} is {custom_id}, {found} in its line")
    output.end()
    errors.end()
    report.output_lines, report.error_lines, report.never_run = output.count, errors.count, errors.never_run
    return True


class _Lines:
    """The lines of an output file, taken in the order of the rows; those that are no next row's are found."""

    def __init__(self, report: Report, path: Path, batch_id: str) -> None:
        self._report = report
        self._path = path
        self._prefix = request_name(batch_id, 0).decode()[:-1]
        #: Lines read, whatever they are, and those of rows that were never run.
        self.count = self.never_run = 0
        self._lines = self._read()
        self._next = next(self._lines, None)

    def take(self, row: int) -> str | None:
        """Return the custom_id of row `row`'s line, if it comes next."""
        while self._next is not None and self._next[1] < row:
            self._stray()
        if self._next is None or self._next[1] != row:
            return None
        custom_id = self._next[2]
        self._next = next(self._lines, None)
        return custom_id

    def end(self) -> None:
        """Find the lines that are left."""
        while self._next is not None:
            self._stray()

    def _stray(self) -> None:
        assert self._next is not None
        number, row, custom_id = self._next
        whose = (
            f"that of input line {row + 1} ({custom_id}), there twice or out of order"
            if row >= 0
            else "of another batch"
        )
        self._report.find(f"{self._path} line {number} is {whose}")
        self._next = next(self._lines, None)

    def _read(self) -> Iterator[tuple[int, int, str]]:
        """Yield (line number, row or -1, custom_id)."""
        try:
            file = self._path.open("rb")
        except OSError:  # which was found when its hash was to be taken; nobody needs an empty errors file
            return
        with file:
            for number, raw in enumerate(file, 1):
                self.count = number
                try:
                    line = msgspec.json.decode(raw, type=_Line)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    self._report.find(f"{self._path} line {number} is not an output line")
                    continue
                self.never_run += line.error is not None and line.error.code in _NEVER_RUN
                digits = line.id.removeprefix(self._prefix)
                yield number, int(digits) if digits.isdecimal() else -1, line.custom_id


def _check_hash(report: Report, path: Path, size: int, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            length = file.tell()
    except OSError as error:
        report.find(f"{path} cannot be read: {error.strerror}")
        return False
    if (length, found) != (size, sha256):
        report.find(f"{path} was changed: {length} bytes, {size} were recorded; sha256 {found[:12]}…")
        return False
    return True


def _check_segments(report: Report, folder: BatchFolder, shards: list[sa.Row[Any]]) -> None:
    files: dict[int, list[tuple[int, Path, int]]] = {}
    for path in sorted(folder.segments.glob("*.*.jsonl")):
        number, epoch = path.name.split(".")[:2]
        if number.isdecimal() and epoch.isdecimal() and path.is_file():
            files.setdefault(int(number), []).append((int(epoch), path, path.stat().st_size))
    for shard in shards:
        seals = {seal["epoch"]: Sealed(**seal) for seal in shard.segments}
        for epoch, seal in seals.items():
            report.segments += 1
            path = folder.segment(shard.number, epoch)
            try:
                with path.open("rb") as file:
                    digest = _digest(file, seal.bytes)
            except OSError as error:
                report.find(f"{path} cannot be read: {error.strerror}")
                continue
            if digest != seal.sha256:
                report.find(f"{path} is not what was sealed")
        beyond = [
            (path, start)
            for epoch, path, size in files.get(shard.number, ())
            if size > (start := seals[epoch].bytes if epoch in seals else 0)
        ]
        if beyond:
            _count_waste(report, folder, shard.number, seals, beyond)


def _count_waste(
    report: Report, folder: BatchFolder, number: int, seals: dict[int, Sealed], beyond: list[tuple[Path, int]]
) -> None:
    """Count what a shard's segments have beyond what was sealed; memory is that of one shard."""
    counted = set()
    for epoch, seal in seals.items():
        with contextlib.suppress(StorageError):  # which was found above
            counted |= {hash(raw) for _, raw in read_lines(folder.segment(number, epoch), seal.bytes)}
    for path, start in beyond:
        try:
            report.unsealed_bytes += path.stat().st_size - start
            for line, raw in read_lines(path, None, start):
                # A retry copies the answers of the segments that it replaces.
                if line.ok and hash(raw) not in counted:
                    report.wasted_rows += 1
                    report.wasted_tokens += line.prompt_tokens + line.completion_tokens
        except (OSError, StorageError) as error:
            report.find(f"{path} cannot be read: {error}")


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()
