"""Batches, as tasks; queue `batch`. A message is a hint that there may be work: the ledger knows."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import uvloop
from kombu.exceptions import OperationalError

from millrace import presence
from millrace.batch import merge as merging
from millrace.batch.inputs import detect_format
from millrace.batch.lease import Leases, waiting_shards
from millrace.batch.ledger import Ledger
from millrace.batch.runner import Session
from millrace.batch.schema import Priority
from millrace.batch.submit import Order, open_input, submit
from millrace.errors import MillraceError
from millrace.settings import Settings, get_settings
from worker.app import BROKER_PRIORITY, app
from worker.holding import held
from worker.lifecycle import draining

log = logging.getLogger(__name__)

SESSION = 300.0  # seconds after which a runner lets other messages of its queue have their turn
WINDOW = 32  # tickets ahead: each runner claims shard after shard, so a few for each of them are plenty


@app.task(name="batch.plan", ignore_result=False)
def plan(path: str, model: str = "", priority: str = "normal", name: str = "") -> str:
    """Submit the file at `path`, on this worker's machine, and return the batch's id.

    Raises:
        InputError: The file cannot be read, or lines of it are wrong.
    """
    order = Order(
        filename=Path(path).name,
        format=detect_format(path, None),
        model=model,
        priority=Priority.parse(priority),
        name=name,
    )
    with open_input(path) as stream:
        submitted = submit(get_settings(), ledger(), stream, order)
    send_tickets()
    return submitted.batch_id


@app.task(name="batch.run_shard")
def run_shard() -> dict[str, Any]:
    """Run shards until there are none or the session's time is over."""
    settings = get_settings()
    if held():
        return {"skipped": "the engine is being changed; tickets are sent again"}
    if not waiting_shards(ledger()):
        # A ticket that was sent ahead: others have done the work.
        return {"skipped": "there is nothing to claim"}
    with _runner_slot(settings) as free:
        if not free:
            return {"skipped": "every runner of this machine is at work; they claim what there is"}
        leases = Leases(ledger(), f"{socket.gethostname()}:{os.getpid()}", settings.batch_lease_seconds)
        trouble = presence.Trouble(settings)
        session = Session(leases, settings, stop=_stop, seconds=SESSION, report=trouble.tell, ended_batch=send_merge)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                outcome = runner.run(session.run())
        except MillraceError as error:
            trouble.tell(error)
            raise
    # Looked at with the slot free: work that came while we were ending finds us or this ticket.
    if outcome.more or waiting_shards(ledger()):
        send_tickets(most=1)
    return {"shards": outcome.shards, "rows": outcome.rows}


def _stop() -> bool:
    return draining() or held()


@app.task(name="batch.merge")
def merge(batch_id: str) -> str:
    """Write the files of a batch whose shards have ended; return its status."""
    settings = get_settings()
    try:
        return str(merging.merge(ledger(), settings.data_dir, batch_id))
    except MillraceError as error:
        presence.Trouble(settings).tell(error)
        raise


def send_merge(batch_id: str) -> None:
    """Ask for a merge; where Redis does not answer, the reaper asks again."""
    try:
        merge.apply_async((batch_id,), retry=False)
    except OperationalError as error:
        log.warning("The merge of %s waits for Redis: %s", batch_id, error)


def send_tickets(most: int = WINDOW) -> int:
    """Publish a ticket for each shard that waits, up to `most`, in one round-trip; return how many."""
    count = waiting_shards(ledger(), most)
    if count:
        with app.producer_pool.acquire(block=True, timeout=10) as producer, producer.batch(max_size=WINDOW):
            for _ in range(count):
                # Last of all steps: on a worker with every queue, whoever waits for an answer goes first.
                run_shard.apply_async(producer=producer, priority=BROKER_PRIORITY[Priority.IDLE])
    return count


@cache
def ledger() -> Ledger:
    """Return this process's ledger, opened at the first call.

    Raises:
        Unreachable: See `Ledger.open`.
    """
    return Ledger.open(get_settings())


@contextlib.contextmanager
def _runner_slot(settings: Settings) -> Iterator[bool]:
    """Hold one of this machine's BATCH_PROCESSES places; yield False where none is free.

    A worker that serves every queue keeps processes for interactive tasks that way. The places are
    file locks: the kernel frees a killed process's.
    """
    folder = settings.data_dir / "run"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(settings.batch_processes):
        with (folder / f"runner.{socket.gethostname()}.{number}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield True
            return
    yield False
