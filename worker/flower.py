"""Flower as we run it: behind a login, with our queues, and with nobody's prompts or answers.

Flower shows what events tell it, what workers answer to `inspect`, and what the result backend holds. The
first two are taken in without arguments, results and the words of errors; the third is shut. Our workers
leave out those of inference.* themselves (worker.request); this is for whatever else is on the same Redis:
a plain producer's events, and a user's own task that a chain hands an answer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

from flower import events, inspector
from flower.api import BaseApiHandler
from flower.api.tasks import GetQueueLengths
from flower.app import Flower
from flower.options import options
from flower.urls import settings as flower_settings
from flower.views.broker import BrokerView
from flower.views.monitor import Metrics
from redis import RedisError
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop

from millrace.errors import MillraceError
from millrace.settings import Settings
from worker.app import QUEUES, app
from worker.request import HIDDEN, without_contents

OFFLINE = 3600  # seconds after which a worker that has gone is no longer listed: a new one has a new name


class Events(events.Events):
    """Flower's events, with the contents of tasks left out."""

    def on_event(self, event: dict[str, Any]) -> None:
        """Take in one event of a task or a worker."""
        super().on_event(without_contents(event))


class Inspector(inspector.Inspector):
    """Flower's questions to workers, with the contents of tasks left out of their answers."""

    def _on_update(self, workername: str, method: str, response: Any) -> None:
        if method in self.task_inspect_methods:
            for entry in response:
                if isinstance(entry, dict):  # revoked ones are ids
                    entry.get("request", entry).update(args=HIDDEN, kwargs=HIDDEN)
        super()._on_update(workername, method, response)


class OurQueues:
    """Queues of workers that are not there are listed too: it is those that fill up."""

    def get_active_queue_names(self) -> list[str]:
        """Return the queues whose depths are shown."""
        return sorted({*QUEUES, *super().get_active_queue_names()})  # type: ignore[misc]


class Broker(OurQueues, BrokerView):
    """The page with the queues' depths."""


class QueueLengths(OurQueues, GetQueueLengths):
    """The same as JSON."""

    async def get(self) -> None:
        """Return the depths; 503 while Redis is away."""
        try:
            await super().get()
        except RedisError as error:
            raise web.HTTPError(503, str(error)) from error


class Result(BaseApiHandler):
    """The result of a task: an answer, and Flower is not who asked for it."""

    @web.authenticated
    def get(self, task_id: str) -> None:
        """Refuse it."""
        raise web.HTTPError(403, "Results are not shown here")


class PrivateMetrics(Metrics):
    """Flower's metrics name tasks and workers: for those who are logged in."""

    @web.authenticated
    async def get(self) -> None:
        """Return them in Prometheus's format."""
        await super().get()


ROUTES = [
    (r"/broker", Broker),
    (r"/api/queues/length", QueueLengths),
    (r"/api/task/result/(.+)", Result),
    (r"/metrics", PrivateMetrics),
]


@contextlib.asynccontextmanager
async def serving(settings: Settings, login: str, listen: str) -> AsyncIterator[None]:
    """Serve Flower while the block runs; its threads end with the process.

    Args:
        settings: For the port, and whether Flower may change anything.
        login: user:password.
        listen: The address to listen on.

    Raises:
        MillraceError: `cannot_listen`, when the port is taken or the address is not this machine's.
    """
    address = (listen, settings.flower_port)
    try:
        listener = socket.create_server(address, family=socket.AF_INET6 if ":" in listen else socket.AF_INET)
    except OSError as error:
        raise MillraceError(
            f"Flower cannot listen on {listen}:{settings.flower_port}: {error.strerror}.",
            "Set FLOWER_PORT to a free port, or --listen to an address of this machine.",
            code="cannot_listen",
        ) from error
    with listener:
        listener.setblocking(False)
        server = _server(settings, login)
        HTTPServer(server).add_socket(listener)
        # Not server.start and stop: they run and end an event loop of their own.
        server.events.start()
        server.update_workers()
        yield


def _server(settings: Settings, login: str) -> Flower:
    # Refused requests; Flower's own command keeps quiet about them too.
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    # Questions that no worker answers, because none is there.
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)
    logging.getLogger("kombu.mixins").addFilter(_without_traceback)
    options.basic_auth = [login]
    options.read_only = settings.flower_read_only
    options.purge_offline_workers = OFFLINE
    loop = IOLoop.current()
    heard = Events(
        app,
        loop,
        enable_events=False,  # our workers send them unasked
        max_workers_in_memory=options.max_workers,
        max_tasks_in_memory=options.max_tasks,
    )
    server = Flower(options=options, capp=app, events=heard, io_loop=loop, **flower_settings)
    server.inspector = Inspector(loop, app, options.inspect_timeout / 1000)
    server.add_handlers(".*", ROUTES)  # in front of Flower's own
    return server


def _without_traceback(record: logging.LogRecord) -> bool:
    """A Redis that is away is told in a line, at every try."""
    record.exc_info = None
    return True
