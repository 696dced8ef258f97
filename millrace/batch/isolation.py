"""Isolation: suspects are tried with nothing else in flight, and the guilty row is ended.

    a death, or a journal of one ──> stand aside ──> rest ──> turn ──> groups of suspects ──> lanes again
                                                                └─ alone: a lone death, the third one ends the row

A session without suspects stands aside as well, while another one of its machine has some.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from millrace.batch.ask import Answered, Asker, EngineDied, ModelAway
from millrace.batch.claimed import Shard
from millrace.batch.lease import Renewal
from millrace.batch.suspects import Deaths, Doing, Suspect, next_group
from millrace.batch.turns import YIELD, Turn
from millrace.engine.breaker import Breaker, EngineFailing
from millrace.errors import MillraceError

log = logging.getLogger(__name__)

LOOK = 0.05  # seconds between looks at an engine that others have
VERDICT = 6.0  # seconds that a row without a request at the engine gets: it may be asking whether that has died


class Host(Protocol):
    """The session, as isolation needs it."""

    asker: Asker
    breaker: Breaker
    #: What it holds, and the tasks that have rows in flight or wait for one.
    shards: set[Shard]
    lanes: set[asyncio.Task[None]]
    #: Tasks that the session does not end without.
    background: set[asyncio.Task[None]]
    #: Rows that may be in flight at the engine, of all sessions together.
    limit: int
    #: Whether it is coming to its end.
    draining: bool
    #: Why it failed; None while it did not.
    failure: BaseException | None

    def start(self, work: Coroutine[Any, Any, None], group: set[asyncio.Task[None]]) -> None:
        """Run `work` as a task of `group`."""

    def open_lanes(self) -> None:
        """Take rows, now that this is allowed again."""

    def close_lanes(self) -> None:
        """Have lanes that wait for rows look again whether they may."""

    def append(self, shard: Shard, row: int, slot: int, answered: Answered) -> None:
        """Write a row's answer."""

    def settle(self, shard: Shard) -> None:
        """End the shard if nothing of it is left to do."""

    def stop_shard(self, shard: Shard, why: Renewal) -> None:
        """Start no more rows of a shard."""


class Isolation:
    """The suspects of one session.

    Args:
        host: The session.
        turn: Its part among those of this machine.
    """

    def __init__(self, host: Host, turn: Turn) -> None:
        self._host = host
        self._turn = turn
        #: Set while no lane may take a row.
        self.aside = False

    def look(self) -> None:
        """Stand aside if another session needs the engine alone; to be called several times a second."""
        self._turn.live()
        if not self.aside and self._turn.wanted():
            self.stand_aside()

    async def join(self, until: float) -> None:
        """Wait until no other session has the engine alone, or `until`, on the monotonic clock."""
        while not self._turn.join():
            if self._host.draining or time.monotonic() >= until:
                return
            await asyncio.sleep(LOOK)

    def claimed(self, shard: Shard) -> None:
        """Take up what the journals of a shard's earlier owners say."""
        for suspect in list(shard.suspects):
            self._judge(shard, suspect)
        if shard.suspects:
            self.stand_aside()

    def accuse(self, shard: Shard, suspect: Suspect, error: BaseException, *, alone: bool = False) -> None:
        """Note that the engine died, or our own code failed, while a row was in flight.

        Raises:
            MillraceError: `error` itself, where it is no row's doing.
        """
        died = isinstance(error, EngineDied)
        if isinstance(error, MillraceError):
            raise error
        if not died and error is not self._host.failure:
            log.error("Row %s of %s failed in a way of its own.", suspect.row, shard.lease.batch_id, exc_info=error)
        if alone:
            suspect.deaths = Deaths(suspect.deaths.engine + died, suspect.deaths.worker + (not died))
        suspect.level = 0 if alone else None
        shard.suspects[suspect] = None
        shard.flight.mark(suspect, Doing.WAITING)
        self._judge(shard, suspect)
        self.stand_aside()

    def dropped(self, shard: Shard, suspect: Suspect, *, alone: bool = False) -> None:
        """Take up a row whose lane was cancelled: it is no suspect for that, but where our own code has failed."""
        failure = self._host.failure
        if failure is not None and not isinstance(failure, MillraceError):
            self.accuse(shard, suspect, failure, alone=alone)
        elif suspect in shard.suspects:
            shard.flight.mark(suspect, Doing.WAITING)
        else:
            shard.flight.end(suspect.slot)

    def stand_aside(self) -> None:
        """Take no more rows until every suspect, ours or another session's, was tried."""
        if not (self.aside or self._host.draining):
            self.aside = True
            self._host.close_lanes()
            self._host.start(self._isolate(), self._host.background)

    def _judge(self, shard: Shard, suspect: Suspect) -> None:
        """End a row that was seen to kill often enough."""
        if suspect.guilty and not shard.dropped:
            batch_id, row, deaths = shard.lease.batch_id, suspect.row, suspect.deaths
            log.error("Row %s of %s is given up: %s died.", row, batch_id, deaths.what)
            answered = self._host.asker.answer_poison(batch_id, row, suspect.line, deaths.total, deaths.what)
            del shard.suspects[suspect]
            self._host.append(shard, row, suspect.slot, answered)

    def _suspects(self) -> dict[Suspect, Shard]:
        return {suspect: shard for shard in self._host.shards if shard.stopped is None for suspect in shard.suspects}

    async def _isolate(self) -> None:
        try:
            await self._rest()
            self._turn.leave()
            while not self._host.draining:
                if self._suspects():
                    await self._try_suspects()
                elif self._turn.join():
                    break
                else:
                    await asyncio.sleep(LOOK)
        finally:
            self.aside = False
        self._host.open_lanes()

    async def _rest(self) -> None:
        """Wait until no row is in flight. One that takes too long is put back, and runs again later."""
        lanes, began = self._host.lanes, time.monotonic()
        put_back: set[asyncio.Task[None]] = set()
        while lanes:
            passed = time.monotonic() - began
            for lane in lanes - put_back:
                if passed > (YIELD if self._host.asker.asking({lane}) else VERDICT):
                    put_back.add(lane)
                    lane.cancel()
            await asyncio.wait(lanes, timeout=LOOK)

    async def _try_suspects(self) -> None:
        """Run suspects, with nothing else of this machine's sessions in flight."""
        while not self._turn.take():
            if self._host.draining:
                return
            await asyncio.sleep(LOOK)
        try:
            while (suspects := self._suspects()) and not self._host.draining:
                trouble = self._host.breaker.trouble
                # A death meanwhile would be none of theirs. One that fails at all it is asked needs a row to mend.
                if trouble is not None and not isinstance(trouble, EngineFailing):
                    await asyncio.sleep(LOOK)
                    continue
                group = next_group(suspects, self._host.limit)
                doing = Doing.ALONE if len(group) == 1 else Doing.TESTED
                for suspect in group:
                    self._host.start(self._try(suspects[suspect], suspect, doing), self._host.lanes)
                while self._host.lanes:
                    await asyncio.wait(self._host.lanes)
        finally:
            self._turn.leave()

    async def _try(self, shard: Shard, suspect: Suspect, doing: Doing) -> None:
        own = asyncio.current_task()
        assert own is not None
        shard.flight.mark(suspect, doing)
        shard.enter(own)
        try:
            answered = await self._host.asker.ask(shard.lease, suspect.row, suspect.line)
        except ModelAway:
            shard.flight.mark(suspect, Doing.WAITING)
            self._host.stop_shard(shard, Renewal.DRAIN)
        except asyncio.CancelledError:
            self.dropped(shard, suspect, alone=doing is Doing.ALONE)
            raise
        except Exception as error:  # noqa: BLE001  # a row that our code cannot bear is as bad as one that kills it
            self.accuse(shard, suspect, error, alone=doing is Doing.ALONE)
        else:
            del shard.suspects[suspect]
            self._host.append(shard, suspect.row, suspect.slot, answered)
        finally:
            shard.leave(own)
            self._host.settle(shard)
