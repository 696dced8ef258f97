"""What a running Millrace consists of, and starting what of it is missing.

    Redis      the one that the settings name, else the embedded one
    engine     the one that the settings name, else the embedded llama.cpp server
    workers    those that say in Redis that they are there, else our own

A part that the settings name on another machine, or that COMPOSE_FILE has, is never replaced by an embedded
one: that would split the work in two without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import IO, Any
from urllib.parse import urlsplit

from millrace import embedded, presence
from millrace.cli.fetching import fetching
from millrace.cli.output import say
from millrace.embedded import LOOPBACK
from millrace.engine.client import EngineClient
from millrace.engine.llama_process import Launch
from millrace.engine.probes import EngineState, probe
from millrace.engine.retry import EngineError, KeyRefused
from millrace.errors import MillraceError, SettingsError, Unreachable
from millrace.guard import Guard
from millrace.models.demo import Wanted, ensure_model
from millrace.settings import Settings, engine_override, get_settings, load
from worker.supervisor import Heard, Supervisor

WORKERS_READY = 60.0  # seconds
LOOK = 0.5  # seconds between looks at whether an embedded server still runs
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between tries to start it again


@dataclass
class Stack:
    """The parts, and which of them are ours."""

    settings: Settings
    engine: EngineState | None = None
    #: What to know before believing an answer; empty for a model that somebody chose.
    caution: str = ""
    #: Of `millrace demo`: which of its models; that one may stand in for an engine that was named.
    demo: Wanted | None = None
    supervisor: Supervisor | None = None
    #: Those parts that this process has started, in words.
    ours: list[str] = field(default_factory=list)
    #: Set by SIGINT or SIGTERM: come to an end.
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    #: The number of the second one: end at once; 0 where there was none.
    ended_by: int = 0
    #: Ends what is ours.
    cleanup: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def ensure_workers(self) -> None:
        """Start workers of our own where none are at work.

        Raises:
            Unreachable: They do not start.
        """
        if self.supervisor is not None or self.stopping.is_set():
            return
        if not await asyncio.to_thread(presence.at_work, self.settings):
            await asyncio.to_thread(presence.forget_trouble, self.settings)
            await _start_workers(self, self.cleanup)


@contextlib.asynccontextmanager
async def running_stack(*, always_own_workers: bool, demo: Wanted | None = None) -> AsyncIterator[Stack]:
    """Yield a whole stack, and end what of it was started here.

    Args:
        always_own_workers: Start workers even where others are at work (`millrace up`); else they start
            with `Stack.ensure_workers`.
        demo: Which of the demo's models an embedded engine serves (see `ensure_model`); it may stand in for an
            engine that LLM_SERVER_URL names.

    Raises:
        InputError: Another stack holds DATA_DIR.
        MillraceError: A part cannot be started.
    """
    settings = get_settings()
    async with contextlib.AsyncExitStack() as cleanup:
        has_redis = await _has_redis(settings)
        engine = await engine_state(settings)
        stack = Stack(settings, engine, demo=demo)
        _listen_to_signals(stack)
        if always_own_workers or not has_redis or engine is None:
            cleanup.enter_context(embedded.only_one(settings.data_dir))
        if not has_redis or engine is None:
            stack = await _start_servers(stack, has_redis, cleanup)
            settings = stack.settings
        stack.cleanup = cleanup
        if always_own_workers:
            await _start_workers(stack, cleanup)
        yield stack


async def engine_state(settings: Settings) -> EngineState | None:
    """Return what the engine is; None where it does not answer.

    Raises:
        SettingsError: It refuses our key.
    """
    async with EngineClient.of(settings) as client:
        try:
            return await probe(client)
        except KeyRefused as error:
            raise SettingsError(error.message, error.hint, code=error.code) from error
        except EngineError:
            return None


async def _has_redis(settings: Settings) -> bool:
    try:
        await asyncio.to_thread(presence.ping, settings)
    except Unreachable as error:
        host = urlsplit(settings.redis_dsn).hostname or ""
        if error.code != "redis_unreachable" or host not in LOOPBACK or settings.compose_file:
            raise
        return False
    return True


def _listen_to_signals(stack: Stack) -> None:
    """First SIGINT or SIGTERM: come to an end in order. Second one: now."""
    loop = asyncio.get_running_loop()

    signals = Heard()

    def heard(number: signal.Signals) -> None:
        stack.stopping.set()
        if signals.hear() != "second" or stack.ended_by:
            return
        say("Ending at once.")
        stack.ended_by = number
        if stack.supervisor is None:  # a file is being read, say: nothing else would end that
            loop.remove_signal_handler(number)
            os.kill(os.getpid(), number)
        else:
            stack.supervisor.end_now()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard, number)


async def _start_servers(stack: Stack, has_redis: bool, cleanup: contextlib.AsyncExitStack) -> Stack:
    settings, data_dir = stack.settings, stack.settings.data_dir
    guard = Guard()
    cleanup.callback(guard.close)
    found: dict[str, Any] = {}
    if not has_redis:
        server = await asyncio.to_thread(embedded.start_redis, data_dir, started=guard.watch)
        url = server.url
        _keep(server, lambda: embedded.start_redis(data_dir, url=url, started=guard.watch), guard, cleanup)
        found["redis_url"] = url
        stack.ours.append("Redis")
        _explain("Redis", settings.redis_address)
    if stack.engine is None:
        launch, stack.caution = await asyncio.to_thread(_choose_engine, stack)
        server = await asyncio.to_thread(_start_engine, stack, launch, guard)
        launch = replace(launch, port=urlsplit(server.url).port or 0)
        _keep(server, lambda: _start_engine(stack, launch, guard), guard, cleanup)
        found |= {"llm_server_url": server.url, "llm_backend": "llamacpp"}
        stack.ours.append("llama.cpp server")
        _explain("The engine", settings.llm_server_url)
    embedded.publish(data_dir, found)
    cleanup.callback(embedded.retract, data_dir)
    get_settings.cache_clear()
    stack.settings = get_settings()
    if stack.engine is None:
        stack.engine = await engine_state(stack.settings)
        _check_engine(stack)
    return stack


def _explain(what: str, where: str) -> None:
    say(f"{what} at {where} does not answer: using an embedded one.")


def _choose_engine(stack: Stack) -> tuple[Launch, str]:
    """Return how to start the embedded engine, and what to know before believing its answers."""
    settings = stack.settings
    host = urlsplit(settings.llm_server_url).hostname or ""
    if engine_override(settings.compose_file):
        raise Unreachable(
            f"The engine's container at {settings.llm_server_url} does not answer.",
            "`millrace backend start` starts it, and says why it does not; to go without containers, take "
            "COMPOSE_FILE out of .env.",
            code="engine_unreachable",
        )
    if settings.llm_backend != "llamacpp" or host not in LOOPBACK:
        raise Unreachable(
            f"The engine at {settings.llm_server_url} does not answer.",
            "Start it, or correct LLM_SERVER_URL; an embedded one stands in only for a llama.cpp server on "
            "this machine (LLM_BACKEND=llamacpp).",
            code="engine_unreachable",
        )
    if not stack.demo and not settings.model_path and "llm_server_url" in load().origins:
        raise Unreachable(
            f"The engine at {settings.llm_server_url}, which LLM_SERVER_URL names, does not answer.",
            "Start it; or set MODEL_PATH, to serve that model here; or take LLM_SERVER_URL out, for the demo's model.",
            code="engine_unreachable",
        )
    with fetching() as show:

        def progress(done: int, total: int) -> None:
            if stack.stopping.is_set():
                raise KeyboardInterrupt
            show(done, total)

        model = ensure_model(settings, say=say, progress=progress, wanted=stack.demo)

    launch = Launch(
        model=str(model.path),
        alias=model.name,
        slots=settings.n_parallel,
        context=settings.n_ctx,
        gpu_layers=settings.n_gpu_layers,
        threads=settings.n_threads,
        api_key=settings.engine_api_key,
    )
    return launch, model.caution


def _start_engine(stack: Stack, launch: Launch, guard: Guard) -> embedded.Server:
    def wait() -> None:
        if stack.stopping.is_set():
            raise KeyboardInterrupt

    return embedded.start_engine(stack.settings.data_dir, launch, wait, guard.watch)


def _check_engine(stack: Stack) -> None:
    """Compare what the server says of itself with what it was started with."""
    settings, state = stack.settings, stack.engine
    if state is None:
        raise Unreachable("The embedded llama.cpp server started, but does not answer.", code="engine_failed")
    # The server rounds a slot's context up to a multiple of 256.
    if state.slots != settings.n_parallel or (state.context or 0) < settings.n_ctx:
        raise Unreachable(
            f"The llama.cpp server has {state.slots} slots of {state.context} tokens instead of "
            f"{settings.n_parallel} of {settings.n_ctx}.",
            "Lower N_CTX or N_PARALLEL.",
            code="engine_differs",
        )


async def _start_workers(stack: Stack, cleanup: contextlib.AsyncExitStack) -> None:
    settings = stack.settings
    guard = Guard()
    cleanup.callback(guard.close)
    log: IO[bytes] = cleanup.enter_context(_worker_log(settings))
    stack.supervisor = Supervisor(settings, log_file=log.fileno(), started=guard.watch, ended=guard.forget)
    await stack.supervisor.start()
    cleanup.push_async_callback(stack.supervisor.stop)
    stack.ours.append("workers")
    away: Unreachable | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WORKERS_READY):
            while not stack.stopping.is_set():
                try:
                    names = [entry["name"] for entry in await asyncio.to_thread(presence.alive, settings)]
                    away = None
                except Unreachable as error:  # an embedded Redis may be about to come back
                    names, away = [], error
                if sum(f".{os.getpid()}@" in name for name in names) >= stack.supervisor.wanted:
                    return
                await asyncio.sleep(0.1)
            return
    raise away or Unreachable(
        f"The workers did not start within {WORKERS_READY:g} s.",
        f"Their log is {settings.data_dir / 'log' / 'workers.log'}.",
        code="workers_failed",
    )


def _worker_log(settings: Settings) -> IO[bytes]:
    folder = settings.data_dir / "log"
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "workers.log").open("ab")


def _keep(
    server: embedded.Server,
    again: Callable[[], embedded.Server],
    guard: Guard,
    cleanup: contextlib.AsyncExitStack,
) -> None:
    """Start an embedded server again, at the same address, when it ends before we end it."""
    current = server

    async def keep() -> None:
        nonlocal current
        pause = FIRST_PAUSE
        while True:
            await asyncio.sleep(LOOK)
            if current.running:
                continue
            guard.forget(current.process.pid)
            current.stop()  # closes its pipes
            say(f"The embedded {current.name} has ended ({current.process.returncode}); it is started again.")
            try:
                current = await asyncio.to_thread(again)
                pause = FIRST_PAUSE
            except MillraceError as error:
                say(str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    keeper = asyncio.create_task(keep())

    async def stop() -> None:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        current.stop()
        guard.forget(current.process.pid)

    cleanup.push_async_callback(stop)
