"""The wall clock jumps (F10). Leases use the ledger's clock, which is the machine's on SQLite; a runner its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from millrace.batch.lease import Leases, free_expired
from millrace.batch.ledger import Ledger
from millrace.batch.schema import ShardState
from millrace.selftest.parts import Project
from tests.faults.harness import answers, ended, judged
from tests.faults.oracle import read_log
from tests.faults.sessions import LEASE, merged, process, run, session, submitted
from tests.services import until

Make = Callable[..., Project]
HOUR = 3600.0  # seconds
JULIAN = 2440587.5  # days from its beginning to 1970


class Clock:
    """A wall clock that can be set: SQLite asks it whenever our ledger asks SQLite."""

    def __init__(self) -> None:
        self.shift = 0.0

    def julianday(self, _: str) -> float:
        return JULIAN + (time.time() + self.shift) / 86400

    @contextlib.contextmanager
    def ledger(self, project: Project) -> Iterator[Ledger]:
        """Open the ledger of a project, with this clock in every connection."""
        with project.ledger() as ledger:

            def connected(connection: Any, _record: object) -> None:
                connection.create_function("julianday", 1, self.julianday)

            sa.event.listen(ledger.engine, "connect", connected)
            ledger.engine.dispose()
            yield ledger


class Faketime:
    """libfaketime: the wall clock of every process that is started while it is `on`; the monotonic one goes on."""

    LIBRARY = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self._path, self._patch = path, patch
        self.jump(0)

    def jump(self, seconds: float) -> None:
        """Set the clock; within a second all of them have it."""
        part = self._path.with_suffix(".part")
        part.write_text(f"{seconds:+.0f}")
        part.replace(self._path)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Give the clock to what is started in the block."""
        with self._patch.context() as patch:
            patch.setenv("LD_PRELOAD", str(self.LIBRARY))
            patch.setenv("FAKETIME_TIMESTAMP_FILE", str(self._path))
            patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            # Seconds between looks at the file. A look at each call stops a busy machine's processes for seconds.
            patch.setenv("FAKETIME_CACHE_DURATION", "1")
            yield


@pytest.fixture
def faketime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faketime:
    if Faketime.LIBRARY is None:
        pytest.skip("needs libfaketime")
    return Faketime(tmp_path / "faketime", monkeypatch)


@pytest.fixture
def ours(project: Make) -> Project:
    made = project(script={"slots": 4, "ttft_ms": 50}, batch_concurrency=8, batch_lease_seconds=LEASE)
    made.start_engine()
    return made


def answered(ours: Project) -> int:
    return sum(any(one.status == 200 for one in found) for found in read_log(ours.log).values())


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_the_clock_jumps_while_two_sessions_run(ours: Project, jump: float) -> None:
    """clock_jump: a lease may pass to the other one for it, but no row has two lines, and none is lost."""
    clock, source = Clock(), ours.write_rows(160)
    with clock.ledger(ours) as ledger:
        batch = submitted(ours, source, ledger)
        with session(ours, ledger, "one", LEASE) as one, session(ours, ledger, "two", LEASE) as two:
            until(lambda: answered(ours) > 40, "some answers")
            clock.shift = jump
            jumped = time.monotonic()
            one.result(60)
            two.result(60)
        # Until a session that was replaced learns it, at its next renewal, its answers do not count.
        kills = [jumped + 0.05 * step for step in range(int(LEASE / 0.05))]
        merged(ours, ledger, batch, source, kills=kills)


def test_a_dead_runner_holds_its_shards_no_longer_when_the_clock_is_set_back(
    ours: Project, figures: Callable[[str, float], None]
) -> None:
    clock, source = Clock(), ours.write_rows(400)
    with clock.ledger(ours) as ledger:
        batch = submitted(ours, source, ledger)
        with process(ours):
            until(lambda: answered(ours) > 20, "some answers")
        killed = time.monotonic()
        clock.shift = -HOUR
        assert any(shard.state == ShardState.LEASED for shard in ledger.shards(batch))
        until(lambda: free_expired(ledger), "shards that are free")
        figures("a dead runner's shards, free after the clock was set back, s", time.monotonic() - killed)
        run(ours, ledger)
        merged(ours, ledger, batch, source, kills=[killed])
        assert time.monotonic() - killed < 60


def test_a_live_runner_keeps_its_shard_when_the_clock_creeps(ours: Project) -> None:
    """What a time server does: steps of less than a second move no lease."""
    clock, source = Clock(), ours.write_rows(1)
    with clock.ledger(ours) as ledger:
        submitted(ours, source, ledger)
        leases = Leases(ledger, "one", LEASE)
        assert leases.claim() is not None
        for shift in (0.9, -0.9):
            clock.shift = shift
            assert free_expired(ledger) == 0
            assert Leases(ledger, "two", LEASE).claim() is None


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_the_clock_of_workers_and_their_ledger_jumps(project: Make, faketime: Faketime, jump: float) -> None:
    """clock_jump, by libfaketime."""
    ours = project(script={"slots": 4, "ttft_ms": 50})
    ours.start_redis()
    ours.start_engine()
    with faketime.on():
        workers = [ours.start_worker() for _ in range(2)]
    for worker in workers:
        ours.await_worker(worker)
    answered_across(ours, faketime, jump)
    with ours.ledger() as ledger:  # the clock of whoever merged
        (batch,) = ledger.batches()
    assert abs(batch["millrace"]["ended"] - time.time() - jump) < HOUR / 2


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_the_clock_of_redis_jumps(
    project: Make, faketime: Faketime, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """clock_jump, by libfaketime: what expires in Redis does so at once, or an hour late."""
    ours = project(script={"slots": 4, "ttft_ms": 50})
    with faketime.on(), monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # so that the wheel's is taken: libfaketime and the allocator of Debian's clash
        ours.start_redis()
    ours.start_engine()
    worker = ours.start_worker()
    ours.await_worker(worker)
    answered_across(ours, faketime, jump)
    with contextlib.closing(redis.Redis.from_url(ours.redis_url)) as client:
        assert abs(client.time()[0] - time.time() - jump) < HOUR / 2


def answered_across(ours: Project, faketime: Faketime, jump: float) -> None:
    """Run a batch in whose middle the clock jumps, and judge it."""
    source = ours.write_rows(400)
    began = time.monotonic()
    batch = ours.submit(source)
    until(lambda: answers(ours) > 40, "some answers")
    faketime.jump(jump)
    ended(ours, batch)
    # libfaketime's processes share a semaphore and wait for it at every look at a clock: on a busy machine they stand
    # still for longer than their leases. So what was run again is excused here, and in the tests above it is not.
    kills = [began + 0.05 * step for step in range(int((time.monotonic() - began) / 0.05))]
    judged(ours, batch, source, kills=kills)
