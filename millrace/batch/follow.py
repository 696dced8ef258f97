"""Follow: the lines of a batch as they are answered, each row once, until it ends.

They come from the segments, in the order of the answers. When the batch has ended, what its file has and
was not yielded follows: rows that were never run, and what was merged between two looks. Memory is a bit a
row and a number a segment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from millrace.batch.folder import BatchFolder, storage_errors
from millrace.batch.ledger import Ledger
from millrace.batch.lines import request_name
from millrace.batch.schema import Status
from millrace.batch.segments import read_lines

POLL = 0.5  # seconds


class _Line(msgspec.Struct):
    id: str


class _Rows:
    """Which rows were yielded."""

    def __init__(self, total: int) -> None:
        self._bits = bytearray(total // 8 + 1)

    def new(self, row: int) -> bool:
        """Whether `row` was not there before; it is now."""
        byte, bit = divmod(row, 8)
        if byte >= len(self._bits) or self._bits[byte] >> bit & 1:
            return False
        self._bits[byte] |= 1 << bit
        return True


def follow(
    ledger: Ledger,
    data_dir: Path,
    batch_id: str,
    *,
    errors: bool,
    looked: Callable[[Status], None] = lambda status: None,
) -> Iterator[bytes]:
    """Yield the answers of a batch, or its failures, without their newlines; end when it has ended.

    Args:
        ledger: The open ledger.
        data_dir: DATA_DIR.
        batch_id: The batch.
        errors: The failed rows instead.
        looked: Told the status after each look at the segments, when all lines of it were taken.

    Raises:
        NotFound: There is no such batch.
        StorageError: Its files are not there.
    """
    rows = _Rows(int(ledger.batch(batch_id)["request_counts"]["total"]))
    folder = BatchFolder.there(data_dir, batch_id)
    reader = _Reader(ledger, folder, batch_id)
    while True:
        began = time.monotonic()
        # Before the segments: of a batch that has ended by now they have everything.
        status = ledger.status(batch_id)
        if not status.final or status is Status.FAILED:
            for row, ok, line in reader.read():
                if ok is not errors and rows.new(row):
                    yield line
        looked(status)
        if status.final:
            break
        # A batch of very many segments is looked at less often.
        time.sleep(max(POLL, 4 * (time.monotonic() - began)))
    if status is not Status.FAILED:
        yield from _rest(folder.errors if errors else folder.output, batch_id, rows)


def _rest(path: Path, batch_id: str, rows: _Rows) -> Iterator[bytes]:
    prefix = len(request_name(batch_id, 0)) - 1
    decode = msgspec.json.Decoder(_Line).decode
    with storage_errors(path), path.open("rb") as file:
        for raw in file:
            if rows.new(int(decode(raw).id[prefix:])):
                yield raw.removesuffix(b"\n")


class _Reader:
    """Reads what was appended to the segments since the last time."""

    def __init__(self, ledger: Ledger, folder: BatchFolder, batch_id: str) -> None:
        self._folder = folder
        #: Where the next line of a segment begins, by its name.
        self._offsets: dict[str, int] = {}
        #: How much of a segment that was sealed before we came counts.
        self._limits: dict[str, int] = {}
        self._newest_sealed: dict[int, int] = {}
        for shard in ledger.shards(batch_id):
            for seal in shard.segments:
                self._limits[folder.segment(shard.number, seal["epoch"]).name] = seal["bytes"]
            self._newest_sealed[shard.number] = max((seal["epoch"] for seal in shard.segments), default=0)

    def read(self) -> Iterator[tuple[int, bool, bytes]]:
        """Yield (row, whether it is an answer, its line)."""
        with storage_errors(self._folder.segments), os.scandir(self._folder.segments) as entries:
            found = [(entry.name, entry.stat().st_size) for entry in entries if entry.name.endswith(".jsonl")]
        for name, size in found:
            start = self._offsets.get(name, 0)
            limit = self._limits.get(name)
            if limit is None and self._replaced(name):
                continue  # such as by a retry, whose new segment has its answers
            end = size if limit is None else min(size, limit)
            if end <= start:
                continue
            for line, raw in read_lines(self._folder.segments / name, end - start, start):
                self._offsets[name] = start = start + len(raw)
                yield line.row, line.ok, bytes(line.line)

    def _replaced(self, name: str) -> bool:
        """Whether a segment without a seal is older than one with a seal."""
        shard, epoch = name.split(".")[:2]
        return int(epoch) < self._newest_sealed.get(int(shard), 0)
