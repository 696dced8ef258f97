"""The circuit breaker of an engine: whether it works, and what it serves, for the requests of one event loop.

                   it is away, or FAULTS rows in a row met a fault, or a row is about to be given up
    closed ──────────────────────────────────────────────────────────────────────────────────────────> open
       ^                                                                                                 │
       └── both answered ──── half-open: a probe, and after faults a request for one token <── a pause ──┘

While it is open, rows wait and no attempt is counted.

**Whose fault it was.** An engine that is away is never a row's fault. A 5xx, a broken connection, an answer
that is none and no answer in time may be either's. Such faults count against their rows only where the
engine answers a request of our own after them; where it does not, they are forgiven, all since the last
answer. So no burst of 500s ends a row, and no row that always gets a 500 keeps the breaker open. A request
of our own and not a row: a bad row would tell nothing of the engine, and a long one would hold up the rest.
Should the engine answer its probes and never our request, a row is let through once in TRIAL_SECONDS: its
answer closes the breaker, its fault is its own, so that no batch waits for ever.

**What it serves.** llama.cpp answers whatever model is asked for. So an answer counts only after a look at
the engine's models that is younger than every connection to it, and than LOOK_SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Hashable, Iterable

import msgspec

from millrace.engine.client import EngineClient
from millrace.engine.probes import EngineState, probe
from millrace.engine.retry import (
    BadResponse,
    ConnectionLost,
    EngineError,
    EngineTimeout,
    KeyRefused,
    Overloaded,
    RequestRefused,
    ServerFault,
)

log = logging.getLogger(__name__)

#: Rows that meet a fault one after the other, with no answer between them, before the engine is suspected.
FAULTS = 5
#: Where the engine works and they fail all the same, it is asked after twice as many the next time.
MOST_FAULTS = 640
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between two probes of an engine that fails
CHECK_SECONDS = 60.0  # that our own request may take; it waits behind the rows in flight
TRIAL_SECONDS = 60.0  # between rows that are let through where our own request fails
LOOK_SECONDS = 15.0  # a proxy may hide from us that there is another engine behind it
MOST_NAMES = 64  # names of models that answers have and the engine's list has not
_NEVER = float("-inf")


class EngineFailing(EngineError):
    """The engine is there, and fails at what it is asked."""

    code = "engine_failing"


class ModelChanged(EngineError):
    """Rows ask for a model that the engine does not serve."""

    code = "model_changed"


class Faults:
    """Faults one after the other, with no answer between them."""

    __slots__ = ("forgiven", "rows")

    def __init__(self) -> None:
        self.rows: set[Hashable] = set()
        #: Whether they were the engine's.
        self.forgiven = False


class Breaker:
    """Watches one engine.

    Args:
        client: Of the engine.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._closed = asyncio.Event()
        self._closed.set()
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._recovering: asyncio.Task[None] | None = None
        #: Set whenever it has been tried.
        self._tried = asyncio.Event()
        #: Why rows wait; None while they do not, or while it is not known yet.
        self.trouble: EngineError | None = None
        #: The engine as it was last seen.
        self.state = EngineState(client.root, "openai")
        #: When the last look began that saw it, and the last one that did not.
        self._looked = self._missed = _NEVER
        self._looking = asyncio.Lock()
        self._names: set[str] = set()
        self._faults = Faults()
        self._most = FAULTS
        #: Of our own, to the route of the last fault; no more of them where rows are answered and they are not.
        self._own_request: tuple[str, bytes] | None = None
        self._own_counts = True
        #: When our own request began to fail, or a row was let through last; None while the engine is away.
        self._failing_since: float | None = None

    async def close(self) -> None:
        """Stop probing."""
        if self._recovering is not None:
            self._recovering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._recovering

    # Whether it works.

    @property
    def up(self) -> bool:
        """Whether nothing is known to be wrong."""
        return self.trouble is None

    async def wait(self) -> bool:
        """Return once the engine works, or once this row is to be let through to try it: then True."""
        if self._closed.is_set():
            return False
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        return bool(await turn)

    def report(self, error: EngineError) -> None:
        """Hold rows back, for the engine is away, until it answers a probe."""
        if self.trouble is None:
            log.warning("%s Rows wait until it answers.", error.message)
            self.trouble = error
        self._open()

    def answered(self, trial: bool = False) -> None:
        """Note that the engine answered a row, if only to refuse it."""
        if trial and not self._closed.is_set():
            self._own_counts = False
        elif (self._faults.rows or self._most > FAULTS) and self._closed.is_set():
            self._faults, self._most = Faults(), FAULTS

    def fault(self, row: Hashable, path: str, model: str, trial: bool = False) -> Faults:
        """Note a fault that a row met, and return those that it is one of: they may come to be forgiven."""
        if trial:
            return Faults()
        faults = self._faults
        faults.rows.add(row)
        self._own_request = (path, _short_request(path, model))
        if len(faults.rows) >= self._most:
            self._open()
        return faults

    async def judge(self, faults: Faults) -> None:
        """Return once it is known whose fault these were: to be asked before a row is given up for them."""
        if faults is self._faults and not faults.forgiven:
            self._tried.clear()  # by a round that this fault is in
            self._open()
            await self._tried.wait()

    def _open(self) -> None:
        if self._closed.is_set():
            self._closed.clear()
            self._recovering = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        pause = FIRST_PAUSE
        while not (await self.look(time.monotonic()) and await self._works()):
            self._tried.set()
            self._try_a_row()
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, LONGEST_PAUSE)
        if self.trouble is not None:
            log.warning("The engine at %s works again.", self._client.root)
        if self._faults.forgiven:
            self._faults, self._most = Faults(), FAULTS
        elif len(self._faults.rows) >= self._most:
            self._faults.rows.clear()
            self._most = min(2 * self._most, MOST_FAULTS)
        self.trouble = self._failing_since = None
        self._tried.set()
        self._closed.set()
        self._let_through(False)

    def _try_a_row(self) -> None:
        if self._failing_since is not None and time.monotonic() - self._failing_since >= TRIAL_SECONDS:
            self._failing_since = time.monotonic()
            self._let_through(True)

    def _let_through(self, trial: bool) -> None:
        """Let through the row that has waited longest, as a trial, or all of them."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its row was dropped
                turn.set_result(trial)
                if trial:
                    return

    async def _works(self) -> bool:
        """Whether the engine answers a request; asked only where there were faults."""
        if self._own_request is None or not (self._faults.rows and self._own_counts):
            return True
        path, body = self._own_request
        try:
            await self._client.post(path, body, CHECK_SECONDS)
        except (RequestRefused, Overloaded):
            return True  # of sound mind
        except EngineError as error:
            self._failing_since = self._failing_since or time.monotonic()
            self._blame(error)
            return False
        return True

    def _blame(self, error: EngineError) -> None:
        """Say that rows wait for the engine, and forgive them what they met."""
        if self._faults.rows:
            self._faults.forgiven = True
        if isinstance(error, ServerFault | BadResponse | ConnectionLost | EngineTimeout):
            error = EngineFailing(
                f"The engine at {self._client.root} fails: {error.message}",
                "Rows wait until it answers; look at its log, and start it anew where it does not mend.",
            )
        if self.trouble is None or type(error) is not type(self.trouble):
            level = logging.ERROR if isinstance(error, KeyRefused) else logging.WARNING
            log.log(level, "%s", error)
        self.trouble = error

    # What it serves.

    def seen(self, state: EngineState, began: float) -> None:
        """Note what the engine is, by a probe that began at a moment of the monotonic clock."""
        if self._looked > _NEVER and state.models != self.state.models:
            before, now = (", ".join(models) or "nothing" for models in (self.state.models, state.models))
            log.warning("The engine at %s now serves %s; it served %s.", state.url, now, before)
        if state.names != self.state.names:
            self._names = set(state.names)
        self.state, self._looked = state, began

    def missing(self, models: Iterable[str]) -> ModelChanged | None:
        """Return what to say of rows that ask for models that are not served; None where all are."""
        absent = sorted(model for model in models if not self.state.serves(model))
        if not absent:
            return None
        names = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        return ModelChanged(
            f"The engine at {self._client.root} serves {', '.join(self.state.models)}; rows ask for {names}.",
            "They wait: start it with their model, or cancel their batch.",
        )

    async def look(self, since: float) -> bool:
        """Look at the engine, unless a look began after `since`; False where it does not answer.

        Rows wait then, until it does.
        """
        async with self._looking:
            if max(self._looked, self._missed) > since:
                return self._looked > self._missed
            began = time.monotonic()
            try:
                state = await probe(self._client)
            except EngineError as error:
                self._missed, self._failing_since = began, None
                self._blame(error)
                self._open()
                return False
            self.seen(state, began)
            return True

    async def sure(self, named: str) -> None:
        """Return once it is known what the engine serves, an answer of a model `named` having come just now."""
        while True:
            now = time.monotonic()
            known = not named or named in self._names
            since = max(self._client.newest_connection, now - LOOK_SECONDS) if known else now
            if self._looked > since:
                return
            if await self.look(since):
                # What is not in the list now is this engine's way to name what is.
                if named and len(self._names) < MOST_NAMES:
                    self._names.add(named)
                return
            await self.wait()


def _short_request(path: str, model: str) -> bytes:
    """Return a request for one token to a route of the engine."""
    body: dict[str, object] = {"model": model}
    match path.rpartition("/")[2]:
        case "embeddings":
            body["input"] = "Hello"
        case "completions" if "chat" not in path:
            body |= {"prompt": "Hello", "max_tokens": 1}
        case _:
            body |= {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return msgspec.json.encode(body)
