"""`millrace dlq`: what a person sees of a task that failed for good, and what they can do about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from millrace import dead_letters
from millrace.dead_letters import Letter
from millrace.settings import Settings
from tests.cli import NOBODY, Cli
from tests.scripted_engine import scripted_engine
from tests.services import redis_server, until

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROMPT = [{"role": "user", "content": "a secret \x1b[31mprompt"}]


@dataclass
class Parts:
    url: str
    client: redis.Redis

    def keep(self, number: int) -> str:
        """Put a letter into the list, as a worker does."""
        body = json.dumps([[PROMPT], {"n": number}, {}])
        message = {"body": body, "headers": {"id": f"task-{number}"}, "properties": {"delivery_info": {}}}
        letter = Letter(
            task_id=f"task-{number}",
            task="inference.chat",
            queue="interactive",
            when=time.time(),
            code="server_error",
            reason="The engine answered 500: it quotes a secret prompt",
            attempts=1,
            worker="celery@here",
            message=json.dumps(message),
        )
        return dead_letters.keep(self.client, Settings(), letter)[0]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as url,
        redis.Redis.from_url(url, decode_responses=True) as client,
    ):
        yield Parts(url, client)


@pytest.fixture
def ready(cli: Cli, parts: Parts) -> Cli:
    cli.environment["REDIS_URL"] = parts.url
    parts.client.flushdb()
    return cli


def test_a_failed_task_from_the_list_to_its_answer(ready: Cli, parts: Parts) -> None:
    ready.environment["PYTHONWARNINGS"] += ",ignore:Call to deprecated setex"  # Celery's
    with scripted_engine(slots=4) as engine:
        ready.environment |= {"LLM_SERVER_URL": engine.url, "TASK_MAX_RETRIES": "0", "BATCH_PROCESSES": "1"}
        engine.script(rules=[{"then": {"do": "status", "status": 500}}])
        with ready.start("worker") as running:
            plain = Celery(broker=parts.url, backend=parts.url)
            sent = plain.send_task("inference.chat", args=[PROMPT, "scripted"], queue="interactive")
            running.until(lambda: dead_letters.count(parts.client, Settings()), "a dead letter")
            status = ready.run("status")
            assert "1 task or message failed for good; `millrace dlq list` names them" in status.out, status
            assert ready.run("status", "--json").json["dead_letters"] == 1
            listed = ready.run("dlq", "list")
            assert listed.code == 0
            assert all(word in listed.out for word in (sent.id, "inference.chat", "interactive", "server_error")), (
                listed
            )
            engine.script(rules=[])
            done = ready.run("dlq", "retry", "--all")
            assert (done.code, done.err) == (0, "Sent again: 1 dead letter.\n")
            # Whoever waits for the result has it.
            until(lambda: plain.AsyncResult(sent.id).successful(), "an answer")
            plain.close()
    assert ready.run("dlq", "list").err == "There are no dead letters.\n"


def test_prompts_are_shown_where_they_are_asked_for(ready: Cli, parts: Parts) -> None:
    parts.keep(1)
    for done in (ready.run("dlq", "list"), ready.run("dlq", "list", "--json")):
        assert done.code == 0
        assert "task-1" in done.out
        assert "secret" not in done.out + done.err
    shown = ready.run("dlq", "show", "task-1")
    assert shown.code == 0
    assert "it quotes a secret prompt" in shown.out
    assert "a secret \\u001b[31mprompt" in shown.out
    assert "\x1b" not in shown.out
    as_json = ready.run("dlq", "show", "task-1", "--json").json
    assert (as_json["id"], as_json["code"], as_json["attempts"]) == ("task-1", "server_error", 1)
    assert as_json["message"]["args"] == [PROMPT]
    assert as_json["message"]["kwargs"] == {"n": 1}
    assert as_json["message"]["headers"] == {"id": "task-1"}
    (listed,) = ready.run("dlq", "list", "--json").json["data"]
    assert set(listed) == {"id", "task_id", "task", "queue", "when", "code", "attempts", "worker"}


def test_retry_and_purge(ready: Cli, parts: Parts) -> None:
    for number in range(4):
        parts.keep(number)
    assert ready.run("dlq", "retry", "task-0", "--json").json == {"retried": ["task-0"]}
    assert parts.client.llen("interactive") == 1
    assert ready.run("dlq", "purge", "task-1", "--yes", "--json").json == {"purged": ["task-1"]}
    asked = ready.run("dlq", "purge", "--all", "--json")
    assert (asked.code, asked.error["code"]) == (2, "confirmation_needed")
    assert dead_letters.count(parts.client, Settings()) == 2
    assert ready.run("dlq", "purge", "--all", "--yes").err == "Removed: 2 dead letters.\n"
    assert ready.run("dlq", "retry", "--all", "--json").json == {"retried": []}
    # Nothing of the prompts is left but the message that was sent again.
    assert parts.client.llen("interactive") == 1
    assert not parts.client.exists(dead_letters.INDEX, dead_letters.LETTERS)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "nothing"), "not_found", "There is no dead letter nothing."),
        (("retry", "nothing"), "not_found", "There is no dead letter nothing."),
        (("purge", "nothing", "--yes"), "not_found", "There is no dead letter nothing."),
        (("retry",), "usage", "Name one dead letter, or --all."),
        (("purge", "x", "--all"), "usage", "x and --all contradict each other."),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(ready: Cli, arguments: tuple[str, ...], code: str, words: str) -> None:
    done: Any = ready.run("dlq", *arguments, "--json")
    assert (done.code, done.error["code"], done.error["message"]) == (2, code, words)
    assert done.error["hint"]


def test_without_redis(cli: Cli, tmp_path: Path) -> None:
    for command in (("list",), ("retry", "--all")):
        done = cli.run("dlq", *command, "--json")
        assert (done.code, done.error["code"]) == (3, "redis_unreachable")
        assert str(NOBODY) in done.error["message"]
