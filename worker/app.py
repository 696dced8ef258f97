"""The Celery application: queues, routing, and every reliability setting with its reason.

Importing it reads no settings, opens no connection and installs no signal handler: Celery asks for
`_configuration` when something first looks at `app.conf`.

Priorities on Redis: a queue is one list for each step, 0 served first. The steps and the separator of
their keys are kombu's defaults on purpose: a producer that knows nothing but our Redis URL then writes
to the keys that our workers read. Its messages without a priority count as high.
"""

from __future__ import annotations

import time
from typing import Any

import celery
from celery import Celery, signals
from click import Option
from kombu.entity import Exchange, Queue

from millrace.batch.schema import Priority
from millrace.dead_letters import SENT_AT
from millrace.settings import get_settings

#: In the order in which a worker that has them all serves them.
QUEUES = (
    "maintenance",  # the reaper and merges: short, and nothing else puts right what they do
    "interactive",  # inference.*: someone is waiting
    "models",  # models.*
    "celery",  # where a plain Celery producer's messages land when it names no queue
    "batch",  # batch.*: tickets that say there may be work
)

#: Celery's number of each priority: kombu's default steps are 0, 3, 6 and 9.
BROKER_PRIORITY = {
    Priority.URGENT: 0,
    Priority.HIGH: 0,
    Priority.NORMAL: 3,
    Priority.LOW: 6,
    Priority.IDLE: 9,
}


class Task(celery.Task):
    """A task of the application; its message is kept when its arguments do not fit (worker.request)."""

    abstract = True
    Request = "worker.request:Request"
    #: Whether its message is kept however it fails for good.
    dead_letters = False


app = Celery("millrace", task_cls=Task, include=["tasks.inference", "tasks.batch", "tasks.models", "tasks.maintenance"])


def _configuration() -> dict[str, Any]:
    settings = get_settings()
    interactive = {
        "soft_time_limit": settings.task_soft_time_limit,
        "time_limit": settings.task_time_limit,
    }
    return {
        "broker_url": settings.redis_dsn,
        "result_backend": settings.redis_dsn,
        # A result costs the producer a subscription and Redis a key: only tasks that are asked for one.
        "task_ignore_result": True,
        "result_expires": settings.result_expires,
        # An answer that is ready while Redis is away is stored when it is back, up to about a minute;
        # without this the task ends as a failure, and the model has worked for nothing.
        "result_backend_always_retry": True,
        "result_backend_max_retries": 40,
        "result_backend_base_sleep_between_retries_ms": 50,
        "result_backend_max_sleep_between_retries_ms": 2000,
        "redis_socket_timeout": 15,
        "redis_socket_connect_timeout": 5,
        # A worker that dies leaves its message in Redis, to be delivered again.
        "task_acks_late": True,
        # True would put a task that kills its process back for ever.
        "task_reject_on_worker_lost": False,
        # Instead: again, up to the task's max_retries; then it is a dead letter (worker.request).
        "task_retry_on_worker_lost": True,
        # Someone waits, and what a dead process has sent is read by then; Celery would wait 10 s for more.
        "worker_lost_wait": 2.0,
        # More would hold a high task behind low ones that a busy process has already taken.
        "worker_prefetch_multiplier": settings.worker_prefetch_multiplier,
        "worker_concurrency": settings.worker_concurrency,
        # True lost tasks in a 3 s outage with the result backend on the same Redis.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        # For ever: a worker that gives up has to be found by someone.
        "broker_connection_max_retries": None,
        # OOM, READONLY and LOADING answers of Redis pass; without this they end the worker.
        "broker_channel_error_retry": True,
        # A producer hears of an exhausted pool instead of waiting for ever.
        "broker_pool_acquire_timeout": 10,
        # Against slow leaks; a process is replaced between two tasks.
        "worker_max_tasks_per_child": 200,
        # ETA tasks are held in memory without limit otherwise.
        "worker_eta_task_limit": 1000,
        # Survives a Redis outage with remote control on, which Celery 5.7.0's own does not.
        "worker_consumer": "worker.consumer:Consumer",
        # `inspect` and Flower need it; the crash that speaks against it is mended in our Consumer.
        "worker_enable_remote_control": True,
        # Flower lives on events; prompts and answers are kept out of them (tasks.inference).
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        # JSON only: a pickle from whoever reaches Redis would be code.
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        # Exchange and key of their own: left out, all of them would share the default queue's.
        "task_queues": [Queue(name, Exchange(name), routing_key=name) for name in QUEUES],
        "task_default_queue": "batch",
        # A mistyped queue is an error at the producer, not a list that nobody reads.
        "task_create_missing_queues": False,
        "task_routes": {
            "inference.*": {"queue": "interactive"},
            "batch.merge": {"queue": "maintenance"},
            "batch.*": {"queue": "batch"},
            "models.*": {"queue": "models"},
            "maintenance.*": {"queue": "maintenance"},
        },
        "task_default_priority": BROKER_PRIORITY[Priority.NORMAL],
        "task_annotations": dict.fromkeys(("inference.chat", "inference.complete", "inference.embed"), interactive),
        "task_track_started": True,
        "broker_transport_options": {
            # Redelivery of what a dead worker held is not our recovery (the reaper is): longer than all but
            # the longest sessions, because a live task that outlasts it is delivered twice. For those of
            # batches that does no harm: the copy finds nothing to claim.
            "visibility_timeout": 7200,
            "unacked_restore_interval": 15,
            "unacked_restore_throttle": 1,
            # In the order of QUEUES, strictly: fair would let interactive wait behind batch.
            "queue_order_strategy": "priority",
            # Longer than BRPOP's own second; without it a half-open connection blocks for ever.
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            # A half-open connection is noticed in about 21 s.
            "health_check_interval": 10,
        },
        "worker_hijack_root_logger": False,  # our own format, see worker.lifecycle
    }


@signals.before_task_publish.connect
def _stamp(headers: dict[str, Any], **_: Any) -> None:
    headers[SENT_AT] = time.time()  # Redis does not know it


app.add_defaults(_configuration)
app.steps["consumer"].add("worker.lifecycle:Presence")
app.steps["worker"].add("worker.lifecycle:Metrics")
app.steps["worker"].add("worker.prompt_end:PromptEnd")
app.steps["worker"].add("worker.ending:Ending")
# From the supervisor, which serves the metrics of all its processes.
app.user_options["worker"].add(Option(("--metrics-fd",), type=int, hidden=True))
app.user_options["worker"].add(Option(("--supervisor",), type=int, hidden=True))
