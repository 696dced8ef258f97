"""`millrace flower`: who may look, what may be done, and that prompts and answers are nowhere in it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from celery import Celery

from tests.cli import NOBODY, Cli
from tests.flower import LOGIN, WORKER, Flower, Watched, flower, watched
from tests.services import ROOT, environment, free_port, redis_server, until
from worker.app import QUEUES

pytest.importorskip("flower", reason="the extra `flower` is not installed")
from flower.urls import handlers
from tornado.web import RequestHandler

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECRET = "a-prompt-that-nobody-else-may-read"
MESSAGES = [{"role": "user", "content": SECRET}]
PAGES = ("/", "/workers", "/tasks", "/broker", "/metrics", f"/worker/{WORKER}", "/task/any")
API = (
    "/api/workers",
    "/api/tasks",
    "/api/task/info/any",
    "/api/task/types",
    "/api/task/result/any",
    "/api/queues/length",
)
ACTIONS = (
    f"/api/worker/shutdown/{WORKER}",
    f"/api/worker/pool/restart/{WORKER}",
    f"/api/worker/pool/grow/{WORKER}",
    f"/api/worker/pool/shrink/{WORKER}",
    f"/api/worker/pool/autoscale/{WORKER}?min=1&max=2",
    f"/api/worker/queue/add-consumer/{WORKER}?queue=batch",
    f"/api/worker/queue/cancel-consumer/{WORKER}?queue=interactive",
    "/api/task/apply/inference.chat",
    "/api/task/async-apply/inference.chat",
    "/api/task/send-task/inference.chat",
    "/api/task/abort/any",
    f"/api/task/timeout/inference.chat?workername={WORKER}&hard=1",
    f"/api/task/rate-limit/inference.chat?workername={WORKER}&ratelimit=1",
    "/api/task/revoke/any?terminate=true",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("flower")) as site:
        yield site


# How it starts and ends.


@pytest.mark.parametrize("login", [None, "somebody", ":something", "somebody:", "somebody:schlüssel"])
def test_it_does_not_start_without_a_login(tmp_path: Path, login: str | None) -> None:
    given = {"FLOWER_BASIC_AUTH": login} if login else {}
    done = Cli(tmp_path / "home", given).run("flower")
    assert done.code == 2
    assert "[flower_login] FLOWER_BASIC_AUTH " in done.err
    assert login is None or login not in done.err.replace("user:password", "")


def test_it_does_not_start_without_redis(tmp_path: Path) -> None:
    given = {"FLOWER_BASIC_AUTH": LOGIN, "REDIS_HOST": "127.0.0.1", "REDIS_PORT": NOBODY}
    done = Cli(tmp_path / "home", given).run("flower")
    assert done.code == 3
    assert "[redis_unreachable]" in done.err


def test_it_names_a_port_that_is_taken(site: Watched, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        given = {"FLOWER_BASIC_AUTH": LOGIN, "REDIS_URL": site.redis_url, "FLOWER_PORT": port}
        done = Cli(tmp_path / "home", given).run("flower")
    assert done.code == 3
    assert f"[cannot_listen] Flower cannot listen on 127.0.0.1:{port}: " in done.err
    assert "Set FLOWER_PORT to a free port" in done.err
    done = Cli(tmp_path / "home", given).run("flower", "--listen", "192.0.2.1")
    assert done.code == 3
    assert f"[cannot_listen] Flower cannot listen on 192.0.2.1:{port}: " in done.err


def test_it_names_the_extra_that_is_not_installed(site: Watched, tmp_path: Path) -> None:
    cli = Cli(tmp_path / "home", {"FLOWER_BASIC_AUTH": LOGIN, "REDIS_URL": site.redis_url})
    cli.write("flower.py", "raise ModuleNotFoundError(name='flower')")
    cli.environment["PYTHONPATH"] = f"{cli.folder}:{cli.environment['PYTHONPATH']}"
    done = cli.run("flower")
    assert done.code == 3
    assert "[extra_missing] Flower needs the package flower" in done.err
    assert "pip install 'millrace[flower]'" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_told_the_password(site: Watched, tmp_path: Path, number: signal.Signals) -> None:
    with flower(tmp_path / "home", site.redis_url) as (shown, running):
        assert shown.request("/workers")[0] == 200
        assert shown.request("/workers", login="somebody:else")[0] == 401
        process = psutil.Process(running.process.pid)
        listening = [entry for entry in process.net_connections("inet") if entry.status == psutil.CONN_LISTEN]
        assert [(entry.laddr.ip, entry.laddr.port) for entry in listening] == [("127.0.0.1", shown.port)]
        told = " ".join(process.cmdline())
        running.send(number)
        done = running.wait()
    assert done.code == 0, done
    told += done.out + done.err
    assert f"http://127.0.0.1:{shown.port} " in told
    assert "some:thing" not in told


def test_it_outlives_redis(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(contextlib.ExitStack())
        url = redis.enter_context(redis_server(tmp_path))
        shown, running = stack.enter_context(flower(tmp_path / "home", url, FLOWER_READ_ONLY="false"))
        shown.get("/api/workers?refresh=1")  # the first questions are over
        assert shown.request("/api/task/revoke/any", b"")[0] == 200
        redis.close()
        with contextlib.closing(HTTPConnection("127.0.0.1", shown.port)) as waiting:
            # This is tried until Redis is back, in a thread; so nobody waits for the answer.
            waiting.request("POST", "/api/task/revoke/any", headers=shown.headers())
            assert shown.request("/api/queues/length")[0] == 503
            assert shown.request("/broker")[0] == 200
            running.send(signal.SIGTERM)
            assert running.wait(20).code == 0


# Who may look, and what may be done.


@pytest.mark.parametrize("login", ["", "somebody:else", "somebody:", "some:thing"])
def test_nothing_is_shown_without_the_login(site: Watched, login: str) -> None:
    for path in (*PAGES, *API):
        assert site.flower.request(path, login=login)[0] == 401, path
    for path in ACTIONS:
        assert site.flower.request(path, b"", login=login)[0] == 401, path
    assert site.flower.request("/healthcheck", login=login) == (200, "OK")


@pytest.mark.parametrize("path", ACTIONS)
def test_nothing_can_be_changed(site: Watched, path: str) -> None:
    code, text = site.flower.request(path, b"")
    assert (code, text) == (403, "Read only mode is enabled")


def test_these_are_all_the_actions() -> None:
    routes = [(entry[0], entry[1]) for entry in handlers if isinstance(entry, tuple)]
    changing = {
        route
        for route, handler in routes
        for verb in ("post", "put", "patch", "delete")
        if getattr(handler, verb) is not getattr(RequestHandler, verb)
    } - {".*"}  # not found
    assert len(changing) == len(ACTIONS)
    for route in changing:
        assert [path for path in ACTIONS if re.fullmatch(route, path.partition("?")[0])], route


def test_actions_can_be_allowed(site: Watched, tmp_path: Path) -> None:
    with flower(tmp_path / "home", site.redis_url, FLOWER_READ_ONLY="false") as (shown, _):
        assert shown.request("/api/task/revoke/any", b"")[0] == 200
        assert shown.request("/api/task/revoke/any", b"", login="")[0] == 401


# What is shown.


def test_messages_of_all_priorities_are_counted(site: Watched) -> None:
    depths = dict.fromkeys(QUEUES, 0)
    with Celery(broker=site.redis_url) as plain:
        for number, queue in enumerate(sorted(set(QUEUES) - {"interactive"}), start=1):  # that one has a worker
            for priority in (0, 3, 6, 9) * number:
                plain.send_task("nobody.runs.this", queue=queue, priority=priority)
                depths[queue] += 1
    site.flower.get("/api/workers?refresh=1")  # from now on Flower knows that one queue is served
    shown = site.flower.get("/api/queues/length")["active_queues"]
    assert {entry["name"]: entry["messages"] for entry in shown} == depths
    page = site.flower.request("/broker")[1]
    for queue, depth in depths.items():
        row = page.partition(f'<tr id="{queue}">')[2].partition("</tr>")[0]
        assert f">{depth}</td>" in row


@pytest.fixture
def plain(site: Watched) -> Iterator[Celery]:
    """A producer of its own, for a test that changes its settings."""
    with Celery(broker=site.redis_url, backend=site.redis_url) as plain:
        yield plain


def test_prompts_and_answers_are_nowhere(site: Watched, plain: Celery) -> None:
    quoted = {"error": {"message": f"cannot say {SECRET}", "type": "invalid_request_error"}}
    site.engine.script(
        rules=[
            {"when": {"contains": "refuse"}, "then": {"do": "status", "status": 400, "body": quoted}},
            {"when": {"contains": "hang"}, "then": {"do": "hang"}},
        ]
    )
    plain.conf.task_send_sent_event = True  # these events have the prompts in them
    chat = plain.signature("inference.chat", args=[MESSAGES], kwargs={"user": SECRET}, queue="interactive")
    theirs = plain.signature("tests.contents", queue="interactive")

    answered = chat.apply_async()
    assert SECRET in json.dumps(answered.get(timeout=90))
    chained = (chat | theirs).apply_async()
    assert SECRET in json.dumps(chained.get(timeout=90))
    refused = chat.clone(kwargs={"stop": "refuse"}).apply_async()
    failed = theirs.clone(args=[{"choices": {SECRET: SECRET}}]).apply_async()
    for result in (refused, failed):
        with pytest.raises(Exception, match=SECRET if result is refused else "0"):
            result.get(timeout=90)
    # Nobody waits for these: a result that is never fetched stays subscribed to.
    unread = plain.signature("nobody.runs.this", args=[SECRET], queue="celery").apply_async(ignore_result=True)
    later = theirs.clone(args=[SECRET]).apply_async(countdown=600, ignore_result=True)
    hanging = chat.clone(kwargs={"stop": "hang"}).apply_async(ignore_result=True)
    waiting = theirs.clone(args=[SECRET]).apply_async(ignore_result=True)

    for result in (answered, chained):
        assert site.flower.task(result.id, "SUCCESS")["result"] == "(…)"
    assert site.flower.task(refused.id, "FAILURE")["exception"] == "RequestRefused(…)"
    assert site.flower.task(failed.id, "FAILURE")["exception"] == "KeyError(…)"
    site.flower.task(unread.id, "PENDING")
    site.flower.task(hanging.id, "STARTED")
    for result in (later, waiting):
        site.flower.task(result.id, "RECEIVED")
    told = everything(site)
    for result in (answered, chained, refused, failed, unread, later, hanging, waiting):
        assert result.id in told
    assert SECRET not in told
    assert password(site.redis_url) not in told
    plain.control.revoke([hanging.id, later.id], terminate=True, signal="SIGKILL")
    site.flower.task(waiting.id, "FAILURE")


def everything(site: Watched) -> str:
    """Return all that can be read in Flower now."""

    def looked() -> Any:
        worker = site.flower.get(f"/api/workers?refresh=1&workername={WORKER}")[WORKER]
        return worker if all(worker.get(what) for what in ("active", "reserved", "scheduled")) else None

    # Flower asks eight things at once, and leaves out what is not answered within a second.
    worker = until(looked, "what the worker is doing")
    tasks = site.flower.get("/api/tasks")
    table = "draw=1&start=0&length=100&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
    paths = ["/", "/workers", "/workers?json=1", "/tasks", f"/tasks/datatable?{table}", "/broker", "/metrics"]
    paths += [f"/worker/{WORKER}", "/api/workers", "/api/tasks", "/api/task/types"]
    paths += [f"/{where}/{task_id}" for where in ("task", "api/task/info") for task_id in tasks]
    texts = [json.dumps(worker)]
    for path in paths:
        code, text = site.flower.request(path)
        assert code == 200, path
        texts.append(text)
    for task_id in tasks:
        code, text = site.flower.request(f"/api/task/result/{task_id}?timeout=1")
        assert code == 403
        texts.append(text)
    assert site.flower.get(f"/api/tasks?search=args:{SECRET}") == {}
    return "\n".join(texts)


def password(url: str) -> str:
    found = urlsplit(url).password
    assert found
    return found


def test_celerys_own_command_shows_no_contents_of_ours(site: Watched, tmp_path: Path) -> None:
    """`celery flower` is without our part of it: what the worker itself leaves out is left out."""
    quoted = {"error": {"message": f"cannot say {SECRET}", "type": "invalid_request_error"}}
    site.engine.script(
        rules=[{"when": {"contains": "refuse"}, "then": {"do": "status", "status": 400, "body": quoted}}]
    )
    port = free_port()
    with (
        (tmp_path / "flower.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "celery_app.celery", "flower", "--address=127.0.0.1"],
            cwd=ROOT,
            env=environment(
                redis_url=site.redis_url, data_dir=tmp_path / "data", flower_port=port, flower_basic_auth=LOGIN
            ),
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            shown = Flower(port)
            until(lambda: shown.request("/healthcheck")[0] == 200, "Flower answers", 60)
            assert shown.request("/api/workers", login="somebody:else")[0] == 401
            until(lambda: shown.get("/api/workers?status=1").get(WORKER), "the worker in Flower", 60)
            chat = site.plain.signature("inference.chat", args=[MESSAGES], queue="interactive")
            answered = chat.apply_async(ignore_result=True)
            refused = chat.clone(kwargs={"stop": "refuse"}).apply_async(ignore_result=True)
            shown.task(answered.id, "SUCCESS")
            shown.task(refused.id, "FAILURE")
            assert SECRET not in shown.request("/api/tasks")[1]
        finally:
            process.terminate()
