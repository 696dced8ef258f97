"""Where a batch keeps its files under DATA_DIR.

DATA_DIR/batches/<batch id>/
  input.jsonl                        the rows as they will be sent, in the user's order
  plan                               which rows belong to which shard (millrace.batch.planner)
  segments/<shard>.<epoch>.jsonl     answers, appended by one runner each
  segments/<shard>.<epoch>.flight    which rows that runner has in flight (millrace.batch.suspects)
  output.jsonl, errors.jsonl         written by the merge
DATA_DIR/unrecorded/<batch id>       a note, while the ledger may not know that folder (millrace.batch.prune)
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import StorageError


@dataclass(frozen=True, slots=True)
class BatchFolder:
    """The paths of one batch."""

    root: Path

    @classmethod
    def of(cls, data_dir: Path, batch_id: str) -> BatchFolder:
        """Return the folder of `batch_id`; it need not exist."""
        return cls(data_dir / "batches" / batch_id)

    @classmethod
    def there(cls, data_dir: Path, batch_id: str, *, whole: bool = False) -> BatchFolder:
        """Return the folder of `batch_id`; with `whole`, one that has what its rows need to be run.

        Raises:
            StorageError: It is not there, or its input or plan is not (batch_files_missing).
        """
        folder = cls.of(data_dir, batch_id)
        for path in (folder.root, folder.input, folder.plan) if whole else (folder.root,):
            if not path.exists():
                raise StorageError(
                    f"The files of {batch_id} are not in DATA_DIR, or not all of them: there is no {path}.",
                    "Set DATA_DIR to the folder that has them, or restore them from a backup.",
                    code="batch_files_missing",
                )
        return folder

    @property
    def note(self) -> Path:
        """The note that stands while the ledger may not know this folder."""
        return self.root.parent.parent / "unrecorded" / self.root.name

    @property
    def input(self) -> Path:
        """The rows as they will be sent."""
        return self.root / "input.jsonl"

    @property
    def plan(self) -> Path:
        """The plan file."""
        return self.root / "plan"

    @property
    def output(self) -> Path:
        """The answers, in input order."""
        return self.root / "output.jsonl"

    @property
    def errors(self) -> Path:
        """The failed rows, in input order."""
        return self.root / "errors.jsonl"

    @property
    def segments(self) -> Path:
        """The folder of the segments."""
        return self.root / "segments"

    def segment(self, shard: int, epoch: int) -> Path:
        """Return the segment that the runner of `epoch` writes for shard number `shard`."""
        return self.segments / f"{shard:06d}.{epoch}.jsonl"

    def flight(self, shard: int, epoch: int) -> Path:
        """Return the flight journal of the runner of `epoch` for shard number `shard`."""
        return self.segments / f"{shard:06d}.{epoch}.flight"

    def newest_epochs(self) -> dict[int, int]:
        """Return the newest epoch that has a segment, by shard number; empty where no file is."""
        newest: dict[int, int] = {}
        for path in self.segments.glob("*.*.jsonl"):
            shard, epoch = path.name.split(".")[:2]
            if shard.isdecimal() and epoch.isdecimal():
                newest[int(shard)] = max(newest.get(int(shard), 0), int(epoch))
        return newest


@contextlib.contextmanager
def storage_errors(path: Path, hint: str = "Check that DATA_DIR exists and is yours to write.") -> Iterator[None]:
    """Turn an OSError on `path` into a sentence a user can act on.

    Raises:
        StorageError: The disk is full (code disk_full) or the path cannot be used.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk that holds {path} is full.",
                "Free some space and run the command again; finished rows are kept.",
                code="disk_full",
            ) from error
        raise StorageError(
            f"{path} cannot be used: {error.strerror or error}.",
            hint,
        ) from error


def sync_folder(path: Path) -> None:
    """Make a rename or a new file in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
