"""An idle worker ends within a second. Celery alone takes three, for which whoever pressed Ctrl-C waits.

- the main process sees the signal when its event loop next wakes, up to a second later: a pipe wakes it;
- a process of the pool sleeps a second after its last word, for a parent that reads nothing more;
- the interpreter's end looks for garbage through every module that was loaded.
"""

from __future__ import annotations

import contextlib
import gc
import os
from typing import Any

from celery import bootsteps, signals

from worker.lifecycle import draining


class PromptEnd(bootsteps.StartStopStep):
    """The worker step that lets the beginning of a shutdown wake the event loop."""

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signals.worker_shutting_down.connect(self._shutting_down)
        # Out of the collector's sight; the processes of the pool then share the modules' pages, too.
        gc.freeze()

    def register_with_event_loop(self, parent: Any, hub: Any) -> None:
        """Listen to the pipe; called again after every reconnect."""
        hub.add_reader(self._woken, os.read, self._woken, 64)

    def _shutting_down(self, **_: Any) -> None:  # in a signal handler
        with contextlib.suppress(BlockingIOError):  # nobody reads any more, so nobody sleeps
            os.write(self._wake, b"!")


@signals.worker_process_shutdown.connect
def _leave(exitcode: int, **_: Any) -> None:
    """End a process of the pool that has given its last result, before billiard lets it sleep."""
    if draining():
        os._exit(exitcode)
