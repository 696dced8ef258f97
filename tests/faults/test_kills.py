"""kill -9, SIGSTOP and rivals: whatever becomes of the workers, every row has one line and costs one request."""

from __future__ import annotations

import signal
import time

import pytest

from millrace.batch.schema import ShardState, shards
from millrace.selftest.kills import schedule
from millrace.selftest.parts import LEASE, kill, row
from millrace.selftest.run import Run
from tests.faults.harness import judged, running, until, words
from tests.faults.oracle import digest, read_log
from tests.services import freeze

SINCE = {"worker": "the death of a worker", "engine": "the return of the engine", "Redis": "the return of Redis"}


def test_random_kills(project, figures, seed, request):
    """F1: main, child, both, the whole worker, Redis and the engine, at random."""
    ours = project()
    ours.start()
    source = ours.write_rows(1000)
    batch = ours.submit(source)
    run = Run(ours, batch)
    outcome = run.outcome(seed, source, run.until_end(schedule(request.config.getoption("--kills"), seed, 1000)))
    note(figures, outcome.verdict, outcome.kills)
    for what, took in outcome.recovery.items():
        figures(f"recovery after {SINCE[what]}, s", took)
    assert outcome.recovery.get("worker", 0.0) <= LEASE + 20.0
    assert outcome.ok, f"{outcome}\n{[f'{blow.seconds:.1f} s: {blow}' for blow in run.blows]}"


@pytest.fixture
def slow(project):
    """A project with eight requests in flight, at an engine that would take a minute for each."""
    made = project({"slots": 64, "ttft_ms": 60_000}, batch_lease_seconds=3, batch_concurrency=8)
    made.start_redis()
    made.start_engine()
    return made


def in_flight(project, count):
    until(lambda: project.engine_stats()["in_flight"] >= count, f"{count} requests in flight")


def test_a_worker_sleeps_longer_than_its_lease(slow, figures):
    """F2, zombie_owner_burns_inference: another one has its shards when it wakes up, and its requests end."""
    source = slow.write_rows(60)
    batch = slow.submit(source)
    with running(slow, batch) as sleeper:
        in_flight(slow, 8)
        freeze(sleeper.pid, slow.data_dir / "ledger.db")
        stopped = time.monotonic()
        slow.tell_engine(ttft_ms=500)
        with running(slow, batch) as heir:
            verdict, _ = judged(slow, batch, source, kills=[stopped], attempts=2)
            assert heir.wait(30) == 0, words(slow)
        assert verdict.run_again == 8
        kill(sleeper.pid, signal.SIGCONT)
        woken = time.monotonic()
        until(lambda: slow.engine_stats()["in_flight"] == 0, "its requests are ended", 20)
        figures("requests of a lost lease end after, s", time.monotonic() - woken)
        assert sleeper.wait(30) == 0, words(slow)
        # terminal_overwrite: whatever it did when it woke up, the batch is what it was.
        judged(slow, batch, source, kills=[stopped], attempts=2)
    assert "Traceback" not in words(slow)


def test_a_shard_has_two_owners(slow, figures):
    """duplicate_execution: a lease is given away while its owner is at work; the owner hears of it and stops."""
    source = slow.write_rows(60)
    batch = slow.submit(source)
    with running(slow, batch) as owner:
        in_flight(slow, 8)
        slow.tell_engine(ttft_ms=3000)  # what is in flight still takes its minute
        with slow.ledger() as ledger, ledger.write() as connection:
            taken = connection.execute(
                shards.update()
                .where(shards.c.state == ShardState.LEASED)
                .values(epoch=shards.c.epoch + 1, owner="somebody", lease_until=1.0)
            )
        assert taken.rowcount
        given_away = time.monotonic()
        until(lambda: slow.engine_stats()["cancelled"] >= 8, "its requests are ended", 10)
        heard = time.monotonic()
        figures("requests of a lost lease end after, s", heard - given_away)
        slow.tell_engine(ttft_ms=10)
        # Rows that it started before it heard were lost with their shard, too.
        verdict, _ = judged(slow, batch, source, kills=[given_away, heard], attempts=2)
        assert verdict.run_again >= 8
        assert owner.wait(30) == 0, words(slow)


def test_many_run_one_batch(project, figures):
    """replicas_execute_once: four runners on one batch ask every row once."""
    ours = project({"slots": 16, "ttft_ms": 20})
    ours.start_redis()
    ours.start_engine()
    source = ours.write_rows(600)
    batch = ours.submit(source)
    with running(ours, batch), running(ours, batch), running(ours, batch), running(ours, batch):
        verdict, report = judged(ours, batch, source, attempts=1)
    assert report.extra_claims == 0
    note(figures, verdict, 0)


def test_a_row_kills_its_worker(project, figures):
    """F12, poison_row: whoever asks it dies; it ends in the errors, alone, and all others are answered."""
    ours = project({"slots": 8, "ttft_ms": 10}, batch_lease_seconds=3)
    ours.script["rules"] = [{"when": {"contains": "Question 23?"}, "then": {"do": "hang"}}]
    ours.start_redis()
    ours.start_engine()
    source = ours.write_rows(60)
    batch = ours.submit(source)
    # As the engine's log has it: a body as it was sent.
    poison = digest(source.read_bytes().splitlines()[23].partition(b'"body":')[2][:-1])
    kills: list[float] = []

    def asked():
        return len(read_log(ours.log).get(poison, []))

    while len(kills) < 10:
        before = asked()  # a lease that is lost on a busy machine has the row asked twice in one life
        with running(ours, batch) as worker:
            until(
                lambda before=before: worker.poll() is not None or asked() > before,
                f"the row is asked\n{words(ours)}",
                60,
            )
            if worker.poll() is not None:
                assert worker.returncode == 0, words(ours)
                break
            worker.kill()
            worker.wait()
            kills.append(time.monotonic())
    verdict, _ = judged(ours, batch, source, kills=kills, may_fail=True)
    assert (verdict.answered, verdict.failed) == (59, 1)
    errors = (ours.data_dir / "batches" / batch / "errors.jsonl").read_text()
    assert row(23)["custom_id"] in errors and "poison_row" in errors
    assert len(kills) <= 5
    figures("deaths until a poison row is known", len(kills))


def test_a_cancel_reaches_the_engine(slow, figures):
    """Requests in flight of a cancelled batch end at the engine, within one renewal and not with their answer."""
    source = slow.write_rows(60)
    batch = slow.submit(source)
    with running(slow, batch):
        in_flight(slow, 8)
        asked = time.monotonic()
        assert slow.run("batch", "cancel", batch).returncode == 0
        until(lambda: slow.engine_stats()["in_flight"] == 0, "no request in flight", 25)
        figures("cancel stops upstream work after, s", time.monotonic() - asked)
        judged(slow, batch, source, status="cancelled", may_fail=True)


def test_a_cancel_races_the_end(project):
    """cancel_racing_completion: a batch of which all is done but the merge's last step ends one way, and stays so."""
    ours = project({"slots": 8, "ttft_ms": 10}, batch_lease_seconds=3)
    ours.start_redis()
    ours.start_engine()
    source = ours.write_rows(60)
    batch = ours.submit(source)
    with running(ours, batch, crash_at="merge.placed") as worker:
        assert worker.wait(60) == 137, words(ours)
    ours.run("batch", "cancel", batch)
    with running(ours, batch):
        _, report = judged(ours, batch, source, attempts=1)
    assert (report.output_lines, report.error_lines) == (60, 0)


def note(figures, verdict, kills=1):
    figures("kills", kills)
    figures("rows", verdict.rows)
    figures("rows lost", verdict.lost)
    figures("rows doubled", verdict.doubled)
    figures("requests run again", verdict.run_again)
    figures("requests in flight at the kills", verdict.in_flight)
