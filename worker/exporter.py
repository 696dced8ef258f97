"""The page that Prometheus reads: what this worker counted, and how Redis, the ledger and the engine are now.

`millrace up` and `millrace worker` serve it beside /health. A worker that was started as `celery worker` has a
process of its own for it: a thread beside forks could leave a lock held in a child for ever.

    python -m worker.exporter DESCRIPTOR PARENT

serves the table of that descriptor until its parent has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from millrace import __version__, dead_letters, metrics, presence
from millrace.batch.ledger import Ledger
from millrace.batch.schema import Priority, ShardState, Status
from millrace.dead_letters import SENT_AT
from millrace.engine.client import EngineClient
from millrace.engine.probes import probe
from millrace.engine.retry import EngineError, EngineTimeout, EngineUnreachable, KeyRefused
from millrace.errors import MillraceError
from millrace.settings import Settings, get_settings
from worker.app import BROKER_PRIORITY, QUEUES

log = logging.getLogger(__name__)

T = TypeVar("T")
Values = dict[str, float]

PATIENCE = 2.5  # seconds that a part gets; Prometheus's own default is 10 for the whole page
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: kombu's separator between a queue's name and its priority step; step 0 has the name alone.
_STEP = "\x06\x16"
#: Each step by the name that people write; urgent and high share one, and it is called high.
_PRIORITIES = {BROKER_PRIORITY[priority]: priority.name.lower() for priority in Priority}
#: Nobody waits for a ticket: the ledger knows how old a batch is.
_AGED = tuple(queue for queue in QUEUES if queue != "batch")


class _Message(msgspec.Struct):
    headers: dict[str, Any] = {}


_decode_message = msgspec.json.Decoder(_Message).decode


class Exporter:
    """Collects the page.

    Args:
        settings: For Redis, the ledger, the engine and DATA_DIR.
        table: What this worker's processes count in.
    """

    def __init__(self, settings: Settings, table: metrics.Table) -> None:
        self._settings = settings
        self._table = table
        self._ledger: Ledger | None = None
        self._models: list[str] = []
        #: The oldest message seen of each list without a time of its own, and since when.
        self._seen: dict[str, tuple[str, float]] = {}
        self._parts = [
            _Part("redis", lambda: _in_thread(self._redis)),
            _Part("ledger", lambda: _in_thread(self._open_work)),
            _Part("engine", self._engine, metrics.ENGINE_STATE.series("timeout")),
            _Part("data_dir", lambda: _in_thread(self._disk)),
        ]

    async def page(self) -> str:
        """Return the page, within PATIENCE whatever does not answer."""
        found = await asyncio.gather(*(part.ask() for part in self._parts))
        values = metrics.zeros(self._models) | {metrics.BUILD.series(__version__): 1.0} | self._table.read()
        for one in found:
            values |= one
        return metrics.render(values)

    def _redis(self) -> Values:
        keys = {
            (queue, name): queue if step == 0 else f"{queue}{_STEP}{step}"
            for queue in QUEUES
            for step, name in _PRIORITIES.items()
        }
        with presence.connect(self._settings, timeout=2.0) as client:
            pipe = client.pipeline(transaction=False)
            for key in keys.values():
                pipe.llen(key)
            aged = [place for place in keys if place[0] in _AGED]
            for place in aged:
                pipe.lindex(keys[place], -1)  # kombu puts at the left and takes from the right
            pipe.info("memory")
            *answers, memory = pipe.execute()
            letters = dead_letters.count(client, self._settings)
        values = {
            metrics.DEPTH.series(*place): float(depth) for place, depth in zip(keys, answers[: len(keys)], strict=True)
        }
        ages = dict.fromkeys(_AGED, 0.0)
        for (queue, priority), message in zip(aged, answers[len(keys) :], strict=True):
            ages[queue] = max(ages[queue], self._age(f"{queue} {priority}", message))
        values |= {metrics.OLDEST.series(queue): age for queue, age in ages.items()}
        values[metrics.DEAD_LETTERS.series()] = float(letters)
        values[metrics.REDIS_MEMORY.series()] = float(memory["used_memory"])
        values[metrics.REDIS_LIMIT.series()] = float(memory.get("maxmemory", 0))
        values |= {metrics.WORKERS.series(queue): 0.0 for queue in QUEUES}
        for worker in presence.alive(self._settings):
            for queue in worker["queues"]:
                series = metrics.WORKERS.series(queue)
                values[series] = values.get(series, 0.0) + 1
        if trouble := presence.trouble(self._settings):
            values[metrics.TROUBLE.series(trouble["code"])] = 1.0
        return values

    def _age(self, place: str, message: str | None) -> float:
        """Return how long the oldest message of a list has waited: since it was sent, or since we saw it first."""
        now = time.time()
        if message is None:
            self._seen.pop(place, None)
            return 0.0
        try:
            headers = _decode_message(message).headers
        except msgspec.DecodeError:  # not Celery's; its worker will say so
            headers = {}
        sent = headers.get(SENT_AT)
        if not isinstance(sent, int | float):
            name = str(headers.get("id"))
            if self._seen.get(place, ("", 0.0))[0] != name:
                self._seen[place] = (name, now)
            sent = self._seen[place][1]
        return max(0.0, now - sent)

    def _open_work(self) -> Values:
        if self._ledger is None:
            self._ledger = Ledger.open(self._settings)
        work = self._ledger.open_work()
        values = {
            metrics.BATCHES.series(status): float(work.batches.get(status, 0)) for status in Status if not status.final
        }
        values |= {metrics.SHARDS.series(state): float(work.shards.get(state, 0)) for state in ShardState}
        waiting = max(0, work.total - work.completed - work.failed)
        for state, rows in (("waiting", waiting), ("completed", work.completed), ("failed", work.failed)):
            values[metrics.BATCH_ROWS.series(state)] = float(rows)
        return values | {metrics.BATCH_AGE.series(): work.age}

    async def _engine(self) -> Values:
        values: Values = {}
        try:
            async with EngineClient.of(self._settings) as client, asyncio.timeout(PATIENCE - 0.5):
                engine = await probe(client)
        except (EngineError, TimeoutError) as error:
            state, self._models = _state_of(error), []
        else:
            state, self._models = "serving", engine.models
            values[metrics.ENGINE.series(engine.kind, engine.version)] = 1.0
            if engine.slots:
                values[metrics.SLOTS.series()] = float(engine.slots)
        values |= {metrics.MODEL_STATE.series(model, "serving"): 1.0 for model in self._models}
        values |= {metrics.ENGINE_STATE.series(one): float(one == state) for one in metrics.ENGINE_STATES}
        return values | {metrics.UP.series("engine"): float(state == "serving")}

    def _disk(self) -> Values:
        usage = shutil.disk_usage(self._settings.data_dir)
        return {metrics.DISK_FREE.series(): float(usage.free), metrics.DISK_SIZE.series(): float(usage.total)}


def _state_of(error: Exception) -> str:
    if isinstance(error, KeyRefused):
        return "key_refused"
    if isinstance(error, EngineUnreachable):
        return "loading" if error.status else "unreachable"
    return "timeout" if isinstance(error, EngineTimeout | TimeoutError) else "failing"


class _Part:
    """Something that is asked at every scrape, and may not answer.

    A question that is still open is not asked again: the next scrape takes its answer.
    """

    def __init__(self, name: str, ask: Callable[[], Awaitable[Values]], late: str = "") -> None:
        self._name = name
        self._ask = ask
        #: A gauge that is 1 when the answer is late.
        self._late = late
        self._open: asyncio.Future[Values] | None = None

    async def ask(self) -> Values:
        if self._open is None:
            self._open = asyncio.ensure_future(self._ask())
        question = self._open
        await asyncio.wait([question], timeout=PATIENCE)
        up = metrics.UP.series(self._name)
        if not question.done():
            return {up: 0.0} | ({self._late: 1.0} if self._late else {})
        if self._open is question:
            self._open = None
        try:
            return {up: 1.0} | question.result()
        except (MillraceError, OSError) as error:
            log.debug("%s", error)
        except Exception:
            log.exception("The metrics of %s failed.", self._name)
        return {up: 0.0}


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run `call` in a thread that nobody waits for at the end: a disk or a database may not answer for minutes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None is T's then

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except Exception as error:  # noqa: BLE001  # it is the caller's
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.asynccontextmanager
async def metrics_server(
    settings: Settings, table: metrics.Table, listen: str, say: Callable[[str], None]
) -> AsyncIterator[None]:
    """Answer /metrics on METRICS_PORT of the address `listen` while the block runs."""
    if not settings.metrics_port:
        yield
        return
    exporter = Exporter(settings, table)

    async def page(_: web.Request) -> web.Response:
        return web.Response(body=(await exporter.page()).encode(), headers={"Content-Type": CONTENT_TYPE})

    routes = web.Application()
    routes.add_routes([web.get("/metrics", page)])
    runner = web.AppRunner(routes, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, listen, settings.metrics_port).start()
    except OSError as error:
        say(f"No /metrics: port {settings.metrics_port} is taken ({error.strerror}); set METRICS_PORT.")
    try:
        yield
    finally:
        await runner.cleanup()


async def _serve(table: metrics.Table, parent: int) -> None:
    async with metrics_server(get_settings(), table, "127.0.0.1", log.warning):
        while os.getppid() == parent:  # noqa: ASYNC110  # nothing tells of its end
            await asyncio.sleep(0.5)


def main() -> None:
    """Serve until the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the parent's, which drains
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    descriptor, parent = map(int, sys.argv[1:])
    asyncio.run(_serve(metrics.Table(descriptor), parent))


if __name__ == "__main__":
    main()
