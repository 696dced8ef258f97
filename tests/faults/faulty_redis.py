"""A Redis that can be made to fail in every way of its own."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from millrace.embedded import find_redis
from tests.services import until


class FaultyRedis:
    """A Redis at one port, with one folder, that starts with other arguments each time.

    Args:
        folder: Where its data lies; made where it is not.
        port: Of loopback.
        password: Its password; "" for none.
    """

    def __init__(self, folder: Path, port: int, password: str = "") -> None:
        self.folder, self.port, self.password = folder, port, password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"redis://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}/0"

    def launch(self, *arguments: str) -> None:
        """Start it, and return at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [find_redis(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--enable-debug-command", "yes", "--enable-protected-configs", "yes"]
        if self.password:
            command += ["--requirepass", self.password, "--masterauth", self.password]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)

    def start(self, *arguments: str) -> None:
        """Start it, and return when it answers."""
        self.launch(*arguments)
        until(self.answers, f"an answer of Redis at {self.url}", 60)

    def answers(self) -> bool:
        """Whether it answers a ping, and is not loading."""
        with self.client(timeout=2) as client, contextlib.suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def kill(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def client(self, timeout: float = 30.0) -> Iterator[redis.Redis]:
        """Yield a client that tries nothing twice."""
        client = redis.Redis.from_url(
            self.url, socket_timeout=timeout, decode_responses=True, retry=Retry(NoBackoff(), 0)
        )
        try:
            yield client
        finally:
            client.close()

    def set(self, **config: Any) -> None:
        """Set its configuration; `_` stands for `-`."""
        with self.client() as client:
            for name, value in config.items():
                client.config_set(name.replace("_", "-"), value)
