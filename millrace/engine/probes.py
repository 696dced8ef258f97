"""What an engine says of itself: alive or not, models, slots, context.

llama.cpp and vLLM are known by name, any other by its behaviour. Sources: llama.cpp
tools/server/README.md (`/health`, `/props`), vLLM's API server (`/health`, `/version`),
llama_cpp/server/app.py (its models are owned by "me"; one request at a time).
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from typing import Any

from millrace.engine.client import EngineClient
from millrace.engine.retry import BadResponse, EngineError, KeyRefused, RequestRefused


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
    #: Further names of its models.
    aliases: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Every name it answers to; empty where it lists none."""
        return [*self.models, *self.aliases]

    def serves(self, model: str) -> bool:
        """Whether it answers to a model's name; one that lists no models may serve any."""
        return not self.models or model in self.names

    def as_dict(self) -> dict[str, Any]:
        """Return the state as a JSON object."""
        return asdict(self)


async def probe(client: EngineClient) -> EngineState:
    """Ask an engine what it is and what it serves.

    Raises:
        EngineError: It does not answer, is loading, refuses our key, or says what no engine would.
    """
    try:
        return await _probe(client)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadResponse(
            f"What answers at {client.root} says of itself what cannot be: {error}.", "Check LLM_SERVER_URL."
        ) from error


async def _probe(client: EngineClient) -> EngineState:
    with contextlib.suppress(RequestRefused):  # an engine without /health is judged by its models
        await client.check("/health")  # vLLM's has an empty body
    listed = await client.get("/v1/models")
    data = listed.get("data") if isinstance(listed, dict) else None
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    models = [str(entry["id"]) for entry in entries if "id" in entry]
    listed_too = [entry.get("aliases") for entry in entries]  # llama.cpp's --alias a,b
    aliases = [str(name) for names in listed_too if isinstance(names, list) for name in names if name not in models]
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
            aliases=aliases,
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
