"""One row, asked until there is an answer that counts.

What passes is waited out: an engine that is away, fails at all it is asked, serves another model or refuses
our key, and answers that ask for less, cost a row no try. What may be the row's own doing is tried
BATCH_ROW_ATTEMPTS times. What never passes ends at once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from millrace import metrics
from millrace.batch.lease import Lease
from millrace.batch.lines import answer_line, decode_input, failure_line, response_object
from millrace.engine.breaker import Breaker, Faults
from millrace.engine.client import Answer, EngineClient
from millrace.engine.retry import (
    ConnectionLost,
    EngineError,
    EngineTimeout,
    EngineUnreachable,
    KeyRefused,
    ModelUnknown,
    Overloaded,
    backoff,
)
from millrace.settings import Settings

RETRY_BASE = 0.5  # seconds
#: Tries of a row whose failures are not its own; the bound only ends what would never end.
PATIENCE = 200
#: The code of a row that takes down what works on it.
POISON = "poison_row"


class EngineDied(Exception):
    """The engine went down while it had this row's request: the row is a suspect, like all that were in flight."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(error.message)
        self.error = error


class ModelAway(Exception):
    """The engine does not serve the row's model, now: its shard is to be given back."""


@dataclass(frozen=True, slots=True)
class Answered:
    """How a row ended: its line in the output (`ok`) or in the errors, and its tokens."""

    ok: bool
    line: bytes
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Of its failure; empty where there was none.
    code: str = ""


class Asker:
    """Asks one engine, for the rows of one process."""

    def __init__(self, client: EngineClient, breaker: Breaker, settings: Settings) -> None:
        self._client = client
        self._breaker = breaker
        self._settings = settings
        #: When each task must have its answer, on the monotonic clock; and those that did not have it.
        self._due: dict[asyncio.Task[Any] | None, float] = {}
        self._overdue: set[asyncio.Task[Any] | None] = set()

    def expire(self) -> None:
        """End the requests that have waited for BATCH_ROW_TIMEOUT; to be called several times a second.

        A timer for each request would cost as much as all our other work on it.
        """
        now = time.monotonic()
        for task, due in list(self._due.items()):
            if task is not None and now >= due and task not in self._overdue:
                self._overdue.add(task)
                task.cancel()

    def asking(self, tasks: set[asyncio.Task[None]]) -> int:
        """Return how many of `tasks` have a request at the engine now; the others wait for their next try."""
        return len(self._due.keys() & tasks)

    async def _post(self, path: str, body: bytes) -> Answer:
        own = asyncio.current_task()
        limit = self._settings.batch_row_timeout
        self._due[own] = time.monotonic() + limit
        try:
            return await self._client.post(path, body, None)
        except asyncio.CancelledError:
            if own is None or own not in self._overdue:
                raise
            own.uncancel()
            raise EngineTimeout(f"The engine did not answer within {limit:g} s.") from None
        finally:
            self._overdue.discard(own)
            del self._due[own]

    async def ask(self, lease: Lease, row: int, line: bytes) -> Answered:
        """Return how row number `row` of a shard ended, `line` being its line in input.jsonl.

        Raises:
            EngineDied: The connection broke or nothing came, and the engine does not answer a probe.
                Nothing was counted.
            ModelAway: The engine does not serve the row's model. Nothing was counted.
        """
        request = decode_input(line)
        body = bytes(request.body)
        #: What it met that may be its own fault, and how often it met what is nobody's.
        faults: list[Faults] = []
        patience = away = 0
        while True:
            trial = await self._breaker.wait()
            self._here(lease.model)
            own = False
            try:
                answer = await self._post(request.url, body)
            except EngineUnreachable as error:
                failure: EngineError = error
                self._breaker.report(error)
                away = min(away + 1, 4)
                pause = backoff(away, RETRY_BASE)
            except (ConnectionLost, EngineTimeout) as error:
                if not await self._breaker.look(time.monotonic()):
                    raise EngineDied(error) from error
                failure = error
                own = True
            except (KeyRefused, Overloaded) as error:
                failure = error
                if isinstance(error, KeyRefused):
                    self._breaker.report(error)
                patience += 1
                pause = backoff(patience, RETRY_BASE, error.retry_after)
            except EngineError as error:
                if isinstance(error, ModelUnknown) and await self._breaker.look(time.monotonic()):
                    self._here(lease.model)
                failure = error
                own = error.retryable
                if not own:
                    self._breaker.answered(trial)
                    return self._failed(lease.batch_id, row, request.custom_id, error)
            else:
                await self._breaker.sure(answer.model)
                self._here(lease.model)
                self._breaker.answered(trial)
                line = answer_line(lease.batch_id, row, request.custom_id, 200, answer.request_id, answer.body)
                return Answered(True, line, answer.prompt_tokens, answer.completion_tokens)
            if own:
                faults.append(self._breaker.fault((lease.batch_id, row), request.url, lease.model, trial))
                if self._tries(faults) >= self._settings.batch_row_attempts:
                    await self._breaker.judge(faults[-1])  # of the others it is known
                pause = backoff(max(1, self._tries(faults)), RETRY_BASE, failure.retry_after)
            if self._tries(faults) >= self._settings.batch_row_attempts or patience >= PATIENCE:
                return self._failed(lease.batch_id, row, request.custom_id, failure)
            metrics.count(metrics.RETRIES.series("batch", failure.code))
            await asyncio.sleep(pause)

    def _tries(self, faults: list[Faults]) -> int:
        return sum(1 for one in faults if not one.forgiven)

    def _here(self, model: str) -> None:
        if not self._breaker.state.serves(model):
            raise ModelAway

    def answer_poison(self, batch_id: str, row: int, line: bytes, deaths: int, what: str) -> Answered:
        """Return the end of a row that took an engine or a worker down whenever it was asked alone.

        Args:
            batch_id: The row's batch.
            row: Its number.
            line: Its line in input.jsonl.
            deaths: How often it was in flight when something died.
            what: What died, and how; such as "the engine" or "the worker process".
        """
        times = "once" if deaths == 1 else f"{deaths} times"
        message = f"{what[:1].upper()}{what[1:]} died {times} while it worked on this row. It is not asked again."
        custom_id = decode_input(line).custom_id
        return Answered(False, failure_line(batch_id, row, custom_id, POISON, message), code=POISON)

    def _failed(self, batch: str, row: int, custom_id: str, error: EngineError) -> Answered:
        message = error.message
        if isinstance(error, ModelUnknown):
            message += f" It serves {', '.join(self._breaker.state.models) or 'none'}."
        response = None
        if error.status is not None and error.body is not None and error.status != 200:
            response = response_object(error.status, error.request_id, one_line_json(error.body))
        return Answered(False, failure_line(batch, row, custom_id, error.code, message, response), code=error.code)


def one_line_json(body: bytes) -> bytes:
    """Return an answer's body as JSON on one line: itself, or a JSON string of its text."""
    try:
        return msgspec.json.format(body, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.encode(body[:2000].decode(errors="replace"))
