"""The network is slow, breaks, and swallows what it is given (F7), before Redis and before the engine."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from celery import Celery

from millrace.selftest.parts import Project
from tests.faults.harness import judged, until
from tests.faults.oracle import digest, read_log
from tests.faults.proxy import Proxy
from tests.faults.sessions import submitted

Figures = Callable[[str, float], None]

RETURN = 20.0  # seconds from Redis's return to work
ROW_TIMEOUT = 4.0  # seconds; what a black hole swallows is asked again after that


@dataclass
class Line:
    """A project whose worker reaches Redis and the engine through proxies alone."""

    project: Project
    redis: Proxy
    engine: Proxy
    numbers: Iterator[int]

    def submit(self, rows: int) -> tuple[str, Path, set[str]]:
        """Submit rows unlike all others, and call the reaper past the proxy; return id, file and digests."""
        number = next(self.numbers)
        source = self.project.write_rows(rows, f"{number}.jsonl", seed=number)
        bodies = [json.loads(line)["body"] for line in source.read_text().splitlines()]
        digests = {digest(json.dumps(body, separators=(",", ":")).encode()) for body in bodies}
        with self.project.ledger() as ledger:
            return submitted(self.project, source, ledger), source, digests

    def nudge(self) -> None:
        with Celery(broker=self.project.redis_url) as plain:
            plain.send_task("maintenance.reap", queue="maintenance", retry=False)

    def answers(self, digests: set[str]) -> int:
        log = read_log(self.project.log)
        return sum(any(one.status == 200 for one in log.get(sha, [])) for sha in digests)

    def log(self) -> str:
        return self.project.workers[0].log[-3000:]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("network") / "project"
    settings: dict[str, Any] = {"batch_lease_seconds": 6, "batch_row_timeout": ROW_TIMEOUT, "batch_processes": 1}
    with Project(folder, {"slots": 4, "ttft_ms": 50}, **settings) as project:
        port = urlsplit(project.redis_url).port
        assert port is not None
        project.start_redis()
        project.start_engine()
        with Proxy(port) as redis, Proxy(project.engine_port) as engine:
            project.changes["redis_url"] = project.redis_url.replace(f":{port}/", f":{redis.port}/")
            project.changes["llm_server_url"] = f"http://127.0.0.1:{engine.port}"
            worker = project.start_worker()
            project.await_worker(worker)
            yield Line(project, redis, engine, itertools.count(1))
            worker.kill()  # before the proxies, to which it would connect again


@pytest.fixture
def line(shared: Line) -> Iterator[Line]:
    yield shared
    shared.redis.heal()
    shared.engine.heal()


def timed(line: Line, rows: int) -> float:
    """Run a batch and return how long its rows took, by the engine's log."""
    batch, source, digests = line.submit(rows)
    line.nudge()
    judged(line.project, batch, source, attempts=1)
    log = read_log(line.project.log)
    found = [log[sha][0] for sha in digests]
    return max(one.end or 0.0 for one in found) - min(one.start for one in found)


@pytest.mark.parametrize(("what", "faults"), [("latency", {"latency": 0.25}), ("slices", {"slice_bytes": 16})])
def test_the_way_to_the_engine_is_slow(line: Line, figures: Figures, what: str, faults: dict[str, Any]) -> None:
    """A bounded slowdown: a round-trip for each row of a lane, and nothing is asked twice."""
    with line.engine.having(**faults):
        took = timed(line, 40)
    figures(f"40 rows with {what} before the engine, s", took)
    # 16 lanes, three rows each, half a second there and back.
    assert took < 10


def test_connections_to_the_engine_are_reset(line: Line) -> None:
    """Rows in flight are asked again, and no others."""
    batch, source, digests = line.submit(100)
    line.nudge()
    kills = []
    for share in (10, 30, 50):
        until(lambda share=share: line.answers(digests) >= share, line.log, 60)  # type: ignore[misc]
        until(line.engine.reset, "connections to reset", 10)
        kills.append(time.monotonic())
    judged(line.project, batch, source, kills=kills, attempts=4)


def test_the_way_to_the_engine_is_a_black_hole(line: Line, figures: Figures) -> None:
    batch, source, digests = line.submit(60)
    line.nudge()
    until(lambda: line.answers(digests) >= 10, line.log, 60)
    began = time.monotonic()
    line.engine.set(blackhole=True)
    # Until requests of every lane are lost, and tried in vain again.
    until(lambda: time.monotonic() > began + 1.5 * ROW_TIMEOUT, "the rows' time", 60)
    line.engine.heal()
    healed = time.monotonic()
    # What was on its way at any moment of it is lost.
    kills = [began + 0.05 * step for step in range(int((healed + ROW_TIMEOUT - began) / 0.05))]
    judged(line.project, batch, source, kills=kills)
    figures("the end of a batch after a black hole before the engine, s", time.monotonic() - healed)


def resumed(line: Line, since: float, digests: set[str]) -> float:
    """Wait for the first request of a batch, and return how long after `since` it came."""

    def first() -> float:
        log = read_log(line.project.log)
        return min((log[sha][0].start for sha in digests if sha in log), default=0.0)

    until(first, line.log, 3 * RETURN)
    return max(first() - since, 0.0)


@pytest.mark.parametrize(("what", "faults"), [("latency", {"latency": 0.1}), ("slices", {"slice_bytes": 16})])
def test_the_way_to_redis_is_slow(line: Line, figures: Figures, what: str, faults: dict[str, Any]) -> None:
    """Tickets and merges take some round-trips; rows take none."""
    with line.redis.having(**faults):
        began = time.monotonic()
        timed(line, 40)
    figures(f"a batch of 40 rows with {what} before Redis, s", time.monotonic() - began)


def test_connections_to_redis_are_reset_and_refused(line: Line, figures: Figures) -> None:
    running, source, digests = line.submit(60)
    line.nudge()
    until(lambda: line.answers(digests) >= 10, line.log, 60)
    line.redis.set(refuse=True)
    line.redis.reset()
    until(lambda: line.answers(digests) == 60, line.log, 60)
    waiting, other, more = line.submit(5)
    line.redis.heal()
    took = resumed(line, time.monotonic(), more)
    figures("recovery after Redis's return, s", took)
    for batch, file in ((running, source), (waiting, other)):
        judged(line.project, batch, file, attempts=1)
    assert took <= RETURN


def test_the_way_to_redis_is_a_black_hole(line: Line, figures: Figures) -> None:
    """What modelq#17 saw: a ticket that Redis hands over on a dead connection is gone; the reaper sends another."""
    running, source, digests = line.submit(200)
    line.nudge()
    until(lambda: line.answers(digests) >= 10, line.log, 60)
    line.redis.set(blackhole=True)
    until(lambda: line.answers(digests) == 200, line.log, 60)
    # The session has a merge to send; then it ends, and only a ticket brings the next one.
    until(lambda: "succeeded" in line.log().partition("waits for Redis: Timeout")[2], line.log, 60)
    waiting, other, more = line.submit(5)
    line.redis.heal()
    healed = time.monotonic()
    took = resumed(line, healed, more)
    figures("recovery after a black hole before Redis, s", took)
    for batch, file in ((running, source), (waiting, other)):
        judged(line.project, batch, file, attempts=1)
