"""Claims: where a session's next shard comes from."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from millrace.batch.claimed import Shard, prepare
from millrace.batch.lease import Lease, Leases, waiting_models
from millrace.engine.breaker import Breaker
from millrace.errors import IntegrityError, MillraceError, Unreachable

log = logging.getLogger(__name__)

AGAIN = 1.0  # seconds between tries at a ledger that is away, or for a model that is


class Claims:
    """Claims shards whose model is served, and prepares them.

    Args:
        leases: Of the session.
        breaker: Knows what the engine serves.
        data_dir: DATA_DIR.
        going: Whether the session takes more shards.
        busy: Whether it holds shards that go on without the ledger for a while.
    """

    def __init__(
        self,
        leases: Leases,
        breaker: Breaker,
        data_dir: Path,
        *,
        going: Callable[[], bool],
        busy: Callable[[], bool],
    ) -> None:
        self._leases = leases
        self._breaker = breaker
        self._data_dir = data_dir
        self._going = going
        self._busy = busy
        self._model = ""
        #: What to say of rows that wait for a model that the engine does not serve.
        self.missing: MillraceError | None = None
        #: Why a claimed shard could not be run here.
        self.failure: MillraceError | None = None

    async def next(self) -> Shard | None:
        """Return the next shard; None where there is none, or `failure` says why.

        Raises:
            Unreachable: The ledger does not answer, and nothing goes on without it.
        """
        while self._going():
            lease = await self._claim()
            if lease is None:
                if not await self._await_model():
                    return None
                continue
            self._model, self.missing = lease.model, None
            try:
                shard = await asyncio.to_thread(prepare, self._data_dir, self._leases, lease)
            except MillraceError as error:
                # No more of this for us, but what is in flight goes on: the fault may be this
                # machine's alone (another DATA_DIR), or one shard's.
                if isinstance(error, IntegrityError):  # nobody can complete this batch
                    await asyncio.to_thread(self._leases.ledger.fail, lease.batch_id, error.code, str(error))
                await asyncio.to_thread(self._leases.hand_back, lease)
                self.failure = error
                return None
            if shard is not None:
                return shard
        return None

    async def _claim(self) -> Lease | None:
        while True:
            try:
                return await asyncio.to_thread(self._leases.claim, self._model, self._breaker.state.names)
            except Unreachable as error:
                if not self._busy():
                    raise
                log.warning("%s", error)
                await asyncio.sleep(AGAIN)

    async def _await_model(self) -> bool:
        """Wait a little where rows wait for a model that the engine does not serve; False where none do."""
        try:
            waiting = await asyncio.to_thread(waiting_models, self._leases.ledger)
        except Unreachable as error:
            log.warning("%s", error)
            return False  # the next session asks again
        self.missing = self._breaker.missing(waiting)
        if self.missing is None:
            return False
        await asyncio.sleep(AGAIN)
        if self._breaker.up:
            await self._breaker.look(time.monotonic())
        return True
