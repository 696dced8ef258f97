"""Celery's way to Redis, where it loses messages: kombu 5.7 pops one, and only then looks whether it can do with it.

What is no message of Celery's raises in the worker's loop, which ends the worker. When Redis is full it takes
no note that somebody has the message, and no acknowledgement either (a transaction needs memory); both end the
connection. A message is gone, or runs again although it was answered. Here the first is a dead letter, and notes
are written all the same: for each of them its message has left Redis.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from time import time
from typing import Any

import msgspec
import redis
from kombu.transport import redis as transport
from kombu.transport.virtual import QoS as VirtualQoS
from kombu.utils.json import dumps

from worker import dead_letter

log = logging.getLogger(__name__)

# ARGV: time, delivery tag, message. The first write adds nothing: after it, Redis takes the others although it is
# full.
_NOTE = """
redis.call('ZREM', KEYS[1], '')
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
"""

# ARGV: delivery tag.
_FORGET = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
"""


class _Place(msgspec.Struct):
    exchange: str | None
    routing_key: str | None


class _Properties(msgspec.Struct):
    delivery_tag: str | int
    delivery_info: _Place
    body_encoding: str | None = None


class _Envelope(msgspec.Struct):
    """What kombu takes for granted."""

    body: str
    properties: _Properties
    headers: dict[str, Any] | None = None


class QoS(transport.QoS):
    """Notes of the messages that this worker has."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note that we have a message."""
        try:
            super().append(message, delivery_tag)
        except redis.ResponseError as error:
            log.warning("Redis did not note message %s: %s", delivery_tag, error)
            place = message.delivery_info
            noted = dumps([message._raw, place["exchange"], place["routing_key"]])
            self._run(_NOTE, time(), delivery_tag, noted)
            VirtualQoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Forget a message."""
        self._run(_FORGET, delivery_tag)
        VirtualQoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Forget a message, or put it back."""
        if requeue:
            super().reject(delivery_tag, requeue=True)
        else:
            self.ack(delivery_tag)

    def _run(self, script: str, *arguments: Any) -> None:
        with self.channel.conn_or_acquire() as client:
            client.eval(script, 2, self.unacked_index_key, self.unacked_key, *arguments)


class Channel(transport.Channel):
    """A channel that gives nothing to Celery but messages."""

    QoS = QoS

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)
        if asynchronous:  # the one that pops
            client.set_response_callback("BRPOP", self._popped)
        return client

    def _popped(self, reply: Any, **_: Any) -> Any:
        if not reply:
            return None
        key, item = reply
        reason = _unreadable(item)
        if not reason:
            return tuple(reply)
        text = item.decode(errors="backslashreplace") if isinstance(item, bytes) else item
        name = key.decode() if isinstance(key, bytes) else key
        queue = name.rsplit(self.sep, 1)[0]
        if not dead_letter.keep_text(text, reason, queue=queue, worker=self.connection.client.hostname or ""):
            with self.conn_or_acquire() as client:
                client.lpush(key, item)
        return None


def _unreadable(item: bytes | str) -> str:
    """Return why something is no message; empty for one."""
    try:
        try:
            envelope = msgspec.json.decode(item, type=_Envelope)
        except msgspec.DecodeError:  # Python's JSON knows more numbers
            envelope = msgspec.convert(json.loads(item), _Envelope)
        encoding = envelope.properties.body_encoding
        if encoding == "base64":
            base64.b64decode(envelope.body.encode())
        elif encoding:
            return f"The message's body is in an unknown encoding, {encoding}."
    except (msgspec.MsgspecError, binascii.Error, ValueError, RecursionError) as error:
        return f"This is no message of Celery's: {error}."
    return ""


def install() -> None:
    """Have this process's connections use the channel above."""
    transport.Transport.Channel = Channel
