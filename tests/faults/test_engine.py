"""The engine fails in every way it knows (F8): bursts of errors, hangs, half answers, death, another model."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import Celery

from millrace.batch.folder import BatchFolder
from millrace.selftest.oracle import Event
from millrace.selftest.parts import Project
from tests.faults.harness import answers, ended, judged, until
from tests.faults.sessions import submitted

Figures = Callable[[str, float], None]

LEASE = 4.0  # seconds
ROW_TIMEOUT = 12.0  # seconds
SCRIPT: dict[str, Any] = {"slots": 8, "ttft_ms": 50}


@dataclass
class Begun:
    """A batch that has some answers."""

    project: Project
    id: str
    source: Path
    #: Answers of the engine before it.
    before: int

    @property
    def answers(self) -> int:
        return answers(self.project) - self.before


class Stand:
    """A project that all tests share, each with rows of its own."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self._numbers = itertools.count(1)

    def begin(self, rows: int, first: int) -> Begun:
        """Submit so many rows, and return once so many are answered."""
        number = next(self._numbers)
        source = self.project.write_rows(rows, f"{number}.jsonl", seed=number)
        before = answers(self.project)
        with self.project.ledger() as ledger:
            begun = Begun(self.project, submitted(self.project, source, ledger), source, before)
        with Celery(broker=self.project.redis_url) as plain:
            plain.send_task("maintenance.reap", queue="maintenance", retry=False)
        until(lambda: begun.answers >= first, self.log, 60)
        return begun

    def log(self) -> str:
        return self.project.workers[0].log[-3000:]

    def restart_engine(self, **script: Any) -> None:
        self.project.kill_engine()
        self.project.script = {
            **self.project.script,
            "load_seconds": 0,
            "models": ["scripted"],
            "rules": [],
            "answer_tokens": 16,
            **script,
        }
        self.project.start_engine()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("engine") / "project"
    settings: dict[str, Any] = {"batch_lease_seconds": LEASE, "batch_row_timeout": ROW_TIMEOUT, "batch_processes": 1}
    with Project(folder, SCRIPT, **settings) as project:
        project.start(workers=1)
        yield Stand(project)


@pytest.fixture
def stand(shared: Stand) -> Iterator[Stand]:
    yield shared
    if shared.project.script.get("models", ["scripted"]) != ["scripted"] or shared.project.engine is None:
        shared.restart_engine()
    shared.project.tell_engine(rules=[])


def spoiled(project: Project, since: float) -> list[float]:
    """Return when the engine spoiled an answer of its own accord."""
    events = (msgspec.json.decode(line, type=Event) for line in project.log.read_bytes().splitlines())
    return [event.t for event in events if event.event == "end" and event.fault and event.t >= since]


def test_all_faults_at_once(stand: Stand) -> None:
    """Each row meets up to three of them, in an order that its own text draws."""
    faults: list[tuple[dict[str, Any], float, int]] = [
        ({"do": "status", "status": 500}, 0.3, 1),
        ({"do": "status", "status": 429, "headers": {"Retry-After": "1"}}, 0.2, 1),
        ({"do": "status", "status": 503}, 0.1, 2),
        ({"do": "cut"}, 0.1, 2),
        ({"do": "half"}, 0.1, 2),
        ({"do": "garbage"}, 0.1, 2),
        ({"do": "hang"}, 0.02, 1),
        ({"do": "hang_after_headers"}, 0.02, 1),
        ({"do": "slow", "seconds": 1.0}, 0.05, 1),
    ]
    rules = [
        {"when": {"probability": share, "first_attempts": times, "seed": seed}, "then": fault}
        for seed, (fault, share, times) in enumerate(faults)
    ]
    began = time.monotonic()
    stand.project.tell_engine(rules=rules)
    begun = stand.begin(150, 0)
    assert ended(stand.project, begun.id) == "completed"
    judged(stand.project, begun.id, begun.source, kills=spoiled(stand.project, began), attempts=9)


def test_the_engine_answers_500_to_everything(stand: Stand, figures: Figures) -> None:
    """A burst that is longer than a row's tries: rows wait, none fails."""
    begun = stand.begin(400, 20)
    stand.project.tell_engine(rules=[{"then": {"do": "status", "status": 500}}])
    broken = time.monotonic()
    until(lambda: time.monotonic() > broken + 6, "the burst's time", 60)
    stand.project.tell_engine(rules=[])
    had, healed = begun.answers, time.monotonic()
    until(lambda: begun.answers > had, stand.log, 60)
    figures("from the end of a burst of 500s to the next answer, s", time.monotonic() - healed)
    judged(stand.project, begun.id, begun.source)


def test_the_engine_is_killed_and_loads_its_model_again(stand: Stand, figures: Figures) -> None:
    """server_oom_restart: what was in flight is asked again, and nothing else."""
    begun = stand.begin(400, 40)
    killed = time.monotonic()
    stand.restart_engine(load_seconds=1.5)
    had, ready = begun.answers, time.monotonic() + 1.5
    until(lambda: begun.answers > had, stand.log, 60)
    figures("from the engine's return to the next answer, s", time.monotonic() - ready)
    judged(stand.project, begun.id, begun.source, kills=[killed])


def test_the_engine_hangs_for_longer_than_a_lease(stand: Stand) -> None:
    """server_hang: the runner lives and renews its lease, so nobody asks its rows again."""
    begun = stand.begin(400, 20)
    assert stand.project.engine is not None
    os.kill(stand.project.engine.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        until(lambda: time.monotonic() > stopped + 1.5 * LEASE, "the lease's time", 60)
    finally:
        os.kill(stand.project.engine.pid, signal.SIGCONT)
    verdict, report = judged(stand.project, begun.id, begun.source, attempts=1)
    assert verdict.run_again == 0
    assert report.extra_claims == 0


def test_the_engine_comes_back_with_another_model(stand: Stand) -> None:
    """Rows wait for theirs; no answer of the other one is taken."""
    begun = stand.begin(400, 30)
    killed = time.monotonic()
    stand.restart_engine(models=["other"], answer_tokens=5)
    until(lambda: "other" in stand.project.workers[0].log, stand.log, 60)
    again = time.monotonic()
    stand.restart_engine()
    judged(stand.project, begun.id, begun.source, kills=[killed, again])
    output = BatchFolder.of(stand.project.data_dir, begun.id).output
    bodies = [json.loads(line)["response"]["body"] for line in output.read_bytes().splitlines()]
    assert {body["usage"]["completion_tokens"] for body in bodies} == {16}
