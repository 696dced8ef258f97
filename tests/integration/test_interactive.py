"""The interactive tasks, through a real Redis and a real worker, on the scripted engine."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, group

from millrace.engine.retry import ContextExceeded, EngineTimeout, Overloaded, RequestRefused
from millrace.errors import InputError
from millrace.settings import get_settings
from tests.scripted_engine import Engine, scripted_engine
from tests.services import ROOT, Worker, celery_worker, environment, redis_server, until

# Celery opens a connection of its own for each result consumer and leaves the last one to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Stack:
    redis_url: str
    engine: Engine
    worker: Worker
    plain: Celery


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A worker of one process: what is queued is run one after the other."""
    folder = tmp_path_factory.mktemp("interactive")
    with redis_server(folder) as url, scripted_engine(slots=8, context=200) as engine:
        settings = {"redis_url": url, "llm_server_url": engine.url, "task_retry_delay": 0.01}
        limits = {"task_soft_time_limit": 2, "task_time_limit": 20}
        arguments = ("--concurrency", "1", "-I", "tests.canvas_tasks")
        with celery_worker(folder, *arguments, **settings, **limits) as worker:
            plain = Celery(broker=url, backend=url)
            yield Stack(url, engine, worker, plain)
            plain.close()


@pytest.fixture(autouse=True)
def _quiet_engine(stack: Stack) -> None:
    stack.engine.script(rules=[], tokens_per_second=0)


@pytest.fixture
def ours(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`tasks.inference`, as a program of the same environment imports it."""
    monkeypatch.setenv("REDIS_URL", stack.redis_url)
    get_settings.cache_clear()
    from tasks import inference
    from worker.app import app

    # The application read other settings in other tests of this process.
    app.conf.update(broker_url=stack.redis_url, result_backend=stack.redis_url)
    app._pool = None
    app._backend_cache = None
    app._local.__dict__.pop("backend", None)
    yield inference
    get_settings.cache_clear()


def calls(engine: Engine, text: str) -> list[dict[str, Any]]:
    return [entry for entry in engine.log() if entry["event"] == "start" and entry["path"] == text]


def requests(engine: Engine) -> int:
    return int(engine.stats()["requests"])


def test_importing_the_application_has_no_side_effect(tmp_path: Path) -> None:
    program = (
        "import signal, socket, threading, os, json\n"
        "before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}\n"
        "files = set(os.listdir('.'))\n"
        "def refuse(*a, **k): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse\n"
        "import celery_app, worker.app, worker.lifecycle, tasks.inference, tasks.batch\n"
        "after = {n: signal.getsignal(n) for n in before}\n"
        "assert before == after and threading.active_count() == 1 and set(os.listdir('.')) == files\n"
        "assert celery_app.celery is worker.app.app\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(n_ctx="wrong"), check=True)


@pytest.mark.parametrize("app", ["worker", "celery_app.celery"])
def test_inspect_names_the_queues(stack: Stack, tmp_path: Path, app: str) -> None:
    command = [sys.executable, "-m", "celery", "-A", app, "inspect", "active_queues", "--json", "--timeout", "20"]
    done = subprocess.run(
        # It waits to the end of its time-out where it does not know how many will answer.
        [*command, "--destination", f"celery@{socket.gethostname()}"],
        cwd=ROOT,
        env=environment(redis_url=stack.redis_url, data_dir=tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    (queues,) = json.loads(done.stdout).values()
    assert {"interactive", "batch", "models", "maintenance"} <= {queue["name"] for queue in queues}


def test_the_command_line_of_the_readme_starts_a_worker(stack: Stack, tmp_path: Path) -> None:
    with celery_worker(tmp_path, "--loglevel=info", app="celery_app.celery", redis_url=stack.redis_url) as worker:
        assert worker.running


def test_plain_celery_gets_the_openai_object(stack: Stack) -> None:
    before = requests(stack.engine)
    result = stack.plain.send_task("inference.chat", args=[HELLO], kwargs={"max_tokens": 4}, queue="interactive")
    answer = result.get(timeout=90)
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["completion_tokens"] == 4
    # One message, one call: no queue shares its exchange with another.
    assert len(calls(stack.engine, "/v1/chat/completions")) and requests(stack.engine) == before + 1


def test_plain_celery_needs_to_know_no_queue(stack: Stack) -> None:
    assert stack.plain.send_task("inference.complete", args=["once"]).get(timeout=90)["object"] == "text_completion"


def test_tasks_are_imported_and_called(stack: Stack, ours: Any) -> None:
    assert ours.chat.delay(HELLO, model="scripted").get(timeout=90)["object"] == "chat.completion"
    assert ours.complete.delay("one", max_tokens=3).get(timeout=90)["usage"]["completion_tokens"] == 3
    embedded = ours.embed.delay(["a", "b"]).get(timeout=90)
    assert embedded["object"] == "list" and len(embedded["data"]) == 2


def test_canvas(stack: Stack, ours: Any) -> None:
    from tests import canvas_tasks

    # A user's own tasks run where the user wants them.
    as_messages, contents = (
        task.s().set(queue="interactive") for task in (canvas_tasks.as_messages, canvas_tasks.contents)
    )

    texts = [[{"role": "user", "content": f"number {number}"}] for number in range(3)]
    together = group(ours.chat.s(text) for text in texts).apply_async().get(timeout=90)
    assert [answer["object"] for answer in together] == ["chat.completion"] * 3
    after = chain(ours.chat.s(texts[0]), as_messages, ours.chat.s(max_tokens=8), contents)
    assert after.apply_async().get(timeout=90)[0].startswith("answer to: again")
    gathered = chord([ours.chat.s(text) for text in texts], contents).apply_async().get(timeout=90)
    assert ["number" in text for text in gathered] == [True] * 3


def test_a_high_task_overtakes_a_hundred_low_ones(stack: Stack, ours: Any) -> None:
    # The first one is held at the engine until everything is queued behind it.
    stack.engine.script(
        rules=[{"when": {"contains": "first of all", "times": 1}, "then": {"do": "slow", "seconds": 6}}]
    )
    first = ours.chat.apply_async(
        [[{"role": "user", "content": "first of all"}]], priority="low", soft_time_limit=60, time_limit=90
    )
    stack.engine.wait_for(lambda stats: stats["in_flight"] == 1)
    low = [ours.chat.delay([{"role": "user", "content": f"low {n}"}], priority="low") for n in range(100)]
    normal = ours.chat.delay([{"role": "user", "content": "a normal one"}])
    high = ours.chat.apply_async([[{"role": "user", "content": "a high one"}]], priority="high")
    done: list[str] = []
    for name, result in {"first": first, "high": high, "normal": normal}.items():
        result.get(timeout=90)
        done.append(name)
    ended = {result.id: result.date_done for result in (high, normal, *low) if result.ready()}
    for result in low:
        result.get(timeout=90)
    times = [result.date_done for result in (first, high, normal)]
    assert times == sorted(times)
    assert max(times) <= min(result.date_done for result in low), ended


def test_an_unknown_priority_is_refused_where_it_is_written(ours: Any) -> None:
    with pytest.raises(InputError, match="urgent, high, normal, low, idle"):
        ours.chat.delay(HELLO, priority="asap")


def test_passing_failures_are_tried_again(stack: Stack, ours: Any) -> None:
    busy = {"when": {"times": 2}, "then": {"do": "status", "status": 503}}
    stack.engine.script(rules=[busy])
    before = requests(stack.engine)
    assert ours.chat.delay(HELLO, model="scripted").get(timeout=90)["choices"]
    assert requests(stack.engine) == before + 3


def test_a_refused_request_is_tried_once_and_says_what_the_server_said(stack: Stack, ours: Any) -> None:
    body = {"error": {"message": "temperature is no colour", "type": "invalid_request_error", "code": 400}}
    stack.engine.script(rules=[{"then": {"do": "status", "status": 400, "body": body}}])
    before = requests(stack.engine)
    with pytest.raises(RequestRefused, match="temperature is no colour"):
        ours.chat.delay(HELLO, model="scripted").get(timeout=90)
    assert requests(stack.engine) == before + 1


def test_tries_are_bounded(stack: Stack, ours: Any) -> None:
    stack.engine.script(rules=[{"then": {"do": "status", "status": 429}}])
    before = requests(stack.engine)
    with pytest.raises(Overloaded):
        ours.chat.delay(HELLO, model="scripted").get(timeout=90)
    assert requests(stack.engine) == before + 4  # TASK_MAX_RETRIES is 3


def test_a_prompt_over_the_context_is_a_typed_error(stack: Stack, ours: Any) -> None:
    with pytest.raises(ContextExceeded, match="exceeds the available context"):
        ours.chat.delay([{"role": "user", "content": "word " * 300}]).get(timeout=90)


def test_streams_are_refused(ours: Any) -> None:
    with pytest.raises(InputError, match="cannot stream"):
        ours.chat.delay(HELLO, stream=True).get(timeout=90)


def test_the_soft_time_limit_ends_a_hanging_request(stack: Stack, ours: Any) -> None:
    stack.engine.script(rules=[{"then": {"do": "hang"}}])
    with pytest.raises(EngineTimeout, match="TASK_SOFT_TIME_LIMIT"):
        ours.chat.delay(HELLO, model="scripted").get(timeout=90)
    # The connection is closed, so the engine's slot is free again; and the process goes on.
    stack.engine.script(rules=[])
    stack.engine.wait_for(lambda stats: stats["in_flight"] == 0)
    assert ours.chat.delay(HELLO).get(timeout=90)["choices"]


def test_models(stack: Stack, ours: Any) -> None:
    from tasks.models import list_models, status

    state = status.delay().get(timeout=90)
    assert (state["kind"], state["slots"], state["context"], state["models"]) == ("llamacpp", 8, 200, ["scripted"])
    assert list_models.delay().get(timeout=90) == {"served": ["scripted"], "files": []}


def test_events_show_no_prompt_and_no_answer(stack: Stack, ours: Any) -> None:
    """Flower and every other monitor reads these; they are published on Redis for whoever listens."""
    bodies: list[str] = []
    with redis.Redis.from_url(stack.redis_url) as client, client.pubsub(ignore_subscribe_messages=True) as events:
        events.psubscribe("*celeryev*")
        sent = ours.chat.delay([{"role": "user", "content": "a secret prompt"}], user="secret user")
        assert sent.get(timeout=90)["object"] == "chat.completion"

        def ended() -> bool:
            message = events.get_message(timeout=0.2)
            if message:
                bodies.append(base64.b64decode(json.loads(message["data"])["body"]).decode())
            return any("task-succeeded" in body and sent.id in body for body in bodies)

        until(ended, "the task's last event")
    text = "".join(bodies)
    assert "task-sent" in text and "task-received" in text
    assert "secret" not in text and "answer to" not in text
