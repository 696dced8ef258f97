"""One request at a time, for callers without an event loop: the interactive tasks and `millrace chat`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from millrace import metrics
from millrace.engine.breaker import Breaker
from millrace.engine.client import EngineClient
from millrace.engine.retry import (
    ConnectionLost,
    EngineError,
    EngineUnreachable,
    ModelUnknown,
    RequestRefused,
    backoff,
)
from millrace.errors import InputError
from millrace.settings import Settings

LOOK = 0.5  # seconds between looks at `leave`


class Left(Exception):
    """Nobody waits for the engine any longer; the request was not answered."""


class Caller:
    """Keeps an event loop and its connections between calls of one process.

    Args:
        settings: For the engine, LLM_TIMEOUT and the TASK_ retry settings.
        patience: How long a call waits for an engine that is away, seconds; no try is counted for that.
        leave: Asked meanwhile whether to wait no longer.
    """

    def __init__(self, settings: Settings, patience: float = 0.0, leave: Callable[[], bool] = lambda: False) -> None:
        self._settings = settings
        self._leave = leave
        self._patience = patience
        self._runner = asyncio.Runner()
        self._client: EngineClient | None = None
        self._breaker: Breaker | None = None
        self._model = settings.llm_model
        #: The series that counts the request at the engine; empty where there is none.
        self._in_flight = ""
        self.pid = os.getpid()

    def close(self) -> None:
        """Cancel what is going on, close the connections and the loop."""
        if self._client is not None and self._breaker is not None:
            self._run(self._breaker.close())
            self._run(self._client.close())
        self._runner.close()

    def call(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """POST `payload` to the engine, again when the failure may pass, and return its answer.

        Raises:
            InputError: The payload asks for a stream.
            EngineError: What the engine said in the end, by class.
            Left: The engine was away, and `leave` said so.
        """
        if payload.get("stream"):
            raise InputError(
                "A task returns one answer; it cannot stream.", "Leave `stream` out.", code="invalid_stream"
            )
        try:
            answer: dict[str, Any] = self._run(self._call(path, payload))
        finally:
            # Here, not in the coroutine: a time limit strikes in the middle of the loop.
            if self._in_flight:
                metrics.show({self._in_flight: 0.0})
                self._in_flight = ""
        return answer

    def model_of(self, payload: dict[str, Any]) -> str:
        """Return the model that `payload` asks for; "" while the engine's default is not known yet."""
        return str(payload.get("model") or self._model)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    async def _call(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        if self._client is None or self._breaker is None:
            self._client = EngineClient.of(self._settings)
            self._breaker = Breaker(self._client)
        given_up = time.monotonic() + self._patience
        attempt = 0
        asked = payload
        while True:
            attempt += 1
            try:
                if not payload.get("model"):
                    payload = {**payload, "model": await self._default_model(self._client)}
                self._in_flight = metrics.INFLIGHT.series("interactive", self.model_of(payload))
                metrics.show({self._in_flight: 1.0})
                body = msgspec.json.encode({name: value for name, value in payload.items() if value is not None})
                answer = await self._client.post(path, body, self._settings.llm_timeout)
                decoded: dict[str, Any] = msgspec.json.decode(answer.body)
            except EngineError as error:
                if isinstance(error, ModelUnknown) and payload is not asked and self._model != self._settings.llm_model:
                    # The engine was changed for another one since we asked for its first model.
                    self._model, payload = self._settings.llm_model, asked
                    if attempt == 1:
                        continue
                if isinstance(error, EngineUnreachable) and self._patience:
                    attempt -= 1  # nobody has worked on it
                    if time.monotonic() >= given_up:
                        raise
                if not error.retryable or attempt > self._settings.task_max_retries:
                    raise
                if self._in_flight:
                    metrics.show({self._in_flight: 0.0})
                metrics.count(metrics.RETRIES.series("interactive", error.code))
                if isinstance(error, EngineUnreachable | ConnectionLost) and time.monotonic() < given_up:
                    await self._await_engine(self._breaker, error, given_up)
                    payload = asked  # of the default model the engine may serve another by now
                await asyncio.sleep(backoff(max(1, attempt), self._settings.task_retry_delay, error.retry_after))
            else:
                return decoded

    async def _await_engine(self, breaker: Breaker, error: EngineError, given_up: float) -> None:
        """Return once the engine answers a probe; what it serves then is to be asked anew.

        Raises:
            EngineError: It does not by then: what it said last.
            Left: `leave` said so.
        """
        breaker.report(error)
        back = asyncio.ensure_future(breaker.wait())
        try:
            while not back.done():
                if self._leave():
                    raise Left
                if (left := given_up - time.monotonic()) <= 0:
                    raise breaker.trouble or error
                await asyncio.wait({back}, timeout=min(LOOK, left))
        finally:
            back.cancel()
        self._model = self._settings.llm_model

    async def _default_model(self, client: EngineClient) -> str:
        if not self._model:
            listed = await client.get("/v1/models")
            names = [entry["id"] for entry in listed.get("data", [])]
            if not names:
                raise RequestRefused(
                    "The engine serves no model.",
                    "Load one, or name one in LLM_MODEL.",
                    code="model_not_found",
                )
            self._model = names[0]
        return self._model
