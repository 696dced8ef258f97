"""A hold: for a while no worker asks the engine for anything, because it is being changed.

One key in Redis, `millrace:hold`, renewed by whoever holds it and gone soon after its holder. Workers look
at every heartbeat: they take no more messages from the queues that need the engine, let running sessions
drain, and say in their heartbeat which hold they have seen and how many such tasks they still have. What
is queued stays queued. Nothing depends on a hold for its exactness: rows whose engine goes away wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import redis

from millrace import presence
from millrace.errors import Unreachable
from millrace.settings import Settings

log = logging.getLogger(__name__)

KEY = "millrace:hold"
TTL = 30  # seconds
RENEW = 2.0  # seconds
LOOK = 0.2  # seconds between looks at the workers
#: Seconds before nobody is at work because nobody has said so: longer than a worker's heartbeat, which a Redis
#: that has lost its memory, or a worker that is just starting, has not given yet.
SETTLE = 3.0

#: Renews the hold, or takes it again where Redis has lost it; 0 where somebody else has it.
_RENEW = """
local held = redis.call('get', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""
#: Ends the hold if it is still ours.
_RELEASE = """
if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end
"""

#: Queues whose tasks need the engine. On the others, merges and the reaper go on.
QUEUES = ("interactive", "celery", "batch")


def current(client: redis.Redis) -> str | None:
    """Return the token of the hold that is on, None where there is none."""
    value = client.get(KEY)
    return str(json.loads(str(value))["token"]) if value else None


class Hold:
    """A hold that is on; `token` names it."""

    def __init__(self, settings: Settings, token: str) -> None:
        self._settings = settings
        self.token = token

    def busy(self) -> list[dict[str, Any]]:
        """Return the workers that have not seen the hold yet, or still have tasks that need the engine.

        Raises:
            Unreachable: Redis does not answer.
        """
        return [
            entry
            for entry in presence.alive(self._settings)
            if set(entry["queues"]) & set(QUEUES) and (entry.get("hold") != self.token or entry.get("engine_tasks"))
        ]

    def wait(self, seconds: float, say: Callable[[list[dict[str, Any]]], None] = lambda busy: None) -> bool:
        """Return whether every worker has come to rest within `seconds`; `say` is told of those that have not."""
        settled, deadline = time.monotonic() + SETTLE, time.monotonic() + seconds
        while (busy := self.busy()) or time.monotonic() < settled:
            say(busy)
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK)
        return True


@contextlib.contextmanager
def hold(settings: Settings, why: str) -> Iterator[Hold]:
    """Hold the work while the block runs.

    Raises:
        Unreachable: Redis does not answer, or somebody else holds the work (held).
    """
    token = secrets.token_hex(8)
    value = json.dumps({"token": token, "why": why})
    with presence.connect(settings) as client:
        if not client.set(KEY, value, nx=True, ex=TTL):
            other = json.loads(str(client.get(KEY) or '{"why": "something else"}'))["why"]
            raise Unreachable(
                f"The work is held already: {other}.", f"Wait for it; a dead holder's ends in {TTL} s.", code="held"
            )
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW):
            try:
                with presence.connect(settings) as client:
                    ours = client.eval(_RENEW, 1, KEY, value, TTL)
            except Unreachable as error:
                log.warning("%s The hold is not renewed.", error.message)
            else:
                if not ours:
                    log.warning("Somebody else holds the work now: we were away for too long.")
                    return

    renewer = threading.Thread(target=renew, daemon=True)
    renewer.start()
    try:
        yield Hold(settings, token)
    finally:
        done.set()
        renewer.join()
        try:
            with presence.connect(settings) as client:
                client.eval(_RELEASE, 1, KEY, value)
        except Unreachable as error:
            log.warning("%s The hold ends by itself in %d s.", error.message, TTL)
