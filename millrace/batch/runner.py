"""The runner: one process's session of claiming shards, asking the engine, and appending answers.

One event loop. As many lanes as the process may have requests in flight each take a row, ask the
engine until there is an answer that counts, append it and take the next row. The next shard is claimed
while the last rows of the one before are still in flight, so the engine stays full between shards.

    claim ──> prepare ──> suspects, alone ──> lanes ──> sync, seal and finish
                                                └─ pause, stop: rows in flight may end; lost, cancel: they are dropped

A session ends when there is nothing to claim, when its time is over, or when it is told to stop; then
what it holds goes back to the ledger with the answered rows sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from millrace import metrics
from millrace.batch.ask import Answered, Asker, ModelAway
from millrace.batch.canary import Canary
from millrace.batch.claimed import Shard
from millrace.batch.claims import Claims
from millrace.batch.isolation import Isolation
from millrace.batch.lease import Finish, Leases, Renewal, waiting_shards
from millrace.batch.renewal import Renewer
from millrace.batch.suspects import Suspect
from millrace.batch.turns import Turn
from millrace.engine.admission import limit_of, share_of
from millrace.engine.breaker import Breaker
from millrace.engine.client import EngineClient
from millrace.engine.probes import EngineState, probe
from millrace.engine.retry import EngineError
from millrace.errors import MillraceError
from millrace.settings import Settings

log = logging.getLogger(__name__)

TICK = 0.25  # seconds between looks at the stop flag and the turnstile
PROGRESS = 1.0  # seconds between looks at who shares the engine
DRAIN = 10.0  # seconds that requests in flight get when the session is told to stop or their batch is paused


@dataclass(frozen=True)
class Outcome:
    """What a session did."""

    shards: int
    rows: int
    #: Whether it ended for want of time, not of work.
    more: bool


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
        self._canary = Canary(leases.ledger, settings)
        self.shards: set[Shard] = set()
        self._feeding: deque[Shard] = deque()
        self.lanes: set[asyncio.Task[None]] = set()
        self.background: set[asyncio.Task[None]] = set()
        self._refilled = asyncio.Event()
        self._refilling = False
        self._exhausted = False
        self._more = False
        self.draining = False
        self.failure: BaseException | None = None
        self._done_shards = 0
        self._done_rows = 0
        #: Gauges of this session, by series.
        self._load: dict[str, float] = {}

    async def run(self) -> Outcome:
        """Run the session to its end."""
        self._ends = time.monotonic() + self._seconds
        async with EngineClient.of(self._settings) as client:
            self._client = client
            self.breaker = Breaker(client)
            try:
                state = await self._await_engine()
                if state is not None:
                    self.asker = Asker(client, self.breaker, self._settings)
                    await self._work(limit_of(state, self._settings.batch_concurrency))
            finally:
                await self.breaker.close()
        if self.failure is not None:
            raise self.failure
        return Outcome(self._done_shards, self._done_rows, self._more)

    async def _await_engine(self) -> EngineState | None:
        """Return what the engine is once it answers; None when it is time to end before."""
        pause = 0.2
        while not self._stop():
            began = time.monotonic()
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
                self.breaker.seen(state, began)
                return state
        self._more = True
        return None

    async def _work(self, limit: int) -> None:
        self.limit = self._share = limit
        turn = Turn(self._settings.data_dir)
        self._isolation = Isolation(self, turn)
        self._claims = Claims(self._leases, self.breaker, self._settings.data_dir, going=self._going, busy=self._busy)
        clocks: set[asyncio.Task[None]] = set()
        # Each by itself: a sync that hangs on a bad disk must not keep a lease from being renewed, and so on.
        self.start(Renewer(self._leases, self.shards, self.stop_shard).run(), clocks)
        self.start(_every(TICK, self._tick), clocks)
        self.start(_every(self._settings.batch_sync_seconds, self._sync), clocks)
        self.start(_every(PROGRESS, self._share_engine), clocks)
        try:
            await self._isolation.join(self._ends)
            await self._refill()
            while self.lanes or self.background:
                await asyncio.wait(self.lanes | self.background, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.draining = self._exhausted = True
            for clock in clocks:
                clock.cancel()
            # Cancelled from outside (a soft shutdown that ran out of time): give back what is held.
            for lane in self.lanes:
                lane.cancel()
            await asyncio.gather(*clocks, *self.lanes, *self.background, return_exceptions=True)
            for shard in list(self.shards):
                try:
                    await self._give_back(shard, shard.stopped or Renewal.DRAIN)
                except MillraceError as error:
                    log.warning("%s The shard's lease runs out instead.", error)
                    self._forget(shard)
            turn.close()
            metrics.show(dict.fromkeys(self._load, 0.0))

    # Lanes.

    def open_lanes(self) -> None:
        """Start lanes for the rows there are."""
        for shard in self.shards:
            if shard.waiting and shard not in self._feeding:  # rows that were put back
                self._feeding.append(shard)
        if self._isolation.aside:
            return
        busy = sum(shard.in_flight for shard in self.shards)
        wanted = min(self._share, busy + sum(len(shard.waiting) for shard in self._feeding))
        while len(self.lanes) < wanted:
            self.start(self._lane(), self.lanes)
        if not self.lanes:  # what there was were suspects alone
            self._ask_refill()

    def close_lanes(self) -> None:
        """Have lanes that wait for rows look again whether they may."""
        self._refilled.set()

    def start(self, work: Coroutine[Any, Any, None], group: set[asyncio.Task[None]]) -> None:
        """Run `work` as a task of `group`; its failure is the session's."""
        task = asyncio.create_task(work)
        group.add(task)
        task.add_done_callback(lambda task: self._ended(task, group))

    def _ended(self, task: asyncio.Task[None], group: set[asyncio.Task[None]]) -> None:
        group.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the session for `error`; the first one is raised by `run`."""
        if self.failure is None:
            self.failure = error
        self._exhausted = self.draining = True
        self._refilled.set()
        for lane in self.lanes:
            lane.cancel()

    async def _lane(self) -> None:
        own = asyncio.current_task()
        assert own is not None
        while True:
            if len(self.lanes) > self._share or self._isolation.aside:
                # At once: of many lanes that end in one turn, each must see that the others did.
                self.lanes.discard(own)
                return
            taken = self._take()
            if taken is None:
                if self._exhausted or self.draining:
                    return
                self._refilled.clear()
                await self._refilled.wait()
                continue
            shard, row, line = taken
            slot = shard.flight.start(row)
            shard.enter(own)
            try:
                answered = await self.asker.ask(shard.lease, row, line)
            except ModelAway:
                shard.flight.end(slot)
                self.stop_shard(shard, Renewal.DRAIN)
            except asyncio.CancelledError:
                self._isolation.dropped(shard, Suspect(row, line, slot))
                # Dropped: our shard was taken from us, and this lane goes on with another one.
                if not shard.dropped or self.failure is not None or own.cancelling() > 1:
                    shard.waiting.appendleft((row, line))  # not answered by this lane
                    raise
                own.uncancel()
            except Exception as error:  # noqa: BLE001  # a row that our code cannot bear is a suspect too
                self._isolation.accuse(shard, Suspect(row, line, slot), error)
            else:
                self.append(shard, row, slot, answered)
            finally:
                shard.leave(own)
                self.settle(shard)

    def _take(self) -> tuple[Shard, int, bytes] | None:
        while self._feeding and not self.draining:
            shard = self._feeding[0]
            if shard.stopped is not None or not shard.waiting:
                self._feeding.popleft()
                continue
            if not shard.lease.trusted:
                # This process slept, or the claim took long: what is asked for now would be asked for twice.
                self.stop_shard(shard, Renewal.LOST)
                continue
            row, line = shard.waiting.popleft()
            if len(shard.waiting) < self._share and len(self._feeding) == 1:
                self._ask_refill()
            return shard, row, line
        self._ask_refill()
        return None

    def append(self, shard: Shard, row: int, slot: int, answered: Answered) -> None:
        """Write a row's answer, if it is still ours to write."""
        if shard.dropped:
            return
        if not shard.lease.trusted:
            # Someone else may have the shard by now: nothing of ours may follow what is written.
            self.stop_shard(shard, Renewal.LOST)
            return
        if not shard.writer.waiting:
            # One write for all the answers of this turn of the loop.
            asyncio.get_running_loop().call_soon(self._flush, shard)
        shard.append(row, slot, answered)
        if self._canary.ended(shard.lease.batch_id, answered):
            self.start(asyncio.to_thread(self._canary.pause, shard.lease.batch_id), self.background)

    def _flush(self, shard: Shard) -> None:
        if shard.stopped is Renewal.LOST:
            return
        try:
            shard.flush()
        except MillraceError as error:
            self._drop(shard, Renewal.LOST)  # its tail may be torn: let the lease run out and be recovered
            self._fail(error)

    # Shards.

    def _ask_refill(self) -> None:
        if not (self._refilling or self._exhausted or self.draining):
            # Now and not when the task begins: many lanes ask in one turn of the loop.
            self._refilling = True
            self.start(self._refill(), self.background)

    async def _refill(self) -> None:
        """Claim shards until there are rows to run, or nothing to claim."""
        self._refilling = True
        try:
            while self._going():
                shard = await self._claims.next()
                if shard is None:
                    self.failure = self.failure or self._claims.failure
                    self._exhausted = True
                    break
                self.shards.add(shard)
                self._feeding.append(shard)
                self._isolation.claimed(shard)
                if shard.waiting or shard.suspects:
                    break
                self.settle(shard)  # there is nothing to ask for
        finally:
            self._refilling = False
            self._refilled.set()
        if not self.lanes:  # the first rows already are to be no more than our share
            await self._learn_share()
        self.open_lanes()

    def _going(self) -> bool:
        if time.monotonic() >= self._ends:
            self._exhausted = self._more = True
        return not (self._exhausted or self.draining)

    def _busy(self) -> bool:
        return not self.draining and any(shard.lease.trusted for shard in self.shards)

    def settle(self, shard: Shard) -> None:
        """Finish a shard whose last row is answered, or give back one whose last request has ended."""
        if shard.in_flight or shard.finishing:
            return
        if shard.complete and shard.stopped in (None, Renewal.DRAIN):
            shard.finishing = True
            self.start(self._finish(shard), self.background)
        elif shard.stopped is not None or self.draining:
            shard.finishing = True
            self.start(self._give_back(shard, shard.stopped or Renewal.DRAIN), self.background)

    async def _finish(self, shard: Shard) -> None:
        try:
            ended = await shard.finish(self._leases)
            if ended:
                self._done_shards += 1
                self._done_rows += shard.writer.rows
            if ended is Finish.BATCH:
                await asyncio.to_thread(self._ended_batch, shard.lease.batch_id)
        finally:
            self._forget(shard)

    async def _give_back(self, shard: Shard, why: Renewal) -> None:
        try:
            if await shard.give_back(self._leases, why):
                self._done_rows += shard.writer.rows
                if why is Renewal.CANCEL:
                    await asyncio.to_thread(self._ended_batch, shard.lease.batch_id)
        finally:
            self._forget(shard)

    def _forget(self, shard: Shard) -> None:
        if shard in self.shards:
            self.shards.discard(shard)
            shard.close()

    def stop_shard(self, shard: Shard, why: Renewal) -> None:
        """Start no more rows of a shard; a pause lets those in flight end, else they are dropped at once."""
        if shard.dropped or shard.finishing:
            return
        if why is not Renewal.DRAIN:
            self._drop(shard, why)
        elif shard.stopped is None:
            shard.stopped = why
            shard.drop_at = time.monotonic() + DRAIN
            shard.waiting.clear()
            self.settle(shard)

    def _drop(self, shard: Shard, why: Renewal) -> None:
        """Drop a shard's requests in flight; the connections close, so the engine stops working on them."""
        log.info("Shard %s of %s is dropped: %s.", shard.lease.number, shard.lease.batch_id, why)
        shard.stopped = why
        shard.dropped = True
        shard.waiting.clear()
        for lane in shard.lanes - {asyncio.current_task()}:
            lane.cancel()
        self.settle(shard)

    # The clock.

    async def _tick(self) -> None:
        """See the stop flag, the turnstile, rows that take too long and shards that have drained."""
        self._report(self.breaker.trouble or self._claims.missing)
        self.asker.expire()
        self._show_load()
        if not self.draining and self._stop():
            self.draining = self._more = True
            self._refilled.set()
            for shard in list(self.shards):
                self.stop_shard(shard, Renewal.DRAIN)
        for shard in list(self.shards):
            late = time.monotonic() >= shard.drop_at or not self.breaker.up
            if shard.stopped is Renewal.DRAIN and late and not (shard.dropped or shard.finishing):
                self._drop(shard, Renewal.DRAIN)
        self._isolation.look()

    def _show_load(self) -> None:
        """Set the metrics of what is in flight, also to 0 for a model that has nothing any more."""
        self._load = dict.fromkeys(self._load, 0.0)
        for shard in self.shards:
            series = metrics.INFLIGHT.series("batch", shard.lease.model)
            self._load[series] = self._load.get(series, 0.0) + self.asker.asking(shard.lanes)
        self._load[metrics.LIMIT.series()] = self._share
        metrics.show(self._load)

    async def _sync(self) -> None:
        for shard in list(self.shards):
            if shard.writer.unsynced and not shard.finishing:
                try:
                    await asyncio.to_thread(shard.writer.sync)
                except MillraceError as error:
                    self._drop(shard, Renewal.LOST)
                    self._fail(error)

    async def _share_engine(self) -> None:
        await self._learn_share()
        with contextlib.suppress(MillraceError):  # a second later serves as well
            # There was nothing to claim: while rows are in flight that may take long, look whether there is now.
            idle = self._exhausted and not self.draining and self.failure is None and len(self.lanes) < self._share
            if idle and await asyncio.to_thread(waiting_shards, self._leases.ledger) > 0:
                self._exhausted = False
                self._ask_refill()
        self.open_lanes()

    async def _learn_share(self) -> None:
        with contextlib.suppress(MillraceError):  # the share of a second ago serves as well
            # An engine that was started anew may have other slots.
            self.limit = limit_of(self.breaker.state, self._settings.batch_concurrency)
            self._share = share_of(self.limit, await asyncio.to_thread(self._leases.owners))


async def _every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await act()
