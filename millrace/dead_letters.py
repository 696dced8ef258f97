"""Dead letters: messages of tasks that failed for good, or that no worker could read. Nothing is dropped.

    millrace:dlq            sorted set: id -> when, seconds since 1970
    millrace:dlq:letters    hash: id -> `Letter` as JSON

A letter holds the message as it lay in Redis, prompts included, so it can be sent again as it was. There are
at most DLQ_MAX of them, for at most DLQ_DAYS; the oldest go first. Every change is one script: a letter
is sent again once, however many ask for it, and whoever dies meanwhile loses nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
import uuid
from bisect import bisect
from typing import Any

import msgspec
import redis

from millrace.errors import NotFound
from millrace.settings import Settings

INDEX = "millrace:dlq"
LETTERS = "millrace:dlq:letters"

#: The header with the time at which a message was sent, seconds since 1970.
SENT_AT = "sent_at"

# kombu's: a queue is one list for each step, and step 0 has the queue's name alone.
_SEPARATOR = "\x06\x16"
_STEPS = (0, 3, 6, 9)
_DAY = 86400.0  # seconds

# ARGV: id, letter, its fingerprint, its time, the oldest time kept, the most letters, seconds until all are too old.
# The first write adds nothing: after it, Redis takes the others although it is full (maxmemory). The message
# leaves `unacked` afterwards, so it does not grow by that.
_KEEP = """
redis.call('ZREM', KEYS[1], '')
local id = ARGV[1]
local there = redis.call('HGET', KEYS[2], id)
if there and cjson.decode(there).fingerprint ~= ARGV[3] then id = id .. '-' .. ARGV[3] end
redis.call('HSET', KEYS[2], id, ARGV[2])
redis.call('ZADD', KEYS[1], ARGV[4], id)
local gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[5])
local over = redis.call('ZCARD', KEYS[1]) - #gone - tonumber(ARGV[6])
if over > 0 then
  for _, old in ipairs(redis.call('ZRANGE', KEYS[1], #gone, #gone + over - 1)) do gone[#gone + 1] = old end
end
for _, old in ipairs(gone) do
  redis.call('HDEL', KEYS[2], old)
  redis.call('ZREM', KEYS[1], old)
end
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('EXPIRE', KEYS[2], ARGV[7])
return {id, gone}
"""

# ARGV: id, the letter as it was read, the message. KEYS[3] is the list of its queue and priority.
# Sent before it is removed: a script that fails half-way is not undone.
_SEND = """
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('LPUSH', KEYS[3], ARGV[3])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
"""

_REMOVE = """
redis.call('ZREM', KEYS[1], ARGV[1])
return redis.call('HDEL', KEYS[2], ARGV[1])
"""


class Letter(msgspec.Struct):
    """One message that was not answered, and why."""

    task_id: str
    #: The task's name; empty where the message has none.
    task: str
    queue: str
    #: Seconds since 1970.
    when: float
    #: A stable word: worker_lost, time_limit, unknown_task, unknown_message, undecodable, wrong_message,
    #: wrong_arguments, exception, or the code of the error that the engine's answer was.
    code: str
    #: What happened. An engine may quote the prompt here.
    reason: str
    #: How often the task was run.
    attempts: int
    worker: str
    #: The message as Redis had it.
    message: str
    fingerprint: str = ""
    #: Its key in the list: the task's id, where that is one and no other message has it.
    id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what is shown to everybody: neither the message nor what was said of it."""
        return {
            "id": self.id,
            "task_id": self.task_id,
            "task": self.task,
            "queue": self.queue,
            "when": self.when,
            "code": self.code,
            "attempts": self.attempts,
            "worker": self.worker,
        }

    def contents(self) -> dict[str, Any]:
        """Return what the message holds: `args`, `kwargs` and `headers`, or `body` where it cannot be read."""
        try:
            message = json.loads(self.message)
            body = message["body"]
            if message.get("properties", {}).get("body_encoding") == "base64":
                body = base64.b64decode(body).decode()
            headers = message.get("headers") or {}
        except (ValueError, LookupError, TypeError, AttributeError):
            return {"body": self.message}
        try:
            decoded = json.loads(body)
            if isinstance(decoded, dict):  # Celery's protocol 1
                return {"args": decoded["args"], "kwargs": decoded["kwargs"], "headers": headers}
            args, kwargs, _ = decoded
        except (ValueError, LookupError, TypeError, RecursionError):
            return {"body": body, "headers": headers}
        return {"args": args, "kwargs": kwargs, "headers": headers}


def keep(client: redis.Redis, settings: Settings, letter: Letter) -> tuple[str, list[str]]:
    """Put a letter into the list; a message that is there already replaces itself.

    Args:
        client: Of Redis, with decoded responses.
        settings: For DLQ_MAX and DLQ_DAYS.
        letter: Without its id and fingerprint.

    Returns:
        Its id, and the ids of those that had to go for it.

    Raises:
        redis.RedisError: It is not in the list.
    """
    fingerprint = _fingerprint(letter.message)
    known = re.fullmatch(r"[\w.:@-]{1,128}", letter.task_id, re.ASCII)
    answer: Any = client.eval(
        _KEEP,
        2,
        INDEX,
        LETTERS,
        letter.task_id if known else f"message-{fingerprint}",
        msgspec.json.encode(msgspec.structs.replace(letter, fingerprint=fingerprint)).decode(),
        fingerprint,
        letter.when,
        _oldest(settings),
        settings.dlq_max,
        int(settings.dlq_days * _DAY),
    )
    return answer[0], answer[1]


def letters(client: redis.Redis, settings: Settings) -> list[Letter]:
    """Return all of them, the oldest first."""
    ids: Any = client.zrange(INDEX, _oldest(settings), "+inf", byscore=True)
    found: Any = client.hmget(LETTERS, ids) if ids else []
    return [_decode(id_, letter) for id_, letter in zip(ids, found, strict=True) if letter is not None]


def count(client: redis.Redis, settings: Settings) -> int:
    """Return how many there are."""
    number: Any = client.zcount(INDEX, _oldest(settings), "+inf")
    return int(number)


def letter(client: redis.Redis, id_: str) -> Letter:
    """Return one of them.

    Raises:
        NotFound: There is none of that id.
    """
    return _decode(id_, _read(client, id_))


def send_again(client: redis.Redis, id_: str) -> Letter:
    """Send a letter's message again, to its queue with its priority and task id, and remove the letter.

    It counts as a new one: it has all its attempts again and does not expire.

    Raises:
        NotFound: There is none of that id, or somebody else has just sent it.
    """
    found = _read(client, id_)
    old = _decode(id_, found)
    message, step = _renewed(old.message)
    list_key = old.queue + (f"{_SEPARATOR}{step}" if step else "")
    if not client.eval(_SEND, 3, INDEX, LETTERS, list_key, id_, found, message):
        raise NotFound(f"There is no dead letter {id_} any more.", "Somebody else has sent or removed it just now.")
    return old


def remove(client: redis.Redis, id_: str) -> None:
    """Remove a letter and the prompt in it.

    Raises:
        NotFound: There is none of that id.
    """
    if not client.eval(_REMOVE, 2, INDEX, LETTERS, id_):
        raise _unknown(id_)


def _read(client: redis.Redis, id_: str) -> str:
    found: Any = client.hget(LETTERS, id_)
    if found is None:
        raise _unknown(id_)
    return str(found)


def _unknown(id_: str) -> NotFound:
    return NotFound(f"There is no dead letter {id_}.", "`millrace dlq list` shows those there are.")


def _oldest(settings: Settings) -> float:
    return time.time() - settings.dlq_days * _DAY


def _decode(id_: str, found: str) -> Letter:
    return msgspec.structs.replace(msgspec.json.decode(found, type=Letter), id=id_)


def _fingerprint(message: str) -> str:
    """Return a short hash of a message's body; its headers change when it is delivered again."""
    try:
        body = json.dumps(json.loads(message)["body"])
    except (ValueError, LookupError, TypeError):
        body = message
    return hashlib.sha256(body.encode()).hexdigest()[:12]


def _renewed(message: str) -> tuple[str, int]:
    """Return a message as it was when it was first sent, but now, and the step of its priority."""
    try:
        parts = json.loads(message)
        headers, properties = parts["headers"], parts["properties"]
        for name, value in {"retries": 0, "expires": None, SENT_AT: time.time()}.items():
            if name in headers:
                headers[name] = value
        headers.pop("redelivered", None)
        # The key of a message that is not acknowledged: a copy that is still somewhere must not have the same.
        properties["delivery_tag"] = str(uuid.uuid4())
        properties["delivery_info"].pop("redelivered", None)
        priority = properties.get("priority")
    except (ValueError, LookupError, TypeError, AttributeError):
        return message, 0
    step = _STEPS[bisect(_STEPS, priority) - 1] if isinstance(priority, int) and priority >= 0 else 0
    return json.dumps(parts), step
