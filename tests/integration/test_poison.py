"""Rows that take the engine or the worker down: they end in the errors file, and every other row is answered."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from millrace.batch import planner
from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Leases
from millrace.batch.ledger import Ledger
from millrace.batch.lines import decode_input
from millrace.batch.runner import Session
from millrace.batch.schema import ShardState
from millrace.batch.suspects import LONE_DEATHS, MOST_PREPARATIONS, Flight
from millrace.settings import Settings
from tests.integration.test_runner import SHORT, Running, all_right, calls, ended, names, on, port_of, run
from tests.scripted_engine import Engine, scripted_engine
from tests.services import freeze, until
from tests.unit.batches import TTL, expire, planned, request

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.integration.test_poison"])


def rows(count: int, *poison: int) -> list[dict[str, Any]]:
    return [request(f"{'poison' if number in poison else 'row'} {number}", model="scripted") for number in range(count)]


@pytest.fixture
def one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MIN_SHARDS", 1)


def work(settings: Settings, ttl: float = TTL) -> None:
    """A worker process: session after session until the batch's shards have ended."""
    with contextlib.closing(Ledger.open(settings)) as ledger:
        leases = Leases(ledger, str(os.getpid()), ttl)
        while ledger.ready_to_merge() == []:
            asyncio.run(Session(leases, settings, stop=lambda: False, seconds=60.0).run())
            time.sleep(0.02)


class Workers:
    """Worker processes, each replaced when it was killed."""

    def __init__(self, settings: Settings, count: int) -> None:
        self._settings = settings
        self._processes: dict[int, BaseProcess] = {}
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        process = PROCESSES.Process(target=work, args=(self._settings,))
        process.start()
        assert process.pid is not None
        self._processes[process.pid] = process

    def kill(self, pid: int) -> None:
        process = self._processes.pop(pid)
        process.kill()
        process.join()
        self._start()

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()


@contextlib.contextmanager
def workers(settings: Settings, count: int) -> Iterator[Workers]:
    started = Workers(settings, count)
    try:
        yield started
    finally:
        started.end()


@contextlib.contextmanager
def immortal_engine(**script: Any) -> Iterator[tuple[Engine, list[Engine]]]:
    """An engine that is started anew, at the same place, whenever it has ended; yields it and all those after it."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(scripted_engine(**script))
        engines, over = [first], threading.Event()

        def revive() -> None:
            while not over.wait(0.01):
                if engines[-1].process.poll() is not None:
                    engines.append(stack.enter_context(scripted_engine(port=port_of(first), **script)))

        thread = threading.Thread(target=revive)
        thread.start()
        try:
            yield first, engines
        finally:
            over.set()
            thread.join()


def body_of(settings: Settings, batch: str, row: int) -> str:
    """Return the hash by which the engine's log names the body of a row."""
    line = BatchFolder.of(settings.data_dir, batch).input.read_bytes().splitlines()[row]
    return hashlib.sha256(bytes(decode_input(line).body)).hexdigest()


def check(settings: Settings, ledger: Ledger, batch: str, count: int, poison: list[int], what: str) -> None:
    output, errors = ended(settings, ledger, batch)
    assert names(output) == [f"row {number}" for number in range(count) if number not in poison]
    assert names(errors) == [f"poison {number}" for number in poison]
    for line in errors:
        assert line["error"]["code"] == "poison_row"
        assert f"{what} died 3 times while it worked on this row" in line["error"]["message"]
    assert not flights(settings, batch)


def flights(settings: Settings, batch: str) -> list[Path]:
    """Return the journals of rows in flight that are there."""
    return list(BatchFolder.of(settings.data_dir, batch).segments.glob("*.flight"))


def test_a_row_that_kills_the_engine_ends_alone(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(51, 17))
    rule = {"when": {"contains": "poison"}, "then": {"do": "exit"}}
    with immortal_engine(slots=4, ttft_ms=20, rules=[rule]) as (first, engines):
        with workers(on(settings, first, batch_concurrency=4), 2):
            until(ledger.ready_to_merge, lambda: str(ledger.batch(batch)), 60)
        # Two rows of each process were in flight at the first death.
        assert 1 + LONE_DEATHS <= len(engines) - 1 <= 2 + LONE_DEATHS
        poison = body_of(settings, batch, 17)
        alone = [
            entry["in_flight"]
            for one in engines
            for entry in one.log()
            if entry["event"] == "start" and entry["sha256"] == poison
        ]
        assert alone[-LONE_DEATHS:] == [1] * LONE_DEATHS
    check(settings, ledger, batch, 51, [17], "The engine")


def test_a_row_that_kills_its_worker_ends_alone(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(51, 17))
    poison = body_of(settings, batch, 17)
    # The poison is never answered; whoever asks for it is killed, as by the kernel when memory is short.
    rule = {"when": {"contains": "poison"}, "then": {"do": "hang"}}
    with scripted_engine(slots=8, ttft_ms=20, rules=[rule]) as engine:
        with workers(on(settings, engine, batch_concurrency=8), 2) as processes:
            kills = 0
            while not ledger.ready_to_merge():
                if calls(engine)[poison] > kills:
                    kills += 1
                    shard = next(s for s in ledger.shards(batch) if s.first <= 17 < s.first + s.rows)
                    processes.kill(int(shard.owner))
                    expire(ledger, *(s.id for s in ledger.shards(batch) if s.owner == shard.owner))
                time.sleep(0.01)
        assert 1 + LONE_DEATHS <= kills <= 3 + LONE_DEATHS
    check(settings, ledger, batch, 51, [17], "The worker process")


def test_rows_that_a_kill_met_by_chance_run_again_in_two_rounds(
    settings: Settings, ledger: Ledger, one_shard: None
) -> None:
    batch = planned(settings, ledger, rows(80))
    with (
        scripted_engine(slots=64, rules=[{"then": {"do": "hang"}}]) as engine,
        workers(on(settings, engine, batch_concurrency=64), 1) as processes,
    ):
        engine.wait_for(lambda stats: stats["in_flight"] == 64)
        (shard,) = ledger.shards(batch)
        processes.kill(int(shard.owner))
        engine.script(rules=[], ttft_ms=500)
        before = len(engine.log())
        expire(ledger, shard.id)
        until(ledger.ready_to_merge, lambda: str(ledger.batch(batch)))
        again = [entry["in_flight"] for entry in engine.log()[before:] if entry["event"] == "start"]
        assert max(again[:64]) == 32
        assert len(again) == 80
    all_right(settings, ledger, batch, 80)


def test_others_wait_while_a_session_has_suspects(settings: Settings, ledger: Ledger) -> None:
    """The rows that a killed worker had in flight run again in halves, while the other session has none in flight."""
    batch = planned(settings, ledger, rows(64))
    with scripted_engine(slots=0, ttft_ms=100) as engine:
        here = on(settings, engine, batch_concurrency=8)
        with workers(here, 1) as processes:
            engine.wait_for(lambda stats: stats["waiting"] == 8)
            pid, killed = next((int(s.owner), s.id) for s in ledger.shards(batch) if s.owner)
            with Running(here, ledger) as other:
                engine.wait_for(lambda stats: stats["waiting"] == 12)
                processes.kill(pid)
                engine.script(slots=4)
                expire(ledger, killed, *(s.id for s in ledger.shards(batch) if s.owner == str(pid)))
                other.result()
                until(ledger.ready_to_merge, lambda: str(ledger.batch(batch)))
        begun: Counter[str] = Counter()
        again = []
        for entry in engine.log():
            if entry["event"] == "start":
                begun[entry["sha256"]] += 1
                if begun[entry["sha256"]] > 1:
                    again.append(entry["in_flight"])
        assert 1 <= max(again) <= 4
    all_right(settings, ledger, batch, 64)


def test_an_answer_that_no_memory_holds_ends_its_row_alone(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, size = aiohttp.ClientResponse.read, 100_000

    async def read_in_little_memory(response: aiohttp.ClientResponse) -> bytes:
        if len(raw := await read(response)) > size:
            raise MemoryError
        return raw

    monkeypatch.setattr(aiohttp.ClientResponse, "read", read_in_little_memory)
    batch = planned(settings, ledger, rows(20, 4))
    body = {"choices": [{"message": {"content": "x" * size}}]}
    rule = {"when": {"contains": "poison"}, "then": {"do": "status", "status": 200, "body": body}}
    with scripted_engine(rules=[rule]) as engine:
        assert run(on(settings, engine), ledger).rows == 20
        assert calls(engine)[body_of(settings, batch, 4)] == 1 + LONE_DEATHS
    check(settings, ledger, batch, 20, [4], "The worker process")


def test_a_row_beside_which_the_session_fails_ends_alone(settings: Settings, ledger: Ledger) -> None:
    """As when memory runs out somewhere else in the process, because of one answer."""
    batch = planned(settings, ledger, rows(20, 4))
    poison, failures = body_of(settings, batch, 4), 0
    rule = {"when": {"contains": "poison"}, "then": {"do": "hang"}}
    with scripted_engine(rules=[rule]) as engine:
        here = on(settings, engine)

        def report(_: object) -> None:
            nonlocal failures
            if calls(engine)[poison] > failures:
                failures += 1
                raise MemoryError

        while not ledger.ready_to_merge():
            session = Session(Leases(ledger, "runner", TTL), here, stop=lambda: False, seconds=60.0, report=report)
            with contextlib.suppress(MemoryError):
                asyncio.run(session.run())
    assert 1 + LONE_DEATHS <= failures <= 3 + LONE_DEATHS
    check(settings, ledger, batch, 20, [4], "The worker process")


def test_a_shard_that_nobody_can_begin_ends_as_errors(settings: Settings, ledger: Ledger, one_shard: None) -> None:
    batch = planned(settings, ledger, rows(6))
    folder = BatchFolder.of(settings.data_dir, batch)
    for _ in range(MOST_PREPARATIONS):
        lease = Leases(ledger, "dies", TTL).claim()
        assert lease is not None
        child = os.fork()
        if not child:
            Flight(folder.flight(lease.number, lease.epoch), lease.epoch, lease.rows)
            os._exit(137)
        os.waitpid(child, 0)
        expire(ledger, lease.shard_id)
    with scripted_engine() as engine:
        assert run(on(settings, engine), ledger).rows == 6
        assert engine.stats()["requests"] == 0
    output, errors = ended(settings, ledger, batch)
    assert output == []
    assert {line["error"]["code"] for line in errors} == {"shard_failed"}
    assert "10 workers died" in errors[0]["error"]["message"]


def test_a_worker_that_stood_still_for_longer_than_its_lease_accuses_nobody(
    settings: Settings, ledger: Ledger, one_shard: None
) -> None:
    batch = planned(settings, ledger, rows(12))
    rule = {"when": {"first_attempts": 1}, "then": {"do": "hang"}}
    with scripted_engine(slots=12, rules=[rule]) as engine:
        here = on(settings, engine, batch_concurrency=12)
        process = PROCESSES.Process(target=work, args=(here, SHORT))
        process.start()
        assert process.pid is not None
        engine.wait_for(lambda stats: stats["in_flight"] == 12)
        freeze(process.pid, settings.data_dir / "ledger.db")
        (shard,) = ledger.shards(batch)
        expire(ledger, shard.id)
        with Running(here, ledger) as running:
            # All at once, beside the requests of the one that stands still, which have the slots.
            engine.wait_for(lambda stats: stats["waiting"] == 12)
            engine.script(slots=24)
            assert running.result().rows == 12
        assert engine.stats()["peak_in_flight"] == 24
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 0
    all_right(settings, ledger, batch, 12)
    assert not flights(settings, batch)


def test_suspects_that_are_given_back_are_still_suspects(settings: Settings, ledger: Ledger, one_shard: None) -> None:
    batch = planned(settings, ledger, rows(12, 3))
    rule = {"when": {"contains": "poison"}, "then": {"do": "exit"}}
    with scripted_engine(slots=12, ttft_ms=200, rules=[rule]) as engine:
        here, port = on(settings, engine, batch_concurrency=12), port_of(engine)
        with Running(here, ledger) as running:
            until(lambda: running.trouble is not None, "an engine that died")
            running.stop.set()
            assert running.result().rows == 0
    (kept,) = flights(settings, batch)
    (shard,) = ledger.shards(batch)
    assert (shard.state, shard.attempts) == (ShardState.READY, 0)
    with scripted_engine(port=port, slots=0) as engine:
        with Running(here, ledger) as running:
            engine.wait_for(lambda stats: stats["waiting"] == 8)
            engine.script(slots=12)
            assert running.result().rows == 12
        assert engine.stats()["peak_in_flight"] == 8
        assert not kept.exists()
