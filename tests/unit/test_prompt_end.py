"""What lets an idle worker end at once."""

from __future__ import annotations

import gc

from kombu.asynchronous import Hub

from worker.prompt_end import PromptEnd


def test_a_shutdown_wakes_an_event_loop_that_sleeps() -> None:
    hub = Hub()
    try:
        step = PromptEnd(None)
        step.register_with_event_loop(None, hub)
        assert not hub.poller.poll(0)
        step._shutting_down()
        ((woken, _),) = hub.poller.poll(60)  # and not after the 60 s
        read, arguments = hub.readers[woken]
        assert read(*arguments) == b"!"
        assert not hub.poller.poll(0), "it sleeps again"
    finally:
        gc.unfreeze()
        hub.close()
