"""`millrace backend …`: the engine's container, started and switched with every reason told."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from millrace.batch.ledger import Ledger
from millrace.batch.lines import CHAT
from millrace.cli.doctor.docker import Docker
from millrace.cli.doctor.model import model
from millrace.cli.output import Json, console, print_json, say
from millrace.compose import SERVICE, Compose
from millrace.engine.client import EngineClient
from millrace.engine.probes import EngineState, probe, serves
from millrace.engine.retry import RequestRefused
from millrace.errors import InputError, MillraceError, SettingsError, Unreachable
from millrace.hold import hold
from millrace.models.demo import put_there
from millrace.models.registry import model_files
from millrace.settings import ENGINES, Settings, engine_override, get_settings, load

app = typer.Typer(help="Start the engine's container, or switch to the other engine.", no_args_is_help=True)

DOTENV = Path(".env")
MARGIN = 60.0  # seconds beyond the longest task, until a worker is called stuck
FIRST_TOKEN = 300.0  # seconds; a large model's first answer may compile something


@app.command("start")
def start(as_json: Json = False) -> None:
    """Start the containers that COMPOSE_FILE names, and wait until the engine has answered."""
    settings = _settings()
    compose = Compose(settings)
    compose.check()
    if engine_override(settings.compose_file) is None:
        raise _no_engine("llamacpp")
    with _alone():
        state = _start(compose, settings)
    _done(state, as_json=as_json)


@app.command("switch")
def switch(
    engine: Annotated[str, typer.Argument(help="llamacpp or vllm.")],
    as_json: Json = False,
) -> None:
    """Switch to the other engine: let running work drain, write .env, change the container, go on.

    What is queued stays queued. Where the new engine does not start, the old one comes back.
    """
    if engine not in ENGINES:
        raise InputError(f"There is no engine {engine!r}.", f"It is one of {', '.join(ENGINES)}.", code="usage")
    settings = _settings()
    old = engine_override(settings.compose_file)
    if old is None:
        raise _no_engine(engine)
    if old == engine:
        say(f"The engine is {engine} already.")
        start(as_json=as_json)
        return
    if load().origins.get("compose_file") != ".env":
        raise InputError(
            "COMPOSE_FILE is set in the environment, which wins over .env.",
            "Unset it there, and set it in .env.",
            code="not_in_dotenv",
        )
    _end_in_order()
    chosen = settings.compose_file.replace(f"docker-compose.{old}.yml", f"docker-compose.{engine}.yml")
    new = Compose(settings, chosen)
    # Whatever can be wrong or slow comes first, while the old engine still works.
    new.check()
    _check_files(settings.model_copy(update={"compose_file": chosen, "llm_backend": engine}), new)
    if name := _name_to_be(engine, settings):
        _check_models(settings, [name])
    with _building(f"Making the image of {engine}.") as told:
        new.build(told)
    with _alone(), hold(settings, f"the engine is being switched to {engine}") as held:
        patience = settings.task_time_limit + MARGIN
        say("Holding the queues: what is in flight is answered, the rest stays queued.")
        if not held.wait(patience, _Waiting()):
            names = ", ".join(entry["name"] for entry in held.busy())
            raise Unreachable(
                f"Not at rest after {patience:.0f} s: {names}. Nothing was changed.",
                "End those workers, or wait for their tasks, then try again.",
                code="workers_busy",
            )
        try:
            state = _change(settings, new, chosen)
        finally:
            _send_tickets()
    _done(state, as_json=as_json)


def _no_engine(engine: str) -> InputError:
    return InputError(
        "COMPOSE_FILE names no engine.",
        f"Set COMPOSE_FILE=docker-compose.yml:docker-compose.{engine}.yml in .env, then `millrace backend start`.",
        code="no_engine",
    )


def _end_in_order() -> None:
    """Let a SIGTERM, and a terminal that closes, end us as Ctrl-C does: with the old engine back."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _change(before: Settings, new: Compose, chosen: str) -> EngineState:
    """Write .env and change the container; whatever goes wrong, put both back."""
    try:
        _write(chosen)
        settings = _settings()
        state = _start(new, settings)
        _check_models(settings, state.models)
    except BaseException as error:
        why = "Interrupted" if isinstance(error, KeyboardInterrupt) else "That did not work"
        say(f"{why}: going back to the old engine.")
        _write(before.compose_file)
        back = "The old engine runs again."
        try:
            _start(Compose(before), _settings())
        except MillraceError as second:
            back = f"The old engine did not come back either: {second.message}"
        if isinstance(error, MillraceError):
            error.message += f"\n{back}"
        else:
            say(back)
        raise
    return state


def _write(compose_file: str) -> None:
    """Set COMPOSE_FILE, and LLM_BACKEND where it is set, in .env; nothing else of it changes."""
    path = DOTENV.resolve()
    text = path.read_text(encoding="utf-8")
    for name, value in (("COMPOSE_FILE", compose_file), ("LLM_BACKEND", engine_override(compose_file))):
        text = re.sub(rf"^(\s*(?:export\s+)?{name}\s*=)[^\n]*\S[^\n]*", rf"\g<1>{value}", text, flags=re.M)
    part = path.with_name(f"{path.name}.part")
    part.touch(mode=path.stat().st_mode & 0o777)  # it holds secrets
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _settings() -> Settings:
    get_settings.cache_clear()
    settings = get_settings()
    if not settings.compose_file:
        raise SettingsError(
            "COMPOSE_FILE is not set: no containers are chosen.",
            "Set it in .env, such as COMPOSE_FILE=docker-compose.yml:docker-compose.llamacpp.yml; "
            "without Docker, `millrace up` runs an engine of its own.",
            code="no_compose_file",
        )
    return settings


def _start(compose: Compose, settings: Settings) -> EngineState:
    """Create what is not there, and return once the engine is healthy and has answered."""
    with _building("Starting the containers.") as told:
        compose.up(told)
    for service in compose.services():
        _await(compose, service)
    return asyncio.run(_first_token(settings))


def _await(compose: Compose, service: str) -> None:
    words = "The engine loads its model" if service == SERVICE else f"{service} starts"
    with console.status(f"{words}.") as line:
        try:
            compose.wait(service, lambda seconds: line.update(f"{words}: {seconds:.0f} s."))
        except Unreachable:
            compose.stop(service)  # it would end and start again for ever
            raise


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let one engine of this machine start at a time, whosever it is.

    Two that measure and take one GPU's memory at the same moment both fail.
    """
    path = Path(tempfile.gettempdir()) / "millrace-engine-start.lock"
    # To read is enough to lock it; another user's file in such a folder cannot be opened with O_CREAT.
    if not path.exists():
        path.touch(mode=0o644)
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another engine of this machine, which is starting.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def _first_token(settings: Settings) -> EngineState:
    """Return what the engine is after it has generated something: listening is not answering."""
    async with EngineClient.of(settings) as client:
        state = await probe(client)
        model = settings.llm_model or next(iter(state.models), "")
        body = {"model": model, "messages": [{"role": "user", "content": "Say a word."}], "max_tokens": 1}
        try:
            await client.post(CHAT, msgspec.json.encode(body), FIRST_TOKEN)
        except RequestRefused:
            if not await serves(client, "/v1/embeddings", model):  # a model without a chat
                raise
        return state


def _name_to_be(engine: str, settings: Settings) -> str:
    """Return the name under which an engine will serve its model, as far as that can be told before it starts."""
    if settings.llm_model:
        return settings.llm_model
    if named := settings.model_path if engine == "llamacpp" else settings.model_name:
        return Path(named).name.removesuffix(".gguf")
    kind = "gguf" if engine == "llamacpp" else "hf"
    there = [file.name for file in model_files(settings.models_dir) if file.format == kind]
    if kind == "gguf":
        there = put_there(there)
    return there[0] if len(there) == 1 and not settings.models_source else ""


def _check_files(settings: Settings, new: Compose) -> None:
    """Refuse an engine whose model's files the doctor calls wrong: it would not start."""
    for finding in model(settings, Docker(config=new.config())):
        if finding.verdict == "wrong":
            raise Unreachable(
                f"{settings.llm_backend} would not start: {finding.what.rstrip('.')}. Nothing was changed.",
                finding.mend,
                code="engine_failed",
            )


def _check_models(settings: Settings, served: list[str]) -> None:
    """Refuse an engine under whose names waiting rows could not be answered."""
    with contextlib.closing(Ledger.open(settings)) as ledger:
        waiting = ledger.waiting_models()
    missing = sorted(set(waiting) - set(served))
    if missing:
        raise InputError(
            f"{sum(waiting[name] for name in missing)} queued rows ask for the model {', '.join(missing)}, "
            f"and the other engine serves {', '.join(served)}.",
            f"Set LLM_MODEL={missing[0]} in .env, to serve it under that name; or finish or cancel those batches.",
            code="model_mismatch",
        )


def _send_tickets() -> None:
    """Let the work go on now, and not when the reaper next looks."""
    from kombu.exceptions import OperationalError

    from tasks.batch import send_tickets

    with contextlib.suppress(MillraceError, OperationalError):  # the reaper does it else
        send_tickets()


def _done(state: EngineState, *, as_json: bool) -> None:
    if as_json:
        print_json({"engine": state.as_dict()})
    else:
        slots = f", {state.slots} slots of {state.context} tokens" if state.slots else ""
        say(f"{state.kind} {state.url} serves {', '.join(state.models)}{slots}.")


@contextlib.contextmanager
def _building(sentence: str) -> Iterator[Callable[[str], None]]:
    """Show what Compose says, its last line where somebody watches, else nothing."""
    say(sentence)
    with console.status(sentence) as line:

        def told(words: str) -> None:
            if shown := re.sub(r"\x1b\[[0-9;]*\w|^#\d+ ", "", words).strip():
                line.update(f"{sentence} {shown[: console.width - len(sentence) - 5]}")

        yield told


class _Waiting:
    """Says once, and again when it changes, what is waited for."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, busy: list[dict[str, Any]]) -> None:
        tasks = sum(entry.get("engine_tasks") or 0 for entry in busy)
        sentence = f"Waiting for {tasks} {'task' if tasks == 1 else 'tasks'} in flight." if tasks else ""
        if sentence and sentence != self._said:
            say(sentence)
        self._said = sentence
