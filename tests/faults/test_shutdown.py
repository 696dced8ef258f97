"""SIGTERM, once, often and twice: what is in flight is answered, no attempt is counted, nothing is lost (F13)."""

from __future__ import annotations

import signal
import time

import pytest
import redis

from millrace.batch.schema import ShardState, shards
from millrace.cli.work import DRAINING
from tests.faults.harness import answers, judged, until
from tests.integration.test_shutdown import FAST, after_the_echo, parts, running_task, storm, twice
from tests.services import celery_worker
from worker.supervisor import SOFT_SHUTDOWN, Heard

__all__ = ["parts"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

REMAPPED = {"remap_sigterm": "SIGQUIT"}


def attempts(project):
    """Return the attempts of the shards that are done, and of those that wait."""
    with project.ledger() as ledger, ledger.read() as connection:
        rows = connection.execute(shards.select()).all()
    done = [row.attempts for row in rows if row.state == ShardState.DONE]
    return done, [row.attempts for row in rows if row.state == ShardState.READY]


def test_a_storm_with_500_requests_in_flight(project, figures):
    ours = project({"slots": 500, "ttft_ms": 3000}, batch_processes=1, batch_concurrency=500)
    ours.start()
    source = ours.write_rows(1500)
    batch = ours.submit(source)
    until(lambda: ours.engine_stats()["in_flight"] >= 500, "500 requests in flight", 60)
    began = time.monotonic()
    for _ in range(20):
        ours.workers[0].process.send_signal(signal.SIGTERM)
    assert ours.workers[0].process.wait(60) == 0
    figures("SIGTERM with 500 requests in flight, s", time.monotonic() - began)
    stats = ours.engine_stats()
    assert (stats["cancelled"], stats["in_flight"]) == (0, 0)
    with ours.ledger() as ledger:
        counts = ledger.batch(batch)["request_counts"]
    assert counts["completed"] == answers(ours) >= 500
    done, ready = attempts(ours)
    assert set(done) <= {1}
    assert ready and set(ready) == {0}
    assert "Ending at once" not in ours.workers[0].log
    ours.tell_engine(ttft_ms=0)
    ours.await_worker(ours.start_worker())
    judged(ours, batch, source)


def test_a_second_sigterm_means_now(project):
    ours = project({"slots": 16, "ttft_ms": 60_000}, batch_concurrency=16)
    ours.start()
    source = ours.write_rows(100)
    batch = ours.submit(source)
    until(lambda: ours.engine_stats()["in_flight"] >= 16, "requests in flight", 60)
    process = ours.workers[0].process
    process.send_signal(signal.SIGTERM)
    until(lambda: DRAINING in ours.workers[0].log, "a first one that is heard")
    heard = time.monotonic()
    until(lambda: time.monotonic() - heard > Heard.ECHO + 0.1, "the time of a second one")
    assert process.poll() is None
    again = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert "\nEnding at once.\n" in ours.workers[0].log
    until(lambda: ours.engine_stats()["in_flight"] == 0, "an end of the requests", 30)
    ours.tell_engine(ttft_ms=0)
    ours.await_worker(ours.start_worker())
    judged(ours, batch, source, kills=[again], attempts=2)


# A plain `celery worker`, where SIGTERM means what REMAP_SIGTERM says.


def test_a_storm_where_sigterm_is_remapped(parts, tmp_path):
    storm(parts, tmp_path, **REMAPPED)


@pytest.mark.parametrize(("number", "more"), [(signal.SIGTERM, REMAPPED), (signal.SIGINT, {}), (signal.SIGQUIT, {})])
def test_any_signal_twice_means_now(parts, tmp_path, number, more):
    twice(parts, tmp_path, number, **more)


def test_a_supervisors_sigquit_after_sigterm_is_no_second_signal(parts, tmp_path):
    url, engine, plain = parts
    with celery_worker(tmp_path, *FAST, redis_url=url, llm_server_url=engine.url) as worker:
        sent = running_task(engine, plain, 6)
        worker.process.send_signal(signal.SIGTERM)
        after_the_echo(worker)
        worker.process.send_signal(signal.SIGQUIT)
        assert sent.get(timeout=90)["object"] == "chat.completion"
        worker.process.wait(20)
        assert "Ending at once" not in worker.log


@pytest.mark.long
def test_a_task_that_outlasts_a_soft_shutdown_goes_back(parts, tmp_path):
    url, engine, plain = parts
    with celery_worker(tmp_path, *FAST, redis_url=url, llm_server_url=engine.url, **REMAPPED) as worker:
        sent = running_task(engine, plain, 2 * SOFT_SHUTDOWN)
        began = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(SOFT_SHUTDOWN + 20)
        assert time.monotonic() - began >= SOFT_SHUTDOWN - 1
        engine.wait_for(lambda stats: stats["in_flight"] == 0)
    with redis.Redis.from_url(url) as client:
        assert client.hlen("unacked") == 0
        (message,) = client.lrange("interactive", 0, -1)
        assert sent.id.encode() in message
        assert not client.exists("millrace:dlq")
        client.delete("interactive")
