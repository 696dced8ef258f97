"""The HTTP client of an OpenAI-compatible engine: bytes in, bytes out, errors by class.

aiohttp and not httpx or the openai package: at 64 in flight on a null server httpx cost 3,442 µs of
CPU a request and aiohttp 79 µs (DESIGN, Engine).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import msgspec
from yarl import URL

from millrace.engine.retry import (
    BadResponse,
    ConnectionLost,
    EngineTimeout,
    EngineUnreachable,
    error_of,
)
from millrace.settings import Settings

CONNECT_TIMEOUT = 10.0  # seconds
KEEP_ALIVE = 4.0  # seconds; vLLM closes idle connections after 5, and a race loses a request
#: A host that does not answer for a minute while a request is in flight is gone: tcp(7), seconds and times.
PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Usage(msgspec.Struct):
    """Token counts of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Answer(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    data: list[msgspec.Raw] | None = None
    usage: Usage | None = None
    model: Any = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with status 200: its JSON on one line, and its token counts."""

    body: bytes
    request_id: str
    prompt_tokens: int
    completion_tokens: int
    #: The model's name in the answer; empty where it has none.
    model: str = ""


class EngineClient:
    """One engine, one connection pool, for one event loop.

    Args:
        root: The engine's URL without `/v1`.
        api_key: Sent as a bearer token; None for none.
    """

    def __init__(self, root: str, api_key: str | None = None) -> None:
        self.root = root
        #: When the newest connection was begun, on the monotonic clock: a connection belongs to one process.
        self.newest_connection = float("-inf")
        self._urls: dict[str, URL] = {}
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE, socket_factory=self._socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            # The engine's answers are small and local; asking for compression costs both sides CPU.
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )

    def _socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        self.newest_connection = time.monotonic()
        made = socket.socket(*address[:3])
        # A host that is gone sends no reset, and an answer may be half an hour away: the kernel asks meanwhile.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in PROBES.items():
            if hasattr(socket, option):  # macOS has other names
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        return made

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return a client of the engine that the settings name."""
        return cls(settings.engine_root, settings.engine_api_key)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def post(self, path: str, body: bytes, limit: float | None) -> Answer:
        """POST a request and return its answer, checked to be the JSON that the route promises.

        Args:
            path: Such as /v1/chat/completions.
            body: The request's JSON.
            limit: The longest wait for the whole answer, seconds; None for a caller who watches the
                clock for many requests at once.

        Raises:
            EngineError: One of its subclasses, by what went wrong.
        """
        status, headers, answer = await self._send("POST", path, body, limit)
        if status != 200:
            raise error_of(status, headers, answer)
        try:
            if not answer.isascii():
                answer.decode()
            decoded = _decode_answer(answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            shown = answer[:200].decode(errors="replace")
            raise BadResponse(
                f"The engine answered 200 with something that is not its JSON: {error}: {shown!r}",
                status=status,
            ) from error
        if decoded.choices is None and decoded.data is None:
            raise BadResponse(
                f"The engine answered 200 without choices or data: {answer[:200].decode(errors='replace')!r}",
                status=status,
            )
        usage = decoded.usage or Usage()
        return Answer(
            # A file of lines has no place for an answer of several.
            body=msgspec.json.format(answer, indent=-1) if b"\n" in answer or b"\r" in answer else answer,
            request_id=headers.get("X-Request-Id", ""),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens or 0,
            model=decoded.model if isinstance(decoded.model, str) else "",
        )

    async def get(self, path: str, limit: float = 5.0) -> Any:
        """GET a JSON document.

        Raises:
            EngineError: One of its subclasses.
        """
        status, headers, answer = await self._send("GET", path, None, limit)
        if status != 200:
            raise error_of(status, headers, answer)
        try:
            return msgspec.json.decode(answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadResponse(f"{self.root}{path} did not answer JSON: {error}.", status=status) from error

    async def check(self, path: str, limit: float = 5.0) -> None:
        """GET a page of which only the status counts.

        Raises:
            EngineError: The status is not 200, or there was no answer.
        """
        status, headers, answer = await self._send("GET", path, None, limit)
        if status != 200:
            raise error_of(status, headers, answer)

    async def _send(self, method: str, path: str, body: bytes | None, limit: float | None) -> tuple[int, Any, bytes]:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(self.root + path)
        try:
            if limit is None:
                return await self._exchange(method, url, body)
            # One timer for the whole request; aiohttp's own per-read timers cost more each.
            async with asyncio.timeout(limit):
                return await self._exchange(method, url, body)
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise EngineUnreachable(f"The engine at {self.root} does not accept connections.") from error
            raise EngineTimeout(f"The engine did not answer within {limit:g} s.") from error
        except aiohttp.ClientConnectorError as error:
            # asyncio's own text is "Connect call failed ('127.0.0.1', 8000)".
            number = error.os_error.errno
            reason = os.strerror(number) if number else str(error.os_error)
            raise EngineUnreachable(
                f"The engine at {self.root} does not answer: {reason}.",
                "Start it (`millrace up`) or correct LLM_SERVER_URL.",
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(
                f"The connection to the engine broke: {str(error) or type(error).__name__}."
            ) from error

    async def _exchange(self, method: str, url: URL, body: bytes | None) -> tuple[int, Any, bytes]:
        async with self._session.request(method, url, data=body) as response:
            return response.status, response.headers, await response.read()
