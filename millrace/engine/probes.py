"""What an engine says of itself: alive or not, models, slots, context.

llama.cpp and vLLM are known by name, any other by its behaviour. Sources: llama.cpp
tools/server/README.md (`/health`, `/props`), vLLM's API server (`/health`, `/version`),
llama_cpp/server/app.py (its models are owned by "me"; one request at a time).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from millrace.engine.client import EngineClient
from millrace.engine.retry import EngineError, KeyRefused, RequestRefused

log = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 5.0  # seconds between probes of an engine that is down


@dataclass(frozen=True)
class EngineState:
    """The engine at one moment."""

    url: str
    #: llamacpp, vllm, llama-cpp-python or openai (anything else).
    kind: str
    #: Names it answers to, the default one first.
    models: list[str] = field(default_factory=list)
    #: Requests it works on at once; None where it does not say.
    slots: int | None = None
    #: Tokens that fit one request, prompt and answer; None where it does not say.
    context: int | None = None
    version: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the state as a JSON object."""
        return asdict(self)


async def probe(client: EngineClient) -> EngineState:
    """Ask an engine what it is and what it serves.

    Raises:
        EngineError: It does not answer, is loading, or refuses our key.
    """
    with contextlib.suppress(RequestRefused):  # an engine without /health is judged by its models
        await client.check("/health")  # vLLM's has an empty body
    listed = await client.get("/v1/models")
    data = listed.get("data") if isinstance(listed, dict) else None
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    models = [str(entry["id"]) for entry in entries if "id" in entry]
    props = await _optional(client, "/props")
    if "total_slots" in props:
        settings = props.get("default_generation_settings", {})
        return EngineState(
            client.root,
            "llamacpp",
            models,
            slots=int(props["total_slots"]),
            context=int(settings.get("n_ctx", 0)) or None,
            version=str(props.get("build_info", "")),
        )
    context = next((entry["max_model_len"] for entry in entries if entry.get("max_model_len")), None)
    version = await _optional(client, "/version")
    if "version" in version:
        return EngineState(client.root, "vllm", models, context=context, version=str(version["version"]))
    if entries and entries[0].get("owned_by") == "me":
        return EngineState(client.root, "llama-cpp-python", models, slots=1, context=context)
    return EngineState(client.root, "openai", models, context=context)


async def serves(client: EngineClient, path: str, model: str) -> bool:
    """Whether the engine has a route, asked with the smallest request there is."""
    try:
        await client.post(path, b'{"model":"%b","input":"a"}' % model.encode(), limit=30.0)
    except RequestRefused as error:
        return error.status not in (404, 405, 501) and b"does not support embeddings" not in (error.body or b"")
    except EngineError as error:
        return error.status is None or error.status < 500
    return True


async def _optional(client: EngineClient, path: str) -> dict[str, Any]:
    try:
        answer = await client.get(path)
    except KeyRefused:
        raise  # llama.cpp answers /v1/models without a key, but not this
    except EngineError:
        return {}
    return answer if isinstance(answer, dict) else {}


class Watch:
    """Whether the engine is up, for the requests of one event loop.

    Requests that fail to reach it call `report`; until a probe succeeds, `wait` holds the others back.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._up = asyncio.Event()
        self._up.set()
        self._probing: asyncio.Task[None] | None = None
        #: Why the engine is down; None while it is up.
        self.trouble: EngineError | None = None

    @property
    def up(self) -> bool:
        """Whether the last thing heard of the engine was good."""
        return self.trouble is None

    def report(self, error: EngineError) -> None:
        """Hold requests back until the engine answers a probe."""
        if self.trouble is None:
            log.warning("%s Rows wait until it answers.", error.message)
            self.trouble = error
            self._up.clear()
            self._probing = asyncio.create_task(self._probe())

    async def wait(self) -> None:
        """Return once the engine is up."""
        await self._up.wait()

    async def close(self) -> None:
        """Stop probing."""
        if self._probing is not None:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing

    async def _probe(self) -> None:
        pause = _FIRST_WAIT
        while True:
            try:
                await probe(self._client)
            except EngineError as error:
                if isinstance(error, KeyRefused) and not isinstance(self.trouble, KeyRefused):
                    log.error("%s", error)
                self.trouble = error
            else:
                log.warning("The engine at %s answers again.", self._client.root)
                self.trouble = None
                self._up.set()
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_WAIT)
