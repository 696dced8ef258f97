"""A hold: workers come to rest, what is queued stays queued, and everything goes on afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from millrace import hold, presence
from millrace.batch.ledger import Ledger
from millrace.batch.submit import Order, submit
from millrace.batch.verify import verify
from millrace.errors import Unreachable
from millrace.settings import Settings
from tests.cli import batch_file
from tests.scripted_engine import Engine, scripted_engine
from tests.services import celery_worker, redis_server, until

# Celery opens a connection of its own for each result consumer and leaves the last one to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HELLO = [{"role": "user", "content": "hello"}]
#: Answers take longer than two heartbeats, so a worker has seen a hold before they are there.
SLOW = [{"then": {"do": "slow", "seconds": 5}}]


@dataclass
class Stack:
    settings: Settings
    engine: Engine
    app: Celery

    def chat(self) -> Any:
        return self.app.send_task("inference.chat", args=[HELLO], queue="interactive")

    def queued(self) -> int:
        with contextlib.closing(redis.Redis.from_url(self.settings.redis_dsn)) as client:
            return sum(int(client.llen(key)) for key in client.keys("interactive*"))


def seen(stack: Stack) -> set[str | None]:
    """The holds that workers have seen."""
    return {entry["hold"] for entry in presence.alive(stack.settings)}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("hold")
    with redis_server(folder) as url, scripted_engine(slots=4) as engine:
        settings = Settings(redis_url=url, llm_server_url=engine.url, data_dir=folder / "data")
        # The reaper comes as often as leases run out.
        options = {"redis_url": url, "llm_server_url": engine.url, "batch_lease_seconds": 3}
        with celery_worker(folder, "--concurrency", "2", **options):
            app = Celery(broker=url, backend=url)
            yield Stack(settings, engine, app)
            app.close()


@pytest.fixture(autouse=True)
def _quick_engine(stack: Stack) -> None:
    stack.engine.script(rules=[], tokens_per_second=0)


def test_a_task_waits_in_its_queue_and_is_answered_afterwards(stack: Stack) -> None:
    assert stack.chat().get(timeout=90)["choices"]
    with hold.hold(stack.settings, "a test") as held:
        assert held.wait(60)
        asked = stack.engine.stats()["requests"]
        waiting = [stack.chat() for _ in range(5)]
        until(lambda: stack.queued() == 5, "five tasks in the queue")
        assert stack.engine.stats()["requests"] == asked
    assert all(result.get(timeout=90)["choices"] for result in waiting)


def test_what_runs_is_answered_before_the_worker_is_at_rest(stack: Stack) -> None:
    stack.engine.script(rules=SLOW)
    running = stack.chat()
    stack.engine.wait_for(lambda stats: stats["in_flight"] == 1)
    with hold.hold(stack.settings, "a test") as held:
        until(lambda: any(entry.get("engine_tasks") == 1 for entry in held.busy()), "a worker that says so")
        assert held.wait(60)
        assert running.ready()
    assert running.get(timeout=90)["choices"]


def test_what_a_worker_has_taken_ahead_goes_back_to_its_queue(stack: Stack) -> None:
    stack.engine.script(rules=SLOW)
    sent = [stack.chat() for _ in range(8)]
    stack.engine.wait_for(lambda stats: stats["in_flight"] == 2)
    with hold.hold(stack.settings, "a test") as held:
        assert held.wait(60)
        until(lambda: stack.queued() == 6, "the other six in their queue")
        stack.engine.script(rules=[])
    assert all(result.get(timeout=90)["choices"] for result in sent)


def test_a_batch_drains_and_goes_on(stack: Stack, tmp_path: Path) -> None:
    stack.engine.script(tokens_per_second=100)
    path = tmp_path / "in.jsonl"
    path.write_text(batch_file(400, max_tokens=8))
    with contextlib.closing(Ledger.open(stack.settings)) as ledger, path.open("rb") as stream:
        batch = submit(stack.settings, ledger, stream, Order(filename="in.jsonl", model="scripted")).batch_id

        def counts() -> dict[str, int]:
            return dict(ledger.batch(batch)["request_counts"])

        until(lambda: counts()["completed"], "a first answer", 60)
        with hold.hold(stack.settings, "a test") as held:
            assert held.wait(60)
            assert stack.engine.stats()["in_flight"] == 0
            done = counts()["completed"]
            assert 0 < done < 400
            waiting = ledger.waiting_models()["scripted"]
            # Whole shards: what of one is done goes back with it.
            assert 400 - done <= waiting <= 400
        stack.engine.script(tokens_per_second=0)
        until(lambda: ledger.batch(batch)["status"] == "completed", "a batch that is done", 60)
        assert verify(ledger, stack.settings.data_dir, batch).ok


def test_only_one_holds(stack: Stack) -> None:
    second = hold.hold(stack.settings, "the second")
    with hold.hold(stack.settings, "the first"), pytest.raises(Unreachable, match="the first") as caught:
        second.__enter__()
    assert caught.value.code == "held"
    with presence.connect(stack.settings) as client:
        assert hold.current(client) is None


def test_a_dead_holders_hold_ends_by_itself(stack: Stack) -> None:
    with presence.connect(stack.settings) as client:
        client.set(hold.KEY, '{"token": "of the dead", "why": "it died"}', ex=hold.TTL)
        until(lambda: seen(stack) == {"of the dead"}, "a worker that holds")
        waiting = stack.chat()
        until(lambda: stack.queued() == 1, "a task in the queue")
        client.expire(hold.KEY, 1)  # the rest of its time
    assert waiting.get(timeout=90)["choices"]


def test_a_holder_that_slept_too_long_leaves_the_next_one_alone(stack: Stack) -> None:
    with presence.connect(stack.settings) as client:
        with hold.hold(stack.settings, "the sleeper"):
            client.set(hold.KEY, '{"token": "another", "why": "awake"}', ex=hold.TTL)
        assert hold.current(client) == "another"
        client.delete(hold.KEY)


def test_a_hold_outlives_a_redis_that_forgets_it(stack: Stack) -> None:
    with presence.connect(stack.settings) as client, hold.hold(stack.settings, "a test") as held:
        client.delete(hold.KEY)
        until(lambda: hold.current(client) == held.token, "the hold again")
