"""A claimed shard while it is run: its rows, its files, and how it ends.

prepare ──> waiting rows, suspects ──> append, flush ──> finish | give_back ──> close
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from millrace import metrics
from millrace.batch.ask import Answered
from millrace.batch.folder import BatchFolder, storage_errors
from millrace.batch.lease import Counts, Finish, Lease, Leases, Renewal, Sealed
from millrace.batch.lines import decode_input, failure_line
from millrace.batch.planner import read_rows
from millrace.batch.segments import SegmentWriter, recover
from millrace.batch.suspects import MOST_PREPARATIONS, Doing, Flight, Suspect, discard_flights, read_flights, set_levels
from millrace.crashpoints import crashpoint
from millrace.errors import Unreachable

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The code of rows of a shard that no worker could begin.
SHARD_FAILED = "shard_failed"
_AGAIN = 1.0  # seconds between tries at a ledger that does not answer


@dataclass(eq=False)
class Shard:
    """A shard that this process holds."""

    lease: Lease
    writer: SegmentWriter
    flight: Flight
    #: Rows without an answer, but for the suspects.
    waiting: deque[tuple[int, bytes]]
    #: In no particular order that matters, but the same each time.
    suspects: dict[Suspect, None]
    counts: Counts
    #: Rows that earlier owners answered.
    earlier: int
    started: float
    in_flight: int = 0
    lanes: set[asyncio.Task[None]] = field(default_factory=set)
    #: Set once no row of it may be started any more.
    stopped: Renewal | None = None
    #: When rows in flight are dropped, on the monotonic clock, and whether they were.
    drop_at: float = 0.0
    dropped: bool = False
    finishing: bool = False
    #: Slots in the journal of rows whose answers are not flushed yet.
    _landed: list[int] = field(default_factory=list)
    #: What of `counts` the metrics have, and the codes of failures that they do not have yet.
    _measured: Counts = field(default_factory=Counts)
    _failures: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Rows answered, by earlier owners too."""
        return self.counts.completed + self.counts.failed

    @property
    def complete(self) -> bool:
        """Whether every row is answered."""
        return not self.waiting and self.answered == self.lease.rows

    def enter(self, lane: asyncio.Task[None]) -> None:
        """Count a row in flight, that `lane` asks for."""
        self.lanes.add(lane)
        self.in_flight += 1

    def leave(self, lane: asyncio.Task[None]) -> None:
        """Count a row that is not in flight any more."""
        self.lanes.discard(lane)
        self.in_flight -= 1

    def append(self, row: int, slot: int, answered: Answered) -> None:
        """Take a row's answer; `flush` writes it. The lease must be trusted."""
        self.writer.append(row, answered.ok, answered.prompt_tokens, answered.completion_tokens, answered.line)
        # In flight until it is written: an answer may be so large that it takes the process down here.
        self._landed.append(slot)
        self.counts.add(answered.ok, answered.prompt_tokens, answered.completion_tokens)
        if not answered.ok:
            self._failures.append(answered.code)

    def flush(self) -> None:
        """Hand the answers taken so far to the operating system, and count them in the metrics.

        Raises:
            StorageError: They cannot be written.
        """
        self.writer.flush()
        for slot in self._landed:
            self.flight.end(slot)
        self._landed.clear()
        now, before = self.counts, self._measured
        metrics.batch_answers(
            self.lease.model,
            now.completed - before.completed,
            now.failed - before.failed,
            now.prompt_tokens - before.prompt_tokens,
            now.completion_tokens - before.completion_tokens,
            self._failures,
        )
        self._measured = replace(now)
        self._failures.clear()

    async def finish(self, leases: Leases) -> Finish:
        """Sync and seal the shard, whose rows are all answered, and end it.

        Raises:
            StorageError: The segment cannot be written.
            Unreachable: The ledger does not answer as long as the lease holds.
        """
        self.flush()
        await asyncio.to_thread(self.writer.sync)
        crashpoint("shard.synced")
        if not self.lease.trusted:
            return Finish.LOST
        sealed, seconds = self._sealed(), time.monotonic() - self.started
        ended = await self._while_trusted(lambda: leases.finish(self.lease, sealed, self.counts, seconds))
        crashpoint("shard.finished")
        return ended

    async def give_back(self, leases: Leases, why: Renewal) -> bool:
        """Sync and seal what is answered, and give the shard back or end it as cancelled; False if it is lost.

        Raises:
            StorageError: The segment cannot be written.
            Unreachable: The ledger does not answer as long as the lease holds.
        """
        if why is Renewal.LOST or not self.lease.trusted:
            return False
        self.flush()
        await asyncio.to_thread(self.writer.sync)
        sealed, seconds = self._sealed(), time.monotonic() - self.started
        end = leases.end_cancelled if why is Renewal.CANCEL else leases.release
        return await self._while_trusted(lambda: end(self.lease, sealed, self.counts, seconds))

    def close(self) -> None:
        """Close the files; the journal stays if suspects are left, for the next owner."""
        self.writer.close()
        set_levels(self.suspects)
        for suspect in self.suspects:
            self.flight.mark(suspect, Doing.WAITING)
        self.flight.close(keep=bool(self.suspects))

    def _sealed(self) -> list[Sealed]:
        return [*self.lease.sealed, self.writer.sealed()]

    async def _while_trusted(self, change: Callable[[], T]) -> T:
        """Return what `change` returns; wait for a ledger that does not answer as long as the lease holds."""
        while True:
            try:
                return await asyncio.to_thread(change)
            except Unreachable as error:
                if not self.lease.trusted:
                    raise
                log.warning("%s", error)
                await asyncio.sleep(_AGAIN)


def prepare(data_dir: Path, leases: Leases, lease: Lease) -> Shard | None:
    """Seal what earlier owners answered, read the rest and whom it suspects; None if the lease is lost meanwhile.

    A shard before whose first row worker after worker dies is ended here, with its rows as errors.

    Raises:
        StorageError: The batch's files are not here.
        IntegrityError: A sealed segment was changed.
    """
    started = time.monotonic()
    folder = BatchFolder.of(data_dir, lease.batch_id)
    accused = read_flights(folder, lease.number, lease.epoch)
    flight = Flight(folder.flight(lease.number, lease.epoch), lease.epoch, lease.rows)
    writer: SegmentWriter | None = None
    suspects: dict[Suspect, None] = {}
    try:
        older = recover(folder, lease.number, lease.epoch, lease.sealed)
        crashpoint("recover.read")
        if older.sealed != lease.sealed:
            if not leases.seal(lease, older.sealed, older.counts):
                flight.close()
                return None
            crashpoint("recover.sealed")
        given_up = accused.preparations >= MOST_PREPARATIONS
        waiting: deque[tuple[int, bytes]] = deque()
        with storage_errors(folder.input):
            rows = (item for item in read_rows(folder, lease.first, lease.rows) if item[0] not in older.rows)
            for row, line in () if given_up else rows:
                if row in accused.rows:
                    deaths, level = accused.rows[row]
                    suspect = Suspect(row, line, flight.start(row), deaths, level)
                    flight.mark(suspect, Doing.WAITING)
                    suspects[suspect] = None
                else:
                    waiting.append((row, line))
        writer = SegmentWriter(folder.segment(lease.number, lease.epoch), lease.epoch, lambda: lease.trusted)
        counts = older.counts
        measured = replace(counts)
        earlier = len(older.rows)
        if given_up:
            message = f"{accused.preparations} workers died, one after the other, before they could ask for a row."
            with storage_errors(folder.input):
                for row, line in rows:
                    custom_id = decode_input(line).custom_id
                    writer.append(row, False, 0, 0, failure_line(lease.batch_id, row, custom_id, SHARD_FAILED, message))
                    writer.flush()  # each by itself: memory may be what they died of
                    counts.add(False, 0, 0)
        flight.prepared()
        discard_flights(folder, lease.number, lease.epoch)
    except BaseException:
        if writer is not None:
            writer.close()
        flight.close(keep=bool(suspects))  # it may be all that is left of what earlier ones say
        raise
    failures = [SHARD_FAILED] * (counts.failed - measured.failed)
    return Shard(
        lease, writer, flight, waiting, suspects, counts, earlier, started, _measured=measured, _failures=failures
    )
