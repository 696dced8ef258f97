"""Watching a batch until it ends: its progress, its rates, and why it waits."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from millrace import presence
from millrace.batch.ledger import Ledger
from millrace.batch.schema import Status
from millrace.cli.output import console, duration, say
from millrace.cli.stack import Stack
from millrace.errors import StorageError, Unreachable
from millrace.settings import Settings

POLL = 0.5  # seconds
RATE_WINDOW = 20.0  # seconds over which rates are taken
REDIS_PATIENCE = 30.0  # seconds without Redis after which watching ends


async def watch_batch(settings: Settings, ledger: Ledger, batch_id: str, stack: Stack | None) -> Status | None:
    """Show a batch's progress until it ends; None when it was the user who ended the watching.

    A run, which has a stack, ends as well where the batch is paused for a mistake in its rows.

    Raises:
        Unreachable: Redis or the ledger has gone.
        StorageError: A worker reports a full disk.
    """
    history: deque[tuple[float, int, int]] = deque()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(batch_id, total=None, rates="")
        reported = None
        told = Status.IN_PROGRESS
        heard = time.monotonic()
        while True:
            batch = await asyncio.to_thread(ledger.batch, batch_id)
            status = Status(batch["millrace"]["status"])
            try:
                trouble = await asyncio.to_thread(presence.trouble, settings)
                if stack is not None:
                    await stack.ensure_workers()
            except Unreachable as error:
                # Runners go on without it, and an embedded one is started again.
                if time.monotonic() - heard > REDIS_PATIENCE:
                    raise
                trouble = error.as_dict()
            else:
                heard = time.monotonic()
            _show(bar, task, batch, history, trouble)
            if status is Status.PAUSED and told is not Status.PAUSED:
                say(paused(batch))
                if stack is not None and batch["millrace"]["reason"]:
                    return status  # only a person can mend it, and may be asleep
            told = status
            if status.final:
                return status
            if stack is not None and stack.stopping.is_set():
                return None
            if trouble and trouble["code"] in ("disk_full", StorageError.code):
                raise StorageError(trouble["message"], trouble["hint"], code=trouble["code"])
            if trouble and trouble["message"] != reported:
                reported = trouble["message"]
                say(f"Rows wait: {reported}")
            await asyncio.sleep(POLL)


def paused(batch: dict[str, Any]) -> str:
    """Return the sentence that says that a batch is paused, and why."""
    reason = batch["millrace"]["reason"]
    if reason:  # which says what to do
        return f"{batch['id']} is paused: {reason}"
    return f"{batch['id']} is paused. `millrace batch resume {batch['id']}` goes on with it."


def _show(
    bar: Progress,
    task: TaskID,
    batch: dict[str, Any],
    history: deque[tuple[float, int, int]],
    trouble: dict[str, Any] | None,
) -> None:
    counts = batch["request_counts"]
    done, tokens = counts["completed"] + counts["failed"], batch["usage"]["output_tokens"]
    now = time.monotonic()
    history.append((now, done, tokens))
    while len(history) > 2 and now - history[0][0] > RATE_WINDOW:
        history.popleft()
    then, done_then, tokens_then = history[0]
    span = now - then
    rates = ""
    if trouble:
        rates = "[yellow]waiting[/]"
    elif span > 0 and done > done_then:
        per_second = (done - done_then) / span
        left = (counts["total"] - done) / per_second
        rates = f"{per_second:.1f} rows/s · {(tokens - tokens_then) / span:.0f} tok/s · ETA {duration(left)}"
    if counts["failed"]:
        rates += f" · [red]{counts['failed']} failed[/]"
    status = batch["millrace"]["status"]
    description = status if status != Status.IN_PROGRESS else "running"
    bar.update(task, total=counts["total"], completed=done, rates=rates, description=description)
