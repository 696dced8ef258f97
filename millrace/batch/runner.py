"""The runner: one process's session of claiming shards, asking the engine, and appending answers.

One event loop. As many lanes as the process may have requests in flight each take a row, ask the
engine until there is an answer that counts, append it and take the next row. The next shard is claimed
while the last rows of the one before are still in flight, so the engine stays full between shards.

    claim ──> recover older segments ──> seal them ──> lanes ──> sync, seal and finish
                                                         └─ stop, lost, cancel: rows in flight are dropped

A session ends when there is nothing to claim, when its time is over, or when it is told to stop; then
what it holds goes back to the ledger with the answered rows sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from millrace import metrics
from millrace.batch.ask import Answered, Asker
from millrace.batch.folder import BatchFolder, storage_errors
from millrace.batch.lease import Counts, Finish, Lease, Leases, Renewal
from millrace.batch.planner import read_rows
from millrace.batch.segments import SegmentWriter, recover
from millrace.engine.admission import limit_of, share_of
from millrace.engine.client import EngineClient
from millrace.engine.probes import EngineState, Watch, probe
from millrace.engine.retry import EngineError
from millrace.errors import IntegrityError, MillraceError, Unreachable
from millrace.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK = 0.25  # seconds between looks at the stop flag, the leases and the files
PROGRESS = 1.0  # seconds between recorded counts, for those who watch
DRAIN = 10.0  # seconds that requests in flight get when the session is told to stop


@dataclass(frozen=True)
class Outcome:
    """What a session did."""

    shards: int
    rows: int
    #: Whether it ended for want of time, not of work.
    more: bool


@dataclass(eq=False)
class _Shard:
    """A claimed shard that is being run."""

    lease: Lease
    writer: SegmentWriter
    waiting: deque[tuple[int, bytes]]
    counts: Counts
    started: float
    renewed: float
    in_flight: int = 0
    #: Set once no row of it may be started or written any more.
    stopped: Renewal | None = None
    finishing: bool = False
    lanes: set[asyncio.Task[None]] = field(default_factory=set)
    recorded: int = 0
    #: What of `counts` the metrics have, and the codes of failures that they do not have yet.
    measured: Counts = field(default_factory=Counts)
    failures: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return self.counts.completed + self.counts.failed

    def measure(self) -> None:
        """Add to the worker's metrics what was answered since the last call."""
        now, before = self.counts, self.measured
        metrics.batch_answers(
            self.lease.model,
            now.completed - before.completed,
            now.failed - before.failed,
            now.prompt_tokens - before.prompt_tokens,
            now.completion_tokens - before.completion_tokens,
            self.failures,
        )
        self.measured = replace(now)
        self.failures.clear()


class Session:
    """Runs shards until there are none, `seconds` are over, or `stop` answers True.

    Args:
        leases: Claims and renews for this process.
        settings: For DATA_DIR, the engine and the limits.
        stop: Asked several times a second whether to come to an end.
        seconds: No shard is claimed after this.
        report: Told what is wrong while rows wait for the engine, else None.
        ended_batch: Told, from another thread, of a batch whose last shard this session ended.

    Raises (from `run`):
        StorageError: A segment cannot be written; leases run out and the rows run again later.
        Unreachable: The ledger does not answer at a claim.
    """

    def __init__(
        self,
        leases: Leases,
        settings: Settings,
        *,
        stop: Callable[[], bool],
        seconds: float,
        report: Callable[[MillraceError | None], None] = lambda trouble: None,
        ended_batch: Callable[[str], None] = lambda batch_id: None,
    ) -> None:
        self._leases = leases
        self._settings = settings
        self._stop = stop
        self._seconds = seconds
        self._report = report
        self._ended_batch = ended_batch
        self._shards: set[_Shard] = set()
        self._feeding: deque[_Shard] = deque()
        self._lanes: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._refilled = asyncio.Event()
        self._refilling = False
        self._exhausted = False
        self._more = False
        self._draining = False
        self._failure: BaseException | None = None
        self._model = ""
        self._done_shards = 0
        self._done_rows = 0
        #: Gauges of this session, by series.
        self._load: dict[str, float] = {}

    async def run(self) -> Outcome:
        """Run the session to its end."""
        self._ends = time.monotonic() + self._seconds
        async with EngineClient.of(self._settings) as client:
            self._client = client
            self._watch = Watch(client)
            try:
                state = await self._await_engine()
                if state is not None:
                    self._asker = Asker(client, self._watch, state, self._settings)
                    await self._work(limit_of(state, self._settings.batch_concurrency))
            finally:
                await self._watch.close()
        if self._failure is not None:
            raise self._failure
        return Outcome(self._done_shards, self._done_rows, self._more)

    async def _await_engine(self) -> EngineState | None:
        """Return what the engine is once it answers; None when it is time to end before."""
        pause = 0.2
        while not self._stop():
            try:
                state = await probe(self._client)
            except EngineError as error:
                self._report(error)
                if time.monotonic() >= self._ends:
                    break
                await asyncio.sleep(pause)
                pause = min(2 * pause, 2.0)
            else:
                self._report(None)
                return state
        self._more = True
        return None

    async def _work(self, limit: int) -> None:
        self._limit = self._share = limit
        ticker = asyncio.create_task(self._tick())
        ticker.add_done_callback(lambda task: self._ended(task, set()))
        try:
            await self._refill()
            self._open_lanes()
            while self._lanes or self._background:
                await asyncio.wait(self._lanes | self._background, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # _ended has noted its failure
                await ticker
            # Cancelled from outside (a soft shutdown that ran out of time): give back what is held.
            for lane in self._lanes:
                lane.cancel()
            await asyncio.gather(*self._lanes, *self._background, return_exceptions=True)
            for shard in list(self._shards):
                try:
                    await self._give_back(shard, shard.stopped or Renewal.DRAIN)
                except MillraceError as error:
                    log.warning("%s The shard's lease runs out instead.", error)
                    self._forget(shard)
            metrics.show(dict.fromkeys(self._load, 0.0))

    # Lanes.

    def _open_lanes(self) -> None:
        busy = sum(shard.in_flight for shard in self._shards)
        wanted = min(self._share, busy + sum(len(shard.waiting) for shard in self._feeding))
        while len(self._lanes) < wanted:
            self._start(self._lane(), self._lanes)

    def _start(self, work: Coroutine[Any, Any, None], group: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        group.add(task)
        task.add_done_callback(lambda task: self._ended(task, group))

    def _ended(self, task: asyncio.Task[None], group: set[asyncio.Task[None]]) -> None:
        group.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the session for `error`; the first one is raised by `run`."""
        if self._failure is None:
            self._failure = error
        self._exhausted = self._draining = True
        self._refilled.set()
        for lane in self._lanes:
            lane.cancel()

    async def _lane(self) -> None:
        own = asyncio.current_task()
        assert own is not None
        while True:
            if len(self._lanes) > self._share:
                # At once: of many lanes that end in one turn, each must see that the others did.
                self._lanes.discard(own)
                return
            taken = self._take()
            if taken is None:
                if self._exhausted or self._draining:
                    return
                self._refilled.clear()
                await self._refilled.wait()
                continue
            shard, row, line = taken
            shard.lanes.add(own)
            shard.in_flight += 1
            try:
                self._append(shard, row, await self._asker.ask(shard.lease.batch_id, row, line))
            except asyncio.CancelledError:
                # Our shard was taken from us: this lane goes on with another one.
                if shard.stopped is None or self._failure is not None or own.cancelling() > 1:
                    shard.waiting.appendleft((row, line))  # not answered by this lane
                    raise
                own.uncancel()
            finally:
                shard.lanes.discard(own)
                shard.in_flight -= 1
                self._settle(shard)

    def _take(self) -> tuple[_Shard, int, bytes] | None:
        while self._feeding and not self._draining:
            shard = self._feeding[0]
            if shard.stopped is not None or not shard.waiting:
                self._feeding.popleft()
                continue
            row, line = shard.waiting.popleft()
            if len(shard.waiting) < self._share and len(self._feeding) == 1:
                self._ask_refill()
            return shard, row, line
        self._ask_refill()
        return None

    def _append(self, shard: _Shard, row: int, answered: Answered) -> None:
        if shard.stopped is not None:
            return
        if not shard.lease.trusted:
            # Someone else may have the shard by now: nothing of ours may follow what is written.
            self._stop_shard(shard, Renewal.LOST)
            return
        if not shard.writer.waiting:
            # One write for all the answers of this turn of the loop.
            asyncio.get_running_loop().call_soon(self._flush, shard)
        shard.writer.append(row, answered.ok, answered.prompt_tokens, answered.completion_tokens, answered.line)
        shard.counts.add(answered.ok, answered.prompt_tokens, answered.completion_tokens)
        if not answered.ok:
            shard.failures.append(answered.code)

    def _flush(self, shard: _Shard) -> None:
        if shard.stopped is Renewal.LOST:
            return
        try:
            shard.writer.flush()
        except MillraceError as error:
            shard.stopped = Renewal.LOST  # its tail may be torn: let the lease run out and be recovered
            self._fail(error)
            return
        shard.measure()

    # Shards.

    def _ask_refill(self) -> None:
        if not (self._refilling or self._exhausted or self._draining):
            # Now and not when the task begins: many lanes ask in one turn of the loop.
            self._refilling = True
            self._start(self._refill(), self._background)

    async def _refill(self) -> None:
        """Claim shards until there are rows to run, or nothing to claim."""
        self._refilling = True
        try:
            while not (self._exhausted or self._draining):
                if time.monotonic() >= self._ends:
                    self._exhausted = self._more = True
                    break
                lease = await self._claim()
                if lease is None:
                    self._exhausted = True
                    break
                self._model = lease.model
                try:
                    shard = await asyncio.to_thread(self._prepare, lease)
                except MillraceError as error:
                    # No more of this for us, but what is in flight goes on: the fault may be this
                    # machine's alone (another DATA_DIR), or one shard's.
                    if isinstance(error, IntegrityError):  # nobody can complete this batch
                        await asyncio.to_thread(self._leases.ledger.fail, lease.batch_id, error.code, str(error))
                    await asyncio.to_thread(self._leases.hand_back, lease)
                    self._failure = self._failure or error
                    self._exhausted = True
                    break
                if shard is None:
                    continue
                self._shards.add(shard)
                self._feeding.append(shard)
                if shard.waiting:
                    break
                self._settle(shard)  # its last owner had answered every row
        finally:
            self._refilling = False
            self._refilled.set()
        self._open_lanes()

    async def _claim(self) -> Lease | None:
        """Claim a shard; while others are in flight, wait for a ledger that does not answer."""
        while True:
            try:
                return await asyncio.to_thread(self._leases.claim, self._model)
            except Unreachable as error:
                if not any(shard.lease.trusted for shard in self._shards) or self._draining:
                    raise
                log.warning("%s", error)
                await asyncio.sleep(PROGRESS)

    async def _while_trusted(self, lease: Lease, change: Callable[[], T]) -> T:
        """Return what `change` returns; wait for a ledger that does not answer as long as the lease holds."""
        while True:
            try:
                return await asyncio.to_thread(change)
            except Unreachable as error:
                if not lease.trusted:
                    raise
                log.warning("%s", error)
                await asyncio.sleep(PROGRESS)

    def _prepare(self, lease: Lease) -> _Shard | None:
        """Seal what earlier owners answered and read the rest; None if the lease is lost meanwhile.

        Raises:
            StorageError: The batch's files are not here.
            IntegrityError: A sealed segment was changed.
        """
        started = time.monotonic()
        folder = BatchFolder.of(Path(self._settings.data_dir), lease.batch_id)
        older = recover(folder, lease.number, lease.epoch, lease.sealed)
        if older.sealed != lease.sealed and not self._leases.seal(lease, older.sealed, older.counts):
            return None
        with storage_errors(folder.input):
            rows = read_rows(folder, lease.first, lease.rows)
            waiting = deque(item for item in rows if item[0] not in older.rows)
        return _Shard(
            lease=lease,
            writer=SegmentWriter(folder.segment(lease.number, lease.epoch), lease.epoch),
            waiting=waiting,
            counts=older.counts,
            started=started,
            renewed=started,
            recorded=older.counts.completed + older.counts.failed,
            measured=replace(older.counts),  # by its earlier owner
        )

    def _settle(self, shard: _Shard) -> None:
        """Finish a shard whose last row is answered, or give back one whose last request has ended."""
        if shard.in_flight or shard.finishing:
            return
        if shard.stopped is not None:
            shard.finishing = True
            self._start(self._give_back(shard, shard.stopped), self._background)
        elif not shard.waiting and shard.answered == shard.lease.rows:
            shard.finishing = True
            self._start(self._finish(shard), self._background)
        elif self._draining:
            shard.finishing = True
            self._start(self._give_back(shard, Renewal.DRAIN), self._background)

    async def _finish(self, shard: _Shard) -> None:
        self._flush(shard)
        if shard.stopped is Renewal.LOST:
            self._forget(shard)
            return
        await asyncio.to_thread(shard.writer.sync)
        sealed = [*shard.lease.sealed, shard.writer.sealed()]
        seconds = time.monotonic() - shard.started
        ended = Finish.LOST
        if shard.lease.trusted:
            ended = await self._while_trusted(
                shard.lease, lambda: self._leases.finish(shard.lease, sealed, shard.counts, seconds)
            )
        if ended:
            self._done_shards += 1
            self._done_rows += shard.writer.rows
        if ended is Finish.BATCH:
            await asyncio.to_thread(self._ended_batch, shard.lease.batch_id)
        self._forget(shard)

    async def _give_back(self, shard: _Shard, why: Renewal) -> None:
        if why is not Renewal.LOST and shard.lease.trusted:
            shard.writer.flush()
            await asyncio.to_thread(shard.writer.sync)
            sealed = [*shard.lease.sealed, shard.writer.sealed()]
            seconds = time.monotonic() - shard.started
            end = self._leases.end_cancelled if why is Renewal.CANCEL else self._leases.release
            held = await self._while_trusted(shard.lease, lambda: end(shard.lease, sealed, shard.counts, seconds))
            if held:
                self._done_rows += shard.writer.rows
                if why is Renewal.CANCEL:
                    await asyncio.to_thread(self._ended_batch, shard.lease.batch_id)
        self._forget(shard)

    def _forget(self, shard: _Shard) -> None:
        if shard in self._shards:
            self._shards.discard(shard)
            shard.writer.close()

    def _stop_shard(self, shard: _Shard, why: Renewal) -> None:
        """Drop a shard's requests in flight; the connections close, so the engine stops working on them."""
        shard.stopped = why
        shard.waiting.clear()
        for lane in shard.lanes - {asyncio.current_task()}:
            lane.cancel()
        self._settle(shard)

    # The clock.

    async def _tick(self) -> None:
        """Renew leases, sync files, record counts, and see the stop flag."""
        shared = synced = 0.0
        drained: float | None = None
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            self._report(self._watch.trouble)
            self._asker.expire()
            self._show_load()
            if drained is None and self._stop():
                drained = now + DRAIN
                self._draining = self._more = True
                self._refilled.set()
                for shard in list(self._shards):
                    self._settle(shard)
            if drained is not None and (now >= drained or not self._watch.up):
                for shard in list(self._shards):
                    if shard.stopped is None and not shard.finishing:
                        self._stop_shard(shard, Renewal.DRAIN)
            if now - synced >= self._settings.batch_sync_seconds:
                synced = now
                await self._sync()
            for shard in list(self._shards):
                await self._renew(shard, now)
            if now - shared >= PROGRESS and self._shards:
                shared = now
                await self._share_engine()

    def _show_load(self) -> None:
        """Set the metrics of what is in flight, also to 0 for a model that has nothing any more."""
        self._load = dict.fromkeys(self._load, 0.0)
        for shard in self._shards:
            series = metrics.INFLIGHT.series("batch", shard.lease.model)
            self._load[series] = self._load.get(series, 0.0) + self._asker.asking(shard.lanes)
        self._load[metrics.LIMIT.series()] = self._share
        metrics.show(self._load)

    async def _sync(self) -> None:
        for shard in list(self._shards):
            if shard.writer.unsynced and not shard.finishing:
                try:
                    await asyncio.to_thread(shard.writer.sync)
                except MillraceError as error:
                    shard.stopped = Renewal.LOST
                    self._fail(error)

    async def _renew(self, shard: _Shard, now: float) -> None:
        due = now - shard.renewed >= self._leases.ttl / 3
        news = shard.answered != shard.recorded and now - shard.renewed >= PROGRESS
        if shard.finishing or shard.stopped is not None or not (due or news):
            return
        answered = shard.answered
        try:
            answer = await asyncio.to_thread(self._leases.renew, shard.lease, shard.counts)
        except MillraceError as error:
            # The ledger is away: go on as long as the lease is trusted, and no longer.
            log.warning("%s", error)
            answer = Renewal.OK if shard.lease.trusted else Renewal.LOST
        else:
            shard.renewed, shard.recorded = now, answered
        if answer is not Renewal.OK and shard.stopped is None and not shard.finishing:
            log.info("Shard %s of %s: %s.", shard.lease.number, shard.lease.batch_id, answer)
            self._stop_shard(shard, answer)

    async def _share_engine(self) -> None:
        with contextlib.suppress(MillraceError):  # the share of a second ago serves as well
            self._share = share_of(self._limit, await asyncio.to_thread(self._leases.owners))
            self._open_lanes()
