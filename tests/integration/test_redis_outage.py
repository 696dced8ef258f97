"""A worker outlives its Redis. Celery 5.7.0's own consumer does not: see worker.consumer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeout
from kombu.exceptions import OperationalError

from tests.scripted_engine import scripted_engine
from tests.services import OwnRedis, Worker, celery_worker, free_port, until

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HELLO = [{"role": "user", "content": "hello"}]


def test_a_partly_busy_worker_survives_an_outage(tmp_path: Path) -> None:
    """Two processes, one busy and one free, remote control on: the case in which 5.7.0 exits with 1."""
    server = OwnRedis(tmp_path / "redis", free_port())
    server.start()
    try:
        with scripted_engine(slots=4) as engine:
            settings = {"redis_url": server.url, "llm_server_url": engine.url}
            with celery_worker(tmp_path, "--concurrency", "2", **settings) as worker:
                plain = Celery(broker=server.url, backend=server.url)
                until(lambda: "maintenance.reap" in worker.log and " succeeded in " in worker.log, "the first reap")
                engine.script(rules=[{"when": {"contains": "slow one"}, "then": {"do": "slow", "seconds": 4}}])
                slow = [{"role": "user", "content": "slow one"}]
                running = plain.send_task("inference.chat", args=[slow, "scripted"], queue="interactive")
                engine.wait_for(lambda stats: stats["in_flight"] == 1)
                server.kill()
                until(lambda: "onnection" in worker.log.partition(" ready.")[2], "the worker notices the outage")
                engine.wait_for(lambda stats: stats["in_flight"] == 0)  # the task goes on meanwhile
                server.start()
                until(lambda: _answers(plain, worker), "an answer after the outage", 60)
                assert worker.running, worker.log
                assert running.get(timeout=60)["object"] == "chat.completion"
                # The task that outlasted the outage has acknowledged its message: it does not run again. (Another
                # one that ended in the very moment of the kill may not have.)
                with redis.Redis.from_url(server.url) as client:
                    until(
                        lambda: not any(running.id.encode() in message for message in client.hvals("unacked")),
                        lambda: f"an acknowledged message\n{worker.log}",
                    )
                plain.close()
    finally:
        server.kill()


def _answers(plain: Celery, worker: Worker) -> bool:
    assert worker.running, worker.log
    try:
        sent = plain.send_task("inference.chat", args=[HELLO, "scripted"], queue="interactive", retry=False)
        return bool(sent.get(timeout=5))
    except (OperationalError, CeleryTimeout, redis.RedisError):  # not yet: Redis reads its file
        return False


def test_queued_tasks_survive_a_killed_redis(tmp_path: Path) -> None:
    server = OwnRedis(tmp_path / "redis", free_port())
    server.start()
    try:
        plain = Celery(broker=server.url, backend=server.url)
        sent = [plain.send_task("inference.chat", args=[HELLO, "scripted"], queue="interactive") for _ in range(5)]
        # AOF everysec: what was acknowledged over a second ago is on the disk; here it is made sure.
        subprocess.run([sys.executable, "-c", _WAIT_FOR_DISK.format(url=server.url)], check=True, env=dict(os.environ))
        server.kill()
        server.start()
        with (
            scripted_engine(slots=4) as engine,
            celery_worker(tmp_path, redis_url=server.url, llm_server_url=engine.url),
        ):
            assert [result.get(timeout=90)["object"] for result in sent] == ["chat.completion"] * 5
        plain.close()
    finally:
        server.kill()


_WAIT_FOR_DISK = """
import redis, time
client = redis.Redis.from_url("{url}")
deadline = time.monotonic() + 10
while client.info("persistence")["aof_pending_bio_fsync"] or client.info("persistence")["aof_buffer_length"]:
    assert time.monotonic() < deadline
"""
