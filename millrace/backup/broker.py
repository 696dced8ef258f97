"""The content of Redis: read at one instant, and put back by the protocol alone.

By protocol it is one way for a container, an embedded and a remote Redis, and its append-only file
records the way back like any other write: a copied dump.rdb is not even looked at where there is one.

What carries messages, lists, hashes and sorted sets, is read by one script, so that no message is between
two places. A string (a result, mostly) stands for itself; strings are read after it, in pieces. A task
that ends in between is then both waiting and answered, and runs again; the other way round it were lost.

Back: every key is restored under a name of its own beside what is there, and one script then drops
the old ones and renames the new ones. Whatever Redis may refuse, it refuses before anything is changed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import redis
from redis.client import NEVER_DECODE

from millrace import presence
from millrace.errors import InputError, Unreachable

#: What is about this moment only: neither saved nor touched. Heartbeats and troubles of workers, whose turn
#: it is to reap, what is held, and kombu's lock on `unacked`.
PRESENT = (presence.PREFIX, presence.TROUBLE_PREFIX, "millrace:reap", "millrace:hold", "unacked_mutex")
#: Restored keys wait under this, and a word of their restore's own, until all of them are there.
STAGED = "millrace:restore:"
#: Redis needs twice this in memory while it answers, beside its data, and does nothing else for some seconds.
MOST = 256 * 2**20  # bytes
PATIENCE = 300.0  # seconds that Redis may take for one answer
WRITTEN = 30.0  # seconds that Redis may take to write its append-only file
_STRINGS = 500  # keys read at once
_LOOK = 0.05  # seconds between looks
_PIECE = 8 * 2**20  # bytes read of strings, or sent, at once
_TOO_LARGE = "TOOLARGE"


class Key(msgspec.Struct, frozen=True):
    """A key of Redis: its value as DUMP gives it, and when it expires in ms since 1970, -1 for never."""

    key: bytes
    expires_at: int
    dump: bytes


# ARGV: the most bytes in memory, then prefixes to leave out. KEYS: these alone; without any, all but strings.
_READ = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function wanted(key)
  for i = 2, #ARGV do
    if key:sub(1, #ARGV[i]) == ARGV[i] then return false end
  end
  return redis.call('TYPE', key).ok ~= 'string'
end
local found, size = {}, 0
for _, key in ipairs(#KEYS > 0 and KEYS or redis.call('KEYS', '*')) do
  if #KEYS > 0 or wanted(key) then
    local usage = redis.call('MEMORY', 'USAGE', key)
    if usage then
      -- Before the dump: the dump of one very long queue alone could take all memory.
      size = size + usage
      if size > tonumber(ARGV[1]) then return redis.error_reply('TOOLARGE') end
      local left = redis.call('PTTL', key)
      found[#found + 1] = {key, left < 0 and -1 or now + left, redis.call('DUMP', key)}
    end
  end
end
return found
"""

# ARGV: the prefix of staged keys, how many there must be at least, then prefixes to leave alone.
_SWITCH = """
local staged, old = {}, {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kept = false
  for i = 3, #ARGV do kept = kept or key:sub(1, #ARGV[i]) == ARGV[i] end
  if key:sub(1, #ARGV[1]) == ARGV[1] then
    staged[#staged + 1] = key
  elseif not kept then
    old[#old + 1] = key
  end
end
if #staged < tonumber(ARGV[2]) then return redis.error_reply('another restore has dropped what was staged') end
for _, key in ipairs(old) do redis.call('UNLINK', key) end
for _, key in ipairs(staged) do redis.call('RENAME', key, key:sub(#ARGV[1] + 1)) end
return #staged
"""


def read(client: redis.Redis) -> Iterator[Key]:
    """Yield every key of the database; a string that is written meanwhile may come twice.

    Raises:
        Unreachable: Queues and the like are larger than MOST (redis_too_large).
        redis.RedisError: For `presence.connect` to put into words.
    """
    left_out = (STAGED, *PRESENT)
    try:
        yield from _evaluate(client, (), MOST, *left_out)
    except redis.ResponseError as error:
        if _TOO_LARGE not in str(error):
            raise
        raise Unreachable(
            f"The queues in Redis hold more than {MOST >> 20} MiB, too much to be read at one instant.",
            "Let workers empty them first.",
            code="redis_too_large",
        ) from error
    prefixes = tuple(prefix.encode() for prefix in left_out)
    for found in _scan(client, "TYPE", "string"):
        yield from _strings(client, [key for key in found if not key.startswith(prefixes)])


def _strings(client: redis.Redis, keys: Sequence[bytes]) -> Iterator[Key]:
    """Yield strings in pieces of some _PIECE bytes, however long each of them is."""
    if not keys:
        return
    try:
        yield from _evaluate(client, keys, _PIECE if len(keys) > 1 else 2**62)
    except redis.ResponseError as error:
        if _TOO_LARGE not in str(error):
            raise
        half = len(keys) // 2
        yield from _strings(client, keys[:half])
        yield from _strings(client, keys[half:])


def _evaluate(client: redis.Redis, keys: Sequence[bytes], *arguments: Any) -> list[Key]:
    return [Key(*entry) for entry in _ask(client, "EVAL", _READ, len(keys), *keys, *arguments)]


def _scan(client: redis.Redis, *chosen: str) -> Iterator[list[bytes]]:
    cursor = 0
    while True:
        cursor, keys = _ask(client, "SCAN", cursor, "COUNT", _STRINGS, *chosen)
        yield keys
        if not cursor:
            return


def _ask(client: Any, *command: Any) -> Any:
    return client.execute_command(*command, **{NEVER_DECODE: True})


class Stage:
    """Keys that are there already, and not yet under their names."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._prefix = f"{STAGED}{secrets.token_hex(8)}:"
        self._lasting = False

    def put(self, keys: Iterable[Key]) -> None:
        """Restore keys where nobody looks; those that have expired are left out.

        Raises:
            InputError: This Redis cannot read what another one has saved (backup_redis_version).
            Unreachable: There is no room for them (redis_full).
            redis.RedisError: For `presence.connect` to put into words.
        """
        seconds, microseconds = self._client.time()
        now = seconds * 1000 + microseconds // 1000
        pipeline: Any = self._client.pipeline(transaction=False)
        size = 0
        for key in keys:
            if 0 <= key.expires_at <= now:
                continue
            self._lasting = self._lasting or key.expires_at < 0
            name = self._prefix.encode() + key.key
            pipeline.execute_command("RESTORE", name, max(key.expires_at, 0), key.dump, "REPLACE", "ABSTTL")
            size += len(key.dump)
            if size >= _PIECE:
                self._send(pipeline)
                size = 0
        self._send(pipeline)
        # Messages that workers held: delivered in 1970, as it were, so that the first worker to start puts
        # back what nobody holds any more at once, and not after the visibility timeout of two hours.
        index = f"{self._prefix}unacked_index"
        _ask(self._client, "ZUNIONSTORE", index, 1, index, "WEIGHTS", 0)

    def _send(self, pipeline: Any) -> None:
        # Not raised by the pipeline: its message would hold what was sent.
        for answer in pipeline.execute(raise_on_error=False):
            if not isinstance(answer, Exception):
                continue
            if "DUMP payload" in str(answer) or "Bad data format" in str(answer):
                raise InputError(
                    f"Redis {version(self._client)} cannot read the backup: a newer one, or one of another kind, "
                    "has written it.",
                    "Restore into a Redis of that version or a newer one; nothing was changed.",
                    code="backup_redis_version",
                )
            if isinstance(answer, redis.exceptions.OutOfMemoryError):
                raise Unreachable(
                    "Redis has no room for the backup beside what it holds; nothing was changed.",
                    "Raise its maxmemory, or empty it first: its content is replaced anyway.",
                    code="redis_full",
                )
            raise answer

    def switch(self) -> int:
        """Put what is staged in the place of everything else, at one instant; return how many keys.

        Raises:
            redis.RedisError: It is not there any more, or Redis does not answer.
        """
        return int(_ask(self._client, "EVAL", _SWITCH, 0, self._prefix, int(self._lasting), *PRESENT))

    def written(self) -> None:
        """Wait until the append-only file, where there is one, would bring this back after a crash of Redis.

        A write waits in Redis's memory while the one before is being synced, which a slow disk makes long.

        Raises:
            redis.RedisError: It takes too long, or Redis does not answer.
        """
        deadline = time.monotonic() + WRITTEN
        while self._client.info("persistence").get("aof_buffer_length"):
            if time.monotonic() > deadline:
                raise redis.TimeoutError(f"its append-only file is not written within {WRITTEN:g} s")
            time.sleep(_LOOK)

    def discard(self) -> None:
        """Drop what is staged."""
        for keys in _scan(self._client, "MATCH", f"{self._prefix}*"):
            if keys:
                _ask(self._client, "UNLINK", *keys)


def version(client: redis.Redis) -> str:
    """Return Redis's version, in words."""
    return str(client.info("server").get("redis_version", "of an unknown version"))
