"""How a worker process ends: what it makes of SIGTERM, SIGINT and SIGQUIT.

    first SIGTERM, SIGINT    drain: runners come to an end, running tasks finish, no message is taken
    first SIGQUIT            the same; after SOFT_SHUTDOWN seconds tasks are cancelled, their messages go back
    a second one, SIGUSR2    now: the pool is killed, messages go back, leases run out
    its supervisor is gone   as a first SIGTERM, should no guard have sent one

With REMAP_SIGTERM=SIGQUIT in its environment, SIGTERM is as SIGQUIT (Celery's own switch, set in our image).
Celery alone does nothing at a second SIGTERM, and needs three SIGINTs. Its own soft shutdown sleeps in the
signal handler to the last second, while nobody reads results: tasks that end meanwhile run again.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from types import FrameType
from typing import Any

from billiard.process import active_children
from celery import bootsteps, signals
from celery.apps import worker as celery_worker
from celery.platforms import EX_OK
from celery.worker import state

from worker import lifecycle
from worker.supervisor import NOW, SOFT_SHUTDOWN, Heard

LAST_WORDS = 2  # seconds that Redis gets to take messages back
LOOK = 2.0  # seconds between looks at the supervisor
#: Looks at a supervisor that is gone, before its guard is taken to be gone too: a second SIGTERM would mean now.
LOOKS = 3


class Ending(bootsteps.StartStopStep):
    """The worker step that takes the signals over from Celery."""

    def __init__(self, parent: Any, supervisor: int | None = None, **options: Any) -> None:
        super().__init__(parent, **options)
        self._pid = os.getpid()
        self._supervisor = supervisor
        self._missed = 0
        self._end, self._quit = Heard(), Heard()
        self._cold: Any = None

    def start(self, parent: Any) -> None:
        """Listen; Celery has set its handlers by now, and would set others while it ends."""
        self._cold = signal.getsignal(signal.SIGQUIT)
        celery_worker.install_worker_term_hard_handler = lambda *_, **__: None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, NOW):
            signal.signal(number, partial(self._heard, parent))
        if self._supervisor is not None:
            # Celery's own timer stands still while Redis is away.
            signal.signal(signal.SIGALRM, partial(self._look, parent))
            signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)

    def _look(self, parent: Any, *_: object) -> None:
        if os.getppid() == self._supervisor or os.getpid() != self._pid:
            return
        self._missed += 1
        if lifecycle.draining() or self._missed == LOOKS:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self._missed == LOOKS and not lifecycle.draining():
            celery_worker.safe_say("The process that started this worker is gone.", sys.__stderr__)
            self._heard(parent, signal.SIGTERM, None)

    def _heard(self, parent: Any, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process of the pool: a Ctrl-\ at the terminal reaches it too
            return
        quits = number == signal.SIGQUIT
        end = self._end.hear()
        # A supervisor sends SIGQUIT when it has waited long enough after SIGTERM: that is a first one.
        order = self._quit.hear() if quits else end
        if order == "second" or number == NOW:
            _end_now(parent, number)
        elif order == "first":
            soft = quits or (number == signal.SIGTERM and celery_worker.REMAP_SIGTERM == "SIGQUIT")
            self._drain(parent, number, soft=soft)

    def _drain(self, parent: Any, number: int, *, soft: bool) -> None:
        lifecycle.drain()
        what = f"Soft shutdown: tasks get {SOFT_SHUTDOWN:g} s." if soft else "Draining: running tasks finish."
        celery_worker.safe_say(f"{what} A second signal ends at once.", sys.__stderr__)
        signals.worker_shutting_down.send(
            sender=parent.hostname, sig=signal.Signals(number).name, how="Warm", exitcode=EX_OK
        )
        state.should_stop = EX_OK
        if soft:
            # The timer first: that of `_look` must not fire into this handler.
            signal.setitimer(signal.ITIMER_REAL, SOFT_SHUTDOWN)
            signal.signal(signal.SIGALRM, self._cold)


def _end_now(parent: Any, number: int) -> None:
    celery_worker.safe_say("Ending at once: tasks are killed, messages go back, leases run out.", sys.__stderr__)
    code = 128 + number
    signal.alarm(LAST_WORDS)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
    try:
        for process in active_children():
            if process.pid:
                os.kill(process.pid, signal.SIGKILL)
        # Else they would be delivered again only when the visibility timeout is over.
        parent.consumer.task_consumer.channel.qos.restore_unacked_once()
    except Exception as error:  # noqa: BLE001  # whatever it is, this process ends here
        celery_worker.safe_say(f"Not all messages went back: {error!r}", sys.__stderr__)
    os._exit(code)
