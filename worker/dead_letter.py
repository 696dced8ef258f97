"""From a message that nobody answers to a letter in the list of dead ones (millrace.dead_letters).

It is written before the message is acknowledged. Where Redis does not take it the message goes back to its queue.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import redis
from kombu.utils.json import dumps

from millrace import dead_letters, presence
from millrace.errors import Unreachable
from millrace.settings import get_settings

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds for Redis: the worker's main process stands still meanwhile


def keep(message: Any, code: str, reason: str, *, queues: Any, worker: str, attempts: int = 0) -> bool:
    """Put kombu's message into the list, and return whether it is there.

    Args:
        message: As it came; it must not be acknowledged yet.
        code: See `dead_letters.Letter`.
        reason: What happened; it is shown with the prompt alone, so it may quote that.
        queues: The names of the queues that the application knows.
        worker: The node's name.
        attempts: How often the task was run.
    """
    task_id, task = identity(message)
    queue = str((message.delivery_info or {}).get("routing_key"))
    letter = dead_letters.Letter(
        task_id=task_id,
        task=task,
        # A message without a queue of ours was in the one of plain producers.
        queue=queue if queue in queues else "celery",
        when=time.time(),
        code=code,
        reason=reason,
        attempts=attempts,
        worker=worker,
        message=dumps(message._raw),
    )
    if _write(letter):
        return True
    log.error("The message of task %s goes back to its queue.", task_id or "without an id")
    return False


def keep_text(text: str, reason: str, *, queue: str, worker: str) -> bool:
    """Put something into the list that lay in a queue and is no message; return whether it is there."""
    letter = dead_letters.Letter(
        task_id="",
        task="",
        queue=queue,
        when=time.time(),
        code="undecodable",
        reason=reason,
        attempts=0,
        worker=worker,
        message=text,
    )
    return _write(letter)


def _write(letter: dead_letters.Letter) -> bool:
    settings = get_settings()
    who = (letter.task_id or "without an id", letter.task or "without a name", letter.code)
    try:
        with presence.connect(settings, PATIENCE) as client:
            id_, gone = dead_letters.keep(client, settings, letter)
    except (Unreachable, redis.RedisError) as error:
        log.error("Task %s (%s) failed for good (%s), but Redis did not take it as a dead letter: %s", *who, error)
        return False
    log.error(
        "Task %s (%s) is a dead letter (%s). `millrace dlq show %s` says why, `millrace dlq retry %s` sends it again.",
        *who,
        id_,
        id_,
    )
    if gone:
        log.warning("DLQ_MAX or DLQ_DAYS is reached; %d dead letters had to go: %s", len(gone), ", ".join(gone))
    return True


def identity(message: Any) -> tuple[str, str]:
    """Return the id and name of a message's task, each empty where it has none that can be shown."""
    headers = message.headers if isinstance(message.headers, dict) else {}
    if "task" not in headers:  # Celery's protocol 1, or no task at all
        try:
            headers = message.payload
        except Exception:  # noqa: BLE001  # whatever a decoder raises: it cannot be read
            headers = {}
    return _word(headers, "id"), _word(headers, "task")


def _word(headers: Any, name: str) -> str:
    value = headers.get(name) if isinstance(headers, dict) else None
    return value if isinstance(value, str) and value.isprintable() else ""
