"""The engine: whether it is healthy, lets us in, and serves what the settings say."""

from __future__ import annotations

import asyncio
import importlib.util
from urllib.parse import urlsplit

from millrace.cli.doctor.docker import Docker, engine_in_container
from millrace.cli.doctor.finding import Finding, note, ok, told, wrong
from millrace.cli.doctor.programs import LIMIT
from millrace.cli.doctor.sockets import listeners
from millrace.compose import SERVICE
from millrace.embedded import LOOPBACK
from millrace.engine.client import EngineClient
from millrace.engine.probes import EngineState, probe
from millrace.engine.retry import BadResponse, EngineError, EngineTimeout, KeyRefused, RequestRefused
from millrace.settings import Settings

CHECK = "engine"


def engine(settings: Settings, docker: Docker) -> list[Finding]:
    """Look at the engine that LLM_SERVER_URL names."""
    try:
        state = asyncio.run(_probe(settings))
    except KeyRefused as error:
        return [told(CHECK, error)]
    except EngineError as error:
        return [_unwell(settings, docker, error)]
    if settings.llm_model and settings.llm_model not in state.names:
        mend = f"It serves {', '.join(state.models)}: correct LLM_MODEL or load the model."
        return [wrong(CHECK, f"{state.url} does not serve LLM_MODEL={settings.llm_model}", mend)]
    size = f" of {state.context} tokens" if state.context else ""
    slots = f", {state.slots} slot{'s' if state.slots > 1 else ''}{size}" if state.slots else ""
    serving = ", ".join(state.models) or "nothing"
    well = ok(CHECK, f"{state.kind} {state.url}, healthy, serving {serving}{slots}")
    return [well, *_differs(settings, docker, state), *_open(settings)]


async def _probe(settings: Settings) -> EngineState:
    try:
        async with asyncio.timeout(LIMIT), EngineClient.of(settings) as client:
            return await probe(client)
    except TimeoutError:
        raise EngineTimeout(f"no answer within {LIMIT:g} s") from None


def _unwell(settings: Settings, docker: Docker, error: EngineError) -> Finding:
    local = urlsplit(settings.llm_server_url).hostname in LOOPBACK
    if error.status == 503 and "loading" in error.message.lower():
        return note(
            CHECK, f"{settings.llm_server_url} is loading its model", "Wait: millrace status shows when it serves."
        )
    if isinstance(error, BadResponse | RequestRefused):
        what = f"what answers at {settings.llm_server_url} is no OpenAI-compatible engine"
        return wrong(CHECK, what, "Correct LLM_SERVER_URL or LLM_PORT.")
    if error.status is not None:
        return wrong(CHECK, f"{settings.llm_server_url} is not healthy. {error.message}", "Look at its log.")
    missing = f"{settings.llm_server_url} does not answer"
    if local and engine_in_container(settings):
        if docker.runs(SERVICE):
            return note(
                CHECK, f"{missing} yet", f"Its container runs: docker compose logs -f {SERVICE} shows how far it is."
            )
        return wrong(CHECK, missing, f"docker compose up -d {SERVICE}")
    if settings.llm_backend != "llamacpp" or not local:
        return wrong(CHECK, missing, "Start it, or correct LLM_SERVER_URL.")
    if importlib.util.find_spec("xllamacpp") is None:
        mend = "Run pip install 'millrace[embedded]', or start a server and set LLM_SERVER_URL."
        return wrong(CHECK, missing, mend)
    return note(CHECK, missing, "`millrace up` starts an embedded llama.cpp server.")


def _differs(settings: Settings, docker: Docker, state: EngineState) -> list[Finding]:
    """Compare what it says of itself with the settings."""
    names = {"llamacpp": "llama.cpp", "vllm": "vLLM"}
    if settings.llm_backend in names and state.kind in names and state.kind != settings.llm_backend:
        what = f"it is {names[state.kind]}, and LLM_BACKEND is {settings.llm_backend}"
        if engine_in_container(settings):
            what = f"it is {names[state.kind]}, and COMPOSE_FILE says {names[settings.llm_backend]}"
            return [note(CHECK, what, "millrace backend start makes it so.")]
        return [note(CHECK, what, f"Set LLM_BACKEND={state.kind}, or see who has its port.")]
    if not docker.runs(SERVICE):  # a server of your own has settings of its own
        return []
    wanted: dict[str, tuple[int, int | None]] = {}
    if state.kind == "llamacpp":
        wanted = {"N_PARALLEL": (settings.n_parallel, state.slots), "N_CTX": (settings.n_ctx, state.context)}
        # The server rounds a slot's context up to a multiple of 256.
        if state.context and settings.n_ctx <= state.context < settings.n_ctx + 256:
            del wanted["N_CTX"]
    elif state.kind == "vllm":
        wanted = {"MAX_MODEL_LEN": (settings.max_model_len, state.context)}
    return [
        note(CHECK, f"{name} is {asked}, and it has {got}", f"docker compose up -d {SERVICE} takes what .env says.")
        for name, (asked, got) in wanted.items()
        if got is not None and got != asked
    ]


def _open(settings: Settings) -> list[Finding]:
    """Look at whether others reach it without a key."""
    parts = urlsplit(settings.llm_server_url)
    if settings.engine_api_key or parts.hostname not in LOOPBACK:
        return []
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = [listener.address for listener in listeners(port) if not listener.loopback]
    if not found:
        return []
    what = f"whoever reaches {', '.join(found)}, port {port}, may use it: it has no key"
    return [note(CHECK, what, "Start it with --host 127.0.0.1, or with a key and the same in LLM_API_KEY.")]
