"""The command line as its users meet it: a process with a folder, an environment, and signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import redis

from tests.services import ROOT, until

T = TypeVar("T")

MILLRACE = str(Path(sys.executable).with_name("millrace"))
COMMAND = 180.0  # seconds a command may take
END = 180.0  # seconds a stack may take to end

# Nobody listens at a port that is bound and not listened at, and nobody else can take it.
_NOBODY = socket.socket()
_NOBODY.bind(("127.0.0.1", 0))
NOBODY = int(_NOBODY.getsockname()[1])


def redis_answers(url: str) -> bool:
    """Whether a Redis answers there."""
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


class Done:
    """A command that has ended."""

    def __init__(self, arguments: tuple[str, ...], code: int, out: str, err: str) -> None:
        self.arguments, self.code, self.out, self.err = arguments, code, out, err
        assert "Traceback" not in err, f"{self}"
        assert not re.search(r"(?m)^(\S+:\d+: )?\w*Warning: ", err), f"{self}"

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"--json is one object on one line: {self}"
        value = json.loads(lines[0])
        assert isinstance(value, dict), f"{self}"
        return value

    @property
    def error(self) -> Any:
        """The error of `--json`."""
        return self.json["error"]

    def __repr__(self) -> str:
        return f"millrace {' '.join(self.arguments)} → {self.code}\n{self.out}{self.err}"


class Running:
    """A command that still runs; what it prints lies in files."""

    def __init__(self, arguments: tuple[str, ...], process: subprocess.Popen[str], out: Path, err: Path) -> None:
        self.arguments, self.process = arguments, process
        self._out, self._err = out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until(self, condition: Callable[[], T], what: str, seconds: float = 120.0) -> T:
        """Wait for a condition; fail at once when the command ends before."""

        def look() -> T | None:
            if answer := condition():
                return answer
            assert self.process.poll() is None, f"it has ended: {self}"
            return None

        answer = until(look, lambda: f"{what}: {self}", seconds)
        assert answer is not None
        return answer

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = END) -> Done:
        """Wait for the end of the command."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s: {self}") from None
        return Done(self.arguments, code, self.out, self.err)

    def __repr__(self) -> str:
        return f"millrace {' '.join(self.arguments)} → {self.process.poll()}\n{self.out}{self.err}"


class Cli:
    """The `millrace` command in a folder of its own, with these settings and no others."""

    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = folder / "millrace-data"
        self.program = [MILLRACE]
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            # Celery warns of root, whom it does not know from a container's only user.
            "PYTHONWARNINGS": "error,ignore:You're running the worker with superuser privileges",
            **{name: str(value) for name, value in settings.items()},
        }
        self._started = 0

    def impatient(self, module: str, **seconds: float) -> None:
        """Let commands from now on wait less long: constants of a module of ours."""
        lines = [f"import {module}"]
        lines += [f"{module}.{name} = {value}" for name, value in seconds.items()]
        lines += ["from millrace.cli import main", "main()"]
        self.program = [sys.executable, "-c", "\n".join(lines)]

    def run(
        self, *arguments: str | Path, stdin: str | bytes = "", seconds: float = COMMAND, wrap: tuple[str, ...] = ()
    ) -> Done:
        """Run a command to its end."""
        words = tuple(map(str, arguments))
        done = subprocess.run(
            [*wrap, *self.program, *words],
            cwd=self.folder,
            env=self.environment,
            input=stdin if isinstance(stdin, bytes) else stdin.encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        return Done(words, done.returncode, done.stdout.decode(), done.stderr.decode())

    @contextlib.contextmanager
    def start(self, *arguments: str | Path) -> Iterator[Running]:
        """Start a command; the end of the block ends it, whatever became of the test."""
        words = tuple(map(str, arguments))
        self._started += 1
        outputs = self.folder.parent / f"{self.folder.name}-{self._started}"
        outputs.mkdir()
        with (outputs / "out").open("w") as out, (outputs / "err").open("w") as err:
            process = subprocess.Popen(
                [*self.program, *words],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        try:
            yield Running(words, process, outputs / "out", outputs / "err")
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END)
            if process.poll() is None:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def up(self) -> Iterator[tuple[Running, dict[str, Any]]]:
        """Run `millrace up`, and yield it with what it said of itself once it was ready."""
        with self.start("up", "--json") as running:
            running.until(lambda: running.out.endswith("\n"), "a stack that is ready", 90)
            yield running, json.loads(running.out)

    def processes(self) -> list[psutil.Process]:
        """Return what runs in our folder: nothing that a stack starts leaves it, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                cwd = Path(process.cwd())
                if cwd == self.folder or self.folder in cwd.parents:
                    found.append(process)
        return found

    def gone(self, seconds: float = END) -> None:
        """Wait until nothing of ours runs any more."""
        until(lambda: not self.processes(), lambda: f"still there: {self.describe()}", seconds)

    def describe(self) -> list[str]:
        """Return what runs, in words."""
        words = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words.append(f"{process.pid} {' '.join(process.cmdline())}")
        return words

    def kill_all(self) -> None:
        """End what a failed test has left."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file into our folder."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read a JSONL file of our folder."""
        return [json.loads(line) for line in (self.folder / name).read_bytes().splitlines()]


def request(number: int, content: str | None = None, **body: Any) -> dict[str, Any]:
    """Return one row of OpenAI's Batch format."""
    messages = [{"role": "user", "content": content if content is not None else f"Question {number}?"}]
    return {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, "max_tokens": 8} | body,
    }


def batch_file(count: int, **body: Any) -> str:
    """Return a file of so many rows."""
    return "".join(json.dumps(request(number, **body)) + "\n" for number in range(count))
