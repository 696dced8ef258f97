"""Real parts for the tests: a Redis, a Celery worker, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from millrace.embedded import find_redis, start_redis
from millrace.selftest.parts import reserve_port

T = TypeVar("T")

ROOT = Path(__file__).parent.parent


def until(condition: Callable[[], T], what: str | Callable[[], str], seconds: float = 90.0) -> T:
    """Return the first true answer of `condition`; fail with `what` where there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := condition():
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.02)


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended; psutil takes one for running whose exit code PID 1 has not asked for."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def freeze(pid: int, ledger: Path) -> None:
    """Stop a process with SIGSTOP, but not inside a write to the ledger: its lock would hold up everybody else."""

    def stopped() -> bool:
        os.kill(pid, signal.SIGSTOP)
        with contextlib.closing(sqlite3.connect(ledger, timeout=0.5)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                os.kill(pid, signal.SIGCONT)
                return False
            return True

    until(stopped, "a moment outside its writes", 20)


#: The ports given last; more would be too many open files.
_given: deque[socket.socket] = deque()
GIVEN = 100


def free_port() -> int:
    """Return a port of loopback at which nobody listens, and which nobody else is given for a while."""
    _given.append(reserve_port())
    if len(_given) > GIVEN:
        _given.popleft().close()
    return int(_given[-1].getsockname()[1])


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run the Redis that the embedded default would run, and yield its URL."""
    server = start_redis(folder)
    try:
        yield server.url
    finally:
        server.stop()


class OwnRedis:
    """A Redis of one port and folder that a test may kill and start again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.url = folder, port, f"redis://127.0.0.1:{port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        self._process = subprocess.Popen(
            [find_redis(), *arguments, "--appendonly", "yes", "--save", ""], stdout=subprocess.DEVNULL
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass
class Worker:
    """A running `celery worker`."""

    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None


def environment(**settings: object) -> dict[str, str]:
    """Return an environment with these settings and no others."""
    from millrace.settings import Settings

    known = {name.upper() for name in Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name not in known}
    return kept | {"PYTHONPATH": str(ROOT)} | {name.upper(): str(value) for name, value in settings.items()}


@contextlib.contextmanager
def celery_worker(cwd: Path, *arguments: str, app: str = "worker", **settings: object) -> Iterator[Worker]:
    """Run `celery -A APP worker …` until the block ends; it is ready when the block begins."""
    log_path = cwd / "worker.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", app, "worker", *arguments],
            cwd=cwd,
            env=environment(**{"data_dir": cwd / "data", "metrics_port": 0} | settings),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    worker = Worker(process, log_path)
    try:
        until(lambda: " ready." in worker.log or not worker.running, f"a ready worker: {worker.log}", 60)
        assert worker.running, worker.log
        yield worker
    finally:
        if worker.running:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
