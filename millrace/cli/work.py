"""`millrace up`, `worker`, `status` and `chat`."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer
from aiohttp import web
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from millrace import dead_letters, presence
from millrace.batch.ledger import Ledger
from millrace.batch.lines import CHAT
from millrace.cli.output import Json, answers, console, print_json, say
from millrace.cli.stack import Stack, engine_state, running_stack
from millrace.engine.interactive import Caller
from millrace.errors import InputError, MillraceError, Unreachable
from millrace.settings import Settings, get_settings, hide_password
from worker.exporter import metrics_server
from worker.supervisor import Heard, Supervisor

LOOPBACK = "127.0.0.1"
DRAINING = "Draining: requests in flight are answered, the rest is kept. Ctrl-C again ends at once."
STATUS_LINE = 1.0  # seconds between its changes
COUNTS = 60.0  # seconds between lines in a log that tell no more than how many rows are done
_COUNT = re.compile(r"\d+/\d+ rows")


def up(as_json: Json = False) -> None:
    """Run Redis, an engine and workers in the foreground; Ctrl-C drains and ends them.

    What .env names is used where it answers; the rest is embedded.
    """
    asyncio.run(_up(as_json=as_json))


async def _up(*, as_json: bool) -> None:
    async with running_stack(always_own_workers=True) as stack:
        assert stack.supervisor is not None
        settings = stack.settings
        if stack.caution:
            say(stack.caution)
        if as_json:
            print_json(
                {
                    "redis": settings.redis_address,
                    "engine": stack.engine.as_dict() if stack.engine else None,
                    "embedded": stack.ours,
                    "workers": stack.supervisor.wanted,
                }
            )
        async with _http_servers(settings, stack.supervisor):
            await _status_line(stack)
        if stack.stopping.is_set():
            say(DRAINING)
    if stack.ended_by:
        raise typer.Exit(128 + stack.ended_by)


async def _status_line(stack: Stack) -> None:
    """Keep one line up to date until it is time to end; in a log, a line a change, of mere counts one a minute."""
    ledger = await asyncio.to_thread(Ledger.open, stack.settings)
    shown, said = "", 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not stack.stopping.is_set():
            line = await _line(stack, ledger)
            if console.is_terminal:
                live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            elif line != shown and (_COUNT.sub("", line) != _COUNT.sub("", shown) or time.monotonic() > said + COUNTS):
                say(line)
                shown, said = line, time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stack.stopping.wait(), STATUS_LINE)


async def _line(stack: Stack, ledger: Ledger) -> str:
    assert stack.supervisor is not None
    settings = stack.settings
    parts = [await asyncio.to_thread(_open_batches, ledger)]
    parts.append(f"{stack.supervisor.running}/{stack.supervisor.wanted} worker processes")
    try:
        trouble = await asyncio.to_thread(presence.trouble, settings)
    except Unreachable as error:
        parts.append(error.message)
    else:
        parts.append(trouble["message"] if trouble else _engine_words(stack))
        parts.append(f"Redis {settings.redis_address.rpartition('@')[2].partition('/')[0]}")
    return " · ".join(parts)


def _open_batches(ledger: Ledger) -> str:
    try:
        found = [batch for batch in ledger.batches(20) if batch["millrace"]["ended"] is None]
    except MillraceError as error:
        return error.message
    if not found:
        return "no open batch"
    done = sum(batch["request_counts"]["completed"] + batch["request_counts"]["failed"] for batch in found)
    total = sum(batch["request_counts"]["total"] for batch in found)
    return f"{len(found)} open {'batch' if len(found) == 1 else 'batches'}, {done}/{total} rows"


def _engine_words(stack: Stack) -> str:
    state = stack.engine
    if state is None:
        return f"engine {stack.settings.llm_server_url} does not answer"
    slots = f", {state.slots} slots of {state.context} tokens" if state.slots else ""
    return f"{state.kind} {state.url.removeprefix('http://')} ({', '.join(state.models)}{slots})"


def worker(
    listen: Annotated[str, typer.Option(help="Address of /health and /metrics; they need no password.")] = LOOPBACK,
) -> None:
    """Run a worker with the right processes and options; SIGTERM and Ctrl-C drain it."""
    settings = get_settings()
    try:
        ipaddress.ip_address(listen)
    except ValueError:
        raise InputError(
            f"--listen {listen} is no IP address.", "Give one of this machine's, such as 0.0.0.0 for all of them."
        ) from None
    presence.ping(settings)
    Ledger.open(settings).close()
    asyncio.run(_worker(settings, listen))


async def _worker(settings: Settings, listen: str) -> None:
    from millrace.guard import Guard

    guard = Guard()
    supervisor = Supervisor(settings, started=guard.watch, ended=guard.forget)
    stopping = asyncio.Event()

    signals = Heard()
    ended_by = 0

    def heard(number: signal.Signals) -> None:
        nonlocal ended_by
        stopping.set()
        if signals.hear() == "second" and not ended_by:
            ended_by = number
            say("Ending at once.")
            supervisor.end_now()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard, number)
    try:
        await supervisor.start()
        async with _http_servers(settings, supervisor, listen):
            say(f"{supervisor.wanted} worker processes on Redis {settings.redis_address}. Ctrl-C drains.")
            await stopping.wait()
            say(DRAINING)
        await supervisor.stop()
    finally:
        supervisor.kill()
        guard.close()
    if ended_by:
        raise typer.Exit(128 + ended_by)


@contextlib.asynccontextmanager
async def _http_servers(settings: Settings, supervisor: Supervisor, listen: str = LOOPBACK) -> AsyncIterator[None]:
    """Answer /health and /metrics, each on its port, while the block runs."""
    async with health_server(settings, supervisor, listen), metrics_server(settings, supervisor.metrics, listen, say):
        yield


@contextlib.asynccontextmanager
async def health_server(settings: Settings, supervisor: Supervisor, listen: str) -> AsyncIterator[None]:
    """Answer /health, /health/live and /health/ready on the address `listen` while the block runs."""
    if not settings.health_check_enabled:
        yield
        return

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(_: web.Request) -> web.Response:
        parts: dict[str, Any] = {"workers": f"{supervisor.running}/{supervisor.wanted}"}
        reason = None if supervisor.running else "no worker process is running"
        try:
            await asyncio.to_thread(presence.ping, settings, 2.0)
            parts["redis"] = "connected"
        except Unreachable as error:
            parts["redis"], reason = "unreachable", reason or error.message
        try:
            engine = await engine_state(settings)
        except MillraceError as error:
            engine, reason = None, reason or error.message
        parts["llm"] = "connected" if engine else "unreachable"
        if engine is None:
            reason = reason or f"the engine at {settings.llm_server_url} does not answer"
        if reason:
            return web.json_response({"status": "not_ready", "reason": reason, **parts}, status=503)
        return web.json_response({"status": "ready", **parts})

    routes = web.Application()
    routes.add_routes([web.get("/health/live", live), web.get("/health/ready", ready), web.get("/health", ready)])
    runner = web.AppRunner(routes, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, listen, settings.health_check_port).start()
    except OSError as error:
        say(f"No /health: port {settings.health_check_port} is taken ({error.strerror}); set HEALTH_CHECK_PORT.")
    try:
        yield
    finally:
        await runner.cleanup()


def status(as_json: Json = False) -> None:
    """Show what is running, what waits and what is wrong."""
    settings = get_settings()
    report: dict[str, Any] = {"redis": {"url": settings.redis_address}, "ledger": {}, "engine": {}}
    reached = True
    try:
        report["workers"] = presence.alive(settings)
        report["trouble"] = presence.trouble(settings)
        with presence.connect(settings) as client:
            report["dead_letters"] = dead_letters.count(client, settings)
        report["redis"]["ok"] = True
    except Unreachable as error:
        report["redis"] |= {"ok": False, "error": error.as_dict()}
        report["workers"], report["trouble"], report["dead_letters"], reached = [], None, None, False
    try:
        state = asyncio.run(engine_state(settings))
        report["engine"] = {"ok": state is not None, "url": settings.engine_root} | (state.as_dict() if state else {})
    except MillraceError as error:
        report["engine"] = {"ok": False, "url": settings.engine_root, "error": error.as_dict()}
    try:
        ledger = Ledger.there(settings)
        report["ledger"] = {"ok": True, "url": hide_password(settings.ledger_url)}
        report["batches"] = [b for b in ledger.batches(100) if b["millrace"]["ended"] is None] if ledger else []
    except MillraceError as error:
        report["ledger"] = {"ok": False, "error": error.as_dict()}
        report["batches"], reached = [], False
    if as_json:
        print_json(report)
    else:
        _print_status(settings, report)
    raise typer.Exit(0 if reached and report["engine"]["ok"] else 3)


def _print_status(settings: Settings, report: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    redis = report["redis"]
    table.add_row("[bold]redis[/]", redis["url"] if redis["ok"] else f"[red]{escape(redis['error']['message'])}[/]")
    engine = report["engine"]
    if engine["ok"]:
        words = f"{engine['kind']} {engine['url']}, serving {escape(', '.join(engine['models'])) or 'nothing'}"
        if engine.get("slots"):
            words += f"; {engine['slots']} slots of {engine['context']} tokens"
    elif "error" in engine:
        words = f"[red]{escape(engine['error']['message'])}[/]"
    else:
        words = f"[red]{settings.llm_server_url} does not answer[/]"
    table.add_row("[bold]engine[/]", words)
    ledger = report["ledger"]
    where = escape(ledger["url"] if ledger["ok"] else ledger["error"]["message"])
    table.add_row("[bold]ledger[/]", where if ledger["ok"] else f"[red]{where}[/]")
    for entry in report["workers"]:
        since = time.strftime("%H:%M:%S", time.localtime(entry["since"]))
        table.add_row("[bold]worker[/]", f"{entry['name']}: {', '.join(entry['queues'])}; since {since}")
    if not report["workers"]:
        table.add_row("[bold]worker[/]", "[yellow]none; start one with `millrace worker` or `millrace up`[/]")
    for batch in report["batches"]:
        counts = batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        table.add_row("[bold]batch[/]", f"{batch['id']}: {batch['millrace']['status']}, {done}/{counts['total']} rows")
    if letters := report["dead_letters"]:
        what = "1 task or message" if letters == 1 else f"{letters} tasks or messages"
        table.add_row("[bold]dead[/]", f"[yellow]{what} failed for good; `millrace dlq list` names them[/]")
    if report["trouble"]:
        table.add_row("[bold]waiting[/]", f"[yellow]{escape(report['trouble']['message'])}[/]")
    answers.print(table)


def chat(
    prompt: Annotated[str, typer.Argument(help="What to say; - reads it from stdin.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Else LLM_MODEL, or the engine's first.")] = "",
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    as_json: Json = False,
) -> None:
    """Ask the engine one thing and print the answer."""
    settings = get_settings()
    if prompt == "-":
        prompt = sys.stdin.read()
    messages = [{"role": "system", "content": system}] if system else []
    payload = {
        "model": model or None,
        "messages": [*messages, {"role": "user", "content": prompt}],
        **settings.sampling,
    }
    if max_tokens:
        payload["max_tokens"] = max_tokens
    with contextlib.closing(Caller(settings)) as caller:
        answer = caller.call(CHAT, payload)
    if as_json:
        print_json(answer)
    else:
        print(answer["choices"][0]["message"]["content"] or "")
