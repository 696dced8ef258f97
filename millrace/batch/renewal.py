"""Renewal: leases are extended in time, whatever else is slow.

A task and a thread of its own: a sync that hangs on a bad disk must not cost a lease, and a ledger that
hangs must not hide that a lease is not to be trusted any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from millrace.batch.claimed import Shard
from millrace.batch.lease import Leases, Renewal
from millrace.errors import MillraceError

log = logging.getLogger(__name__)

LOOK = 0.25  # seconds between looks at the leases; a good deal less than the margin of their trust
PROGRESS = 1.0  # seconds between recorded counts, for those who watch, and between tries that fail


class Renewer:
    """Renews the leases of a session.

    Args:
        leases: Of the session.
        shards: What the session holds at any moment.
        stop: Told of a shard that must not go on, and why.
    """

    def __init__(self, leases: Leases, shards: Collection[Shard], stop: Callable[[Shard, Renewal], None]) -> None:
        self._leases = leases
        self._shards = shards
        self._stop = stop
        #: When each shard was last renewed or tried (on the monotonic clock), and its count then.
        self._last: dict[Shard, tuple[float, int]] = {}
        self._asking: dict[Shard, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Renew until cancelled.

        Raises:
            Exception: A renewal failed in a way that no ledger's absence explains.
        """
        # Not the loop's own threads: hanging syncs may have all of these.
        thread = ThreadPoolExecutor(1, thread_name_prefix="renewal")
        try:
            while True:
                await asyncio.sleep(LOOK)
                for shard, asking in list(self._asking.items()):
                    if asking.done():
                        del self._asking[shard]
                        asking.result()
                self._last = {shard: self._last.get(shard, (shard.started, shard.earlier)) for shard in self._shards}
                for shard in self._last:
                    self._look(shard, thread)
        finally:
            for asking in self._asking.values():
                asking.cancel()
            thread.shutdown(wait=False, cancel_futures=True)

    def _look(self, shard: Shard, thread: ThreadPoolExecutor) -> None:
        if not shard.lease.trusted:
            self._stop(shard, Renewal.LOST)
            return
        now = time.monotonic()
        last, recorded = self._last[shard]
        due = now - last >= self._leases.ttl / 3
        news = shard.answered != recorded and now - last >= PROGRESS
        if (due or news) and shard not in self._asking:
            self._asking[shard] = asyncio.create_task(self._renew(shard, now, thread))

    async def _renew(self, shard: Shard, now: float, thread: ThreadPoolExecutor) -> None:
        counts, answered = replace(shard.counts), shard.answered
        renew = asyncio.get_running_loop().run_in_executor(thread, self._leases.renew, shard.lease, counts)
        try:
            answer = await renew
        except MillraceError as error:
            # The ledger is away: go on as long as the lease is trusted, and no longer.
            log.warning("%s", error)
            self._last[shard] = (max(now, time.monotonic() - self._leases.ttl / 3 + PROGRESS), shard.answered)
            return
        self._last[shard] = (now, answered)
        if answer is not Renewal.OK:
            self._stop(shard, answer)
