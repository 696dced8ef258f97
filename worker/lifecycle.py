"""What a worker does besides its tasks: says that it is there, calls the reaper, tells runners to stop, counts.

The main process does all of it, on Celery's own timer: a thread beside a fork could leave a lock held
in the child for ever.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import time
from typing import Any

import billiard.pool
import redis
from celery import bootsteps, signals
from redis.backoff import NoBackoff
from redis.retry import Retry

from millrace import metrics, presence
from millrace.settings import get_settings
from worker import holding

log = logging.getLogger(__name__)

BEAT = 2.0  # seconds; a hold is seen as late as that
REAP = 15.0  # seconds between reaper tasks, over all workers together; less where leases are shorter
#: Seconds that a reaper task may wait. With fewer, a worker whose way to Redis is slow, or whose clock differs from
#: the sender's, throws every one of them away.
REAP_WAIT = 300.0
REAP_KEY = "millrace:reap"

# A process of the pool that ends waits until its parent has read its last result. A parent that is shutting
# down no longer reads, and billiard's own limit is 300 tenths of a second.
billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 20

#: One byte shared with the pool's children by fork: set, it asks runners to come to an end. Celery tells
#: a task nothing of a shutdown until its patience is over.
_draining = mmap.mmap(-1, 1)


def draining() -> bool:
    """Whether this worker is shutting down; true in its children too."""
    return _draining[0] != 0


def drain() -> None:
    """Ask runners to come to an end; for good."""
    _draining[0] = 1


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:  # by remote control, too
    drain()


class Presence(bootsteps.StartStopStep):
    """The consumer step that beats and calls the reaper."""

    requires = ("celery.worker.consumer:Tasks",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._timer: Any = None
        self._client: redis.Redis | None = None

    def start(self, parent: Any) -> None:
        """Begin to beat; called again after every reconnect."""
        self.stop(parent)
        self._client = redis.Redis.from_url(
            get_settings().redis_dsn,
            socket_timeout=2,
            socket_connect_timeout=2,
            decode_responses=True,
            # redis-py 8 repeats a command ten times; the consumer's own loop would stand still meanwhile.
            retry=Retry(NoBackoff(), 0),
        )
        self._started = time.time()
        self._timer = parent.timer.call_repeatedly(BEAT, self._beat, (parent,))
        self._beat(parent)

    def stop(self, parent: Any) -> None:
        """Stop beating, and say so while Redis still listens."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._client is not None:
            try:
                presence.fade(self._client, parent.hostname)
            except redis.RedisError as error:
                log.debug("Redis did not hear the farewell: %s", error)
            self._client.close()
            self._client = None

    def shutdown(self, parent: Any) -> None:
        """Celery calls this instead of `stop` when the worker ends."""
        self.stop(parent)

    def _beat(self, parent: Any) -> None:
        if self._client is None:
            return
        queues = [queue.name for queue in parent.app.amqp.queues.consume_from.values()]
        try:
            presence.beat(
                self._client,
                parent.hostname,
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "queues": queues,
                    "processes": parent.pool.num_processes if parent.pool else 0,
                    "since": self._started,
                    "draining": draining(),
                    **holding.obey(parent, self._client),
                },
            )
            # The first worker whose SET succeeds is the leader for this round.
            every = min(REAP, get_settings().batch_lease_seconds)
            if "maintenance" in queues and self._client.set(
                REAP_KEY, parent.hostname, nx=True, ex=max(1, int(every) - 1)
            ):
                parent.app.send_task("maintenance.reap", expires=REAP_WAIT, retry=False)
        except Exception as error:  # noqa: BLE001  # a beat missed for whatever reason must not end the worker
            log.warning("No heartbeat this time: %s", error)


class Metrics(bootsteps.StartStopStep):
    """The worker step that gives its processes the table they count in, before there are any.

    The supervisor's is used where there is one; else the table is our own, and a process of ours serves it.
    """

    def __init__(self, parent: Any, metrics_fd: int | None = None, **options: Any) -> None:
        super().__init__(parent, **options)
        self._own = metrics_fd is None
        self._table = metrics.Table.create() if metrics_fd is None else metrics.Table(metrics_fd)
        self._exporter: subprocess.Popen[bytes] | None = None
        metrics.use(self._table)

    def start(self, parent: Any) -> None:
        """Start to serve."""
        if self._own and get_settings().metrics_port:
            descriptor = self._table.descriptor
            self._exporter = subprocess.Popen(
                [sys.executable, "-m", "worker.exporter", str(descriptor), str(os.getpid())], pass_fds=(descriptor,)
            )

    def stop(self, parent: Any) -> None:
        """Stop serving."""
        if self._exporter is not None:
            self._exporter.terminate()
            self._exporter.wait()
            self._exporter = None

    def terminate(self, parent: Any) -> None:
        """Celery calls this instead of `stop` when the worker is to end at once."""
        self.stop(parent)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with the task's id and name inside a task."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "service": "millrace",
            "environment": get_settings().environment,
        }
        from celery import current_task

        if current_task and current_task.request.id:
            entry |= {"task_id": current_task.request.id, "task_name": current_task.name}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


@signals.setup_logging.connect
def _configure_logging(loglevel: int | str | None = None, **_: Any) -> None:
    """Log to stderr in LOG_FORMAT, at the level of the command line or else LOG_LEVEL."""
    settings = get_settings()
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Celery's own default is WARNING: only a level that somebody chose overrides the setting.
    chosen = loglevel if loglevel not in (None, "WARNING", logging.WARNING) else settings.log_level
    logging.basicConfig(level=chosen, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
