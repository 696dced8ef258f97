"""What ended and goes on: `resume` runs the rows that have no line, `retry` those that failed.

Answers are kept as they are. A failed row's line stands in a sealed segment, and segments are only ever
appended to; so a retry writes a new segment with the shard's answers alone, of an epoch above every one
on the disk, and seals that one instead of all the others:

    folder held ──> new segments, synced ──> one transaction: seals, epochs, shards ready, batch in progress

`recover` does not look at unsealed segments below a sealed one, so what failed does not come back. A crash
before the transaction leaves the batch as it was and some segments that nobody reads. The files of the
batch's first end stay where they are until the next merge renames new ones over them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Counts, Sealed, finalize_done
from millrace.batch.ledger import Ledger
from millrace.batch.merge import alone_with
from millrace.batch.schema import ShardState, Status, batches, clock, shards
from millrace.batch.segments import SegmentLine, SegmentWriter, read_lines
from millrace.crashpoints import crashpoint
from millrace.errors import InputError, IntegrityError, MillraceError

_AT_ONCE = 1000  # lines of a new segment that are written together


@dataclass(frozen=True)
class _Change:
    """A shard that goes back to ready, as it was read and with what it gets."""

    shard: Any
    values: dict[str, Any]


def resume(ledger: Ledger, data_dir: Path, batch_id: str) -> Status:
    """Go on with a batch that is paused, or was cancelled, expired or failed; return its status after it.

    Rows without a line are run; rows that failed stay failed. Of a batch that failed because segments were
    changed or lost, the rows of those are run again. A completion window that is over no longer holds.
    Nothing happens to a batch that runs.

    Raises:
        InputError: It is completed (batch_completed), or about to end (batch_ending).
        MillraceError: Another process has its files (batch_busy).
        NotFound: There is no such batch.
        StorageError: Its files are not there.
    """
    status = ledger.status(batch_id)
    if status is Status.PAUSED:
        with ledger.write() as connection:
            connection.execute(
                batches.update()
                .where(batches.c.id == batch_id, batches.c.status == Status.PAUSED)
                .values(status=Status.IN_PROGRESS, reason="", canary=False)
            )
        return ledger.status(batch_id)
    if status is Status.COMPLETED:
        raise InputError(
            f"{batch_id} is completed: every row of it has its answer or its failure.",
            f"`millrace batch retry {batch_id}` runs the failed ones again.",
            code="batch_completed",
        )
    if status is Status.CANCELLING or (status is Status.FINALIZING and ledger.end_of(batch_id) is Status.EXPIRED):
        raise InputError(
            f"{batch_id} is about to end: what its runners have answered is being put in its place.",
            f"Wait for it, `millrace batch watch {batch_id}`, and resume it then.",
            code="batch_ending",
        )
    if not status.final:
        return status
    folder = BatchFolder.there(data_dir, batch_id, whole=True)
    with _held(folder, batch_id):
        newest = folder.newest_epochs()
        changes = []
        for shard in ledger.shards(batch_id):
            if shard.state == ShardState.LEASED:  # of a batch that failed; its runner goes on
                continue
            good = [seal for seal in _seals(shard) if status is not Status.FAILED or _intact(folder, shard, seal)]
            if len(good) < len(shard.segments):
                changes.append(_rewritten(folder, shard, newest, good, lambda line: True))
            elif shard.state != ShardState.DONE:
                # What a retry or a resume left that did not come to its end must not be in the next owner's way.
                changes.append(_Change(shard, {"epoch": max(shard.epoch, newest.get(shard.number, 0))}))
        _reopen(ledger, batch_id, status, changes)
    return ledger.status(batch_id)


def retry(ledger: Ledger, data_dir: Path, batch_id: str) -> int:
    """Run the failed rows of a completed batch again, as part of it; return how many they are.

    Raises:
        InputError: It has not ended (batch_not_ended), has rows that were never run (batch_not_completed),
            or none that failed (nothing_failed).
        IntegrityError: A sealed segment was changed or lost.
        MillraceError: Another process has its files (batch_busy).
        NotFound: There is no such batch.
        StorageError: Its files are not there, or the disk is full.
    """
    status = ledger.status(batch_id)
    if not status.final:
        raise InputError(
            f"{batch_id} is {status}; its failed rows can be run again when it has ended.",
            f"Wait for it: `millrace batch watch {batch_id}`.",
            code="batch_not_ended",
        )
    if status is not Status.COMPLETED:
        raise InputError(
            f"{batch_id} is {status}; there may be rows of it that were never run.",
            f"Run those first: `millrace batch resume {batch_id}`.",
            code="batch_not_completed",
        )
    failed = int(ledger.batch(batch_id)["request_counts"]["failed"])
    if not failed:
        raise InputError(f"No row of {batch_id} has failed.", code="nothing_failed")
    folder = BatchFolder.there(data_dir, batch_id, whole=True)
    with _held(folder, batch_id):
        newest = folder.newest_epochs()
        changes = [
            _rewritten(folder, shard, newest, _seals(shard), lambda line: line.ok)
            for shard in ledger.shards(batch_id)
            if shard.failed
        ]
        crashpoint("retry.rewritten")
        _reopen(ledger, batch_id, status, changes)
        crashpoint("retry.reopened")
    return failed


@contextlib.contextmanager
def _held(folder: BatchFolder, batch_id: str) -> Iterator[None]:
    with alone_with(folder) as alone:
        if not alone:
            raise busy(batch_id)
        yield
        folder.note.unlink(missing_ok=True)  # of a removal that the ledger did not hear of


def busy(batch_id: str) -> MillraceError:
    """Return the error for a batch that another process has in hand."""
    return MillraceError(
        f"Another process has the files of {batch_id} in hand; nothing was changed.",
        "Try again in a moment.",
        code="batch_busy",
    )


def _seals(shard: Any) -> list[Sealed]:
    return [Sealed(**one) for one in shard.segments]


def _intact(folder: BatchFolder, shard: Any, seal: Sealed) -> bool:
    digest, left = hashlib.sha256(), seal.bytes
    try:
        with folder.segment(shard.number, seal.epoch).open("rb") as file:
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
    except OSError:
        return False
    return digest.hexdigest() == seal.sha256


def _rewritten(
    folder: BatchFolder,
    shard: Any,
    newest: dict[int, int],
    seals: list[Sealed],
    keep: Callable[[SegmentLine], bool],
) -> _Change:
    """Write a segment with the lines of `seals` that are kept, and return the change that seals it alone."""
    epoch = max(shard.epoch, newest.get(shard.number, 0)) + 1
    counts = Counts()
    writer = SegmentWriter(folder.segment(shard.number, epoch), epoch)
    try:
        for seal in seals:
            path = folder.segment(shard.number, seal.epoch)
            digest = hashlib.sha256()
            for number, (line, raw) in enumerate(read_lines(path, seal.bytes)):
                digest.update(raw)
                if keep(line):
                    writer.append(line.row, line.ok, line.prompt_tokens, line.completion_tokens, bytes(line.line))
                    counts.add(line.ok, line.prompt_tokens, line.completion_tokens)
                if number % _AT_ONCE == 0:
                    writer.flush()
            if digest.hexdigest() != seal.sha256:
                raise IntegrityError(
                    f"{path} is not what was sealed; nothing was changed.",
                    "The file was changed or lost after it was written; restore it from a backup.",
                )
        writer.flush()
        writer.sync()
        sealed = writer.sealed()
    except BaseException:
        writer.path.unlink(missing_ok=True)
        raise
    finally:
        writer.close()
    return _Change(shard, {"epoch": epoch, "segments": [asdict(sealed)], **asdict(counts)})


def _reopen(ledger: Ledger, batch_id: str, status: Status, changes: list[_Change]) -> None:
    """Make all the changes and set the batch in progress, in one transaction; or none of it.

    Raises:
        MillraceError: The batch or a shard is not as it was read (batch_busy).
    """
    with ledger.write() as connection:
        now = connection.scalar(sa.select(batches.c.status).where(batches.c.id == batch_id).with_for_update())
        if now != status:
            raise busy(batch_id)
        for change in changes:
            held = connection.execute(
                shards.update()
                .where(shards.c.id == change.shard.id, shards.c.epoch == change.shard.epoch)
                .where(shards.c.state == change.shard.state)
                .values(state=ShardState.READY, owner=None, lease_until=None, **change.values)
            )
            if not held.rowcount:
                raise busy(batch_id)
        stamps = [f"{end}_at" for end in ("finalizing", "completed", "failed", "expired", "cancelling", "cancelled")]
        connection.execute(
            batches.update()
            .where(batches.c.id == batch_id)
            .values(
                status=Status.IN_PROGRESS,
                reason="",
                canary=False,
                errors=[],
                output_file_id=None,
                error_file_id=None,
                expires_at=sa.case((batches.c.expires_at > clock(), batches.c.expires_at)),
                **dict.fromkeys(stamps, None),
            )
        )
        finalize_done(connection, batch_id)
