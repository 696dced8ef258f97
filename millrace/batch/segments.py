"""Segments: append-only files of answers, each written by one epoch of one shard.

A line is `{"row":R,"ok":true,"in":P,"out":C,"line":{…}}`: the row's number in input.jsonl, whether it
goes to the output or the errors file, its tokens, and the line as it will stand there.

A runner appends to its own segment and nothing else. Its bytes reach the operating system in the same
turn of the event loop, so that a killed process loses none; they are synced to the disk in groups, so
that a power cut loses at most BATCH_SYNC_SECONDS of answers, which then run again. What counts is only
what the ledger has sealed: bytes that a replaced runner appends beyond it do not exist for the merge.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from millrace.batch.folder import BatchFolder, storage_errors, sync_folder
from millrace.batch.lease import Counts, Sealed
from millrace.crashpoints import crashpoint
from millrace.errors import IntegrityError, StorageError


class SegmentLine(msgspec.Struct):
    """One answered row of a segment."""

    row: int
    ok: bool
    prompt_tokens: int = msgspec.field(name="in")
    completion_tokens: int = msgspec.field(name="out")
    line: msgspec.Raw


_decode = msgspec.json.Decoder(SegmentLine).decode


class SegmentWriter:
    """Appends answers to a new segment.

    Args:
        path: Of the file, which is made.
        epoch: Of the runner.
        trusted: Whether nobody else may have read the file yet.

    Raises:
        StorageError: The file cannot be made or written, or the disk is full. The segment then keeps
            the whole lines it has.
    """

    def __init__(self, path: Path, epoch: int, trusted: Callable[[], bool] = lambda: True) -> None:
        self.path = path
        self.epoch = epoch
        self._trusted = trusted
        self.rows = 0
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._waiting: list[bytes] = []
        self._synced = 0
        self._failure: StorageError | None = None
        self._syncing = threading.Lock()  # a file is not closed while another thread syncs it
        self._closed = False
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # O_EXCL: an epoch is claimed once, so its segment cannot be there.
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            sync_folder(path.parent)
        crashpoint("segment.created")

    def append(self, row: int, ok: bool, prompt_tokens: int, completion_tokens: int, line: bytes) -> None:
        """Take an answer; `flush` writes it."""
        self._waiting.append(
            b'{"row":%d,"ok":%b,"in":%d,"out":%d,"line":%b}\n'
            % (row, b"true" if ok else b"false", prompt_tokens, completion_tokens, line)
        )

    @property
    def waiting(self) -> bool:
        """Whether there are answers that `flush` has not written."""
        return bool(self._waiting)

    @property
    def unsynced(self) -> bool:
        """Whether there are bytes that `sync` has not put on the disk."""
        return self.bytes > self._synced

    def flush(self) -> None:
        """Hand the answers taken so far to the operating system."""
        if not self._waiting:
            return
        rows, data = len(self._waiting), b"".join(self._waiting)
        self._waiting.clear()
        with self._writing():
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        self._digest.update(data)
        self.bytes += len(data)
        self.rows += rows
        crashpoint("segment.flushed")

    def sync(self) -> None:
        """Put what was flushed on the disk; may run in another thread than `append` and `flush`."""
        try:
            with self._syncing:
                if not self._closed:
                    self._sync()
        finally:
            self._release()

    def _sync(self) -> None:
        reached = self.bytes
        with self._writing():
            try:
                os.fsync(self._descriptor)
            except OSError:
                # It can be read until the kernel needs the memory, and is gone then: a later epoch must not
                # count what never reached the disk. Where one may have sealed it by now, the merge finds it.
                if self._trusted():
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._descriptor, self._synced)
                raise
        self._synced = max(self._synced, reached)
        crashpoint("segment.synced")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            with storage_errors(self.path):
                yield
        except StorageError as error:
            # For good: after a failed fsync the next one succeeds, with the bytes gone all the same.
            self._failure = error
            raise

    def sealed(self) -> Sealed:
        """Return the part of the segment that is flushed.

        Raises:
            StorageError: A write or a sync of it has failed; nobody knows what is on the disk.
        """
        if self._failure is not None:
            raise self._failure
        return Sealed(self.epoch, self.bytes, self.rows, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file, now or when a sync of another thread has ended; what was not flushed is dropped."""
        self._closed = True
        self._release()

    def _release(self) -> None:
        # Whoever has the lock comes here after it, so that nobody waits for a disk that hangs.
        if self._closed and self._syncing.acquire(blocking=False):
            try:
                if self._descriptor >= 0:
                    os.close(self._descriptor)
                    self._descriptor = -1
            finally:
                self._syncing.release()


@dataclass(slots=True)
class Recovered:
    """What earlier epochs of a shard have answered."""

    sealed: list[Sealed]
    rows: set[int]
    counts: Counts


def recover(folder: BatchFolder, shard: int, epoch: int, sealed: list[Sealed]) -> Recovered:
    """Read the segments of a shard older than `epoch`, up to their last whole line.

    A segment that the ledger has sealed already keeps its seal. A row that two epochs answered counts
    where it was sealed first; a later segment is cut before it.

    Raises:
        IntegrityError: A sealed segment is shorter than its seal.
        StorageError: A segment cannot be read.
    """
    known = {one.epoch: one for one in sealed}
    result = Recovered([], set(), Counts())
    newest_sealed = max(known, default=0)
    for older in range(1, epoch):
        path = folder.segment(shard, older)
        seal = known.get(older)
        # An unsealed one below a sealed one was not there, or empty, when that was sealed: what stands in
        # it was written late by a runner that had been replaced.
        if seal is None and (older < newest_sealed or not path.exists()):
            continue
        result.sealed.append(_take(path, older, seal, result))
    return result


def _take(path: Path, epoch: int, seal: Sealed | None, result: Recovered) -> Sealed:
    if seal is not None:
        check_there(path)
    digest, size, rows = hashlib.sha256(), 0, 0
    for line, raw in read_lines(path, seal.bytes if seal else None):
        if line.row in result.rows:
            break
        result.rows.add(line.row)
        result.counts.add(line.ok, line.prompt_tokens, line.completion_tokens)
        digest.update(raw)
        size += len(raw)
        rows += 1
    if seal is not None and size != seal.bytes:
        raise IntegrityError(
            f"{path} has {size} good bytes, but {seal.bytes} of it were sealed.",
            "The file was changed or lost after it was written; restore it from a backup, or resume the batch: "
            "its rows are then run again.",
        )
    if seal is None and size:
        # Its runner may have been killed before it synced them, and a seal holds for ever.
        with storage_errors(path), path.open("rb") as file:
            os.fsync(file.fileno())
    return seal or Sealed(epoch, size, rows, digest.hexdigest())


def check_there(path: Path) -> None:
    """Check that a sealed segment is where its batch's others are.

    Raises:
        IntegrityError: It is gone. Where the whole folder is, the disk may not be mounted: that may pass.
    """
    if path.parent.is_dir() and not path.exists():
        raise IntegrityError(
            f"{path} is gone, and answers of it were sealed.",
            "Restore it from a backup, or resume the batch: its rows are then run again.",
        )


def read_lines(path: Path, limit: int | None, start: int = 0) -> Iterator[tuple[SegmentLine, bytes]]:
    """Yield (line, its bytes with the newline) of a segment from byte `start` on.

    It ends after `limit` bytes, or else with the last whole line.
    """
    left = limit
    with storage_errors(path), path.open("rb") as file:
        file.seek(start)
        for raw in file:
            if left is not None:
                left -= len(raw)
                if left < 0:
                    return
            if not raw.endswith(b"\n"):
                return
            try:
                line = _decode(raw)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return  # a crash of the machine can leave a torn or zeroed tail
            yield line, raw
