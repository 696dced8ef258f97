"""A whole Millrace in a folder of its own, each part of which may be killed and started again.

    Project
    ├── redis     the embedded one, always at the same port
    ├── engine    the scripted one, always at the same port; its request log outlives it
    └── workers   `millrace worker`, as many as are started

Nothing of it reads the user's settings or .env, and nothing of it outlives this process: see millrace.guard.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from millrace import embedded
from millrace.batch.ledger import Ledger
from millrace.errors import Unreachable
from millrace.guard import Guard
from millrace.processes import Process, alive, still_there, tree
from millrace.settings import Settings, environment, only

LEASE = 6.0  # seconds; short, so that what a dead worker held is soon run again
START = 60.0  # seconds that a part may take to start
LOOK = 0.05  # seconds between looks at what is awaited

#: What a project's workers run with; a project's own settings win.
SETTINGS: dict[str, Any] = {
    "batch_lease_seconds": LEASE,
    "batch_processes": 2,
    "worker_concurrency": 1,
    "metrics_port": 0,
    "health_check_enabled": False,
    "log_level": "INFO",
    "environment": "selftest",
}

#: What a project's engine is: sixteen requests in flight, some hundred and fifty rows a second.
SCRIPT: dict[str, Any] = {"slots": 8, "ttft_ms": 50, "answer_tokens": 16}


@dataclass
class Worker:
    """A `millrace worker` and the file with its logs."""

    process: subprocess.Popen[bytes]
    log_path: Path
    #: What `kill_parent` left to end by itself.
    orphans: list[Process] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def log(self) -> str:
        """What it and its processes have logged."""
        return self.log_path.read_text(errors="replace")

    def mains(self, queue: str = "") -> list[Process]:
        """Return its Celery processes; with `queue`, those that read that queue."""
        return [
            one
            for one in tree(self.process.pid)
            if one.parent == self.process.pid and "--queues" in one.command and queue in one.command
        ]

    def pool(self, queue: str = "") -> list[Process]:
        """Return the processes that run tasks: the children of `mains`."""
        parents = {main.pid for main in self.mains(queue)}
        return [one for one in tree(self.process.pid) if one.parent in parents]

    def kill(self) -> None:
        """Kill it and all its processes at once."""
        kill(self.process.pid, signal.SIGSTOP)
        if self.running:  # it would start again what it sees end; from now on it starts nothing
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.process.pid, os.WUNTRACED)
        for one in [*tree(self.process.pid), Process(self.process.pid, 0, "")]:
            kill(one.pid)
        self.process.wait()

    def kill_parent(self) -> None:
        """Kill it alone; its processes hear of it from their guard, and drain."""
        self.orphans += tree(self.process.pid)
        kill(self.process.pid)
        self.process.wait()

    def kill_orphans(self) -> None:
        """Kill what `kill_parent` left, and return when it is gone."""
        left = [one.pid for one in still_there(self.orphans)]
        for pid in left:
            kill(pid)
        deadline = time.monotonic() + START
        while any(map(alive, left)) and time.monotonic() < deadline:
            time.sleep(LOOK)

    def stop(self, patience: float = 30.0) -> int:
        """End it in order, and return its exit code."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.wait()


class Project:
    """A Millrace of its own.

    Args:
        folder: An empty folder.
        script: Fields of the scripted engine's script, over SCRIPT.
        settings: Settings of its workers, over SETTINGS; redis_url and llm_server_url may name a proxy.
    """

    def __init__(self, folder: Path, script: dict[str, Any] | None = None, **settings: Any) -> None:
        self.folder = folder.absolute()
        self.data_dir = self.folder / "data"
        self.temporary = self.folder / "tmp"
        self.log = self.folder / "engine.log.jsonl"
        self.script = {**SCRIPT, "log_path": str(self.log), **(script or {})}
        self.changes = settings
        # Kept as long as the project: its parts come back to them, and others look for free ports meanwhile.
        self._ports = [reserve_port(), reserve_port()]
        redis_port, self.engine_port = (port.getsockname()[1] for port in self._ports)
        self.redis_url = f"redis://:selftest@127.0.0.1:{redis_port}/0"
        self.redis: embedded.Server | None = None
        self.engine: subprocess.Popen[bytes] | None = None
        self.workers: list[Worker] = []
        self._guard: Guard | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data_dir.mkdir(mode=0o700, exist_ok=True)
        self.temporary.mkdir(exist_ok=True)
        self._guard = Guard()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.running:
                worker.kill()
            worker.kill_orphans()
        self.kill_engine()
        self.kill_redis()
        if self._guard is not None:
            self._guard.close()
        for port in self._ports:
            port.close()

    # Settings.

    @property
    def engine_url(self) -> str:
        """Where the engine answers, without /v1."""
        return f"http://127.0.0.1:{self.engine_port}"

    def values(self, **changes: Any) -> dict[str, Any]:
        """Return the settings of a worker, by field."""
        parts = {"redis_url": self.redis_url, "llm_server_url": self.engine_url, "data_dir": self.data_dir}
        return {**SETTINGS, **parts, **self.changes, **changes}

    def settings(self, **changes: Any) -> Settings:
        """Return them as the library takes them."""
        return only(self.values(**changes))

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Open the ledger for a block."""
        with contextlib.closing(Ledger.open(self.settings())) as ledger:
            yield ledger

    def _environment(self, **values: Any) -> dict[str, str]:
        # Celery's processes leave files in the temporary folder when they are killed.
        return environment(**values) | {"TMPDIR": str(self.temporary)}

    # Parts.

    def start(self, workers: int = 1) -> None:
        """Start Redis, the engine and so many workers, and return when the workers are at work."""
        self.start_redis()
        self.start_engine()
        started = [self.start_worker() for _ in range(workers)]
        for worker in started:
            self.await_worker(worker)

    def start_redis(self) -> None:
        """Start Redis, with what its append-only file has, and return when it answers."""
        self.redis = embedded.start_redis(self.folder, url=self.redis_url, started=self._watch)

    def kill_redis(self) -> None:
        """Kill Redis."""
        if self.redis is not None:
            self.redis.process.kill()
            self.redis.process.wait()
            self._forget(self.redis.process.pid)
            self.redis = None

    def start_engine(self) -> None:
        """Start the engine, and return when it answers."""
        path = self.folder / "script.json"
        path.write_text(json.dumps(self.script))
        command = [sys.executable, "-m", "millrace.engine.scripted", "--port", str(self.engine_port)]
        with (self.folder / "engine.log").open("ab") as log:
            self.engine = subprocess.Popen(
                [*command, "--script", str(path), "--die-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env=self._environment(),
            )
        assert self.engine.stdout is not None
        if not (select.select([self.engine.stdout], [], [], START)[0] and self.engine.stdout.readline()):
            self.kill_engine()
            words = (self.folder / "engine.log").read_text(errors="replace")[-500:]
            raise Unreachable(f"The scripted engine does not start: {words}", code="engine_failed")

    def kill_engine(self) -> None:
        """Kill the engine."""
        if self.engine is not None:
            self.engine.kill()
            self.engine.wait()
            for pipe in (self.engine.stdin, self.engine.stdout):
                if pipe is not None:
                    pipe.close()
            self.engine = None

    def tell_engine(self, **changes: Any) -> dict[str, Any]:
        """Change the engine's script while it runs, for this life of it; return its counts."""
        return self._ask_engine("/_script", json.dumps(changes).encode())

    def engine_stats(self) -> dict[str, Any]:
        """Return the engine's counts since its start."""
        return self._ask_engine("/_script/stats")

    def _ask_engine(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.engine_url}{path}", body, headers)  # noqa: S310
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
            return dict(json.load(answer))

    def start_worker(self, **changes: Any) -> Worker:
        """Start a worker, with changed settings; it is not ready when this returns."""
        path = self.folder / f"worker{len(self.workers)}.log"
        with path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "millrace", "worker"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment(**self.values(**changes)),
                start_new_session=True,
            )
        self._watch(process.pid)
        worker = Worker(process, path)
        self.workers.append(worker)
        return worker

    def await_worker(self, worker: Worker) -> None:
        """Wait until every process of a worker is ready."""
        deadline = time.monotonic() + START
        wanted = 1 + int(self.values()["batch_processes"])
        while worker.log.count(" ready.") < wanted:
            if not worker.running or time.monotonic() > deadline:
                raise Unreachable(f"A worker does not start: {worker.log[-1500:]}", code="worker_failed")
            time.sleep(LOOK)

    def _watch(self, pid: int) -> None:
        if self._guard is not None:
            self._guard.watch(pid)

    def _forget(self, pid: int) -> None:
        if self._guard is not None:
            self._guard.forget(pid)

    # Batches.

    def write_rows(self, count: int, name: str = "input.jsonl", **body: Any) -> Path:
        """Write a file of so many rows, each another prompt, and return its path."""
        path = self.folder / name
        with path.open("w") as file:
            for number in range(count):
                file.write(json.dumps(row(number, **body), separators=(",", ":")) + "\n")
        return path

    def submit(self, source: Path, *options: str, **settings: Any) -> str:
        """Submit a file with `millrace batch submit`, and return the batch's id.

        Raises:
            Unreachable: The command failed.
        """
        done = self.run("batch", "submit", str(source), "--json", *options, **settings)
        if done.returncode:
            raise Unreachable(f"The batch cannot be submitted: {done.stdout}{done.stderr}", code="submit_failed")
        return str(json.loads(done.stdout)["id"])

    def run(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a `millrace` command to its end, with changed settings."""
        return subprocess.run(
            [sys.executable, "-m", "millrace", *arguments],
            cwd=self.folder,
            env=self._environment(**self.values(**settings)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * START,
        )


def row(number: int, **body: Any) -> dict[str, Any]:
    """Return a row of OpenAI's Batch format whose prompt no other number has."""
    messages = [{"role": "user", "content": f"Question {number}?"}]
    return {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "scripted", "messages": messages, "max_tokens": 16, **body},
    }


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; return whether there was somebody to get it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def reserve_port() -> socket.socket:
    """Return a socket whose port of loopback is given to nobody else as a free one until it is closed.

    It is bound and not listened at, so a server that sets SO_REUSEADDR, as servers do, can listen at that port.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
