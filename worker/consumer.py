"""Celery's consumer, with one crash of Celery 5.7.0 mended, and nothing dropped.

Celery 5.7.0 logs a message that it cannot use, prompt included, and throws it away; one whose body is JSON of
another shape ends the worker. Here each of them is a dead letter (millrace.dead_letters): after a deploy in
which producers were earlier than workers, `millrace dlq retry --all` runs what the old workers did not know.

The crash: when Redis goes away while a prefork worker is partly busy and remote control is on, 5.7.0 takes the client
from the lost connection's transport and then still uses it: when it closes the connection, and when a task
that was running acknowledges its message. Each time kombu raises AttributeError ("'NoneType' object has no
attribute 'hostname'"), which Celery does not expect there, and the worker exits with 1. Introduced by
celery#10242. tests/integration/test_redis_outage.py keeps watch; drop this with the release that mends it.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import msgspec
from celery import signals
from celery.exceptions import CPendingDeprecationWarning, InvalidTaskError, NotRegistered
from celery.utils.objects import Bunch
from celery.worker.consumer import Consumer as CeleryConsumer

from worker import channel, dead_letter

log = logging.getLogger(__name__)

REFUSED = 2.0  # seconds between two tries at a Redis that refuses
LONGEST_PAUSE = 4.0  # seconds between two tries at a Redis that does not answer


class _Headers(msgspec.Struct):
    """Those of a task's message that Celery uses without a look at them."""

    id: str
    task: str
    retries: int | None = None
    timelimit: tuple[float | None, float | None] | None = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None


class Consumer(CeleryConsumer):
    """Celery's consumer, that survives the loss of its connection and what it cannot read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        channel.install()
        super().__init__(*args, **kwargs)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Clean up after a lost connection; Celery then connects again."""
        transport = self.connection.transport
        client = transport.client
        try:
            with warnings.catch_warnings():
                # It warns of a default that will change; we have set it (worker.app).
                warnings.simplefilter("ignore", CPendingDeprecationWarning)
                super().on_connection_error_after_connected(exc)
        except AttributeError as error:
            # self.connection is None by now, so the reconnect starts from nothing, as it should.
            log.warning("The lost connection to Redis could not be closed: %s.", error)
        # Tasks that are still running acknowledge through the old channel, once Redis is back.
        transport.client = client

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, trying every few seconds; Celery's pause grows to half a minute, which Redis's return would cost."""
        conn.ensure_connection = functools.partial(conn.ensure_connection, interval_max=LONGEST_PAUSE)
        return super().ensure_connected(conn)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Wait before the next try at a Redis that answers but refuses (OOM, MISCONF, READONLY).

        Celery would try at once, five times a second, and log a traceback every second of a whole night.
        """
        super().on_connection_error_before_connected(exc)
        time.sleep(REFUSED)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Return what is called with each message; those that would end the worker do not come through."""
        handle = super().create_task_handler(*args, **kwargs)

        def checked(message: Any) -> None:
            try:
                wrong = self._wrong(message)
            except Exception:  # noqa: BLE001  # whatever a decoder raises, Celery meets it again and tells us
                wrong = ""
            if wrong:
                self.on_invalid_task(None, message, InvalidTaskError(wrong))
            else:
                handle(message)

        return checked

    def _wrong(self, message: Any) -> str:
        """Return why a message for a task we have is none: Celery would fail at it, and end, or wait for ever."""
        headers = message.headers
        if "task" in headers:
            body = message.payload
        else:  # Celery's protocol 1: all of it is in the body
            headers = body = message.payload
            if not isinstance(body, dict) or "task" not in body:
                return ""
        if isinstance(headers["task"], str) and headers["task"] not in self.app.tasks:
            return ""
        try:
            msgspec.convert(headers, _Headers)
        except msgspec.ValidationError as error:
            return f"The message's headers are not a task's: {error}."
        if isinstance(body, dict):
            body = (body.get("args", []), body.get("kwargs", {}), {})
        if not isinstance(body, list | tuple) or len(body) != 3:
            return "The message's body is not a list of args, kwargs and options."
        args, kwargs, options = body
        fits = isinstance(args, list | tuple) and isinstance(kwargs, dict) and isinstance(options, dict | None)
        return "" if fits else "The message's args, kwargs and options are not a list and two objects."

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message for a task that this worker does not have; whoever waits for it hears so."""
        task_id, name = dead_letter.identity(message)
        if not self._keep(message, "unknown_task", f"This worker has no task {name or 'of that name'}."):
            return
        if task_id:
            self.app.backend.mark_as_failure(
                task_id,
                NotRegistered(name),
                request=Bunch(
                    name=name,
                    chord=None,
                    root_id=message.headers.get("root_id"),
                    correlation_id=message.properties.get("correlation_id"),
                    reply_to=message.properties.get("reply_to"),
                    errbacks=None,
                ),
            )
            if self.event_dispatcher:
                self.event_dispatcher.send("task-failed", uuid=task_id, exception=f"NotRegistered({name!r})")
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Keep a message that is not Celery's."""
        self._keep(message, "unknown_message", "The message names no task.")
        signals.task_rejected.send(sender=self, message=message, exc=None)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keep a message whose body cannot be read."""
        self._keep(message, "undecodable", f"The message's body cannot be read: {exc}")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message that has a body of another shape, or of a kind that is not accepted."""
        self._keep(message, "wrong_message", str(exc))
        signals.task_rejected.send(sender=self, message=message, exc=exc)

    def _keep(self, message: Any, code: str, reason: str) -> bool:
        """Make a dead letter of a message, or give it back; return whether it is one."""
        kept = dead_letter.keep(message, code, reason, queues=self.app.amqp.queues, worker=self.hostname)
        message.reject_log_error(log, self.connection_errors, requeue=not kept)
        return kept
