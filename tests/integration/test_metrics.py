"""What a worker exposes is what was run, whatever is killed or not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery
from celery.result import AsyncResult

from millrace import metrics, presence
from millrace.batch.ledger import Ledger
from millrace.settings import Settings
from tests.cli import Cli, batch_file, request
from tests.metrics import page, scrape, values
from tests.scripted_engine import Engine, scripted_engine
from tests.services import OwnRedis, celery_worker, free_port, lives, redis_server, until
from tests.unit.batches import recorded
from worker.exporter import Exporter

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROWS_DONE = 'millrace_batch_requests_total{model="scripted",status="completed"}'
ROWS_FAILED = 'millrace_batch_requests_total{model="scripted",status="failed"}'
SOON = 9.0  # seconds in which a page is there, whatever is not


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def cli(tmp_path: Path, port: int) -> Iterator[Cli]:
    made = Cli(
        tmp_path / "home",
        {
            "METRICS_PORT": port,
            "HEALTH_CHECK_ENABLED": "false",
            "WORKER_CONCURRENCY": 2,
            "BATCH_LEASE_SECONDS": 3,
            "TASK_RETRY_DELAY": 0.01,
        },
    )
    # celery 5.7 stores results that way.
    made.environment["PYTHONWARNINGS"] += ",ignore:Call to deprecated setex"
    yield made
    made.kill_all()


@contextlib.contextmanager
def worker(cli: Cli, redis: str, engine: Engine, *options: str) -> Iterator[Any]:
    """Run `millrace worker` until its processes say that they are there."""
    cli.environment |= {"REDIS_URL": redis, "LLM_SERVER_URL": engine.url}
    with cli.start("worker", *options) as running:
        wanted = 1 + int(cli.environment.get("BATCH_PROCESSES", 2))
        running.until(lambda: len(presence.alive(Settings(redis_url=redis))) == wanted, "its processes")
        yield running


def chat(plain: Celery, text: str, **options: Any) -> AsyncResult:
    message = [{"role": "user", "content": text}]
    return plain.send_task("inference.chat", args=[message], queue="interactive", **options)


def test_the_values_are_what_was_run(cli: Cli, port: int, tmp_path: Path) -> None:
    rules = [{"when": {"contains": "twice", "times": 1}, "then": {"do": "status", "status": 503}}]
    long = " ".join(["word"] * 300)
    lines = [request(number, "three words here", model="scripted") for number in range(27)]
    lines += [request(number, long, model="scripted") for number in range(27, 30)]
    with (
        redis_server(tmp_path) as redis,
        scripted_engine(context=200, answer_tokens=5, rules=rules) as engine,
        worker(cli, redis, engine),
        Celery(broker=redis, backend=redis) as plain,
    ):
        before = scrape(port)
        assert (before[ROWS_DONE], before[ROWS_FAILED]) == (0, 0)
        file = cli.write("q.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        assert cli.run("batch", "run", file, "-o", "a.jsonl").code == 1
        for result in [chat(plain, "two words") for _ in range(4)] + [chat(plain, "twice over")]:
            assert result.get(timeout=90)["usage"]["completion_tokens"] == 5
        with pytest.raises(Exception, match="exceeds"):
            chat(plain, long).get(timeout=90)

        # A task's result is there a moment before it is counted.
        found = until(lambda: (found := scrape(port))["millrace_interactive_request_seconds_count"] == 6 and found, "")
        assert found[ROWS_DONE] == 27
        assert found[ROWS_FAILED] == 3
        assert found['millrace_interactive_requests_total{model="scripted",status="completed"}'] == 5
        assert found['millrace_interactive_requests_total{model="scripted",status="failed"}'] == 1
        tokens = 'millrace_tokens_total{{model="scripted",type="{}",kind="{}"}}'
        assert found[tokens.format("prompt", "batch")] == 27 * 3
        assert found[tokens.format("completion", "batch")] == 27 * 5
        assert found[tokens.format("prompt", "interactive")] == 5 * 2
        assert found[tokens.format("completion", "interactive")] == 5 * 5
        errors = {series: value for series, value in found.items() if series.startswith("millrace_errors_") and value}
        assert errors == {
            'millrace_errors_total{kind="batch",code="context_length_exceeded"}': 3,
            'millrace_errors_total{kind="interactive",code="context_length_exceeded"}': 1,
        }
        retries = {series: value for series, value in found.items() if series.startswith("millrace_retr") and value}
        assert retries == {'millrace_retries_total{kind="interactive",reason="engine_overloaded"}': 1}
        assert found['millrace_interactive_request_seconds_bucket{le="+Inf"}'] == 6
        assert found['millrace_batch_rows{state="waiting"}'] == 0
        assert found['millrace_workers{queue="batch"}'] == 2
        assert found['millrace_workers{queue="interactive"}'] == 1
        assert found['millrace_engine_state{state="serving"}'] == 1
        assert found['millrace_model_state{model="scripted",state="serving"}'] == 1
        assert {series: found[series] for series in found if series.startswith("millrace_up")} == {
            f'millrace_up{{part="{part}"}}': 1 for part in ("redis", "ledger", "engine", "data_dir")
        }


def test_in_flight_against_the_limit(cli: Cli, port: int, tmp_path: Path) -> None:
    cli.environment["BATCH_PROCESSES"] = "1"
    with (
        redis_server(tmp_path) as redis,
        scripted_engine(slots=4, ttft_ms=3_600_000) as engine,
        worker(cli, redis, engine),
        Celery(broker=redis, backend=redis) as plain,
    ):
        for _ in range(2):
            chat(plain, "one")
        file = cli.write("q.jsonl", batch_file(40, model="scripted"))
        batch = cli.run("batch", "submit", file).out.strip()

        def full() -> dict[str, float] | None:
            found = scrape(port)
            busy = [found[f'millrace_inflight{{kind="{kind}",model="scripted"}}'] for kind in ("batch", "interactive")]
            return found if busy == [8, 2] and engine.stats()["in_flight"] == 10 else None

        found = until(full, lambda: f"eight and two in flight: {page(port)} {engine.stats()}")
        assert found["millrace_concurrency_limit"] == 8
        assert found["millrace_engine_slots"] == 4
        assert found['millrace_batches{status="in_progress"}'] == 1
        assert found['millrace_batch_rows{state="waiting"}'] == 40
        assert found["millrace_batch_oldest_age_seconds"] > 0
        assert batch not in page(port)
        cli.run("batch", "cancel", batch)
        until(lambda: scrape(port)['millrace_inflight{kind="batch",model="scripted"}'] == 0, "none in flight")
        engine.kill()  # the two that wait are answered


def test_what_a_killed_child_counted_stays_and_nothing_is_doubled(cli: Cli, port: int, tmp_path: Path) -> None:
    with (
        redis_server(tmp_path) as redis,
        scripted_engine(slots=8, ttft_ms=20, tokens_per_second=400) as engine,
        worker(cli, redis, engine),
    ):
        file = cli.write("q.jsonl", batch_file(600, model="scripted"))
        batch = cli.run("batch", "submit", file).out.strip()
        until(lambda: scrape(port)[ROWS_DONE] > 60, "some rows")
        (child, *_), *_ = (
            process.children()
            for process in cli.processes()
            if "--queues" in process.cmdline() and "batch" in process.cmdline() and process.children()
        )
        child.kill()
        done = scrape(port)[ROWS_DONE]
        assert done > 60
        # And a whole Celery process, with the child that it has.
        main = next(
            process for process in cli.processes() if "batch" in process.cmdline() and child not in process.children()
        )
        os.killpg(main.pid, signal.SIGKILL)
        assert cli.run("batch", "watch", batch, seconds=60).code == 0
        assert cli.run("batch", "verify", batch).code == 0
        # Not counted is at most what one turn of each of the two had written: it is counted after it is written.
        uncounted = 2 * 16
        found = until(lambda: (found := scrape(port))[ROWS_DONE] >= 600 - uncounted and found, lambda: page(port))
        assert found[ROWS_DONE] <= 600
        assert found[ROWS_FAILED] == 0
        flying = 'millrace_inflight{kind="batch",model="scripted"}'
        until(lambda: scrape(port)[flying] == 0, lambda: page(port))


def test_without_a_supervisor_the_celery_worker_serves(tmp_path: Path, port: int) -> None:
    with (
        redis_server(tmp_path) as redis,
        scripted_engine() as engine,
        Celery(broker=redis, backend=redis) as plain,
    ):
        settings = {"redis_url": redis, "llm_server_url": engine.url, "metrics_port": port, "data_dir": tmp_path}
        (tmp_path / "second").mkdir()
        with celery_worker(tmp_path, "--concurrency", "2", **settings) as first:
            until(lambda: page(port), "the page")
            chat(plain, "one").get(timeout=90)
            counted = 'millrace_interactive_requests_total{model="scripted",status="completed"}'
            until(lambda: scrape(port)[counted] == 1, lambda: page(port))
            exporter = next(
                one for one in psutil.Process(first.process.pid).children() if "worker.exporter" in one.cmdline()
            )
            # A second one on the machine finds the port taken, says so, and works.
            with celery_worker(tmp_path / "second", "--hostname", "second@%h", **settings) as second:
                until(lambda: f"No /metrics: port {port} is taken" in second.log, lambda: second.log)
                assert "set METRICS_PORT" in second.log
        assert not lives(exporter)
        assert "Traceback" not in first.log
        # A worker that is killed leaves no exporter behind.
        with celery_worker(tmp_path, "--concurrency", "1", **settings) as third:
            until(lambda: page(port), "the page")
            children = psutil.Process(third.process.pid).children()
            exporter = next(one for one in children if "worker.exporter" in one.cmdline())
            third.process.kill()
            until(lambda: not lives(exporter), "its end")


def test_a_port_that_is_taken_is_named(cli: Cli, port: int, tmp_path: Path) -> None:
    cli.environment["BATCH_PROCESSES"] = "1"
    with (
        socket.create_server(("127.0.0.1", port)),
        redis_server(tmp_path) as redis,
        scripted_engine() as engine,
        worker(cli, redis, engine) as running,
    ):
        assert f"No /metrics: port {port} is taken" in running.err
        assert "set METRICS_PORT" in running.err
        running.send(signal.SIGTERM)
        assert running.wait().code == 0


def test_no_port_no_server(cli: Cli, tmp_path: Path) -> None:
    cli.environment |= {"METRICS_PORT": "0", "BATCH_PROCESSES": "1"}
    with redis_server(tmp_path) as redis, scripted_engine() as engine, worker(cli, redis, engine) as running:
        assert "metrics" not in running.err
        for process in cli.processes():
            assert not [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]


def test_listen(cli: Cli, port: int, tmp_path: Path) -> None:
    wrong = cli.run("worker", "--listen", "everywhere")
    assert wrong.code == 2
    assert "--listen everywhere is no IP address." in wrong.err
    health = free_port()
    cli.environment |= {"HEALTH_CHECK_ENABLED": "true", "HEALTH_CHECK_PORT": str(health), "BATCH_PROCESSES": "1"}
    # Another address of loopback stands for those of the network.
    with (
        redis_server(tmp_path) as redis,
        scripted_engine() as engine,
        worker(cli, redis, engine, "--listen", "127.0.0.2"),
    ):
        assert 'millrace_up{part="redis"} 1' in page(port, "127.0.0.2")
        assert page(port) == ""
        with socket.create_connection(("127.0.0.2", health), 5):
            pass


# What is asked at a scrape.


@contextlib.contextmanager
def exporter(settings: Settings) -> Iterator[Exporter]:
    table = metrics.Table.create()
    table.add({ROWS_DONE: 7.0})
    yield Exporter(settings, table)
    table.close()


def seen(one: Exporter) -> dict[str, float]:
    started = time.monotonic()
    text = asyncio.run(one.page())
    assert time.monotonic() - started < SOON
    return values(text)


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """Yield a port where connections are taken and nothing is ever said."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield int(listener.getsockname()[1])


def test_nothing_answers(settings: Settings) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = nobody.getsockname()[1]
        settings = settings.model_copy(
            update={"redis_host": "127.0.0.1", "redis_port": dead, "llm_server_url": f"http://127.0.0.1:{dead}"}
        )
        Path(settings.data_dir).write_text("no folder")
        with exporter(settings) as one:
            found = seen(one)
    assert found[ROWS_DONE] == 7
    assert found['millrace_engine_state{state="unreachable"}'] == 1
    for part in ("redis", "ledger", "engine"):
        assert found[f'millrace_up{{part="{part}"}}'] == 0
    for gone in ("millrace_queue_depth", "millrace_shards", "millrace_engine_slots", "millrace_model_state"):
        assert not [series for series in found if series.startswith(gone)]


def test_everything_hangs(settings: Settings, ledger: Ledger) -> None:
    with silent() as port:
        settings = settings.model_copy(
            update={"redis_host": "127.0.0.1", "redis_port": port, "llm_server_url": f"http://127.0.0.1:{port}"}
        )
        with exporter(settings) as one:
            found = seen(one)
            assert found[ROWS_DONE] == 7
            assert found['millrace_up{part="redis"}'] == found['millrace_up{part="engine"}'] == 0
            assert found['millrace_engine_state{state="timeout"}'] == 1
            assert found['millrace_up{part="ledger"}'] == 1


def test_what_the_engine_is(settings: Settings) -> None:
    with scripted_engine(api_key="right", load_seconds=3600) as engine:
        url = engine.url.removesuffix("/v1")
        with exporter(settings.model_copy(update={"llm_server_url": url})) as one:
            assert seen(one)['millrace_engine_state{state="loading"}'] == 1
            engine.script(load_seconds=0)
            found = seen(one)
            assert found['millrace_engine_state{state="key_refused"}'] == 1
            assert sum(value for series, value in found.items() if series.startswith("millrace_engine_state")) == 1


def test_the_ledgers_work(settings: Settings, ledger: Ledger) -> None:
    recorded(ledger, [5, 5, 2])
    recorded(ledger, [3])
    ledger.cancel(recorded(ledger, [4]))
    with exporter(settings) as one:
        found = seen(one)
    assert found['millrace_batches{status="in_progress"}'] == 2
    assert found['millrace_batches{status="cancelling"}'] == 1
    assert found['millrace_shards{state="ready"}'] == 4
    assert found['millrace_shards{state="cancelled"}'] == 1
    assert found['millrace_batch_rows{state="waiting"}'] == 19
    assert 0 < found["millrace_batch_oldest_age_seconds"] < 60


def test_queues_by_priority_and_their_oldest_message(settings: Settings, tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis, Celery(broker=redis, backend=redis) as plain:
        settings = Settings(data_dir=settings.data_dir, redis_url=redis)
        with exporter(settings) as one:
            for priority in (None, 0, 3, 3, 9):
                chat(plain, "one", priority=priority)
            found = seen(one)
            depth = 'millrace_queue_depth{{queue="interactive",priority="{}"}}'
            assert [found[depth.format(name)] for name in ("high", "normal", "low", "idle")] == [2, 2, 0, 1]
            assert found["millrace_redis_memory_bytes"] > 0
            oldest = 'millrace_queue_oldest_age_seconds{queue="interactive"}'
            # `worker.app` is loaded here, so they have the time at which they were sent.
            assert 0 < found[oldest] < 10
            stale = json.dumps({"headers": {"sent_at": time.time() - 100}})
            foreign = json.dumps({"headers": {"id": "x"}})
            with contextlib.closing(plain.connection_for_write().default_channel.client) as client:
                client.rpush("interactive", stale)
                assert 100 < seen(one)[oldest] < 110
                # Of a message without that time it is known how long we see it.
                client.delete("interactive", "interactive\x06\x163", "interactive\x06\x169")
                client.rpush("interactive\x06\x166", foreign)
                first = seen(one)
                assert first[oldest] < 0.1
                assert first[depth.format("low")] == 1
                assert until(lambda: seen(one)[oldest] > 0.2, "it has waited")
                client.delete("interactive\x06\x166")
                assert seen(one)[oldest] == 0


def test_redis_comes_and_goes(settings: Settings, tmp_path: Path) -> None:
    redis = OwnRedis(tmp_path / "redis", free_port())
    with exporter(Settings(data_dir=settings.data_dir, redis_url=redis.url)) as one:
        redis.start()
        try:
            until(lambda: seen(one)['millrace_up{part="redis"}'] == 1, "Redis")
            redis.kill()
            assert seen(one)['millrace_up{part="redis"}'] == 0
            redis.start()
            until(lambda: seen(one)['millrace_up{part="redis"}'] == 1, "Redis again")
        finally:
            redis.kill()
