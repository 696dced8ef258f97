from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import aiohttp
import pytest

from millrace.engine.scripted import Script, read_script, run
from millrace.engine.scripted.faults import Rule, Rules, When
from millrace.engine.scripted.slots import Slots
from millrace.errors import InputError
from tests.scripted_engine import Engine, scripted_engine

T = TypeVar("T")

DEADLINE = aiohttp.ClientTimeout(total=20)


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **more}


def with_session(work: Callable[[aiohttp.ClientSession], Awaitable[T]]) -> T:
    async def main() -> T:
        async with aiohttp.ClientSession(timeout=DEADLINE, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await work(session)

    return asyncio.run(main())


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    async def one(session: aiohttp.ClientSession) -> tuple[int, dict[str, str], bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        all_headers = {"Content-Type": "application/json"} | (headers or {})
        async with session.post(url, data=raw, headers=all_headers) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    return with_session(one)


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    async def one(session: aiohttp.ClientSession) -> tuple[int, str]:
        async with session.get(url, headers=headers) as answer:
            return answer.status, await answer.text()

    return with_session(one)


def post_chat(engine: Engine, text: str = "hello", **more: Any) -> tuple[int, dict[str, str], bytes]:
    return post(engine.url + "/chat/completions", chat(text, **more))


async def until(engine: Engine, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    return await asyncio.to_thread(engine.wait_for, condition)


# Answers


def test_an_answer_echoes_the_prompt_and_counts_tokens() -> None:
    with scripted_engine(answer_tokens=6) as engine:
        status, _, body = post_chat(engine, "two words")
        answer = json.loads(body)
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == "answer to: two words and so"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
        assert post_chat(engine, "two words")[2] == body


def test_max_tokens_cuts_the_answer() -> None:
    with scripted_engine() as engine:
        answer = json.loads(post_chat(engine, max_tokens=3)[2])
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["message"]["content"] == "answer to: hello"
        longer = json.loads(post_chat(engine, max_tokens=40, ignore_eos=True)[2])
        assert longer["usage"]["completion_tokens"] == 40


def test_long_prompts_with_one_prefix_get_different_answers() -> None:
    with scripted_engine() as engine:
        one, other = (json.loads(post_chat(engine, "word " * 50 + end)[2]) for end in ("a", "b"))
        assert one["choices"] != other["choices"]
        assert one["usage"]["completion_tokens"] == 16


def test_completions_take_several_prompts() -> None:
    with scripted_engine(answer_tokens=3) as engine:
        _, _, body = post(engine.url + "/completions", {"prompt": ["a", "b"]})
        assert [choice["text"] for choice in json.loads(body)["choices"]] == ["answer to: a", "answer to: b"]


def test_embeddings_are_unit_vectors_made_from_the_text() -> None:
    with scripted_engine(embedding_size=12) as engine:
        _, _, body = post(engine.url + "/embeddings", {"input": ["a", "b", "a"]})
        one, other, again = (entry["embedding"] for entry in json.loads(body)["data"])
        assert one == again != other
        assert len(one) == 12
        assert sum(x * x for x in one) == pytest.approx(1, abs=1e-4)


def test_a_stream_gives_the_same_text_as_a_whole_answer() -> None:
    with scripted_engine(tokens_per_second=1000) as engine:
        whole = json.loads(post_chat(engine)[2])["choices"][0]["message"]["content"]
        _, headers, body = post_chat(engine, stream=True, stream_options={"include_usage": True})
        assert headers["Content-Type"].startswith("text/event-stream")
        *events, done = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
        assert done == b"[DONE]"
        chunks = [json.loads(event) for event in events]
        pieces = [c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]]
        assert "".join(pieces) == whole
        assert chunks[-1]["usage"]["completion_tokens"] == 16


def test_speed() -> None:
    with scripted_engine(tokens_per_second=100, ttft_ms=50) as engine:
        for stream in (False, True):
            begin = time.monotonic()
            post_chat(engine, max_tokens=10, stream=stream)
            assert 0.14 <= time.monotonic() - begin < 5


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"messages": 3}', b'{"messages": []}'])
def test_a_malformed_request_gets_400(body: bytes) -> None:
    with scripted_engine() as engine:
        status, _, answer = post(engine.url + "/chat/completions", body)
        assert status == 400
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"


# Slots and the queue


def test_never_more_at_work_than_slots() -> None:
    with scripted_engine(slots=0, tokens_per_second=400) as engine:

        async def flood(session: aiohttp.ClientSession) -> list[int]:
            async def one(number: int) -> int:
                async with session.post(engine.url + "/chat/completions", json=chat(str(number))) as answer:
                    await answer.read()
                    return answer.status

            asked = asyncio.gather(*(one(number) for number in range(30)))
            await asyncio.to_thread(engine.wait_for, lambda stats: stats["waiting"] == 30)
            await asyncio.to_thread(engine.script, slots=3)
            return await asked

        assert with_session(flood) == [200] * 30
        stats = engine.stats()
        assert stats["peak_working"] == 3
        assert stats["peak_in_flight"] == 30
        assert (stats["in_flight"], stats["working"], stats["waiting"]) == (0, 0, 0)
        assert stats["by_status"] == {"200": 30}
        assert max(line["working"] for line in engine.log()) <= 3


def test_more_slots_at_run_time_let_in_those_who_wait() -> None:
    hang = {"then": {"do": "hang"}}
    with scripted_engine(slots=1, rules=[hang]) as engine:

        async def work(session: aiohttp.ClientSession) -> None:
            tasks = [asyncio.create_task(session.post(engine.url + "/chat/completions", json=chat())) for _ in range(3)]
            await until(engine, lambda stats: stats["working"] == 1 and stats["waiting"] == 2)
            await asyncio.to_thread(engine.script, slots=3)
            await until(engine, lambda stats: stats["working"] == 3 and stats["waiting"] == 0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with_session(work)
        engine.wait_for(lambda stats: stats["in_flight"] == 0)


@pytest.mark.parametrize(("dialect", "kind"), [("vllm", "ServiceUnavailableError"), ("llamacpp", "unavailable_error")])
def test_a_full_queue_gets_503(dialect: str, kind: str) -> None:
    hang = {"when": {"contains": "hold"}, "then": {"do": "hang"}}
    with scripted_engine(dialect=dialect, slots=1, queue_limit=1, rules=[hang]) as engine:

        async def work(session: aiohttp.ClientSession) -> None:
            url = engine.url + "/chat/completions"
            held = asyncio.create_task(session.post(url, json=chat("hold")))
            await until(engine, lambda stats: stats["working"] == 1)
            waiting = asyncio.create_task(session.post(url, json=chat("wait")))
            await until(engine, lambda stats: stats["waiting"] == 1)
            async with session.post(url, json=chat("refused")) as answer:
                assert answer.status == 503
                assert (await answer.json())["error"]["type"] == kind
            held.cancel()
            async with await waiting as answer:
                assert answer.status == 200

        with_session(work)


@pytest.mark.parametrize("hold", ["hang", "waiting", "stream"])
def test_a_client_that_goes_frees_its_slot(hold: str) -> None:
    rules = [] if hold == "stream" else [{"when": {"contains": "hold"}, "then": {"do": "hang"}}]
    # At one token a second the streamed answer would last longer than the test may.
    with scripted_engine(slots=1, rules=rules, tokens_per_second=1 if hold == "stream" else 0) as engine:

        async def work(session: aiohttp.ClientSession) -> None:
            url = engine.url + "/chat/completions"
            body = chat("hold", stream=hold == "stream", max_tokens=1000, ignore_eos=True)
            tasks = [asyncio.create_task(session.post(url, json=body))]
            await until(engine, lambda stats: stats["working"] == 1)
            if hold == "waiting":
                tasks.insert(0, asyncio.create_task(session.post(url, json=body)))
                await until(engine, lambda stats: stats["waiting"] == 1)
            if hold == "stream":
                answer = await tasks[0]
                await answer.content.readany()
                answer.close()
            for task in tasks:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            stats = await until(engine, lambda stats: stats["in_flight"] == 0)
            assert (stats["working"], stats["waiting"], stats["cancelled"]) == (0, 0, len(tasks))
            await asyncio.to_thread(engine.script, tokens_per_second=0)
            async with session.post(url, json=chat("next")) as answer:
                assert answer.status == 200

        with_session(work)
        ends = [line for line in engine.log() if line["event"] == "end"]
        assert all(line["cancelled"] and line["status"] is None for line in ends[:-1])


def test_slots_are_neither_lost_nor_made_by_cancellation() -> None:
    async def main() -> None:
        slots, random = Slots(3), Random(5)

        async def work() -> None:
            await slots.take()
            try:
                assert slots.working <= 3
                for _ in range(random.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                slots.give_back()

        tasks = [asyncio.create_task(work()) for _ in range(500)]
        while not all(task.done() for task in tasks):
            random.choice(tasks).cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (slots.working, slots.waiting, slots.peak) == (0, 0, 3)
        assert sum(task.cancelled() for task in tasks) > 20
        assert sum(not task.cancelled() for task in tasks) > 20

    asyncio.run(main())


# Faults


def test_status_with_headers_and_body() -> None:
    then = {
        "do": "status",
        "status": 429,
        "headers": {"Retry-After": "7", "content-type": "text/x"},
        "body": "slow down",
    }
    with scripted_engine(rules=[{"when": {"nth": [2]}, "then": then}]) as engine:
        assert post_chat(engine)[0] == 200
        status, headers, body = post_chat(engine)
        assert (status, headers["Retry-After"], headers["Content-Type"], body) == (
            429,
            "7",
            "text/x",
            b"slow down",
        )
        assert post_chat(engine)[0] == 200
        assert engine.stats()["faults"] == {"status": 1}


@pytest.mark.parametrize("dialect", ["llamacpp", "vllm", "openai"])
def test_status_without_a_body_has_the_dialects_error(dialect: str) -> None:
    with scripted_engine(dialect=dialect, rules=[{"then": {"do": "status"}}]) as engine:
        status, _, body = post_chat(engine)
        assert status == 500
        kind = "InternalServerError" if dialect == "vllm" else "server_error"
        assert json.loads(body)["error"]["type"] == kind


def test_hang_gives_nothing() -> None:
    with (
        scripted_engine(rules=[{"then": {"do": "hang"}}]) as engine,
        socket.create_connection(("127.0.0.1", int(engine.root.rpartition(":")[2])), timeout=0.3) as raw,
    ):
        raw.sendall(_raw_request())
        engine.wait_for(lambda stats: stats["working"] == 1)
        with pytest.raises(TimeoutError):
            raw.recv(1)


def test_hang_after_headers_gives_headers_and_nothing_more() -> None:
    with (
        scripted_engine(rules=[{"then": {"do": "hang_after_headers"}}]) as engine,
        socket.create_connection(("127.0.0.1", int(engine.root.rpartition(":")[2])), timeout=10) as raw,
    ):
        raw.sendall(_raw_request())
        got = b""
        while b"\r\n\r\n" not in got:
            got += raw.recv(4096)
        assert got.startswith(b"HTTP/1.1 200 ")
        assert got.endswith(b"\r\n\r\n")
        raw.settimeout(0.3)
        with pytest.raises(TimeoutError):
            raw.recv(1)


def _raw_request() -> bytes:
    body = json.dumps(chat()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_cut_closes_without_an_answer() -> None:
    with scripted_engine(rules=[{"then": {"do": "cut"}}]) as engine:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            post_chat(engine)
        end = engine.log()[-1]
        assert (end["event"], end["status"], end["cancelled"], end["fault"]) == ("end", None, False, "cut")


@pytest.mark.parametrize("stream", [False, True])
def test_half_an_answer(stream: bool) -> None:
    with (
        scripted_engine(rules=[{"then": {"do": "half"}}]) as engine,
        pytest.raises(aiohttp.ClientPayloadError),
    ):
        post_chat(engine, stream=stream)


def test_half_an_answer_is_its_first_half() -> None:
    with scripted_engine(rules=[{"when": {"nth": 2}, "then": {"do": "half"}}]) as engine:
        whole = post_chat(engine)[2]
        connection = http.client.HTTPConnection(engine.root.removeprefix("http://"), timeout=10)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat()).encode())
        with connection.getresponse() as answer, pytest.raises(http.client.IncompleteRead) as broken:
            answer.read()
        connection.close()
        assert broken.value.partial == whole[: len(whole) // 2]


def test_garbage_is_200_and_no_json() -> None:
    with scripted_engine(rules=[{"then": {"do": "garbage"}}]) as engine:
        status, _, body = post_chat(engine)
        assert status == 200
        with pytest.raises(ValueError, match="Expecting value"):
            json.loads(body)


def test_slow_comes_late_and_right() -> None:
    with scripted_engine(rules=[{"when": {"nth": 2}, "then": {"do": "slow", "seconds": 0.2}}]) as engine:
        right = post_chat(engine)
        begin = time.monotonic()
        late = post_chat(engine)
        assert time.monotonic() - begin >= 0.2
        assert (late[0], late[2]) == (right[0], right[2])


def test_exit_is_a_crash_that_leaves_the_log() -> None:
    with scripted_engine(rules=[{"when": {"contains": "poison"}, "then": {"do": "exit"}}]) as engine:
        assert post_chat(engine)[0] == 200
        with pytest.raises(aiohttp.ClientError):
            post_chat(engine, "poison")
        assert engine.process.wait(10) == 137
        assert [line["event"] for line in engine.log()] == ["start", "end", "start"]


def test_first_attempts_fail_and_the_next_is_let_through() -> None:
    rule = {"when": {"first_attempts": 2}, "then": {"do": "status", "status": 503}}
    with scripted_engine(rules=[rule]) as engine:
        assert [post_chat(engine, text)[0] for text in ("a", "a", "b", "a", "b", "b")] == [
            503,
            503,
            503,
            200,
            503,
            200,
        ]


def test_rules_replaced_at_run_time_count_anew() -> None:
    with scripted_engine() as engine:
        assert post_chat(engine)[0] == 200
        engine.script(rules=[{"when": {"nth": 1}, "then": {"do": "status", "status": 500}}])
        assert [post_chat(engine)[0] for _ in range(2)] == [500, 200]
        engine.script(rules=[{"when": {"times": 1}, "then": {"do": "status", "status": 502}}])
        assert [post_chat(engine)[0] for _ in range(2)] == [502, 200]


def _picks(when: When, texts: list[bytes], times: list[float] | None = None) -> list[bool]:
    rules = Rules([read_rule(when)], 0.0)
    return [
        rules.pick("/v1/chat/completions", text, hashlib.sha256(text).digest(), now) is not None
        for text, now in zip(texts, times or [0.0] * len(texts), strict=True)
    ]


def read_rule(when: When) -> Rule:
    return Rule(when=when, then=read_script({"rules": [{"then": {"do": "cut"}}]}).rules[0].then)


def test_matchers() -> None:
    same = [b"x"] * 6
    assert _picks(When(every=3), same) == [False, False, True] * 2
    assert _picks(When(nth=[1, 5]), same) == [True, False, False, False, True, False]
    assert _picks(When(times=2), same) == [True, True, False, False, False, False]
    assert _picks(When(path="/v1/embeddings"), same) == [False] * 6
    assert _picks(When(contains="ä"), ["bär".encode(), b"bar"]) == [True, False]
    window = When(after_seconds=1, before_seconds=3)
    assert _picks(window, same, [0, 1, 2, 2.9, 3, 4]) == [False, True, True, True, False, False]


def test_probability_depends_on_body_attempt_and_seed_alone() -> None:
    texts = [b"%d" % number for number in range(1000)]
    picks = dict(zip(texts, _picks(When(probability=0.3, seed=7), texts), strict=True))
    backwards = dict(zip(texts[::-1], _picks(When(probability=0.3, seed=7), texts[::-1]), strict=True))
    assert picks == backwards
    assert 240 < sum(picks.values()) < 360
    assert list(picks.values()) != _picks(When(probability=0.3, seed=8), texts)
    again = _picks(When(probability=0.3, seed=7), texts + texts)[1000:]
    assert again != list(picks.values())  # a retry draws anew
    assert not any(_picks(When(probability=0.0), texts))
    assert all(_picks(When(probability=1.0), texts))


# Dialects


def test_context_overflow_in_llamacpps_words() -> None:
    with scripted_engine(dialect="llamacpp", context=10) as engine:
        status, _, body = post_chat(engine, "word " * 12)
        error = json.loads(body)["error"]
        assert status == error["code"] == 400
        assert error["type"] == "exceed_context_size_error"
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (12, 10)
        assert "exceeds the available context size" in error["message"]
        cut = json.loads(post_chat(engine, "word " * 8)[2])
        assert cut["usage"]["completion_tokens"] == 2
        assert cut["choices"][0]["finish_reason"] == "length"


def test_context_overflow_in_vllms_words() -> None:
    with scripted_engine(dialect="vllm", context=10) as engine:
        status, _, body = post_chat(engine, "word " * 12)
        error = json.loads(body)["error"]
        assert status == 400
        assert error["message"].startswith("This model's maximum context length is 10 tokens")
        assert (error["type"], error["param"], error["code"]) == ("BadRequestError", None, 400)


def test_context_overflow_in_openais_words() -> None:
    with scripted_engine(dialect="openai", context=10) as engine:
        status, _, body = post_chat(engine, "word " * 12)
        assert status == 400
        assert json.loads(body)["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("dialect", ["llamacpp", "vllm", "openai"])
def test_an_unknown_model(dialect: str) -> None:
    with scripted_engine(dialect=dialect, models=["one"]) as engine:
        status, _, body = post_chat(engine)
        if dialect == "llamacpp":
            assert status == 200
        else:
            assert status == 404
            assert json.loads(body)["error"] == {
                "message": "The model `scripted` does not exist.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }


@pytest.mark.parametrize("dialect", ["llamacpp", "vllm", "openai"])
def test_the_key(dialect: str) -> None:
    with scripted_engine(dialect=dialect, api_key="secret") as engine:
        status, _, body = post_chat(engine)
        assert status == 401
        error = json.loads(body)["error"]
        if dialect == "vllm":
            assert error == "Unauthorized"
        else:
            assert error["type"] == "authentication_error"
        key = {"Authorization": "Bearer secret"}
        assert post(engine.url + "/chat/completions", chat(), key)[0] == 200
        assert get(engine.root + "/health")[0] == 200
        assert get(engine.url + "/models")[0] == (200 if dialect == "llamacpp" else 401)
        assert get(engine.url + "/models", key)[0] == 200


@pytest.mark.parametrize(
    ("dialect", "pages"),
    [("llamacpp", {"/props", "/slots", "/metrics"}), ("vllm", {"/metrics", "/version"}), ("openai", set())],
)
def test_status_pages(dialect: str, pages: set[str]) -> None:
    with scripted_engine(dialect=dialect, slots=3, context=100) as engine:
        for page in ("/props", "/slots", "/metrics", "/version"):
            assert get(engine.root + page)[0] == (200 if page in pages else 404), page
        models = json.loads(get(engine.url + "/models")[1])
        assert [model["id"] for model in models["data"]] == ["scripted"]
        if dialect == "llamacpp":
            props = json.loads(get(engine.root + "/props")[1])
            assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (3, 100)


def test_metrics_report_the_load() -> None:
    with scripted_engine(dialect="vllm", slots=2, rules=[{"then": {"do": "hang"}}]) as engine:

        async def work(session: aiohttp.ClientSession) -> tuple[str, str]:
            url = engine.url + "/chat/completions"
            tasks = [asyncio.create_task(session.post(url, json=chat())) for _ in range(5)]
            await until(engine, lambda stats: stats["waiting"] == 3)
            async with session.get(engine.root + "/metrics") as answer:
                vllm = await answer.text()
            await asyncio.to_thread(engine.script, dialect="llamacpp")
            async with session.get(engine.root + "/metrics") as answer:
                llamacpp = await answer.text()
            async with session.get(engine.root + "/slots?fail_on_no_slot=1") as answer:
                assert answer.status == 503
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return vllm, llamacpp

        vllm, llamacpp = with_session(work)
    labels = '{engine="0",model_name="scripted"}'
    for line in (
        "num_requests_running{} 2.0",
        "num_requests_waiting{} 3.0",
        "kv_cache_usage_perc{} 1.0",
        "num_preemptions_total{} 0.0",
    ):
        assert f"vllm:{line.format(labels)}\n" in vllm
    assert "llamacpp:requests_processing 2\n" in llamacpp
    assert "llamacpp:requests_deferred 3\n" in llamacpp


def test_loading_answers_503_until_it_is_done() -> None:
    with scripted_engine(load_seconds=3600) as engine:
        status, body = get(engine.root + "/health")
        assert status == 503
        assert json.loads(body)["error"] == {
            "code": 503,
            "message": "Loading model",
            "type": "unavailable_error",
        }
        assert post_chat(engine)[0] == 503
        engine.script(load_seconds=0)
        assert get(engine.root + "/health") == (200, '{"status":"ok"}')


# The log, the script and the process


def test_log_lines() -> None:
    with scripted_engine() as engine:
        body = json.dumps(chat()).encode()
        post(engine.url + "/chat/completions", body, {"X-Request-Id": "row-17"})
        start, end = engine.log()
        assert (start["event"], end["event"]) == ("start", "end")
        for line in (start, end):
            assert line["n"] == 1
            assert line["path"] == "/v1/chat/completions"
            assert line["sha256"] == hashlib.sha256(body).hexdigest()
            assert line["custom"] == "row-17"
        assert (start["in_flight"], end["in_flight"]) == (1, 0)
        assert (end["status"], end["cancelled"], end["fault"]) == (200, False, None)
        assert start["t"] <= end["t"] <= time.monotonic()
        lines = get(engine.root + "/_script/log")[1].splitlines()
        assert [json.loads(line) for line in lines] == [start, end]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slotz": 3}, "unknown field `slotz`"),
        (
            {"rules": [{"when": {"nht": 3}, "then": {"do": "cut"}}]},
            r"unknown field `nht` - at `\$.rules\[0\].when`",
        ),
        ({"slots": -1}, r">= 0 - at `\$.slots`"),
        ({"dialect": "tgi"}, "Invalid enum value 'tgi'"),
        ({"rules": [{"then": {"do": "explode"}}]}, "Invalid enum value 'explode'"),
        ({"rules": [{"then": {"do": "cut", "status": 429}}]}, "`status` goes with `do: status` only"),
        ({"rules": [{"then": {"do": "slow"}}]}, "needs `seconds`"),
        ({"rules": [{"then": {"do": "hang", "seconds": 3}}]}, "use `do: slow`"),
        ({"models": []}, r"length >= 1 - at `\$.models`"),
    ],
)
def test_a_wrong_script_is_an_input_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_script(values)
    assert "slots" in caught.value.hint


def test_a_wrong_change_is_refused_and_changes_nothing() -> None:
    with scripted_engine(slots=2) as engine:
        for change, message in (
            ({"slotz": 1}, "slotz"),
            ({"api_key": "x"}, "Start it anew"),
            ({"slots": -1}, "slots"),
        ):
            with pytest.raises(AssertionError, match=message):
                engine.script(**change)
        status, _, _ = post(engine.root + "/_script", b'{"slots": 1}', {"Content-Type": "text/plain"})
        assert status == 415
        assert json.loads(get(engine.root + "/props")[1])["total_slots"] == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "engine.example", ""])
def test_refuses_to_listen_off_loopback_without_a_key(host: str) -> None:
    with pytest.raises(InputError, match="without a key"):
        run(Script(), host, 0)


def _main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millrace.engine.scripted", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_the_command_line_reports_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text('{"slotz": 3}')
    for arguments, message in (
        (["--host", "0.0.0.0"], "without a key"),
        (["--script", str(tmp_path / "script.json")], "unknown field `slotz`"),
        (["--script", str(tmp_path / "none.json")], "cannot be read"),
        (["--slots", "-1"], "slots"),
        (["--log", str(tmp_path / "none" / "log")], "cannot be written"),
    ):
        done = _main(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_port_in_use() -> None:
    with scripted_engine() as engine:
        done = _main("--port", engine.root.rpartition(":")[2])
        assert done.returncode == 2
        assert "cannot listen" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_cleanly_on_a_signal_even_with_a_hung_request(number: signal.Signals) -> None:
    with (
        scripted_engine(rules=[{"then": {"do": "hang"}}]) as engine,
        socket.create_connection(("127.0.0.1", int(engine.root.rpartition(":")[2])), timeout=10) as raw,
    ):
        raw.sendall(_raw_request())
        engine.wait_for(lambda stats: stats["working"] == 1)
        engine.process.send_signal(number)
        assert engine.process.wait(10) == 0
        assert engine.log()[-1]["cancelled"]
        assert engine.stderr() == ""


def test_ends_with_its_stdin() -> None:
    with scripted_engine() as engine:
        assert engine.process.stdin is not None
        engine.process.stdin.close()
        assert engine.process.wait(10) == 0


def test_kill_and_stop() -> None:
    with scripted_engine() as engine:
        assert engine.kill() == -signal.SIGKILL
    with scripted_engine() as engine:
        assert engine.stop() == 0
