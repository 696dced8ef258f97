"""What fails for good is kept and can be sent again: a real Redis, a real worker, the scripted engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery
from celery.exceptions import NotRegistered

from millrace import dead_letters, presence
from millrace.dead_letters import Letter
from millrace.engine.retry import RequestRefused, ServerFault
from millrace.errors import NotFound, Unreachable
from millrace.metrics import Table
from millrace.settings import Settings
from tests.scripted_engine import Engine, scripted_engine
from tests.services import Worker, celery_worker, redis_server, until
from worker.exporter import Exporter

# Celery leaves connections to the collector; see test_interactive.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECRET = [{"role": "user", "content": "a secret prompt"}]

BROKEN = """
from tasks.inference import InferenceTask
from worker.app import app

@app.task(name="inference.broken", base=InferenceTask, ignore_result=False)
def broken(word):
    raise KeyError(word)
"""


@dataclass
class Stack:
    settings: Settings
    client: redis.Redis
    engine: Engine
    worker: Worker
    plain: Celery

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        options.setdefault("queue", "interactive")
        return self.plain.send_task(name, args=list(args), **options)

    def push(self, envelope: Any, queue: str = "interactive") -> None:
        self.client.lpush(queue, json.dumps(envelope))

    def letters(self) -> list[Letter]:
        return dead_letters.letters(self.client, self.settings)

    def one(self) -> Letter:
        until(self.letters, lambda: f"a dead letter: {self.worker.log[-3000:]}")
        (letter,) = self.letters()
        return letter

    def answers(self) -> bool:
        """Whether the worker has seen all that was sent before, and goes on."""
        self.engine.script(rules=[])
        return bool(self.send("inference.chat", SECRET, "scripted").get(timeout=90)["choices"])

    def child(self) -> int:
        """Return the pid of the pool's only process."""
        parent = psutil.Process(self.worker.process.pid)

        def found() -> list[psutil.Process]:
            return [one for one in parent.children() if "exporter" not in " ".join(one.cmdline())]

        return int(until(found, "a pool process")[0].pid)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("dead")
    with redis_server(folder) as url, scripted_engine(slots=4, context=200) as engine:
        told = {"redis_url": url, "llm_server_url": engine.url, "task_retry_delay": 0.01, "task_max_retries": 1}
        limits = {"task_soft_time_limit": 2, "task_time_limit": 3}
        (folder / "broken.py").write_text(BROKEN)
        arguments = ("-c", "1", "-Q", "interactive,celery", "-I", "broken", "--without-mingle", "--without-gossip")
        with (
            celery_worker(folder, *arguments, **told, **limits) as worker,
            redis.Redis.from_url(url, decode_responses=True) as client,
        ):
            plain = Celery(broker=url, backend=url)
            yield Stack(Settings(redis_url=url), client, engine, worker, plain)
            plain.close()


@pytest.fixture
def stack(parts: Stack) -> Stack:
    parts.engine.script(rules=[])
    parts.client.delete(dead_letters.INDEX, dead_letters.LETTERS)
    return parts


def envelope(body: str, **headers: Any) -> dict[str, Any]:
    """Return a message as kombu puts it into Redis."""
    return {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "delivery_info": {"exchange": "", "routing_key": "interactive"},
            "delivery_tag": str(uuid.uuid4()),
            "body_encoding": "base64",
            "priority": 0,
        },
    }


# The tasks.


def test_an_engine_that_fails_leaves_a_letter_and_another_try_is_answered(stack: Stack) -> None:
    stack.engine.script(rules=[{"then": {"do": "status", "status": 500}}])
    sent = stack.send("inference.chat", SECRET, "scripted", kwargs={"max_tokens": 4}, priority=6)
    with pytest.raises(ServerFault):
        sent.get(timeout=90)
    letter = stack.one()
    assert (letter.id, letter.task, letter.queue) == (sent.id, "inference.chat", "interactive")
    assert (letter.code, letter.attempts) == ("server_error", 1)
    assert "celery@" in letter.worker
    assert "secret" not in json.dumps(letter.as_dict())
    contents = letter.contents()
    assert (contents["args"], contents["kwargs"]) == ([SECRET, "scripted"], {"max_tokens": 4})
    assert f"millrace dlq show {sent.id}" in stack.worker.log

    stack.engine.script(rules=[])
    assert dead_letters.send_again(stack.client, letter.id).id == letter.id
    again = until(
        lambda: stack.plain.AsyncResult(sent.id).successful() and stack.plain.AsyncResult(sent.id), "a result"
    )
    assert again.get()["usage"]["completion_tokens"] == 4
    assert stack.letters() == []
    assert "secret" not in stack.worker.log


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "no such colour", "type": "invalid_request_error"}}),
        (400, {"error": {"message": "too long", "type": "exceed_context_size_error"}}),
    ],
)
def test_a_fault_of_the_caller_is_an_answer_and_no_letter(stack: Stack, status: int, body: Any) -> None:
    stack.engine.script(rules=[{"then": {"do": "status", "status": status, "body": body}}])
    with pytest.raises(RequestRefused):
        stack.send("inference.chat", SECRET, "scripted").get(timeout=90)
    assert stack.answers()
    assert stack.letters() == []


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ({"do": "status", "status": 401}, "engine_key_refused"),
        (
            {"do": "status", "status": 404, "body": {"error": {"message": "no model x", "code": "model_not_found"}}},
            "model_not_found",
        ),
        ({"do": "hang"}, "engine_timeout"),
    ],
)
def test_what_another_try_may_mend_is_kept(stack: Stack, rule: dict[str, Any], code: str) -> None:
    stack.engine.script(rules=[{"then": rule}])
    stack.send("inference.complete", "a prompt", "scripted")
    assert stack.one().code == code


def test_a_process_that_does_not_react_ends_at_the_hard_limit_as_a_letter(stack: Stack) -> None:
    stack.engine.script(rules=[{"then": {"do": "hang"}}])
    sent = stack.send("inference.chat", SECRET, "scripted")
    stack.engine.wait_for(lambda stats: stats["in_flight"] == 1)
    os.kill(stack.child(), signal.SIGSTOP)
    letter = stack.one()
    assert (letter.id, letter.code) == (sent.id, "time_limit")
    assert stack.answers()
    until(lambda: stack.client.hlen("unacked") == 0, "an acknowledged message")


def test_a_task_that_kills_its_process_four_times_is_a_letter(stack: Stack) -> None:
    stack.engine.script(rules=[{"then": {"do": "slow", "seconds": 30}}])
    sent = stack.send("inference.chat", SECRET, "scripted", priority=3, soft_time_limit=60, time_limit=90)
    for _ in range(4):
        assert stack.letters() == []
        stack.engine.wait_for(lambda stats: stats["in_flight"] == 1)
        os.kill(stack.child(), signal.SIGKILL)
        stack.engine.wait_for(lambda stats: stats["in_flight"] == 0)
    letter = stack.one()
    assert (letter.id, letter.code, letter.attempts) == (sent.id, "worker_lost", 4)
    assert "secret" not in stack.worker.log
    # It has all its attempts again.
    stack.engine.script(rules=[{"when": {"times": 1}, "then": {"do": "slow", "seconds": 30}}])
    dead_letters.send_again(stack.client, letter.id)
    stack.engine.wait_for(lambda stats: stats["in_flight"] == 1)
    os.kill(stack.child(), signal.SIGKILL)
    until(lambda: stack.plain.AsyncResult(sent.id).successful(), "an answer after all")
    assert stack.letters() == []


def test_a_fault_of_our_own_is_kept(stack: Stack) -> None:
    with pytest.raises(KeyError):
        stack.send("inference.broken", "a word").get(timeout=90)
    letter = stack.one()
    assert (letter.code, letter.reason, letter.attempts) == ("exception", "KeyError: 'a word'", 1)


def test_arguments_that_do_not_fit_are_kept(stack: Stack) -> None:
    sent = stack.send("inference.chat", kwargs={"max_tokens": 4})
    with pytest.raises(TypeError):
        sent.get(timeout=90)
    letter = stack.one()
    assert (letter.id, letter.code) == (sent.id, "wrong_arguments")
    assert "messages" in letter.reason


def test_a_list_that_redis_does_not_write_loses_nothing(stack: Stack) -> None:
    """The message is not acknowledged; it comes again until the list takes it."""
    stack.client.set(dead_letters.LETTERS, "something else's")
    stack.engine.script(rules=[{"then": {"do": "status", "status": 400, "body": {}}}])
    known, unknown = stack.send("inference.chat"), stack.send("no.such.task", SECRET)
    for sent in (known, unknown):
        until(lambda sent=sent: f"Task {sent.id}" in stack.worker.log, "a line in the log")  # type: ignore[misc]
    assert "goes back to its queue" in stack.worker.log
    assert "secret" not in stack.worker.log
    stack.client.delete(dead_letters.LETTERS)
    until(lambda: {letter.id for letter in stack.letters()} == {known.id, unknown.id}, "both letters")
    assert stack.answers()
    until(lambda: stack.client.hlen("unacked") == 0, "an acknowledged message")


# The messages.


def test_an_unknown_task_is_kept_and_its_caller_told(stack: Stack) -> None:
    sent = stack.send("no.such.task", SECRET, kwargs={"n": 1})
    with pytest.raises(NotRegistered):
        sent.get(timeout=90)
    letter = stack.one()
    assert (letter.id, letter.task, letter.code, letter.attempts) == (sent.id, "no.such.task", "unknown_task", 0)
    assert (letter.contents()["args"], letter.contents()["kwargs"]) == ([SECRET], {"n": 1})
    assert "secret" not in stack.worker.log
    assert stack.answers()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (envelope("not json", task="inference.chat", id="x1"), "undecodable"),
        (envelope("5", task="inference.chat", id="x1"), "wrong_message"),
        (envelope("[[], 5, {}]", task="inference.chat", id="x1"), "wrong_message"),
        (envelope("[[], {}, 5]", task="inference.chat", id="x1"), "wrong_message"),
        (envelope("[[], {}, {}]", task="inference.chat"), "wrong_message"),
        (envelope("[[], {}, {}]", task="inference.chat", id="x1", eta="soon"), "wrong_message"),
        (envelope("[[], {}, {}]", task="inference.chat", id="x1", stamps=[]), "wrong_message"),
        (envelope("[[], {}, {}]", task="inference.chat", id="x1", timelimit=5), "wrong_message"),
        (envelope("[[], {}, {}]", task="inference.chat", id=["x1"]), "wrong_message"),
        (envelope("[[], {}, {}]", task="inference.chat", id="x1", stamped_headers=5), "wrong_message"),
        (envelope("[[], {}, {}]", task=["inference.chat"], id="x1"), "wrong_message"),
        (envelope('{"task": "inference.chat", "args": []}'), "wrong_message"),
        (envelope('{"task": ["x"], "id": "x1"}'), "wrong_message"),
        (envelope("[" * 5000 + "]" * 5000, task="inference.chat", id="x1"), "undecodable"),
        (envelope('{"hello": "world"}'), "unknown_message"),
        (envelope("[1]"), "unknown_message"),
        (envelope("not json"), "undecodable"),
        (
            envelope("x", task="inference.chat", id="x1") | {"content-type": "application/x-python-serialize"},
            "wrong_message",
        ),
        (envelope("x", task="inference.chat", id="x1", compression="application/x-gzip"), "undecodable"),
    ],
)
def test_a_message_that_nobody_can_read_is_kept(stack: Stack, message: dict[str, Any], code: str) -> None:
    stack.push(message)
    letter = stack.one()
    assert letter.code == code, letter
    assert json.loads(letter.message)["body"] == message["body"]
    assert letter.contents()
    # Sent again it is the same message, and ends the same way.
    dead_letters.send_again(stack.client, letter.id)
    assert (stack.one().id, stack.one().code) == (letter.id, code)
    assert stack.answers()


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "[1, 2]",
        "{}",
        '{"body": "x", "properties": {"delivery_tag": "x"}}',
        json.dumps(envelope("{}") | {"headers": [1]}),
        json.dumps(envelope("{}") | {"body": "%%%"}).replace("base64", "base65"),
        json.dumps(envelope("{}") | {"body": "a"}),
    ],
)
def test_what_is_no_message_is_kept_as_it_is(stack: Stack, text: str) -> None:
    stack.client.lpush("interactive\x06\x163", text)
    letter = stack.one()
    assert (letter.code, letter.queue, letter.message) == ("undecodable", "interactive", text)
    assert letter.contents()
    assert stack.answers()


def test_a_full_redis_loses_no_message(stack: Stack) -> None:
    """It refuses to note who has a message, and acknowledgements; the worker goes on, and nothing runs twice."""
    stack.engine.script(rules=[{"when": {"times": 1}, "then": {"do": "hang"}}])
    sent = stack.send("inference.chat", SECRET, "scripted", ignore_result=True)
    before = int(stack.engine.stats()["requests"])
    try:
        stack.engine.wait_for(lambda stats: stats["in_flight"] == 1)
        stack.send("inference.embed", "the one after", "scripted", ignore_result=True)
        stack.client.config_set("maxmemory", 1)
        # The first one ends at its limit; what comes next is taken from a full Redis.
        until(lambda: "did not note message" in stack.worker.log, "a refused note")
        until(lambda: any(entry["path"] == "/v1/embeddings" for entry in stack.engine.log()), "the second task")
    finally:
        stack.client.config_set("maxmemory", 0)
    assert stack.answers()
    assert stack.worker.running
    assert [letter.id for letter in stack.letters()] == [sent.id]
    assert int(stack.engine.stats()["requests"]) <= before + 3
    until(lambda: stack.client.hlen("unacked") == 0, "an acknowledged message")


def test_a_full_redis_keeps_the_task_of_a_killed_process(stack: Stack) -> None:
    """It refuses the message of another attempt, so there is none; the letter is taken."""
    stack.engine.script(rules=[{"then": {"do": "slow", "seconds": 30}}])
    options = {"ignore_result": True, "soft_time_limit": 60, "time_limit": 90}
    sent = stack.send("inference.chat", SECRET, "scripted", **options)
    stack.engine.wait_for(lambda stats: stats["in_flight"] == 1)
    stack.client.config_set("maxmemory", 1)
    try:
        os.kill(stack.child(), signal.SIGKILL)
        letter = stack.one()
    finally:
        stack.client.config_set("maxmemory", 0)
    assert (letter.id, letter.code, letter.attempts) == (sent.id, "worker_lost", 1)
    assert "did not take the message for another attempt" in letter.reason
    assert stack.answers()


# The list.


@pytest.fixture
def client(stack: Stack) -> redis.Redis:
    return stack.client


def some_letter(number: int = 0, body: str = "[[], {}, {}]", **fields: Any) -> Letter:
    message = envelope(body, task="inference.chat", id=f"task-{number}", retries=3, expires="2020-01-01T00:00:00")
    letter = Letter(
        task_id=f"task-{number}",
        task="inference.chat",
        queue="nobody",
        when=time.time() - 100 + number,
        code="server_error",
        reason="",
        attempts=4,
        worker="w",
        message=json.dumps(message),
    )
    for name, value in fields.items():
        setattr(letter, name, value)
    return letter


def test_the_list_is_bounded_and_the_oldest_go(client: redis.Redis) -> None:
    settings = Settings(dlq_max=3, dlq_days=2)
    assert dead_letters.keep(client, settings, some_letter(0, when=time.time() - 3 * 86400)) == ("task-0", ["task-0"])
    for number in range(3):
        assert dead_letters.keep(client, settings, some_letter(number)) == (f"task-{number}", [])
    assert dead_letters.keep(client, settings, some_letter(3)) == ("task-3", ["task-0"])
    assert [letter.id for letter in dead_letters.letters(client, settings)] == ["task-1", "task-2", "task-3"]
    fewer = Settings(dlq_max=1)
    assert dead_letters.keep(client, fewer, some_letter(4)) == ("task-4", ["task-1", "task-2", "task-3"])
    assert client.hlen(dead_letters.LETTERS) == dead_letters.count(client, fewer) == 1
    # Without new ones, all of them are gone in time.
    assert 86400 < client.ttl(dead_letters.INDEX) <= client.ttl(dead_letters.LETTERS) <= 14 * 86400


def test_prometheus_hears_how_many_there_are(stack: Stack) -> None:
    dead_letters.keep(stack.client, stack.settings, some_letter())
    with contextlib.closing(Table.create()) as table:
        page = asyncio.run(Exporter(stack.settings, table).page())
    assert "\nmillrace_dead_letters 1\n" in page


def test_a_message_that_fails_twice_is_one_letter_and_another_of_its_id_is_another(client: redis.Redis) -> None:
    settings = Settings()
    dead_letters.keep(client, settings, some_letter())
    assert dead_letters.keep(client, settings, some_letter(code="time_limit")) == ("task-0", [])
    (id_, _) = dead_letters.keep(client, settings, some_letter(body="[[1], {}, {}]"))
    assert id_.startswith("task-0-")
    (odd, _) = dead_letters.keep(client, settings, some_letter(task_id="\x1b[31m"))
    assert odd.startswith("message-")
    assert dead_letters.letter(client, "task-0").code == "time_limit"
    assert dead_letters.count(client, settings) == 3


def test_a_letter_is_sent_once_to_its_queue_with_its_priority(client: redis.Redis) -> None:
    letter = some_letter()
    message = json.loads(letter.message)
    message["properties"]["priority"] = 7
    letter.message = json.dumps(message)
    dead_letters.keep(client, Settings(), letter)
    dead_letters.send_again(client, "task-0")
    sent = json.loads(client.rpop("nobody\x06\x166"))  # type: ignore[arg-type]
    assert sent["body"] == message["body"]
    assert (sent["headers"]["id"], sent["headers"]["retries"], sent["headers"]["expires"]) == ("task-0", 0, None)
    assert sent["properties"]["delivery_tag"] != message["properties"]["delivery_tag"]
    assert client.llen("nobody\x06\x166") == 0
    for call in (dead_letters.send_again, dead_letters.remove, dead_letters.letter):
        with pytest.raises(NotFound, match="no dead letter task-0"):
            call(client, "task-0")


def test_two_who_send_at_once_send_once(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_letters.keep(client, Settings(), some_letter())
    read = dead_letters._read

    def slow_read(used: redis.Redis, id_: str) -> str:
        found = read(used, id_)
        monkeypatch.setattr(dead_letters, "_read", read)
        dead_letters.send_again(used, id_)  # somebody else is faster
        return found

    monkeypatch.setattr(dead_letters, "_read", slow_read)
    with pytest.raises(NotFound, match="any more"):
        dead_letters.send_again(client, "task-0")
    assert client.llen("nobody") == 1
    client.delete("nobody")


def test_a_full_redis_takes_letters_and_keeps_those_it_cannot_send(stack: Stack, tmp_path: Path) -> None:
    with redis_server(tmp_path) as url, redis.Redis.from_url(url, decode_responses=True) as full:
        settings = Settings(redis_url=url)
        full.config_set("maxmemory", 1)
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            full.lpush("x", "1")
        dead_letters.keep(full, settings, some_letter())
        with pytest.raises(Unreachable, match="maxmemory") as raised, presence.connect(settings) as client:
            dead_letters.send_again(client, "task-0")
        assert raised.value.code == "redis_refuses"
        assert dead_letters.count(full, settings) == 1
        dead_letters.remove(full, "task-0")
        assert full.dbsize() == 0
