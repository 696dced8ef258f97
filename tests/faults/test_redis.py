"""Redis dies, hangs, refuses and forgets (F3 to F6, F14): a batch goes on without it, and the next one with it.

One project serves them all. In each test one batch is running when Redis goes, and another is submitted while
it is away: the first must end its rows meanwhile, the second must begin within RETURN of Redis's return.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from millrace.batch.submit import Order, open_input, submit
from millrace.selftest.parts import Project, Worker, kill
from tests.faults.faulty_redis import FaultyRedis
from tests.faults.harness import MOST_LIMBO, judged, until
from tests.faults.oracle import digest, read_log
from worker.lifecycle import REAP_KEY

Figures = Callable[[str, float], None]

RETURN = 20.0  # seconds from Redis's return to work
EMPTY = 40.0  # seconds from its return with nothing in it to work
EVERYSEC = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "")
ALWAYS = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
RDB = ("--appendonly", "no", "--save", "1 1")


@dataclass
class Batch:
    """A submitted batch."""

    source: Path
    id: str
    digests: set[str] = field(default_factory=set)


class Stand:
    """A project whose Redis is ours to break, and its only worker."""

    def __init__(self, project: Project, server: FaultyRedis) -> None:
        self.project, self.redis = project, server
        self._numbers = itertools.count(1)
        self.worker: Worker
        #: Of the Celery processes, none of which may be replaced.
        self.pids: set[int] = set()

    def begin(self) -> None:
        self.redis.start(*EVERYSEC)
        self.project.start_engine()
        self.worker = self.project.start_worker()
        self.project.await_worker(self.worker)
        self.pids = {main.pid for main in self.worker.mains()}

    def submit(self, rows: int) -> Batch:
        """Submit so many rows, all unlike those of other batches."""
        number = next(self._numbers)
        source = self.project.write_rows(rows, f"{number}.jsonl", seed=number)
        bodies = [json.loads(line)["body"] for line in source.read_text().splitlines()]
        digests = {digest(json.dumps(body, separators=(",", ":")).encode()) for body in bodies}
        # By the library: Redis may be away.
        with self.project.ledger() as ledger, open_input(str(source)) as stream:
            submitted = submit(self.project.settings(), ledger, stream, Order(source.name))
        return Batch(source, submitted.batch_id, digests)

    def nudge(self) -> None:
        """Call the reaper now."""
        with Celery(broker=self.redis.url) as plain:
            plain.send_task("maintenance.reap", queue="maintenance", retry=False)

    def answers(self, batch: Batch) -> int:
        """Return how many rows of a batch the engine has answered."""
        log = read_log(self.project.log)
        return sum(any(one.status == 200 for one in log.get(sha, [])) for sha in batch.digests)

    def first(self, batch: Batch) -> float:
        """Return when the engine got a batch's first row; infinity where it has none."""
        log = read_log(self.project.log)
        return min((log[sha][0].start for sha in batch.digests if sha in log), default=float("inf"))

    def started(self, rows: int = 60) -> Batch:
        """Submit a batch, and return once it has some answers."""
        batch = self.submit(rows)
        self.nudge()
        until(lambda: self.answers(batch) >= rows // 6, "some answers", 60)
        return batch

    def forget(self) -> None:
        """Empty Redis."""
        with self.redis.client() as client:
            client.flushall()

    def idle(self) -> bool:
        """Whether no process runs a session: each holds a lock of the machine meanwhile."""
        for path in (self.project.data_dir / "run").glob("runner.*.lock"):
            with path.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
        return True

    def loading(self) -> bool:
        """Whether Redis answers LOADING."""
        with self.redis.client() as client:
            try:
                client.ping()
            except redis.BusyLoadingError:
                return True
            except redis.RedisError:
                return False
        return False

    def queued(self) -> int:
        """Return how many tickets lie in Redis."""
        with self.redis.client() as client:
            return sum(client.llen(key) for key in client.scan_iter("batch*", _type="list"))

    def resumed(self, batch: Batch, since: float, limit: float) -> float:
        """Wait for the first request of a batch, and return how long after `since` it came."""
        until(lambda: self.first(batch) < float("inf"), lambda: f"a request: {self.worker.log[-3000:]}", 3 * limit)
        took = self.first(batch) - since
        assert took <= limit, f"the first request came {took:.1f} s after Redis's return"
        return max(took, 0.0)

    def check(self, *batches: Batch) -> None:
        """Check that the batches are whole, asked once each, and that no process of the worker was replaced."""
        self.nudge()  # what a merge of theirs still waits for
        for batch in batches:
            verdict, _ = judged(self.project, batch.id, batch.source, attempts=1)
            assert verdict.run_again == 0
        assert {main.pid for main in self.worker.mains()} == self.pids, self.worker.log


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("redis")
    script = {"slots": 4, "ttft_ms": 200}
    with Project(folder / "project", script, batch_lease_seconds=45, batch_processes=2) as project:
        server = FaultyRedis(folder / "redis", int(project.redis_url.rpartition(":")[2].partition("/")[0]), "selftest")
        stand = Stand(project, server)
        try:
            stand.begin()
            yield stand
        finally:
            server.kill()


@pytest.fixture
def stand(shared: Stand) -> Iterator[Stand]:
    """The shared stand, with Redis well again whatever a test has left."""
    yield shared
    shared.redis.kill()
    shared.redis.start(*EVERYSEC)


def wait_out(stand: Stand, batch: Batch) -> None:
    """Wait until a batch has all its answers and no runner is at work: the next one needs a ticket."""
    until(lambda: stand.answers(batch) == len(batch.digests), lambda: f"every answer: {stand.worker.log[-3000:]}", 60)
    until(stand.idle, "runners that have ended")


@pytest.mark.parametrize(("before", "after"), [(EVERYSEC, EVERYSEC), (ALWAYS, ALWAYS), (RDB, RDB)])
def test_redis_is_killed_in_the_middle(stand: Stand, figures: Figures, before: Any, after: Any) -> None:
    """redis_restart_mid_lease, with each of its ways to keep data."""
    if before is not EVERYSEC:
        with stand.redis.client() as client:
            client.config_set("save", before[before.index("--save") + 1])
            client.config_set("appendonly", before[before.index("--appendonly") + 1])
            if "--appendfsync" in before:
                client.config_set("appendfsync", "always")
    running = stand.started()
    stand.redis.kill()
    wait_out(stand, running)
    waiting = stand.submit(10)
    stand.redis.start(*after)
    returned = time.monotonic()
    figures("recovery after Redis's return, s", stand.resumed(waiting, returned, RETURN))
    stand.check(running, waiting)


@pytest.mark.long
def test_redis_is_away_for_two_minutes(stand: Stand, figures: Figures) -> None:
    """Celery waits longer before each try, up to half a minute; our workers do not."""
    running = stand.started()
    stand.redis.kill()
    killed = time.monotonic()
    wait_out(stand, running)
    waiting = stand.submit(10)
    until(lambda: time.monotonic() > killed + 120, "two minutes", 150)
    stand.redis.start(*EVERYSEC)
    figures("recovery after Redis's return, s", stand.resumed(waiting, time.monotonic(), RETURN))
    stand.check(running, waiting)


def test_redis_hangs(stand: Stand, figures: Figures) -> None:
    running = stand.started(30)
    with stand.redis.client() as client:
        client.execute_command("DEBUG", "SLEEP", "6")
    returned = time.monotonic()
    waiting = stand.submit(10)
    figures("recovery after Redis's return, s", stand.resumed(waiting, returned, RETURN))
    stand.check(running, waiting)


def test_redis_refuses(stand: Stand, figures: Figures) -> None:
    """OOM, MISCONF and READONLY, one after the other: what is popped meanwhile is lost, and comes again."""
    running = stand.started()
    words = len(stand.worker.log)

    def noticed(word: str) -> None:
        # Its heartbeat is a write, every five seconds.
        until(lambda: word in stand.worker.log[words:], lambda: f"{word}: {stand.worker.log[words:][-3000:]}")

    stand.redis.set(maxmemory="1")
    noticed("'maxmemory'")
    # Redis saves by itself, one second after a write, and then refuses the next.
    stand.redis.set(maxmemory="0", dir="/proc", save="1 1", **{"stop-writes-on-bgsave-error": "yes"})
    noticed("MISCONF")
    wait_out(stand, running)
    waiting = stand.submit(10)
    stand.redis.set(dir=str(stand.redis.folder), save="")
    with stand.redis.client() as client:
        client.config_set("stop-writes-on-bgsave-error", "no")
        client.replicaof("127.0.0.1", "1")
    noticed("read only")
    with stand.redis.client() as client:
        client.replicaof("NO", "ONE")
    returned = time.monotonic()
    figures("recovery after Redis's return, s", stand.resumed(waiting, returned, RETURN))
    stand.check(running, waiting)


def test_redis_loads_its_file(stand: Stand, figures: Figures) -> None:
    running = stand.started()
    with stand.redis.client() as client:
        for number in range(60):
            client.set(f"filler:{number}", random.randbytes(2048))  # which Redis cannot make shorter
        client.save()
    stand.redis.kill()
    # 0.1 s for each key, with a look at the clients between them; a worker tries again after two seconds.
    slow = ("--key-load-delay", "100000", "--loading-process-events-interval-bytes", "1024")
    stand.redis.launch("--appendonly", "no", "--save", "", *slow)
    until(stand.loading, "LOADING")
    wait_out(stand, running)
    waiting = stand.submit(10)
    until(stand.redis.answers, "the end of loading", 60)
    returned = time.monotonic()
    figures("recovery after Redis's return, s", stand.resumed(waiting, returned, RETURN))
    stand.check(running, waiting)


def test_connections_are_killed_every_two_seconds(stand: Stand) -> None:
    """duplicate_execution: tickets may be delivered twice; shards are not."""
    running = stand.submit(150)
    stand.nudge()
    killed = 0.0
    with stand.redis.client() as client:
        while stand.answers(running) < len(running.digests):
            time.sleep(0.05)
            if time.monotonic() - killed >= 2:
                killed = time.monotonic()
                client.client_kill_filter(_type="normal", skipme=True)
                client.client_kill_filter(_type="pubsub", skipme=True)
    stand.check(running)


def test_everything_in_redis_is_forgotten(stand: Stand, figures: Figures) -> None:
    """broker_flushed, with a batch running and another one that waits for its tickets."""
    running = stand.started()
    stand.forget()
    wait_out(stand, running)
    waiting = stand.submit(10)
    stand.forget()
    flushed = time.monotonic()
    figures("recovery after FLUSHALL, s", stand.resumed(waiting, flushed, EMPTY))
    stand.check(running, waiting)


def test_redis_comes_back_without_its_volume(stand: Stand, figures: Figures) -> None:
    running = stand.started()
    stand.redis.kill()
    wait_out(stand, running)
    waiting = stand.submit(10)
    shutil.rmtree(stand.redis.folder)
    stand.redis.start(*EVERYSEC)
    returned = time.monotonic()
    figures("recovery with an empty Redis, s", stand.resumed(waiting, returned, EMPTY))
    stand.check(running, waiting)


def test_a_ticket_goes_to_a_process_that_never_reads_it(stand: Stand, figures: Figures) -> None:
    """Redis hands the only ticket to a stopped process whose BRPOP is in flight; the process is killed."""

    def listening() -> bool:
        with contextlib.suppress(redis.RedisError), stand.redis.client() as client:
            return bool(client.info("clients")["blocked_clients"] >= 3)
        return False

    until(listening, "three processes that wait for messages")
    with stand.redis.client() as client:
        client.set(REAP_KEY, "test", ex=14)  # no round of the reaper meanwhile
    waiting = stand.submit(1)
    mains = stand.worker.mains("batch")
    with Celery(broker=stand.redis.url) as plain:
        for _ in range(20):
            for main in mains:
                kill(main.pid, signal.SIGSTOP)
            plain.send_task("batch.run_shard", queue="batch", priority=9, retry=False)
            if not stand.queued():
                break
            # Stopped between two BRPOPs: nobody asked for it.
            stand.forget()
            for main in mains:
                kill(main.pid, signal.SIGCONT)
            until(listening, "three processes that wait for messages")
        else:
            pytest.fail("nobody took the ticket")
    lost = time.monotonic()
    for main in mains:
        kill(main.pid, signal.SIGKILL)
    figures("longest time of work without a ticket, s", stand.resumed(waiting, lost, MOST_LIMBO))
    stand.project.await_worker(stand.worker)
    until(lambda: len(stand.worker.mains()) == 3, "all processes")
    stand.pids = {main.pid for main in stand.worker.mains()}
    stand.check(waiting)


def test_a_batch_is_cancelled_while_redis_is_away(stand: Stand, figures: Figures) -> None:
    """cancel_event_lost: it reaches the runner with its renewal, here of the lease that is the default."""
    batch = stand.submit(20)
    stand.project.tell_engine(rules=[{"then": {"do": "slow", "seconds": 300}}])
    stand.nudge()
    until(lambda: stand.project.engine_stats()["in_flight"], "requests in flight", 60)
    stand.redis.kill()
    done = stand.project.run("batch", "cancel", batch.id, "--json")
    cancelled = time.monotonic()
    assert done.returncode == 0, done
    until(lambda: stand.project.engine_stats()["in_flight"] == 0, lambda: stand.worker.log[-3000:], 60)
    took = time.monotonic() - cancelled
    figures("from cancel to the engine's rest, s", took)
    stand.project.tell_engine(rules=[])
    stand.redis.start(*EVERYSEC)
    judged(stand.project, batch.id, batch.source, status="cancelled", may_fail=True, attempts=1)
    assert took <= 25
