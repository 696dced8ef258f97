"""A plain `celery worker` and its signals: one drains, a storm is one, a second one means now.

tests/faults/test_shutdown.py has those that take longer.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery

from tests.scripted_engine import Engine, scripted_engine
from tests.services import Worker, celery_worker, free_port, lives, redis_server, until
from worker.supervisor import Heard

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HELLO = [{"role": "user", "content": "hello"}]
FAST = ("--concurrency", "1", "--without-mingle", "--without-gossip", "--queues", "interactive")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine, Celery]]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url, scripted_engine(slots=4) as engine:
        plain = Celery(broker=url, backend=url)
        yield url, engine, plain
        plain.close()


def running_task(engine: Engine, plain: Celery, seconds: float) -> Any:
    engine.script(rules=[{"when": {"times": 1}, "then": {"do": "slow", "seconds": seconds}}])
    sent = plain.send_task("inference.chat", args=[HELLO, "scripted"], queue="interactive")
    engine.wait_for(lambda stats: stats["in_flight"] == 1)
    return sent


def after_the_echo(worker: Worker) -> None:
    """Wait until another signal is a second one; the first has not ended the worker by then."""
    until(lambda: "Draining: " in worker.log or "Soft shutdown: " in worker.log, "a first signal that is heard")
    heard = time.monotonic()
    until(lambda: time.monotonic() - heard > Heard.ECHO + 0.1, "a second signal's time")
    assert worker.running, worker.log


def test_a_storm_of_signals_is_one_and_tasks_finish(parts: tuple[str, Engine, Celery], tmp_path: Path) -> None:
    storm(parts, tmp_path)


def storm(parts: tuple[str, Engine, Celery], tmp_path: Path, **more: str) -> None:
    """Send many signals at once, and check that they drain the worker."""
    url, engine, plain = parts
    with celery_worker(tmp_path, *FAST, redis_url=url, llm_server_url=engine.url, **more) as worker:
        sent = running_task(engine, plain, 6)
        waiting = plain.send_task("inference.chat", args=[HELLO, "scripted"], queue="interactive")
        for _ in range(20):
            worker.process.send_signal(signal.SIGTERM)
        assert sent.get(timeout=90)["object"] == "chat.completion"
        assert worker.process.wait(20) == 0
        assert "Ending at once" not in worker.log
        assert not waiting.ready()
    with redis.Redis.from_url(url) as client:
        assert client.hlen("unacked") == 0
        assert client.llen("interactive") == 1
        assert not client.exists("millrace:dlq")
        client.delete("interactive")


def test_a_second_signal_means_now_and_the_message_goes_back(parts: tuple[str, Engine, Celery], tmp_path: Path) -> None:
    twice(parts, tmp_path, signal.SIGTERM)


def twice(parts: tuple[str, Engine, Celery], tmp_path: Path, number: signal.Signals, **more: str) -> None:
    """Send a signal a second time, and check that it ends the worker, and nothing is lost."""
    url, engine, plain = parts
    with celery_worker(tmp_path, *FAST, redis_url=url, llm_server_url=engine.url, **more) as worker:
        sent = running_task(engine, plain, 60)
        children = psutil.Process(worker.process.pid).children(recursive=True)
        worker.process.send_signal(number)
        after_the_echo(worker)
        worker.process.send_signal(number)
        assert worker.process.wait(20) == 128 + number
        assert worker.log.count("Ending at once") == 1
        until(lambda: not any(map(lives, children)), "an end of its children")
        engine.wait_for(lambda stats: stats["in_flight"] == 0)
    with redis.Redis.from_url(url) as client:
        assert client.hlen("unacked") == 0
        (message,) = client.lrange("interactive", 0, -1)
        assert sent.id.encode() in message
        assert not client.exists("millrace:dlq")
        client.delete("interactive")


def test_a_task_that_waits_for_the_engine_goes_back(parts: tuple[str, Engine, Celery], tmp_path: Path) -> None:
    url, _, plain = parts
    nobody = f"http://127.0.0.1:{free_port()}"
    with celery_worker(tmp_path, *FAST, redis_url=url, llm_server_url=nobody) as worker:
        sent = plain.send_task("inference.chat", args=[HELLO, "scripted"], queue="interactive")
        until(lambda: f"inference.chat[{sent.id}] received" in worker.log, "a task that waits")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(10) == 0
    with redis.Redis.from_url(url) as client:
        assert client.hlen("unacked") == 0
        (message,) = client.lrange("interactive", 0, -1)
        assert sent.id.encode() in message
        assert not client.exists("millrace:dlq")
        client.delete("interactive")
