"""What a worker tells of a task it has received, with prompts and answers left out."""

from __future__ import annotations

import re
from typing import Any

from celery.worker.request import Request

#: Stands for what is not shown.
HIDDEN = "(…)"


def without_contents(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event without the task's arguments and result; of an error the class is left.

    An engine may quote the prompt in what it says of it.
    """
    hidden = dict(event)
    for name in ("args", "kwargs", "result"):
        if name in hidden:
            hidden[name] = HIDDEN
    if "exception" in hidden:
        known = re.match(r"[\w.]+(?=\()", str(hidden["exception"]))
        hidden |= {"exception": (known[0] if known else "") + HIDDEN, "traceback": None}
    return hidden


class PrivateRequest(Request):
    """A request whose contents are shown to nobody: not in events, `inspect` or Flower.

    A producer with our task classes leaves its arguments out itself; a plain Celery producer does not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._argsrepr = self._kwargsrepr = HIDDEN

    def info(self, safe: bool = False) -> dict[str, Any]:  # Celery asks for unsafe ones
        """Return what `inspect active` shows."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002  # Celery's name
        """Tell of a step in the task's life."""
        super().send_event(type, **without_contents(fields))
