"""The circuit breaker, against a scripted engine in the same loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from millrace.batch.lines import CHAT, COMPLETIONS, EMBEDDINGS
from millrace.engine import breaker as module
from millrace.engine.breaker import FAULTS, Breaker
from millrace.engine.client import EngineClient
from millrace.engine.probes import EngineState
from millrace.engine.retry import EngineUnreachable, KeyRefused
from millrace.engine.scripted import read_script, serve

FAILS = [{"then": {"do": "status", "status": 500}}]
CHAT_BODY = b'{"model":"scripted","messages":[{"role":"user","content":"a"}]}'


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.02)


@contextlib.asynccontextmanager
async def served(port: int = 0, **script: Any) -> AsyncIterator[str]:
    """Run an engine and yield its URL without /v1."""
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(read_script(script), port=port, ready=url.set_result))
    try:
        yield (await url).removesuffix("/v1")
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def watched(root: str, key: str | None = None) -> AsyncIterator[tuple[Breaker, EngineClient]]:
    async with EngineClient(root, key) as client:
        breaker = Breaker(client)
        try:
            yield breaker, client
        finally:
            await breaker.close()


def on_engine(work: Callable[[Breaker, EngineClient], Awaitable[None]], **script: Any) -> None:
    async def main() -> None:
        async with served(**script) as root, watched(root) as (breaker, client):
            await work(breaker, client)

    asyncio.run(main())


async def told(client: EngineClient, **changes: Any) -> None:
    async with client._session.post(f"{client.root}/_script", json=changes) as answer:
        assert answer.status == 200


async def requests(client: EngineClient) -> int:
    return int((await client.get("/_script/stats"))["requests"])


async def trouble(breaker: Breaker) -> str:
    async with asyncio.timeout(10):
        while breaker.trouble is None:  # noqa: ASYNC110  # it is no event for anyone but tests
            await asyncio.sleep(0.001)
    return breaker.trouble.code


# Whose fault it was


def test_faults_of_an_engine_that_fails_are_forgiven() -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        met = [breaker.fault(row, CHAT, "scripted") for row in range(FAULTS + 3)]
        assert await trouble(breaker) == "engine_failing"
        late = breaker.fault("in flight until now", CHAT, "scripted")
        await told(client, rules=[])
        await breaker.wait()
        assert breaker.up
        assert all(faults.forgiven for faults in (*met, late))
        assert not breaker.fault(0, CHAT, "scripted").forgiven

    on_engine(work, rules=FAILS)


def test_faults_that_an_engine_answers_after_are_the_rows_own() -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        met = [breaker.fault(row, CHAT, "scripted") for row in range(FAULTS)]
        await breaker.wait()
        assert (await requests(client), met[0].forgiven, breaker.trouble) == (1, False, None)
        # The next time it is asked after twice as many, and after an answer as at first.
        for row in range(2 * FAULTS - 1):
            breaker.fault(row, CHAT, "scripted")
        await breaker.wait()
        assert await requests(client) == 1
        breaker.fault("one more", CHAT, "scripted")
        await breaker.wait()
        assert await requests(client) == 2
        breaker.answered()
        for row in range(FAULTS):
            breaker.fault(row, CHAT, "scripted")
        await breaker.wait()
        assert await requests(client) == 3

    on_engine(work)


def test_one_row_alone_is_no_sign_of_the_engine() -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        for _ in range(10 * FAULTS):
            breaker.fault("the same", CHAT, "scripted")
        await breaker.wait()
        assert await requests(client) == 0

    on_engine(work)


def test_a_row_is_given_up_only_where_the_engine_works() -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        faults = breaker.fault(0, CHAT, "scripted")
        await breaker.judge(faults)
        assert faults.forgiven
        assert await trouble(breaker) == "engine_failing"
        await told(client, rules=[])
        await breaker.wait()
        # Now it works: the fault stands. And where an answer came between, nothing is asked.
        again = breaker.fault(0, CHAT, "scripted")
        await breaker.judge(again)
        assert not again.forgiven
        asked = await requests(client)
        breaker.answered()
        await breaker.judge(again)
        assert await requests(client) == asked

    on_engine(work, rules=FAILS)


@pytest.mark.parametrize("status", [400, 404, 429, 503])
def test_an_engine_that_refuses_or_is_busy_is_of_sound_mind(status: int) -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        faults = breaker.fault(0, CHAT, "scripted")
        await breaker.judge(faults)
        assert (faults.forgiven, breaker.trouble) == (False, None)

    on_engine(work, rules=[{"then": {"do": "status", "status": status}}])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_each_route_is_asked_for_a_token(path: str) -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        await breaker.judge(breaker.fault(0, path, "scripted"))
        stats = await client.get("/_script/stats")
        assert stats["by_status"] == {"200": 1}
        assert stats["completion_tokens"] == (0 if path == EMBEDDINGS else 1)

    on_engine(work)


def test_a_row_is_let_through_where_our_own_request_never_gets_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        await breaker.judge(breaker.fault(0, CHAT, "scripted"))
        first, second = (asyncio.create_task(breaker.wait()) for _ in range(2))
        await asyncio.sleep(0)  # both wait
        monkeypatch.setattr(module, "TRIAL_SECONDS", 0.0)
        assert await first
        assert not breaker.fault(1, CHAT, "scripted", trial=True).forgiven
        assert await second
        breaker.answered(trial=True)
        await breaker.wait()
        # Believed no more: the next faults are the rows' own.
        faults = breaker.fault(2, CHAT, "scripted")
        await breaker.judge(faults)
        assert (breaker.trouble, faults.forgiven) == (None, False)

    on_engine(work, rules=FAILS)


# An engine that is away


def test_rows_wait_for_an_engine_that_is_away_and_see_what_came_back() -> None:
    async def main() -> None:
        async with served(slots=8) as root:
            port = int(root.rpartition(":")[2])
        async with watched(root) as (breaker, client):
            with pytest.raises(EngineUnreachable) as caught:
                await client.post(CHAT, CHAT_BODY, 5.0)
            faults = breaker.fault(0, CHAT, "scripted")
            breaker.report(caught.value)
            waiting = asyncio.create_task(breaker.wait())
            assert breaker.trouble is caught.value
            # However many ask, the engine is probed a few times and not for each of them.
            assert not any(await asyncio.gather(*(breaker.look(0.0) for _ in range(50))))
            assert not waiting.done()
            async with served(port=port, slots=2, models=["another"]):
                async with asyncio.timeout(10):
                    await waiting
                assert (breaker.state.slots, breaker.state.models) == (2, ["another"])
                assert faults.forgiven
                missing = breaker.missing(["scripted", "another"])
                assert missing is not None
                assert (missing.code, missing.message) == (
                    "model_changed",
                    f"The engine at {root} serves another; rows ask for scripted.",
                )
                missing = breaker.missing([f"model {number}" for number in range(5)])
                assert missing is not None
                assert "rows ask for model 0, model 1, model 2 and 2 more" in missing.message

    asyncio.run(main())


def test_a_refused_key_is_told_as_that() -> None:
    async def main() -> None:
        async with served(api_key="right", dialect="vllm") as root, watched(root, "wrong") as (breaker, _):
            assert not await breaker.look(0.0)
            assert isinstance(breaker.trouble, KeyRefused)

    asyncio.run(main())


# What it serves


def test_an_answer_over_a_new_connection_counts_after_a_look() -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        assert await breaker.look(0.0)
        await breaker.sure("scripted")  # the look had opened a connection itself
        await told(client, models=["another"])
        await breaker.sure("scripted")
        assert breaker.state.models == ["scripted"]  # the same connection, a name that is known
        first, second = (asyncio.create_task(client.post(CHAT, CHAT_BODY, 5.0)) for _ in range(2))
        await asyncio.gather(first, second)
        await breaker.sure("scripted")
        assert breaker.state.models == ["another"]

    on_engine(work)


def test_an_answer_with_an_unknown_name_counts_after_a_look() -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        assert await breaker.look(0.0)
        await breaker.sure("scripted-2026-08-06")
        looked = breaker._looked
        await breaker.sure("scripted-2026-08-06")
        assert breaker._looked == looked  # this engine calls its model that
        await told(client, models=["another"])
        await breaker.sure("another")
        assert not breaker.state.serves("scripted")

    on_engine(work)


def test_a_look_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(breaker: Breaker, client: EngineClient) -> None:
        assert await breaker.look(0.0)
        await told(client, models=["another"])
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
        await breaker.sure("")
        assert breaker.state.models == ["another"]

    on_engine(work)


def test_an_engine_that_lists_nothing_may_serve_anything() -> None:
    assert EngineState("u", "openai").serves("any")
    state = EngineState("u", "llamacpp", models=["a"], aliases=["b"])
    assert [state.serves(name) for name in "abc"] == [True, True, False]
