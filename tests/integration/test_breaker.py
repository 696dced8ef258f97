"""The breaker in a session, against an engine in another process that goes wrong."""

from __future__ import annotations

import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from millrace.batch.ledger import Ledger
from millrace.batch.schema import ShardState, Status
from millrace.engine.admission import PER_SLOT
from millrace.engine.interactive import Caller
from millrace.engine.retry import EngineUnreachable
from millrace.settings import Settings
from tests.integration.test_runner import Running, all_right, calls, ended, names, on, port_of, rows, run, until
from tests.scripted_engine import scripted_engine
from tests.unit.batches import planned

ALWAYS_500 = {"then": {"do": "status", "status": 500}}


def attempts(ledger: Ledger, batch: str) -> set[int]:
    return {shard.attempts for shard in ledger.shards(batch)}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.batch.ask.RETRY_BASE", 0.01)
    monkeypatch.setattr("millrace.engine.breaker.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("millrace.engine.breaker.LONGEST_PAUSE", 0.05)


# Faults of the engine


@pytest.mark.parametrize("fault", [{"do": "status", "status": 500}, {"do": "garbage"}, {"do": "half"}])
def test_an_engine_that_fails_at_everything_fails_no_row(
    settings: Settings, ledger: Ledger, fault: dict[str, Any]
) -> None:
    batch = planned(settings, ledger, rows(30))
    with scripted_engine(slots=4, rules=[{"then": fault}]) as engine:
        with Running(on(settings, engine, batch_row_attempts=1), ledger) as running:
            until(lambda: running.trouble is not None)
            assert running.trouble is not None
            assert running.trouble.code == "engine_failing"
            assert "look at its log" in running.trouble.hint
            met = engine.stats()["requests"]
            # Rows wait; from now on it is asked with a request of our own alone.
            engine.wait_for(lambda stats: stats["requests"] >= met + 3)
            assert ledger.batch(batch)["request_counts"]["failed"] == 0
            engine.script(rules=[])
            assert running.result().rows == 30
        assert len([sha for sha, times in calls(engine).items() if times > 1]) <= 4 * PER_SLOT + 1
    all_right(settings, ledger, batch, 30)


def test_bursts_of_500_and_429_fail_no_row(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(60))
    rules = [
        {"when": {"nth": list(range(10, 30))}, "then": {"do": "status", "status": 500}},
        {"when": {"nth": list(range(50, 60))}, "then": {"do": "status", "status": 429}},
    ]
    with scripted_engine(slots=4, rules=rules) as engine:
        assert run(on(settings, engine, batch_row_attempts=2), ledger).rows == 60
        assert engine.stats()["faults"] == {"status": 30}
    all_right(settings, ledger, batch, 60)


def test_each_fault_of_a_row_is_judged_not_its_first_alone(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(6))
    rules = [
        # Its own fault, for the engine answers the others before it is asked again.
        {
            "when": {"contains": '"row 0"', "first_attempts": 1},
            "then": {"do": "status", "status": 500, "headers": {"Retry-After": "2"}},
        },
        # The engine's: its second try, and our own request after that.
        {"when": {"nth": [7, 8, 9]}, "then": {"do": "status", "status": 500}},
    ]
    with scripted_engine(slots=2, rules=rules) as engine:
        assert run(on(settings, engine, batch_concurrency=2, batch_row_attempts=2), ledger).rows == 6
        assert engine.stats()["faults"] == {"status": 4}
    all_right(settings, ledger, batch, 6)


def test_one_bad_row_ends_after_its_tries_and_holds_up_nobody(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(20))
    rule = {"when": {"contains": '"row 7"'}, "then": {"do": "status", "status": 500}}
    with scripted_engine(slots=4, rules=[rule]) as engine:
        with Running(on(settings, engine, batch_row_attempts=3), ledger) as running:
            assert running.result().rows == 20
        assert running.troubles == []
        assert max(calls(engine).values()) == 3
    assert names(ended(settings, ledger, batch)[1]) == ["row 7"]


def test_where_all_rows_are_bad_and_the_engine_is_well_the_batch_ends(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(30))
    rule = {"when": {"contains": '"row '}, "then": {"do": "status", "status": 500}}
    with scripted_engine(slots=8, rules=[rule]) as engine:
        with Running(on(settings, engine, batch_row_attempts=3), ledger) as running:
            assert running.result().rows == 30
        assert running.troubles == []
        assert Counter(calls(engine).values())[3] >= 30
    output, errors = ended(settings, ledger, batch)
    assert (len(output), {line["error"]["code"] for line in errors}) == (0, {"server_error"})


def test_an_engine_that_never_answers_our_own_request_is_tried_with_rows(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.engine.breaker.TRIAL_SECONDS", 0.0)
    batch = planned(settings, ledger, rows(20))
    ours = {"when": {"contains": '"Hello"'}, "then": {"do": "status", "status": 500}}
    once = {"when": {"first_attempts": 1}, "then": {"do": "status", "status": 500}}
    with scripted_engine(slots=4, rules=[ours, once]) as engine:
        with Running(on(settings, engine, batch_row_attempts=2), ledger) as running:
            assert running.result().rows == 20
        # After the first answer to a row our own request is believed no more.
        assert sum(times for times in calls(engine).values() if times > 2) <= 3
    all_right(settings, ledger, batch, 20)


def test_a_batch_of_bad_rows_ends_where_the_engine_fails_as_well(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.engine.breaker.TRIAL_SECONDS", 0.0)
    batch = planned(settings, ledger, rows(6))
    with scripted_engine(rules=[ALWAYS_500]) as engine:
        assert run(on(settings, engine, batch_row_attempts=2), ledger).rows == 6
    assert len(ended(settings, ledger, batch)[1]) == 6


def test_an_engine_that_hangs_after_its_headers_fails_no_row(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.engine.breaker.CHECK_SECONDS", 0.3)
    batch = planned(settings, ledger, rows(10))
    with scripted_engine(slots=16, rules=[{"then": {"do": "hang_after_headers"}}]) as engine:
        here = on(settings, engine, batch_row_timeout=2.0, batch_row_attempts=2)
        with Running(here, ledger) as running:
            until(lambda: running.trouble is not None)
            assert running.trouble is not None
            assert running.trouble.code == "engine_failing"
            engine.script(rules=[])
            assert running.result().rows == 10
    all_right(settings, ledger, batch, 10)


# What it serves


def test_an_engine_that_comes_back_with_another_model_answers_no_row(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(40))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(scripted_engine(slots=4, ttft_ms=20))
        running = stack.enter_context(Running(on(settings, first, batch_concurrency=4), ledger))
        first.wait_for(lambda stats: stats["by_status"].get("200", 0) >= 8)
        first.kill()
        second = stack.enter_context(scripted_engine(port=port_of(first), models=["another"]))
        until(lambda: running.trouble is not None and running.trouble.code == "model_changed")
        assert running.trouble is not None
        assert "serves another; rows ask for scripted" in running.trouble.message
        # The shards wait in the ledger, not in a worker; nobody's attempt was counted.
        until(lambda: {shard.state for shard in ledger.shards(batch)} <= {ShardState.READY, ShardState.DONE})
        assert {shard.attempts for shard in ledger.shards(batch) if shard.state == ShardState.READY} == {0}
        assert second.stats()["by_status"].get("200", 0) == 0
        second.script(models=["scripted"])
        until(lambda: ledger.status(batch) is Status.FINALIZING)
        running.result()
    all_right(settings, ledger, batch, 40)


def test_a_model_that_changes_behind_an_open_connection_is_noticed(settings: Settings, ledger: Ledger) -> None:
    """As behind a proxy: no connection breaks, and the answers alone tell."""
    batch = planned(settings, ledger, rows(40))
    with (
        scripted_engine(slots=1, ttft_ms=20) as engine,
        Running(on(settings, engine, batch_concurrency=1), ledger) as running,
    ):
        engine.wait_for(lambda stats: stats["by_status"].get("200", 0) >= 5)
        body = {"model": "another", "choices": [{"message": {"content": "another's answer"}}]}
        engine.script(models=["another"], rules=[{"then": {"do": "status", "status": 200, "body": body}}])
        until(lambda: running.trouble is not None and running.trouble.code == "model_changed")
        engine.script(models=["scripted", "another"], rules=[])
        running.result()
    all_right(settings, ledger, batch, 40)


def test_rows_of_a_served_model_go_on_while_others_wait(settings: Settings, ledger: Ledger) -> None:
    lines = rows(12)
    for line in lines[:4]:
        line["body"]["model"] = "absent"
    batch = planned(settings, ledger, lines)
    other = planned(settings, ledger, rows(3))
    with scripted_engine(dialect="vllm") as engine:
        with Running(on(settings, engine), ledger) as running:
            until(lambda: ledger.status(other) is Status.FINALIZING)
            until(lambda: running.trouble is not None)
            assert running.trouble is not None
            assert running.trouble.code == "model_changed"
            until(lambda: ledger.batch(batch)["request_counts"] == {"total": 12, "completed": 8, "failed": 0})
            assert {shard.attempts for shard in ledger.shards(batch) if shard.model == "absent"} == {0}
            # Told to stop, it does.
            running.stop.set()
            assert running.result().more
        engine.script(models=["absent"])
        assert run(on(settings, engine), ledger).rows == 4
    all_right(settings, ledger, batch, 12)


def test_an_engine_that_comes_back_with_fewer_slots_gets_fewer_rows(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, rows(150))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(scripted_engine(slots=8, ttft_ms=100))
        running = stack.enter_context(Running(on(settings, first), ledger))
        first.wait_for(lambda stats: stats["in_flight"] > 2 * PER_SLOT and stats["by_status"].get("200", 0) >= 20)
        first.kill()
        second = stack.enter_context(scripted_engine(port=port_of(first), slots=2, ttft_ms=50))
        second.wait_for(lambda stats: stats["in_flight"] == 2 * PER_SLOT and stats["by_status"].get("200", 0) >= 20)
        second.script(ttft_ms=0)
        running.result()
    all_right(settings, ledger, batch, 150)


def test_an_answer_that_names_its_model_otherwise_counts(settings: Settings, ledger: Ledger) -> None:
    """As where the list has an alias, or a date is added to the name."""
    body = {"model": "scripted-2026-08-06", "choices": [{"message": {"content": "answer to: row 0"}}]}
    batch = planned(settings, ledger, rows(1))
    with scripted_engine(rules=[{"then": {"do": "status", "status": 200, "body": body}}]) as engine:
        assert run(on(settings, engine), ledger).rows == 1
    all_right(settings, ledger, batch, 1)


# Interactive requests

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Calling:
    """A caller with a call under way in a thread of its own."""

    def __init__(self, settings: Settings, patience: float) -> None:
        self.caller = Caller(settings, patience)
        self._pool = ThreadPoolExecutor(1)
        self._answer = self._pool.submit(self.caller.call, "/v1/chat/completions", HELLO)

    def waits(self) -> bool:
        breaker = self.caller._breaker
        return breaker is not None and breaker.trouble is not None

    def answer(self) -> dict[str, Any]:
        return self._answer.result(20)

    def __enter__(self) -> Calling:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.submit(self.caller.close).result(20)
        self._pool.shutdown()


def test_an_interactive_request_waits_for_an_engine_that_is_away(settings: Settings) -> None:
    with scripted_engine() as engine:
        here = on(settings, engine, task_max_retries=0, task_retry_delay=0.0)
        port = port_of(engine)
    with Calling(here, 20.0) as calling:
        until(calling.waits)
        with scripted_engine(port=port, load_seconds=0.3):
            assert calling.answer()["model"] == "scripted"


def test_an_interactive_request_outlives_the_engine_it_was_asked_at(settings: Settings) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(scripted_engine(rules=[{"then": {"do": "hang"}}]))
        calling = stack.enter_context(Calling(on(settings, first, task_retry_delay=0.0), 20.0))
        first.wait_for(lambda stats: stats["in_flight"] == 1)
        first.kill()
        until(calling.waits)
        # Of the model that it serves now: nobody had asked for the other one.
        stack.enter_context(scripted_engine(port=port_of(first), models=["another"], dialect="vllm"))
        assert calling.answer()["model"] == "another"


def test_patience_is_bounded(settings: Settings) -> None:
    with scripted_engine() as engine:
        here = on(settings, engine)
    with Calling(here, 0.5) as calling, pytest.raises(EngineUnreachable):
        calling.answer()
