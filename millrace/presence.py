"""Who is at work: every worker process says so in Redis every few seconds, and the entry fades.

Keys: `millrace:worker:<name>`, a JSON object, kept for TTL seconds.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from millrace import processes
from millrace.errors import MillraceError, Unreachable
from millrace.settings import Settings, hide_password

TTL = 20  # seconds
PREFIX = "millrace:worker:"
TROUBLE_PREFIX = "millrace:trouble:"

log = logging.getLogger(__name__)


@contextmanager
def connect(settings: Settings, timeout: float = 5.0) -> Iterator[redis.Redis]:
    """Yield a Redis client.

    Raises:
        Unreachable: Redis does not answer, refuses the password (redis_password), or refuses to write
            (redis_refuses), inside the block too.
    """
    client = redis.Redis.from_url(
        settings.redis_dsn,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        decode_responses=True,
        # Redis() of redis-py 8 repeats a failed command ten times; whoever asks here wants the answer now.
        retry=Retry(NoBackoff(), 0),
    )
    address = hide_password(settings.redis_dsn)
    try:
        yield client
    except redis.AuthenticationError as error:
        raise Unreachable(
            f"Redis at {address} refuses the password: {str(error).rstrip('.')}.",
            "Correct REDIS_PASSWORD or REDIS_URL.",
            code="redis_password",
        ) from error
    except redis.ResponseError as error:
        raise Unreachable(
            f"Redis at {address} refuses a command: {str(error).rstrip('.')}.",
            "Look at its log and its disk.",
            code="redis_refuses",
        ) from error
    except redis.InvalidResponse as error:
        raise Unreachable(
            f"What answers at {address} is no Redis.",
            "Correct REDIS_URL or REDIS_HOST and REDIS_PORT.",
            code="redis_refuses",
        ) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Unreachable(
            f"Redis at {address} does not answer.",
            f"Start it ({'docker compose up -d --wait' if settings.compose_file else '`millrace up` has one'}), "
            "or correct REDIS_URL or REDIS_HOST and REDIS_PORT.",
            code="redis_unreachable",
        ) from error
    finally:
        client.close()


def ping(settings: Settings, timeout: float = 5.0) -> None:
    """Check that Redis answers.

    Raises:
        Unreachable: See `connect`.
    """
    with connect(settings, timeout) as client:
        client.ping()


def beat(client: redis.Redis, name: str, info: dict[str, Any]) -> None:
    """Say that the worker process `name` is alive, and how it is."""
    client.set(PREFIX + name, json.dumps(info), ex=TTL)


def fade(client: redis.Redis, name: str) -> None:
    """Say that the worker process `name` has ended."""
    client.delete(PREFIX + name)


class Trouble:
    """Tells whoever watches why rows wait; Redis forgets it when it is not repeated.

    It never raises: what cannot be told must not stop what is going on.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._key = f"{TROUBLE_PREFIX}{socket.gethostname()}:{os.getpid()}"
        self._told: str | None = None
        self._next = 0.0

    def tell(self, trouble: MillraceError | None) -> None:
        """Say that there is trouble, or with None that there is none any more."""
        now = time.monotonic()
        message = str(trouble) if trouble else None
        if message == self._told and (message is None or now < self._next):
            return
        try:
            with connect(self._settings, timeout=2) as client:
                if trouble is None:
                    client.delete(self._key)
                else:
                    client.set(self._key, json.dumps(trouble.as_dict()), ex=TTL)
        except Unreachable as error:
            log.debug("%s", error)
        self._told, self._next = message, now + TTL / 4


def trouble(settings: Settings) -> dict[str, Any] | None:
    """Return the trouble of a process that has some: code, message, hint; None where all is well.

    Raises:
        Unreachable: See `connect`.
    """
    with connect(settings) as client:
        keys = sorted(client.scan_iter(match=TROUBLE_PREFIX + "*", count=1000))
        told = [value for value in client.mget(keys) if value] if keys else []
    return dict(json.loads(told[0])) if told else None


def forget_trouble(settings: Settings) -> None:
    """Forget what processes told that are gone: a full disk, say, need not be full any more.

    Raises:
        Unreachable: See `connect`.
    """
    with connect(settings) as client:
        for key in client.scan_iter(match=TROUBLE_PREFIX + "*", count=1000):
            client.delete(key)


def at_work(settings: Settings) -> bool:
    """Whether workers are there that run batches, and will be: draining ones do not count.

    Raises:
        Unreachable: See `connect`.
    """
    served: set[str] = set()
    for entry in alive(settings):
        # Redis may still have the entries of those that a crash has ended.
        if not entry["draining"] and (entry["host"] != socket.gethostname() or processes.alive(entry["pid"])):
            served.update(entry["queues"])
    return {"batch", "maintenance"} <= served


def alive(settings: Settings) -> list[dict[str, Any]]:
    """Return what every live worker process says of itself, by name.

    Raises:
        Unreachable: See `connect`.
    """
    with connect(settings) as client:
        keys = sorted(client.scan_iter(match=PREFIX + "*", count=1000))
        values = client.mget(keys) if keys else []
    return [
        {"name": key.removeprefix(PREFIX), **json.loads(value)}
        for key, value in zip(keys, values, strict=True)
        if value
    ]
