"""The runner against an engine in another process: whatever goes wrong, every row is answered once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from millrace.batch import claims, planner, runner
from millrace.batch.again import resume
from millrace.batch.claimed import Shard, prepare
from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Lease, Leases
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge
from millrace.batch.runner import Outcome, Session
from millrace.batch.schema import ShardState, Status
from millrace.batch.verify import verify
from millrace.engine.admission import PER_SLOT
from millrace.errors import MillraceError, StorageError
from millrace.settings import Settings
from tests.scripted_engine import Engine, scripted_engine
from tests.unit.batches import TTL, expire, planned, request, run_shard

SHORT = 6.0  # seconds, renewed every two; a slow disk may take some for one commit
WAIT = 60.0


def on(settings: Settings, engine: Engine, **changes: Any) -> Settings:
    return settings.model_copy(update={"llm_server_url": engine.url.removesuffix("/v1"), **changes})


class Running:
    """A session in a thread of its own."""

    def __init__(self, settings: Settings, ledger: Ledger, ttl: float = TTL, seconds: float = 60.0) -> None:
        self.stop = threading.Event()
        #: What was last reported, and everything that ever was.
        self.trouble: MillraceError | None = None
        self.troubles: list[MillraceError] = []
        self.leases = Leases(ledger, "runner", ttl)
        self._session = Session(self.leases, settings, stop=self.stop.is_set, seconds=seconds, report=self._report)
        self._pool = ThreadPoolExecutor(1)
        self._outcome: Future[Outcome] = self._pool.submit(lambda: asyncio.run(self._session.run()))

    def _report(self, trouble: MillraceError | None) -> None:
        self.trouble = trouble
        if trouble is not None:
            self.troubles.append(trouble)

    def result(self) -> Outcome:
        return self._outcome.result(WAIT)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._pool.shutdown()


def run(settings: Settings, ledger: Ledger, **options: Any) -> Outcome:
    with Running(settings, ledger, **options) as running:
        return running.result()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met"
        time.sleep(0.01)


def answered(ledger: Ledger, batch: str) -> int:
    counts = ledger.batch(batch)["request_counts"]
    return int(counts["completed"] + counts["failed"])


def taken(ledger: Ledger, shard: int, other: Leases) -> Lease:
    """Let another take a shard whose lease is made to run out; between the two its runner may still renew it."""
    while True:
        expire(ledger, shard)
        if (lease := other.claim()) is not None:
            return lease


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [request(f"row {number}", model="scripted", **changes) for number in range(count)]


def ended(settings: Settings, ledger: Ledger, batch: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Merge and verify a batch; return (output lines, error lines)."""
    merge(ledger, settings.data_dir, batch)
    report = verify(ledger, settings.data_dir, batch)
    assert report.ok, report.findings
    folder = BatchFolder.of(settings.data_dir, batch)
    output, errors = (
        [json.loads(line) for line in path.read_bytes().splitlines()] for path in (folder.output, folder.errors)
    )
    return output, errors


def names(lines: list[dict[str, Any]]) -> list[str]:
    return [line["custom_id"] for line in lines]


def all_right(settings: Settings, ledger: Ledger, batch: str, count: int) -> None:
    """Check that every row has its own answer, in order."""
    output, errors = ended(settings, ledger, batch)
    assert errors == []
    assert names(output) == [f"row {number}" for number in range(count)]
    for line in output:
        assert line["response"]["status_code"] == 200
        text = line["response"]["body"]["choices"][0]["message"]["content"]
        assert text.startswith(f"answer to: {line['custom_id']}")


def calls(engine: Engine) -> Counter[str]:
    """Return how often each body was asked."""
    return Counter(entry["sha256"] for entry in engine.log() if entry["event"] == "start")


@pytest.fixture
def one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MIN_SHARDS", 1)


# The usual way


def test_a_batch_runs_to_its_end_with_each_row_asked_once(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(60))
    with scripted_engine(slots=0) as engine:
        with Running(on(settings, engine, batch_concurrency=5), ledger) as running:
            engine.wait_for(lambda stats: stats["waiting"] == 5)
            engine.script(slots=8, ttft_ms=10)
            outcome = running.result()
        assert outcome == Outcome(shards=len(ledger.shards(batch)), rows=60, more=False)
        stats = engine.stats()
        assert (stats["requests"], stats["peak_in_flight"], stats["cancelled"]) == (60, 5, 0)
        assert set(calls(engine).values()) == {1}
        counts = ledger.batch(batch)["millrace"]
        assert stats["completion_tokens"] == sum(shard.completion_tokens for shard in ledger.shards(batch))
        assert counts["claims"] == len(ledger.shards(batch))
    assert ledger.status(batch) is Status.FINALIZING
    all_right(settings, ledger, batch, 60)


def test_the_engine_is_kept_full_over_many_small_shards(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(160))
    assert {shard.rows for shard in ledger.shards(batch)} == {10}
    with scripted_engine(slots=0) as engine:
        with Running(on(settings, engine, batch_concurrency=40), ledger) as running:
            engine.wait_for(lambda stats: stats["waiting"] == 40)
            engine.script(slots=64)
            running.result()
        assert engine.stats()["peak_in_flight"] == 40
    all_right(settings, ledger, batch, 160)


def test_a_session_holds_no_more_shards_than_it_has_use_for(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(160))
    with scripted_engine(slots=10, ttft_ms=20) as engine:
        here = on(settings, engine, batch_concurrency=10)
        held: list[int] = []

        def finished() -> bool:
            states = Counter(shard.state for shard in ledger.shards(batch))
            held.append(states[ShardState.LEASED])
            return states[ShardState.DONE] == 16

        with Running(here, ledger):
            until(finished)
        # One that ends, one or two that are run, the next one; and some that wait for the ledger to take their end.
        assert 1 <= max(held) <= 8


def test_the_limit_comes_from_what_the_engine_reports(settings: Settings, ledger: Ledger, one_shard: None) -> None:
    batch = planned(settings, ledger, rows(40))
    # The first three hold the slots until the line behind them has its length.
    rule = {"when": {"times": 3}, "then": {"do": "slow", "seconds": 3}}
    with scripted_engine(slots=3, rules=[rule]) as engine:
        run(on(settings, engine), ledger)
        assert engine.stats()["peak_in_flight"] == 3 * PER_SLOT
    all_right(settings, ledger, batch, 40)


def test_a_ledger_without_work_ends_the_session(settings: Settings, ledger: Ledger) -> None:
    with scripted_engine() as engine:
        assert run(on(settings, engine), ledger) == Outcome(0, 0, False)


def test_no_shard_is_claimed_when_the_time_is_over(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(4))
    with scripted_engine() as engine:
        assert run(on(settings, engine), ledger, seconds=0.0) == Outcome(0, 0, True)
        assert engine.stats()["requests"] == 0
    assert {shard.state for shard in ledger.shards(batch)} == {ShardState.READY}


def test_all_routes_run_in_one_batch(settings: Settings, ledger: Ledger) -> None:
    lines = rows(3)
    lines[1] |= {"url": "/v1/completions", "body": {"model": "scripted", "prompt": "row 1"}}
    lines[2] |= {"url": "/v1/embeddings", "body": {"model": "scripted", "input": ["row 2", "x"]}}
    batch = planned(settings, ledger, lines)
    with scripted_engine(embedding_size=4) as engine:
        run(on(settings, engine), ledger)
    output, _ = ended(settings, ledger, batch)
    bodies = [line["response"]["body"] for line in output]
    assert bodies[1]["choices"][0]["text"].startswith("answer to: row 1")
    assert [len(entry["embedding"]) for entry in bodies[2]["data"]] == [4, 4]


def test_two_sessions_share_a_batch(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(80))
    with scripted_engine(slots=4, ttft_ms=20) as engine:
        here = on(settings, engine, batch_concurrency=4)
        with Running(here, ledger) as one, Running(here, ledger) as two:
            assert one.result().rows + two.result().rows == 80
        assert set(calls(engine).values()) == {1}
    all_right(settings, ledger, batch, 80)


# What one row's request can meet


def test_a_row_that_does_not_fit_fails_alone(settings: Settings, ledger: Ledger) -> None:
    lines = rows(20)
    lines[7]["body"]["messages"][0]["content"] = "word " * 500
    batch = planned(settings, ledger, lines)
    with scripted_engine(context=100) as engine:
        run(on(settings, engine), ledger)
        assert set(calls(engine).values()) == {1}
    output, errors = ended(settings, ledger, batch)
    assert names(errors) == ["row 7"]
    assert len(output) == 19
    assert errors[0]["error"]["code"] == "context_length_exceeded"
    assert errors[0]["response"]["status_code"] == 400
    assert errors[0]["response"]["body"]["error"]["type"] == "exceed_context_size_error"
    assert ledger.batch(batch)["request_counts"] == {"total": 20, "completed": 19, "failed": 1}


def test_a_refused_row_is_asked_once(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(20))
    rule = {"when": {"contains": '"row 3"'}, "then": {"do": "status", "status": 400, "body": {"error": "no\nway"}}}
    with scripted_engine(rules=[rule]) as engine:
        run(on(settings, engine), ledger)
        assert set(calls(engine).values()) == {1}
        assert engine.stats()["by_status"] == {"200": 19, "400": 1}
    _, errors = ended(settings, ledger, batch)
    assert names(errors) == ["row 3"]
    assert errors[0]["error"]["code"] == "invalid_request_error"
    assert errors[0]["response"]["body"] == {"error": "no\nway"}


def test_a_model_that_is_listed_and_not_found_is_named_with_those_that_are(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(6))
    said = {"error": {"message": "The model `scripted` does not exist.", "type": "NotFoundError", "code": 404}}
    rule = {"when": {"contains": '"row 2"'}, "then": {"do": "status", "status": 404, "body": said}}
    with scripted_engine(dialect="vllm", models=["scripted", "second"], rules=[rule]) as engine:
        run(on(settings, engine), ledger)
        assert set(calls(engine).values()) == {1}
    output, errors = ended(settings, ledger, batch)
    assert len(output) == 5
    assert names(errors) == ["row 2"]
    assert errors[0]["error"]["code"] == "model_not_found"
    assert "`scripted` does not exist" in errors[0]["error"]["message"]
    assert "It serves scripted, second." in errors[0]["error"]["message"]


@pytest.mark.parametrize("status", [429, 503])
def test_an_engine_that_asks_for_less_is_obeyed(settings: Settings, ledger: Ledger, status: int) -> None:
    batch = planned(settings, ledger, rows(10))
    then = {"do": "status", "status": status, "headers": {"Retry-After": "1"}}
    with scripted_engine(rules=[{"when": {"first_attempts": 1}, "then": then}]) as engine:
        run(on(settings, engine, batch_concurrency=10, batch_row_attempts=1), ledger)
        assert set(calls(engine).values()) == {2}
        refused = {entry["sha256"]: entry["t"] for entry in engine.log() if entry.get("status") == status}
        starts: dict[str, float] = {entry["sha256"]: entry["t"] for entry in engine.log() if entry["event"] == "start"}
        assert len(refused) == 10
        assert all(starts[body] - moment >= 0.99 for body, moment in refused.items())
    all_right(settings, ledger, batch, 10)


def test_a_fault_that_passes_fails_no_row(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(4))  # fewer than make the breaker ask by itself
    rule = {"when": {"first_attempts": 3}, "then": {"do": "status", "status": 500}}
    with scripted_engine(rules=[rule]) as engine:
        run(on(settings, engine, batch_row_attempts=4), ledger)
        assert set(calls(engine).values()) == {4}
    all_right(settings, ledger, batch, 4)


def test_a_fault_that_does_not_pass_fails_the_row_after_its_tries(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(6))
    rule = {"when": {"contains": '"row 4"'}, "then": {"do": "status", "status": 500, "body": "not JSON\n at all"}}
    with scripted_engine(rules=[rule]) as engine:
        run(on(settings, engine, batch_row_attempts=2), ledger)
        # The breaker may have asked one thing more, to see that the engine works.
        assert sorted(calls(engine).values())[-2:] == [1, 2]
    output, errors = ended(settings, ledger, batch)
    assert len(output) == 5
    assert errors[0]["error"]["code"] == "server_error"
    assert errors[0]["response"]["body"] == "not JSON\n at all"


@pytest.mark.parametrize("fault", ["garbage", "half", "cut"])
def test_an_answer_that_is_none_is_asked_for_again(settings: Settings, ledger: Ledger, fault: str) -> None:
    batch = planned(settings, ledger, rows(4))
    with scripted_engine(rules=[{"when": {"first_attempts": 1}, "then": {"do": fault}}]) as engine:
        run(on(settings, engine), ledger)
        assert set(calls(engine).values()) == {2}
        assert engine.stats()["faults"] == {fault: 4}
    all_right(settings, ledger, batch, 4)


@pytest.mark.parametrize("fault", ["hang", "hang_after_headers"])
def test_a_row_without_an_answer_is_given_up_after_its_time(settings: Settings, ledger: Ledger, fault: str) -> None:
    batch = planned(settings, ledger, rows(6))
    with scripted_engine(rules=[{"when": {"contains": '"row 1"'}, "then": {"do": fault}}], slots=8) as engine:
        run(on(settings, engine, batch_row_timeout=2.0, batch_row_attempts=2), ledger)
        engine.wait_for(lambda stats: stats["cancelled"] == 2)
    output, errors = ended(settings, ledger, batch)
    assert len(output) == 5
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [("row 1", "engine_timeout")]
    assert errors[0]["response"] is None


# What the engine as a whole can do


def port_of(engine: Engine) -> int:
    port = urlsplit(engine.url).port
    assert port is not None
    return port


def test_an_engine_that_dies_and_comes_back_fails_no_row(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(80))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(scripted_engine(slots=4, ttft_ms=20))
        running = stack.enter_context(Running(on(settings, first, batch_concurrency=8), ledger))
        first.wait_for(lambda stats: stats["by_status"].get("200", 0) >= 20)
        first.kill()
        until(lambda: running.trouble is not None)
        before = {entry["sha256"] for entry in first.log() if entry.get("status") == 200}
        assert len(before) < 80
        second = stack.enter_context(scripted_engine(port=port_of(first), slots=4, ttft_ms=20))
        assert running.result().rows == 80
        assert running.trouble is None
        # What was answered is not asked again, but for answers that were on their way.
        assert len(before & set(calls(second))) <= 8
    all_right(settings, ledger, batch, 80)


def test_an_engine_that_is_not_there_yet_is_waited_for(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(10))
    with scripted_engine() as earlier:
        here, port = on(settings, earlier), port_of(earlier)
    with Running(here, ledger) as running:
        until(lambda: running.trouble is not None)
        assert running.trouble is not None
        assert running.trouble.code == "engine_unreachable"
        assert {shard.state for shard in ledger.shards(batch)} == {ShardState.READY}
        with scripted_engine(port=port, load_seconds=0.5):
            assert running.result().rows == 10
            assert running.trouble is None
    all_right(settings, ledger, batch, 10)


@pytest.mark.parametrize("dialect", ["llamacpp", "vllm", "openai"])
def test_a_wrong_key_fails_no_row(settings: Settings, ledger: Ledger, dialect: str) -> None:
    batch = planned(settings, ledger, rows(10))
    with scripted_engine(dialect=dialect, api_key="right") as engine:
        wrong = Settings(data_dir=settings.data_dir, llm_server_url=engine.root, llm_api_key="wrong")
        with Running(wrong, ledger) as running:
            until(lambda: running.trouble is not None)
            assert running.trouble is not None
            assert running.trouble.code == "engine_key_refused"
            assert "LLM_API_KEY" in running.trouble.hint
            running.stop.set()
            assert running.result().rows == 0
        assert answered(ledger, batch) == 0
        assert [(shard.state, shard.attempts) for shard in ledger.shards(batch)] == [(ShardState.READY, 0)] * 10
        right = Settings(data_dir=settings.data_dir, llm_server_url=engine.root, llm_api_key="right")
        assert run(right, ledger).rows == 10
    all_right(settings, ledger, batch, 10)


def test_a_key_that_is_refused_in_the_middle_makes_rows_wait(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(10))
    rule = {"when": {"first_attempts": 1}, "then": {"do": "status", "status": 401}}
    with scripted_engine(rules=[rule]) as engine:
        assert run(on(settings, engine, batch_row_attempts=1), ledger).rows == 10
    all_right(settings, ledger, batch, 10)


# Stopping


def test_stop_lets_rows_in_flight_end_and_gives_the_rest_back(
    settings: Settings, ledger: Ledger, one_shard: None
) -> None:
    batch = planned(settings, ledger, rows(40))
    with scripted_engine(slots=4, ttft_ms=100) as engine:
        here = on(settings, engine, batch_concurrency=8)
        with Running(here, ledger) as running:
            engine.wait_for(lambda stats: stats["by_status"].get("200", 0) >= 8)
            running.stop.set()
            outcome = running.result()
        stats = engine.stats()
        assert outcome.more
        assert outcome.shards == 0
        assert stats["cancelled"] == 0
        assert stats["requests"] == stats["by_status"]["200"] == outcome.rows < 40
        (shard,) = ledger.shards(batch)
        assert (shard.state, shard.attempts, shard.owner, shard.completed) == ("ready", 0, None, outcome.rows)
        assert run(here, ledger).rows == 40 - outcome.rows
        assert set(calls(engine).values()) == {1}
    all_right(settings, ledger, batch, 40)
    assert verify(ledger, settings.data_dir, batch).extra_claims == 0


def test_a_session_that_is_cancelled_gives_back_what_it_holds(
    settings: Settings, ledger: Ledger, one_shard: None
) -> None:
    batch = planned(settings, ledger, rows(20))
    rule = {"when": {"contains": '"row 1'}, "then": {"do": "hang"}}  # 1 and 10 to 19
    with scripted_engine(slots=20, rules=[rule]) as engine:
        here = on(settings, engine, batch_concurrency=20)

        async def cancelled() -> None:
            session = Session(Leases(ledger, "runner", TTL), here, stop=lambda: False, seconds=60.0)
            task = asyncio.create_task(session.run())
            await asyncio.to_thread(engine.wait_for, lambda stats: stats["by_status"].get("200") == 9)
            await asyncio.to_thread(until, lambda: answered(ledger, batch) == 9)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancelled())
        engine.wait_for(lambda stats: stats["cancelled"] == 11)
        (shard,) = ledger.shards(batch)
        assert (shard.state, shard.attempts, shard.completed) == ("ready", 0, 9)
        engine.script(rules=[])
        assert run(here, ledger).rows == 11
    all_right(settings, ledger, batch, 20)


def test_a_lease_that_was_taken_away_ends_the_work_and_nothing_of_it_counts(
    settings: Settings, ledger: Ledger, one_shard: None
) -> None:
    batch = planned(settings, ledger, rows(10))
    # Row 0 holds the only slot for ever, the others wait behind it.
    with scripted_engine(slots=1, rules=[{"when": {"contains": '"row 0"'}, "then": {"do": "hang"}}]) as engine:
        with Running(on(settings, engine, batch_concurrency=10), ledger, ttl=SHORT) as running:
            engine.wait_for(lambda stats: stats["in_flight"] == 10 and stats["working"] == 1)
            (shard,) = ledger.shards(batch)
            other = Leases(ledger, "other", TTL)
            lease = taken(ledger, shard.id, other)
            assert lease.epoch == 2
            run_shard(settings, other, lease)
            # Answers for the runner that was replaced, before it knows.
            engine.script(slots=2)
            outcome = running.result()
        engine.wait_for(lambda stats: stats["in_flight"] == 0 and stats["cancelled"] >= 1)
        assert (outcome.shards, outcome.rows) == (0, 0)
    output, errors = ended(settings, ledger, batch)
    assert errors == []
    assert len(output) == 10
    assert {line["response"]["body"]["choices"][0]["message"]["content"] for line in output} == {"epoch 2"}
    assert [one["epoch"] for one in ledger.shards(batch)[0].segments] == [2] or [
        (one["epoch"], one["rows"]) for one in ledger.shards(batch)[0].segments
    ] == [(1, 0), (2, 10)]


def test_nothing_is_asked_for_under_a_lease_that_ran_out_while_it_was_claimed(
    settings: Settings, ledger: Ledger, one_shard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = planned(settings, ledger, rows(10))

    def slow(data_dir: Path, leases: Leases, lease: Lease) -> Shard | None:
        shard = prepare(data_dir, leases, lease)
        lease.trusted_until = time.monotonic()
        return shard

    with scripted_engine() as engine:
        with monkeypatch.context() as patched:
            patched.setattr(claims, "prepare", slow)
            assert run(on(settings, engine), ledger) == Outcome(0, 0, False)
        assert engine.stats()["requests"] == 0
        expire(ledger, ledger.shards(batch)[0].id)
        assert run(on(settings, engine), ledger) == Outcome(1, 10, False)
    all_right(settings, ledger, batch, 10)


def test_a_runner_that_loses_one_shard_goes_on_with_the_other(
    settings: Settings, ledger: Ledger, one_shard: None
) -> None:
    lost = planned(settings, ledger, rows(6, extra="stuck"))
    other = planned(settings, ledger, rows(60))
    rule = {"when": {"contains": "stuck"}, "then": {"do": "hang"}}
    with scripted_engine(slots=0, ttft_ms=100, rules=[rule]) as engine:
        with Running(on(settings, engine, batch_concurrency=8), ledger, ttl=SHORT) as running:
            engine.wait_for(lambda stats: stats["waiting"] == 8)
            engine.script(slots=20)
            # Two lanes are left for the other batch.
            engine.wait_for(lambda stats: stats["by_status"].get("200", 0) >= 2)
            thief = Leases(ledger, "thief", TTL)
            lease = taken(ledger, ledger.shards(lost)[0].id, thief)
            assert lease.batch_id == lost
            run_shard(settings, thief, lease)
            outcome = running.result()
        assert outcome.rows == 60
        stats = engine.stats()
        assert (stats["requests"], stats["cancelled"], stats["peak_in_flight"]) == (66, 6, 8)
    all_right(settings, ledger, other, 60)
    assert ended(settings, ledger, lost)[1] == []


def test_a_batch_that_is_cancelled_keeps_what_was_answered(settings: Settings, ledger: Ledger, one_shard: None) -> None:
    batch = planned(settings, ledger, rows(20))
    rule = {"when": {"contains": '"row 1'}, "then": {"do": "hang"}}
    with scripted_engine(slots=20, rules=[rule]) as engine:
        with Running(on(settings, engine, batch_concurrency=20), ledger, ttl=SHORT) as running:
            engine.wait_for(lambda stats: stats["by_status"].get("200") == 9)
            assert ledger.cancel(batch) is Status.CANCELLING
            outcome = running.result()
        engine.wait_for(lambda stats: stats["cancelled"] == 11 and stats["in_flight"] == 0)
    assert (outcome.shards, outcome.rows) == (0, 9)
    output, errors = ended(settings, ledger, batch)
    assert ledger.status(batch) is Status.CANCELLED
    hung = [f"row {number}" for number in (1, *range(10, 20))]
    assert names(output) == [f"row {number}" for number in range(20) if f"row {number}" not in hung]
    assert names(errors) == hung
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}


def test_a_paused_batch_keeps_the_rows_in_flight_and_drops_those_that_take_too_long(
    settings: Settings, ledger: Ledger, one_shard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "DRAIN", 4.0)
    batch = planned(settings, ledger, rows(30))
    rule = {"when": {"contains": '"row 7"'}, "then": {"do": "hang"}}
    with scripted_engine(slots=10, ttft_ms=400, rules=[rule]) as engine:
        here = on(settings, engine, batch_concurrency=10)
        with Running(here, ledger, ttl=SHORT) as running:
            engine.wait_for(lambda stats: stats["in_flight"] == 10)
            assert ledger.pause(batch) is Status.PAUSED
            outcome = running.result()
        engine.wait_for(lambda stats: stats["in_flight"] == 0)
        # Every request was answered and kept, but for the one.
        stats = engine.stats()
        assert stats["cancelled"] == 1
        assert outcome.rows == stats["by_status"]["200"] == stats["requests"] - 1 < 30
        (shard,) = ledger.shards(batch)
        assert (shard.state, shard.attempts, shard.completed) == ("ready", 0, outcome.rows)
        engine.script(rules=[], ttft_ms=10)
        resume(ledger, settings.data_dir, batch)
        assert run(here, ledger).rows == 30 - outcome.rows
    all_right(settings, ledger, batch, 30)


def test_cancelling_stops_the_engines_work_within_one_renewal(
    settings: Settings, ledger: Ledger, one_shard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = planned(settings, ledger, rows(20))
    with scripted_engine(slots=20, rules=[{"then": {"do": "hang"}}]) as engine:
        with Running(on(settings, engine, batch_concurrency=20), ledger, ttl=SHORT) as running:
            engine.wait_for(lambda stats: stats["in_flight"] == 20)
            begun: list[float] = []
            renew = running.leases.renew
            monkeypatch.setattr(
                running.leases, "renew", lambda *lease: (begun.append(time.monotonic()), renew(*lease))[1]
            )
            ledger.cancel(batch)
            cancelled = time.monotonic()
            running.result()
            # None where one was under way already.
            assert sum(moment > cancelled for moment in begun) <= 1
        engine.wait_for(lambda stats: stats["in_flight"] == 0)
        ends = [entry["t"] for entry in engine.log() if entry["event"] == "end" and entry["cancelled"]]
    assert len(ends) == 20
    # A lease that is lost would end them as well, but not like this.
    assert ledger.shards(batch)[0].state == ShardState.CANCELLED
    assert max(ends) - cancelled < SHORT / 3 + 5.0


# The lease


def test_a_sync_that_hangs_does_not_cost_the_lease(
    settings: Settings, ledger: Ledger, one_shard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = planned(settings, ledger, rows(10))
    hangs, sync = threading.Event(), os.fsync

    def hanging(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".jsonl":
            hangs.wait(WAIT)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", hanging)
    with scripted_engine(slots=10) as engine, Running(on(settings, engine), ledger, ttl=8.0) as running:
        until(lambda: answered(ledger, batch) == 10)
        (before,) = ledger.shards(batch)
        # A whole lease further on it is still held.
        until(lambda: ledger.shards(batch)[0].lease_until > before.lease_until + 8.0)
        assert ledger.shards(batch)[0].state == ShardState.LEASED
        hangs.set()
        assert running.result() == Outcome(1, 10, False)
    assert ledger.shards(batch)[0].epoch == 1
    all_right(settings, ledger, batch, 10)


def test_a_ledger_that_hangs_ends_the_work_when_the_lease_is_not_to_be_trusted(
    settings: Settings, ledger: Ledger, one_shard: None
) -> None:
    batch = planned(settings, ledger, rows(10))
    with scripted_engine(slots=10, rules=[{"when": {"contains": '"row 1'}, "then": {"do": "hang"}}]) as engine:
        with Running(on(settings, engine, batch_concurrency=10), ledger, ttl=SHORT) as running:
            until(lambda: answered(ledger, batch) == 9)
            with ledger.write():  # SQLite has one writer: nobody renews meanwhile
                hung = time.monotonic()
                engine.wait_for(lambda stats: stats["cancelled"] == 1)
                assert time.monotonic() - hung < SHORT + 5.0
            assert running.result() == Outcome(0, 0, False)
        (shard,) = ledger.shards(batch)
        assert shard.state == ShardState.LEASED
        engine.script(rules=[])
        # The renewal that hung may still come through, after its session's end.
        until(lambda: expire(ledger, shard.id) or run(on(settings, engine), ledger).rows == 1)
    all_right(settings, ledger, batch, 10)


# The disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("ledger_there_too", [False, True])
def test_a_full_disk_ends_the_session_and_loses_nothing(
    small_disk: Path, tmp_path: Path, ledger_there_too: bool
) -> None:
    settings = Settings(
        data_dir=small_disk, database_url=None if ledger_there_too else f"sqlite:///{tmp_path}/elsewhere.db"
    )
    with contextlib.closing(Ledger.open(settings)) as ledger:
        batch = planned(settings, ledger, rows(80))
        filler = small_disk / "filler"
        with scripted_engine(answer_tokens=1500, context=100_000, slots=8) as engine:
            here = on(settings, engine)
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            filler.write_bytes(b"x" * (free - 200 * 1024))
            with pytest.raises(StorageError) as caught:
                run(here, ledger)
            assert caught.value.code == "disk_full"
            assert caught.value.exit_code == 3
            filler.unlink()
            assert answered(ledger, batch) < 80
            kept = sum(
                1
                for path in BatchFolder.of(small_disk, batch).segments.glob("*.jsonl")
                for line in path.read_bytes().splitlines(keepends=True)
                if line.endswith(b"\n")
            )
            assert 0 < kept < 80
            expire(ledger, *(shard.id for shard in ledger.shards(batch) if shard.state == ShardState.LEASED))
            # What had reached the disk is not run again.
            assert run(here, ledger).rows == 80 - kept
        all_right(settings, ledger, batch, 80)
