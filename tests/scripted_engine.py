"""A scripted engine for tests: a subprocess that is ended whatever becomes of the test."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.services import free_port

START_SECONDS = 90.0
END_SECONDS = 60.0
CONDITION_SECONDS = 60.0


class Engine:
    """A running scripted engine."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, pid: int, log_path: Path, stderr: Path) -> None:
        self.process = process
        #: The base URL, which ends in /v1.
        self.url = url
        #: The URL without /v1, for /health, /metrics, /props, …
        self.root = url.removesuffix("/v1")
        self.pid = pid
        self.log_path = log_path
        self._stderr = stderr

    def script(self, **changes: Any) -> dict[str, Any]:
        """Change the script while it runs; `rules=[…]` replaces all rules. Returns the stats."""
        return self._control("/_script", json.dumps(changes).encode())

    def stats(self) -> dict[str, Any]:
        """Return the counts since the start and the load of this moment."""
        return self._control("/_script/stats")

    def log(self) -> list[dict[str, Any]]:
        """Return the request log, which is there after a crash too."""
        return [json.loads(line) for line in self.log_path.read_bytes().splitlines()]

    def stderr(self) -> str:
        """Return what it wrote to stderr."""
        return self._stderr.read_text()

    def wait_for(
        self, condition: Callable[[dict[str, Any]], bool], seconds: float = CONDITION_SECONDS
    ) -> dict[str, Any]:
        """Wait until the stats meet a condition, and return them."""
        deadline = time.monotonic() + seconds
        while not condition(stats := self.stats()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s; the last stats were {stats}")
            time.sleep(0.01)
        return stats

    def kill(self) -> int:
        """End it as a crash would, without a word to its clients."""
        self.process.kill()
        return self.process.wait(END_SECONDS)

    def stop(self) -> int:
        """End it in good order and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(END_SECONDS)

    def _control(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        request = urllib.request.Request(self.root + path, data=body, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=CONDITION_SECONDS) as answer:
                stats: dict[str, Any] = json.load(answer)
                return stats
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{error.code}: {error.read().decode()}") from None


@contextlib.contextmanager
def scripted_engine(port: int = 0, **script: Any) -> Iterator[Engine]:
    """Start a scripted engine with these fields of `Script`, and end it at the end of the block.

    Args:
        port: 0 for a free one; another to come back at the same place after a crash.
        script: Fields of `millrace.engine.scripted.Script`; `log_path` is set where not given.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scripted-")))
        script.setdefault("log_path", str(folder / "log.jsonl"))
        (folder / "script.json").write_text(json.dumps(script))
        command = [sys.executable, "-m", "millrace.engine.scripted", "--port", str(port or free_port())]
        command += ["--script", str(folder / "script.json"), "--die-with-stdin"]
        stderr = stack.enter_context((folder / "stderr").open("w+b"))
        process = stack.enter_context(
            # stdin is a pipe that we alone hold, so the engine ends with a test run that was killed.
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, bufsize=0)
        )
        # Popen's own exit waits for the process, so it must be dead by then.
        stack.callback(process.kill)
        ready = _ready_line(process, folder / "stderr")
        engine = Engine(process, ready["url"], ready["pid"], Path(script["log_path"]), folder / "stderr")
        yield engine
        if process.poll() is None:
            engine.stop()


def _ready_line(process: subprocess.Popen[bytes], stderr: Path) -> dict[str, Any]:
    assert process.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        piece = process.stdout.read(4096) if readable else b""
        if not piece:
            process.kill()
            code = process.wait(END_SECONDS)
            raise AssertionError(f"no ready line (exit code {code}): {stderr.read_text()}")
        line += piece
    ready: dict[str, Any] = json.loads(line)
    return ready
