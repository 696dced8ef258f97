"""The engine behind the routes: what happens to a request from its arrival to its end."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from millrace.engine.scripted import answers, dialects
from millrace.engine.scripted.answers import Kind
from millrace.engine.scripted.faults import ON_ARRIVAL, Fault, Rules
from millrace.engine.scripted.script import FIXED, Script, read_script
from millrace.engine.scripted.slots import Slots
from millrace.errors import InputError

JSON = "application/json"

ROUTES: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
}


class RequestLog:
    """The JSONL file with a line for each request's arrival and one for its end."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        # Unbuffered and one write a line: what a crash leaves behind has whole lines only.
        self._file = self.path.open("ab", buffering=0)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(msgspec.json.encode(entry) + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Call:
    """One request to an inference route, as the log and the counts see it."""

    __slots__ = ("body", "closed_by_us", "digest", "fault", "n", "path", "request")

    def __init__(self, n: int, request: web.BaseRequest, body: bytes) -> None:
        self.n = n
        self.request = request
        self.path = request.path
        self.body = body
        self.digest = hashlib.sha256(body).digest()
        self.fault: Fault | None = None
        self.closed_by_us = False

    def hang_up(self) -> NoReturn:
        """Close the connection; aiohttp does that for a handler that was cancelled."""
        self.closed_by_us = True
        raise asyncio.CancelledError


class Engine:
    """The engine behind the routes.

    Args:
        script: What it is and does.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        now = time.monotonic()
        self._rules = Rules(script.rules, now)
        self._ready_at = now + script.load_seconds
        self._slots = Slots(script.slots)
        self._log = None if script.log_path is None else RequestLog(script.log_path)
        self._requests = 0
        self._in_flight = 0
        self._peak_in_flight = 0
        self._cancelled = 0
        self._by_status: Counter[int] = Counter()
        self._faults: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._completion_tokens = 0

    async def close(self) -> None:
        """Let the requests that the end of the server cancelled write their last line; close the log."""
        for _ in range(100):  # turns of the loop; a handler needs one or two
            if not self._in_flight:
                break
            await asyncio.sleep(0)
        if self._log is not None:
            self._log.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request to any route."""
        if request.method == "POST" and request.path in ROUTES:
            return await self._infer(request)
        if request.path.startswith("/_script"):
            return await self._control(request)
        return self._page(request)

    async def _infer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Count and log a request to an inference route around its work."""
        body = await request.read()
        self._requests += 1
        self._in_flight += 1
        self._peak_in_flight = max(self._peak_in_flight, self._in_flight)
        call = Call(self._requests, request, body)
        if self._log is not None:
            self._log.write(self._entry("start", call))
        status, cancelled = None, False
        try:
            response = await self._refuse(call)
            if response is None:
                response = await self._work(call)
            status = response.status
            self._by_status[status] += 1
            return response
        except asyncio.CancelledError:
            cancelled = not call.closed_by_us
            self._cancelled += cancelled
            raise
        except ConnectionError:
            cancelled = True  # a stream's next event found the client gone before its cancellation came
            self._cancelled += 1
            raise asyncio.CancelledError from None
        finally:
            self._in_flight -= 1
            if self._log is not None:
                fault = call.fault.do if call.fault else None
                end = {"status": status, "cancelled": cancelled, "fault": fault}
                self._log.write(self._entry("end", call) | end)

    def _entry(self, event: str, call: Call) -> dict[str, Any]:
        return {
            "event": event,
            "n": call.n,
            "t": time.monotonic(),
            "path": call.path,
            "sha256": call.digest.hex(),
            "custom": call.request.headers.get("X-Request-Id"),
            "in_flight": self._in_flight,
            "working": self._slots.working,
        }

    async def _refuse(self, call: Call) -> web.StreamResponse | None:
        """Return the answer to a request that is refused on arrival, None where it is let in."""
        if (refusal := self._closed_door(call.request)) is not None:
            return refusal
        call.fault = fault = self._rules.pick(call.path, call.body, call.digest, time.monotonic())
        if fault is None:
            return None
        self._faults[fault.do] += 1
        if fault.do not in ON_ARRIVAL:
            return None
        await asyncio.sleep(fault.seconds)
        if fault.do == "exit":
            os._exit(137)  # no cleanup: a killed engine has none either
        if fault.do == "cut":
            call.hang_up()
        body = fault.body
        if body is None:
            body = dialects.error(self.script.dialect, fault.status, "A fault of the script.")
        return _reply(body, fault.status, fault.headers)

    def _closed_door(self, request: web.BaseRequest) -> web.Response | None:
        """Return 503 while the model loads and 401 without the key."""
        script = self.script
        if time.monotonic() < self._ready_at:
            return self._error(503, "Loading model")
        if script.api_key is not None and not dialects.is_open(script.dialect, request.path):
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not _same(key.strip(), script.api_key):
                return self._error(401, "Invalid API Key")
        return None

    async def _work(self, call: Call) -> web.StreamResponse:
        script = self.script
        kind = ROUTES[call.path]
        try:
            ask = answers.decode(call.body)
            prompt = answers.read_prompt(kind, ask)
        except (msgspec.DecodeError, ValueError) as error:
            return self._error(400, f"Invalid request: {error}")
        model = ask.model or script.models[0]
        if script.dialect != "llamacpp" and model not in script.models:
            return _reply(dialects.model_error(model), 404)
        if prompt.tokens >= script.context:
            return _reply(dialects.context_error(script.dialect, prompt.tokens, script.context), 400)
        waits = script.queue_limit
        if self._slots.full and waits is not None and self._slots.waiting >= waits:
            return self._error(503, "The request queue is full, try again later.")
        await self._slots.take()
        try:
            if kind == "embedding":
                body = answers.embeddings(ask, prompt, model, script.embedding_size)
                response = await self._send(call, body, script.ttft_ms / 1000)
                self._prompt_tokens += prompt.tokens
                return response
            room = script.context - prompt.tokens
            key = call.digest.hex()
            made = answers.Generation(kind, ask, prompt, model=model, key=key, natural=script.answer_tokens, room=room)
            if ask.stream:
                response = await self._stream(call, made)
            else:
                seconds = script.ttft_ms / 1000
                if script.tokens_per_second:
                    seconds += made.tokens / script.tokens_per_second
                response = await self._send(call, made.body(), seconds)
            self._prompt_tokens += made.prompt_tokens
            self._completion_tokens += made.completion_tokens
            return response
        finally:
            self._slots.give_back()

    async def _send(self, call: Call, body: bytes, seconds: float) -> web.StreamResponse:
        """Answer with a whole body after so many seconds of work, or fail as the rule says."""
        fault = call.fault
        if fault is not None:
            await self._hang(call, {"Content-Type": JSON, "Content-Length": str(len(body))})
            seconds += fault.seconds
        if seconds > 0:
            await asyncio.sleep(seconds)
        if fault is not None and fault.do == "garbage":
            return web.Response(body=b"<html>\x00 this is not JSON {", content_type=JSON)
        if fault is not None and fault.do == "half":
            response = web.StreamResponse(headers={"Content-Type": JSON, "Content-Length": str(len(body))})
            await response.prepare(call.request)
            await response.write(body[: len(body) // 2])
            call.hang_up()
        return web.Response(body=body, content_type=JSON)

    async def _stream(self, call: Call, made: answers.Generation) -> web.StreamResponse:
        """Answer with server-sent events, a token at a time."""
        script, fault = self.script, call.fault
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        if fault is not None:
            await self._hang(call, headers)
        response = web.StreamResponse(headers=headers)
        await response.prepare(call.request)
        if fault is not None and fault.do == "garbage":
            await response.write(b"data: {not JSON\n\n")
            return response
        due = time.monotonic() + script.ttft_ms / 1000 + (fault.seconds if fault else 0.0)
        tokens = 0
        for event, is_token in made.events():
            # Against a clock and not by equal sleeps, which would each come a little late.
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            await response.write(event)
            if is_token:
                tokens += 1
                if script.tokens_per_second:
                    due += 1 / script.tokens_per_second
                if fault is not None and fault.do == "half" and tokens * 2 >= made.completion_tokens:
                    call.hang_up()
        return response

    async def _hang(self, call: Call, headers: dict[str, str]) -> None:
        """Never come back, where the rule says so."""
        if call.fault is None or not call.fault.do.startswith("hang"):
            return
        if call.fault.do == "hang_after_headers":
            await web.StreamResponse(headers=headers).prepare(call.request)
        await forever()

    def _page(self, request: web.BaseRequest) -> web.Response:
        script = self.script
        if (refusal := self._closed_door(request)) is not None:
            return refusal
        if request.path == "/health" or (request.path == "/v1/health" and script.dialect == "llamacpp"):
            return _reply({"status": "ok"})
        load = self._load()
        page = dialects.page(script.dialect, request.path, script.models, script.context, load)
        if page is None:
            return self._error(404, f"There is no {request.method} {request.path} here.")
        if request.path == "/slots" and "fail_on_no_slot" in request.query and self._slots.full:
            return self._error(503, "no slot available")
        return _reply(page)

    def _load(self) -> dialects.Load:
        script, slots = self.script, self._slots
        usage = min(1.0, slots.working / max(1, slots.size)) if script.kv_usage is None else script.kv_usage
        return dialects.Load(
            working=slots.working,
            waiting=slots.waiting,
            slots=slots.size,
            kv_usage=usage,
            preemptions=script.preemptions,
            finished=self._by_status[200],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    def stats(self) -> dict[str, Any]:
        """Return what the engine has done since its start, and what it is doing now."""
        return {
            "requests": self._requests,
            "in_flight": self._in_flight,
            "peak_in_flight": self._peak_in_flight,
            "working": self._slots.working,
            "peak_working": self._slots.peak,
            "waiting": self._slots.waiting,
            "cancelled": self._cancelled,
            "by_status": {str(status): count for status, count in sorted(self._by_status.items())},
            "faults": dict(sorted(self._faults.items())),
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
        }

    def change(self, changes: Mapping[str, Any]) -> None:
        """Change fields of the script while the engine runs.

        Raises:
            InputError: A field is unknown, has an impossible value or can be set at the start only.
        """
        if fixed := sorted(FIXED & changes.keys()):
            raise InputError(f"{', '.join(fixed)} cannot be changed while the engine runs.", "Start it anew.")
        self.script = script = read_script(msgspec.to_builtins(self.script) | dict(changes), "The change")
        now = time.monotonic()
        if "rules" in changes:
            self._rules = Rules(script.rules, now)
        if "load_seconds" in changes:
            self._ready_at = now + script.load_seconds
        self._slots.resize(script.slots)

    async def _control(self, request: web.BaseRequest) -> web.Response:
        """Answer on `/_script`; to loopback alone, for whoever can script it can also end it."""
        remote = request.remote
        if remote is None or not ipaddress.ip_address(remote).is_loopback:
            return _reply({"error": "The script answers to loopback only."}, 403)
        match request.method, request.path:
            case "GET", "/_script/stats":
                return _reply(self.stats())
            case "GET", "/_script/log":
                if self._log is None:
                    return _reply({"error": "There is no log: start the engine with a log path."}, 404)
                lines = self._log.path.read_bytes()
                return web.Response(body=lines, content_type="application/x-ndjson")
            case "POST", "/_script":
                # A web page can post text to loopback, but not JSON unless we let it ask first.
                if request.content_type != JSON:
                    return _reply({"error": f"The script must be {JSON}."}, 415)
                try:
                    self.change(msgspec.json.decode(await request.read(), type=dict[str, Any]))
                except (InputError, msgspec.DecodeError) as error:
                    return _reply({"error": str(error)}, 400)
                return _reply(self.stats())
        return _reply({"error": f"There is no {request.method} {request.path} here."}, 404)

    def _error(self, status: int, message: str) -> web.Response:
        return _reply(dialects.error(self.script.dialect, status, message), status)


def _reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a response: text for a string, JSON for anything else."""
    text = isinstance(body, str)
    # Not the `content_type` argument: aiohttp refuses it where a rule sets the header too.
    all_headers = CIMultiDict({"Content-Type": "text/plain; charset=utf-8" if text else JSON})
    all_headers.update(headers or {})
    raw = body.encode() if text else msgspec.json.encode(body)
    return web.Response(body=raw, status=status, headers=all_headers)


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())


async def forever() -> NoReturn:
    """Wait until cancelled."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable")
