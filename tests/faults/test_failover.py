"""Redis Sentinel promotes a replica (F15); a proxy leads to whoever is the master, as people do it with HAProxy."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from millrace.embedded import find_redis
from millrace.selftest.parts import Project
from tests.faults.faulty_redis import FaultyRedis
from tests.faults.harness import answers, judged, until
from tests.faults.proxy import Proxy
from tests.faults.sessions import submitted
from tests.services import free_port

RETURN = 20.0  # seconds from the promotion to work
PASSWORD = "selftest"


@contextlib.contextmanager
def sentinel(folder: Path, master: FaultyRedis) -> Iterator[redis.Redis]:
    """Run a Sentinel that alone decides, a second after its master is silent."""
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor main 127.0.0.1 {master.port} 1\nsentinel auth-pass main {PASSWORD}\n"
        "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n"
    )
    with (folder / "sentinel.log").open("ab") as log:
        process = subprocess.Popen([find_redis(), str(config), "--sentinel"], stdout=log, stderr=log)
    client = redis.Redis(port=port, decode_responses=True)
    try:
        yield client
    finally:
        client.close()
        process.kill()
        process.wait()


def test_a_replica_is_promoted(project: Callable[..., Project], tmp_path: Path, figures: Callable[..., None]) -> None:
    ours = project(script={"slots": 4, "ttft_ms": 200}, batch_processes=1)
    ports = urlsplit(ours.redis_url).port, free_port()
    assert ports[0] is not None
    master = FaultyRedis(tmp_path / "master", ports[0], PASSWORD)
    replica = FaultyRedis(tmp_path / "replica", ports[1], PASSWORD)
    with contextlib.ExitStack() as stack:
        for server in (master, replica):
            stack.callback(server.kill)
        master.start("--appendonly", "yes", "--save", "", "--repl-diskless-sync-delay", "0")
        replica.start("--appendonly", "yes", "--save", "", "--replicaof", "127.0.0.1", str(master.port))
        watch = stack.enter_context(sentinel(tmp_path, master))
        proxy = stack.enter_context(Proxy(master.port))
        ours.changes["redis_url"] = ours.redis_url.replace(f":{master.port}/", f":{proxy.port}/")
        ours.start_engine()
        worker = ours.start_worker()
        stack.callback(worker.kill)
        ours.await_worker(worker)
        before = {main.pid for main in worker.mains()}

        def state(of: str) -> Any:
            with contextlib.suppress(redis.RedisError):
                return dict(watch.sentinel_master("main"))[of]
            return None

        first = ours.write_rows(40, "first.jsonl", seed=1)
        running = ours.submit(first)
        until(lambda: answers(ours) >= 5, lambda: worker.log[-3000:], 60)
        until(lambda: state("num-slaves") == 1, "a replica that Sentinel knows", 60)
        master.kill()
        killed = time.monotonic()
        until(lambda: answers(ours) == 40, lambda: worker.log[-3000:], 60)
        second = ours.write_rows(5, "second.jsonl", seed=2)
        with ours.ledger() as ledger:
            waiting = submitted(ours, second, ledger)
        until(lambda: state("port") == replica.port, "a promotion", 60)
        figures("from a master's death to the promotion, s", time.monotonic() - killed)
        proxy.target = replica.port
        promoted = time.monotonic()
        until(lambda: answers(ours) > 40, lambda: worker.log[-3000:], 60)
        took = time.monotonic() - promoted
        figures("recovery after a promotion, s", took)
        ours.redis_url = replica.url
        for batch, source in ((running, first), (waiting, second)):
            judged(ours, batch, source, attempts=1)
        assert {main.pid for main in worker.mains()} == before, worker.log
        assert took <= RETURN
