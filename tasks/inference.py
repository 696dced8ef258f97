"""Interactive requests: what the OpenAI endpoints take, as Celery tasks; queue `interactive`.

    from tasks.inference import chat

    result = chat.delay([{"role": "user", "content": "Hello"}], max_tokens=32)
    result.get(timeout=60)["choices"][0]["message"]["content"]

`priority="high"` (or normal, low, …) is understood by `delay`, `apply_async` and signatures.
"""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery.exceptions import Reject

from millrace import metrics
from millrace.batch.lines import CHAT, COMPLETIONS, EMBEDDINGS
from millrace.batch.schema import Priority
from millrace.engine.interactive import Caller, Left
from millrace.engine.retry import EngineTimeout
from millrace.errors import MillraceError
from millrace.settings import get_settings
from worker.app import BROKER_PRIORITY, Task, app
from worker.holding import held
from worker.lifecycle import draining


class InferenceTask(Task):
    """A task that takes priorities by name, and shows no prompt or answer in events and Flower."""

    abstract = True
    Request = "worker.request:PrivateRequest"
    dead_letters = True
    #: Characters of the answer in events.
    resultrepr_maxsize = 3

    def apply_async(
        self,
        args: Any = None,
        kwargs: dict[str, Any] | None = None,
        *more: Any,
        priority: str | int | None = None,
        **options: Any,
    ) -> Any:
        """Send the task; `priority` may be a name.

        Raises:
            InputError: There is no priority of that name.
        """
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("priority"), str):  # from delay(…, priority="high")
            priority = kwargs.pop("priority")
        if isinstance(priority, str):
            priority = BROKER_PRIORITY[Priority.parse(priority)]
        if priority is not None:
            options["priority"] = priority
        # Celery would write this process's limits into the message; the worker's own are meant.
        options.setdefault("time_limit", None)
        options.setdefault("soft_time_limit", None)
        options.setdefault("argsrepr", "(…)")
        options.setdefault("kwargsrepr", repr(dict.fromkeys(kwargs, "…")))
        return super().apply_async(args, kwargs, *more, **options)


# The options of a task that someone waits for.
_OPTIONS: dict[str, Any] = {
    "base": InferenceTask,
    "ignore_result": False,
    "max_retries": 3,  # of task_retry_on_worker_lost; requests have TASK_MAX_RETRIES
    "default_retry_delay": 0,  # then: to the end of its queue; Celery's own would be three minutes
    "throws": (MillraceError,),  # an answer to the caller, not a fault of the worker: no traceback in its log
}


@app.task(name="inference.chat", **_OPTIONS)
def chat(messages: list[dict[str, Any]], model: str | None = None, **params: Any) -> dict[str, Any]:
    """Return the OpenAI chat completion object for `messages`.

    Args:
        messages: As /v1/chat/completions takes them.
        model: A name the engine serves; None for LLM_MODEL, or else the engine's first.
        params: Any further parameter of the endpoint.

    Raises:
        EngineError: What the engine said, by class (see millrace.engine.retry).
    """
    return _call(CHAT, {"model": model, "messages": messages, **params})


@app.task(name="inference.complete", **_OPTIONS)
def complete(prompt: str | list[Any], model: str | None = None, **params: Any) -> dict[str, Any]:
    """Return the OpenAI completion object for `prompt`; see `chat`."""
    return _call(COMPLETIONS, {"model": model, "prompt": prompt, **params})


@app.task(name="inference.embed", **_OPTIONS)
def embed(input: str | list[Any], model: str | None = None, **params: Any) -> dict[str, Any]:  # noqa: A002  # OpenAI's name
    """Return the OpenAI embedding list object for `input`; see `chat`."""
    return _call(EMBEDDINGS, {"model": model, "input": input, **params})


@cache
def _caller(pid: int) -> Caller:  # a forked child must not share its parent's connections
    settings = get_settings()
    # Not all of the limit: who waited in vain is to hear what the engine said, and not that time was up.
    return Caller(settings, patience=0.9 * settings.task_soft_time_limit, leave=draining)


def _call(path: str, payload: dict[str, Any]) -> dict[str, Any]:
    if isinstance(payload.get("priority"), str):
        # From a producer without our task classes; the engine's own `priority` is a number.
        del payload["priority"]
    if held():
        raise Reject("the engine is being changed", requeue=True)  # its queue is served again afterwards
    caller = _caller(os.getpid())
    started = time.monotonic()
    usage: dict[str, Any] = {}
    error: str | None = "exception"  # one that is none of ours
    try:
        answer = _ask(caller, path, payload)
        usage, error = answer.get("usage") or {}, ""
        return answer
    except MillraceError as failure:
        error = failure.code
        raise
    except Left:
        error = None
        raise Reject("the worker ends while the engine is away", requeue=True) from None  # another one may wait
    finally:
        if error is not None:
            metrics.interactive_answer(
                caller.model_of(payload) or "unknown",
                time.monotonic() - started,
                usage.get("prompt_tokens") or 0,
                usage.get("completion_tokens") or 0,
                error,
            )


def _ask(caller: Caller, path: str, payload: dict[str, Any]) -> dict[str, Any]:
    try:
        return caller.call(path, payload)
    except SoftTimeLimitExceeded:
        # It struck in the middle of the loop: the next request gets a new one, and this one's
        # connections are closed, so that the engine stops working for nobody.
        _caller.cache_clear()
        caller.close()
        limit = get_settings().task_soft_time_limit
        raise EngineTimeout(
            f"The engine did not answer within {limit} s (TASK_SOFT_TIME_LIMIT).",
            "Ask for fewer tokens, or raise the limit.",
        ) from None
