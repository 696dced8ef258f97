"""How a worker comes to rest while the engine is changed (millrace.hold).

The main process looks at every heartbeat. While there is a hold it takes no message from the queues that need
the engine; its children see a shared byte: a batch session drains, and an interactive task that was taken
just before goes back to its queue.
"""

from __future__ import annotations

import mmap
from typing import Any

import redis

from millrace import hold

#: One byte shared with the pool's children by fork.
_held = mmap.mmap(-1, 1)


def held() -> bool:
    """Whether the engine must not be asked for anything now; true in the pool's children too."""
    return _held[0] != 0


def obey(consumer: Any, client: redis.Redis) -> dict[str, Any]:
    """Begin or end to hold, as Redis says, and return what the heartbeat tells of it.

    Args:
        consumer: Celery's, in the main process; after a reconnect it takes from every queue again.
        client: Of Redis, with decoded responses.
    """
    from celery.worker import state  # producers import this module too

    token = hold.current(client)
    _held[0] = token is not None
    taking = consumer.task_consumer
    for name, queue in consumer.app.amqp.queues.consume_from.items():
        # Not Celery's cancel_task_queue: it forgets the queue, and a reconnect would leave it out.
        if token is not None and name in hold.QUEUES:
            taking.cancel_by_queue(name)
        elif not taking.consuming_from(name):
            taking.add_queue(queue)
            taking.consume()
    if token is None:
        return {"hold": None}
    needing = [request for request in state.reserved_requests if not request.name.startswith(_AT_EASE)]
    return {"hold": token, "engine_tasks": len(needing)}


#: Tasks that do not need the engine, or only ask it how it is.
_AT_EASE = ("maintenance.", "models.", "batch.merge", "batch.plan")
