"""Removing batches: those a user deletes, those that are old, and folders that no ledger came to know.

A folder and its rows in the ledger cannot go in one step. The rows go first: a kill -9 in between leaves a
folder that nobody names, which breaks nothing; the other way round it would leave a batch that says it is
completed and has no answers.

A folder that a ledger does not know is not thereby nobody's: DATABASE_URL may name another ledger today, or
one that was restored. So nothing is removed for being unknown alone. A note in DATA_DIR/unrecorded stands
for each folder while the ledger may not know it: from before it is made until it is recorded, and from
before its rows are removed until it is gone. Only a folder with a note, unknown, a day old, and where
nothing was answered unless it was being deleted, is what a kill -9 has left.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

from millrace.batch.again import busy
from millrace.batch.folder import BatchFolder, storage_errors
from millrace.batch.ledger import Ledger
from millrace.batch.merge import alone_with
from millrace.batch.schema import Status
from millrace.crashpoints import crashpoint
from millrace.errors import MillraceError, NotFound

ORPHAN_AGE = 86400.0  # seconds; longer than any submit takes
MOST = 20  # batches removed in one round of the reaper, which has other things to do
_DELETED = "deleted"
#: Why a batch is not removed that another process is retrying or removing.
_IN_HAND = {"batch_busy", "batch_not_ended", NotFound.code}
_BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")


def note_new(folder: BatchFolder) -> None:
    """Note that a folder is about to be made for a batch which the ledger does not know yet.

    Raises:
        StorageError: DATA_DIR cannot be written.
    """
    _note(folder, "")


def delete(ledger: Ledger, data_dir: Path, batch_id: str) -> None:
    """Remove an ended batch from the ledger, and its files.

    Raises:
        InputError: It has not ended (batch_not_ended).
        MillraceError: Another process has its files (batch_busy).
        NotFound: There is no such batch.
        StorageError: Its files cannot be removed; the ledger does not know them any more.
    """
    folder = BatchFolder.of(data_dir, batch_id)
    if not ledger.status(batch_id).final or not folder.root.is_dir():
        ledger.forget(batch_id)  # which refuses one that has not ended
        return
    with alone_with(folder) as alone:
        if not alone:
            raise busy(batch_id)
        _note(folder, _DELETED)
        try:
            ledger.forget(batch_id)
        except MillraceError as error:
            if error.code in _IN_HAND:
                folder.note.unlink(missing_ok=True)
            raise
        crashpoint("delete.forgotten")
        _remove(folder)


def prune(ledger: Ledger, data_dir: Path, keep_days: int) -> list[str]:
    """Remove batches that ended more than `keep_days` days ago, a few at a time; return them. 0 keeps all."""
    removed: list[str] = []
    if keep_days:
        for batch_id in ledger.over(keep_days * 86400.0)[:MOST]:
            try:
                delete(ledger, data_dir, batch_id)
            except MillraceError as error:
                if error.code in _IN_HAND:
                    continue
                raise
            removed.append(batch_id)
    return removed


def remove_orphans(ledger: Ledger, data_dir: Path) -> list[str]:
    """Remove what submits and removals have left that were killed; return whose folders they were.

    Raises:
        Unreachable: The ledger does not answer: nobody can tell what it knows.
    """
    removed = []
    notes = data_dir / "unrecorded"
    for note in sorted(notes.iterdir()) if notes.is_dir() else []:
        folder = BatchFolder.of(data_dir, note.name)
        try:
            deleted, old = note.read_text() == _DELETED, time.time() - note.stat().st_mtime > ORPHAN_AGE
        except FileNotFoundError:  # by now its submit has come to its end
            continue
        if _status(ledger, note.name) is not None:
            # A submit is killed between its commit and the end of its note; a removal may still be at work.
            if old or not deleted:
                note.unlink(missing_ok=True)
        elif old and _BATCH_ID.fullmatch(note.name) and (deleted or not any(folder.segments.glob("*"))):
            _remove(folder)
            removed.append(note.name)
    return removed


def _status(ledger: Ledger, batch_id: str) -> Status | None:
    try:
        return ledger.status(batch_id)
    except NotFound:
        return None


def _note(folder: BatchFolder, text: str) -> None:
    with storage_errors(folder.note):
        folder.note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.note.write_text(text)


def _remove(folder: BatchFolder) -> None:
    with storage_errors(folder.root):
        if folder.root.exists():
            shutil.rmtree(folder.root)
        folder.note.unlink(missing_ok=True)
