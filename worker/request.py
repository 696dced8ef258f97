"""What a worker tells of a task it has received, with prompts and answers left out, and what it does when one fails."""

from __future__ import annotations

import inspect
import re
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import SoftTimeLimitExceeded, Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.worker.request import Request as CeleryRequest

from millrace.engine.retry import ModelUnknown, RequestRefused
from millrace.errors import InputError, MillraceError
from worker import dead_letter

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


class Request(CeleryRequest):
    """A request whose message becomes a dead letter when its task fails for good.

    That is done here, in the main process, because the message is here as it came, and not acknowledged yet.
    """

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Celery calls this when a task has failed, for good or not."""
        if verdict := self._verdict(_bare(exc_info.exception)):
            self._bury(*verdict)
        super().on_failure(exc_info, send_failed_event, return_ok)

    def _retry_worker_lost(self, exc: Exception, exc_info: Any) -> bool:
        sent = bool(super()._retry_worker_lost(exc, exc_info))
        if not sent and self._buries_all:
            self._bury("worker_lost", f"{exc} Redis did not take the message for another attempt.")
        return sent

    @property
    def _buries_all(self) -> bool:
        return bool(getattr(self.task, "dead_letters", False))

    def _verdict(self, error: BaseException) -> tuple[str, str] | None:
        """Return the code and words of a failure that makes a dead letter; None for any other end."""
        if isinstance(error, TypeError) and not self._fits():
            return "wrong_arguments", str(error)
        if not self._buries_all or isinstance(error, Terminated | Ignore | Reject | Retry | MemoryError):
            # Terminated: somebody asked for it. MemoryError: Celery ends the worker, and the message comes again.
            return None
        if isinstance(error, WorkerLostError | SystemExit | KeyboardInterrupt):
            return self._lost(error)
        if isinstance(error, TimeLimitExceeded | SoftTimeLimitExceeded):
            return "time_limit", f"The task ran longer than it may: {error}."
        if isinstance(error, MillraceError):
            # An answer to the caller, which no other try would change. A model may yet be served.
            refused = isinstance(error, InputError | RequestRefused) and not isinstance(error, ModelUnknown)
            return None if refused else (error.code, str(error))
        return "exception", f"{type(error).__name__}: {error}"

    def _lost(self, error: BaseException) -> tuple[str, str] | None:
        if self._already_cancelled or self._already_revoked:
            return None
        most = self.task.max_retries
        if self.task.retry_on_worker_lost and (most is None or self._context.retries < most):
            return None  # it is tried again
        if self._success_was_stored():
            return None
        return "worker_lost", str(error) or type(error).__name__

    def _fits(self) -> bool:
        """Whether the arguments are those the task takes."""
        try:
            inspect.signature(self.task.run).bind(*self.args, **self.kwargs)
        except TypeError:
            return False
        return True

    def _bury(self, code: str, reason: str) -> None:
        attempts = self._context.retries + 1
        queues = self.app.amqp.queues
        if not dead_letter.keep(self.message, code, reason, queues=queues, worker=self.hostname, attempts=attempts):
            # Celery acknowledges only what is neither acknowledged nor rejected.
            self.reject(requeue=True)


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


def _bare(error: BaseException) -> BaseException:
    return error.exc if isinstance(error, ExceptionWithTraceback) else error
