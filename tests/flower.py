"""`millrace flower` for the tests, with a Redis, a scripted engine and a worker of the queue `interactive`."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery

from tests.cli import Cli, Running
from tests.scripted_engine import Engine, scripted_engine
from tests.services import celery_worker, free_port, redis_server, until

LOGIN = "somebody:some:thing"  # a password may hold a colon
WORKER = "interactive@mill"


@dataclass(frozen=True)
class Flower:
    """A Flower on loopback."""

    port: int

    def headers(self, login: str = LOGIN) -> dict[str, str]:
        """Return what a browser sends once somebody has logged in."""
        return {"Authorization": "Basic " + b64encode(login.encode()).decode()}

    def request(self, path: str, body: bytes | None = None, *, login: str = LOGIN) -> tuple[int, str]:
        """GET, or POST a body; returns the status and the text. No answer has the status 0."""
        headers = self.headers(login) if login else {}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def get(self, path: str) -> Any:
        """Return the JSON that is there."""
        code, text = self.request(path)
        assert code == 200, (path, code, text)
        return json.loads(text)

    def task(self, task_id: str, state: str) -> dict[str, Any]:
        """Wait until a task is in this state, and return what Flower knows of it."""

        def look() -> dict[str, Any] | None:
            task = self.get("/api/tasks").get(task_id)
            return task if task and task["state"] == state else None

        found = until(look, lambda: f"{task_id} is {state}: {self.get('/api/tasks')}")
        assert found is not None
        return found


@contextlib.contextmanager
def flower(folder: Path, redis_url: str, **settings: object) -> Iterator[tuple[Flower, Running]]:
    """Run `millrace flower` until the block ends; it answers when the block begins."""
    shown = Flower(free_port())
    given = {"REDIS_URL": redis_url, "FLOWER_PORT": shown.port, "FLOWER_BASIC_AUTH": LOGIN, **settings}
    with Cli(folder, given).start("flower") as running:
        running.until(lambda: shown.request("/healthcheck")[0] == 200, "Flower answers")
        yield shown, running


@dataclass(frozen=True)
class Watched:
    """What Flower watches, and Flower; `plain` is a producer that knows nothing of us but the Redis."""

    redis_url: str
    engine: Engine
    flower: Flower
    plain: Celery


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """Run all of it; the worker has one process, and Flower has seen it."""
    arguments = ("--queues", "interactive", "--concurrency", "1", "--hostname", WORKER, "-I", "tests.canvas_tasks")
    settings = {"worker_prefetch_multiplier": 4}
    with (
        redis_server(folder) as url,
        scripted_engine() as engine,
        flower(folder / "flower", url) as (shown, _),
        celery_worker(folder, *arguments, redis_url=url, llm_server_url=engine.url, **settings),
        Celery(broker=url, backend=url) as plain,
    ):
        # Flower hears events from its subscription on; a worker's heartbeat shows that it listens.
        until(lambda: shown.get("/api/workers?status=1").get(WORKER), "the worker in Flower", 60)
        yield Watched(url, engine, shown, plain)
