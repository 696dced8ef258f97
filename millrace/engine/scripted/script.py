"""The script: how large and how fast the engine is, and which faults it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from millrace.engine.scripted.answers import Dialect
from millrace.engine.scripted.faults import Positive, Rule, Seconds
from millrace.errors import InputError

NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1)]


class Script(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What the engine is and does. `read_script` checks the values, the constructor does not."""

    #: Whose status pages and error objects it has.
    dialect: Dialect = "llamacpp"
    models: Annotated[list[Name], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["scripted"])
    #: Requests worked on at once; the others wait, first come, first served. 0: all wait until it has more.
    slots: NotNegative = 4
    #: Requests that may wait; the next gets 503. None: any number.
    #: (vLLM's --max-num-queued-reqs counts those at work too: it is slots + queue_limit.)
    queue_limit: NotNegative | None = None
    #: Milliseconds from the start of work to the first token.
    ttft_ms: Seconds = 0.0
    #: Tokens a second in each slot; 0: no delay at all.
    tokens_per_second: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    #: Tokens (words) in an answer that `max_tokens` does not cut.
    answer_tokens: Positive = 16
    #: Tokens of prompt and answer that fit into a slot.
    context: Positive = 8192
    #: Seconds after the start in which it answers 503, as an engine that reads its model.
    load_seconds: Seconds = 0.0
    api_key: Name | None = None
    embedding_size: Positive = 8
    #: Seconds after which an idle connection is closed (vLLM: 5).
    keep_alive_seconds: Seconds = 75.0
    #: What vLLM's metrics report. None: the share of slots at work.
    kv_usage: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    preemptions: NotNegative = 0
    #: The request log, one JSON object a line; None: no log.
    log_path: str | None = None
    rules: list[Rule] = []


#: What only a start can set: a key that guards an open port must not be taken off through the port.
FIXED = frozenset({"api_key", "log_path", "keep_alive_seconds"})


def read_script(values: Mapping[str, Any], source: str = "The script") -> Script:
    """Return a checked script.

    Args:
        values: Fields of `Script`, as JSON has them.
        source: What an error calls it, such as the name of a file.

    Raises:
        InputError: A key is unknown or a value is not possible.
    """
    try:
        return msgspec.convert(dict(values), Script)
    except msgspec.ValidationError as error:
        keys = ", ".join(Script.__struct_fields__)
        raise InputError(f"{source} is wrong: {error}.", f"A script has these keys: {keys}.") from error


def read_script_file(path: Path) -> dict[str, Any]:
    """Return the fields that a script file gives, unchecked but for being a JSON object.

    Raises:
        InputError: The file cannot be read or is no JSON object.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise InputError(f"The script {path} cannot be read: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise InputError(f"The script {path} is no JSON object: {error}.") from error
