"""One row, asked until there is an answer that counts.

What passes is waited out: an engine that is away or refuses our key, and answers that ask for less, cost a
row no try. What may be the row's own doing is tried BATCH_ROW_ATTEMPTS times. What never passes ends at once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from millrace import metrics
from millrace.batch.lines import answer_line, decode_input, failure_line, response_object
from millrace.engine.client import Answer, EngineClient
from millrace.engine.probes import EngineState, Watch, probe
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
#: Times that a row may be in flight when its engine dies.
MOST_LOSSES = 20


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

    def __init__(self, client: EngineClient, watch: Watch, state: EngineState, settings: Settings) -> None:
        self._client = client
        self._watch = watch
        self._state = state
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

    async def ask(self, batch_id: str, row: int, line: bytes) -> Answered:
        """Return how row number `row` ended, `line` being its line in input.jsonl."""
        request = decode_input(line)
        body = bytes(request.body)
        #: By whose fault the request failed: perhaps the row's; nobody's; the engine was away or died.
        tries = patience = away = losses = 0
        while True:
            await self._watch.wait()
            try:
                answer = await self._post(request.url, body)
            except EngineUnreachable as error:
                failure: EngineError = error
                self._watch.report(error)
                away = min(away + 1, 4)
                pause = backoff(away, RETRY_BASE)
            except ConnectionLost as error:
                failure = error
                losses += 1
                if await self._survived():
                    tries += 1
                else:
                    # The engine went down with it: not the row's fault, unless it goes on like that.
                    self._watch.report(error)
                pause = backoff(losses, RETRY_BASE)
            except (KeyRefused, Overloaded) as error:
                failure = error
                if isinstance(error, KeyRefused):
                    self._watch.report(error)
                patience += 1
                pause = backoff(patience, RETRY_BASE, error.retry_after)
            except EngineError as error:
                failure = error
                tries += 1 if error.retryable else self._settings.batch_row_attempts
                pause = backoff(tries, RETRY_BASE, error.retry_after)
            else:
                line = answer_line(batch_id, row, request.custom_id, 200, answer.request_id, answer.body)
                return Answered(True, line, answer.prompt_tokens, answer.completion_tokens)
            if tries >= self._settings.batch_row_attempts or patience >= PATIENCE or losses >= MOST_LOSSES:
                line = self._failure_line(batch_id, row, request.custom_id, failure)
                return Answered(False, line, code=failure.code)
            metrics.count(metrics.RETRIES.series("batch", failure.code))
            await asyncio.sleep(pause)

    async def _survived(self) -> bool:
        try:
            await probe(self._client)
        except EngineError:
            return False
        return True

    def _failure_line(self, batch: str, row: int, custom_id: str, error: EngineError) -> bytes:
        message = error.message
        if isinstance(error, ModelUnknown):
            message += f" It serves {', '.join(self._state.models) or 'none'}."
        response = None
        if error.status is not None and error.body is not None and error.status != 200:
            response = response_object(error.status, error.request_id, one_line_json(error.body))
        return failure_line(batch, row, custom_id, error.code, message, response)


def one_line_json(body: bytes) -> bytes:
    """Return an answer's body as JSON on one line: itself, or a JSON string of its text."""
    try:
        return msgspec.json.format(body, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.encode(body[:2000].decode(errors="replace"))
