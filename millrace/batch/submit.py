"""Submit: from a user's file to a batch in the ledger, whole or not at all."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import sqlalchemy as sa

from millrace.batch.folder import BatchFolder
from millrace.batch.inputs import Format, Request
from millrace.batch.ledger import Ledger, Window, new_id
from millrace.batch.life import FileRecord
from millrace.batch.lines import EMBEDDINGS
from millrace.batch.planner import Plan, PlanOptions, plan
from millrace.batch.prune import note_new
from millrace.batch.schema import Priority
from millrace.crashpoints import crashpoint
from millrace.engine.client import EngineClient
from millrace.engine.probes import EngineState, probe, serves
from millrace.engine.retry import EngineError, KeyRefused
from millrace.errors import InputError, InvalidInputFile, MillraceError, NotFound, Problem, SettingsError, Unreachable
from millrace.settings import Settings

MAX_KEY = 255  # characters of an idempotency key


@dataclass(frozen=True)
class Order:
    """What the user asked for besides the file."""

    #: What to call the file in messages and in the ledger.
    filename: str
    format: Format = Format.OPENAI
    request: Request = field(default_factory=Request)
    model: str = ""
    priority: Priority = Priority.NORMAL
    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: Take up an unfinished batch of the same input and metadata instead of making a second one.
    resume: bool = False
    #: The user's own word for this order: given again with the same rows, it names the same batch.
    idempotency_key: str | None = None
    window: Window | None = None


@dataclass(frozen=True)
class Submitted:
    """A batch in the ledger. `trouble` says in words why it will wait, None when nothing is wrong."""

    batch_id: str
    rows: int
    #: Whether it was there before.
    resumed: bool
    trouble: str | None
    #: An earlier batch of the same rows, None where this one is not new.
    twin: str | None = None


def open_input(path: str) -> BinaryIO:
    """Open a user's file.

    Raises:
        InputError: It is not there (no_such_file), a folder, or not readable (unreadable_file).
    """
    try:
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.", "Check the path.", code="no_such_file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder.", "Name a file.", code="unreadable_file") from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "Make it readable for you.", code="unreadable_file"
        ) from error


def submit(settings: Settings, ledger: Ledger, stream: BinaryIO, order: Order) -> Submitted:
    """Validate, copy and plan a file, and record it as a batch.

    An engine that does not answer is no reason to refuse: the batch waits for it.

    Raises:
        InvalidInputFile: Lines are wrong, or name a model or a url that the engine does not serve.
        InputError: The file has no rows, or its idempotency key is no key (invalid_idempotency_key) or that of
            a batch of other rows (idempotency_conflict).
        SettingsError: The engine refuses LLM_API_KEY.
        StorageError: DATA_DIR cannot be written.
        Unreachable: The ledger does not answer.
    """
    if order.idempotency_key is not None and not 0 < len(order.idempotency_key) <= MAX_KEY:
        raise InputError(
            f"An idempotency key has 1 to {MAX_KEY} characters, not {len(order.idempotency_key)}.",
            "Name one, or leave --idempotency-key out.",
            code="invalid_idempotency_key",
        )
    state, trouble = asyncio.run(_engine(settings))
    model = order.model or settings.llm_model
    if not model and state is not None and len(state.models) == 1:
        model = state.models[0]
    if not model and state is None and order.format is not Format.OPENAI:
        raise Unreachable(
            f"Which model is to answer is not known: {trouble}",
            "Start the engine, or name a model with --model or LLM_MODEL.",
            code="engine_unreachable",
        )
    options = PlanOptions(
        format=order.format,
        request=order.request,
        default_model=model,
        max_line_bytes=settings.batch_max_line_bytes,
        shard_seconds=settings.batch_shard_seconds,
    )
    if (rate := ledger.rate()) is not None:
        options = replace(options, rate=rate)
    batch_id = new_id("batch")
    folder = BatchFolder.of(settings.data_dir, batch_id)
    note_new(folder)
    recorded = False
    try:
        planned = plan(stream, folder, options, name=order.filename)
        crashpoint("submit.planned")
        if state is not None:
            asyncio.run(_check_served(settings, state, planned, order.filename))
        metadata = dict(order.metadata)
        if order.idempotency_key is not None:
            if earlier := _keyed(ledger, order.idempotency_key, planned):
                return Submitted(earlier, planned.rows, True, trouble)
        elif order.resume and (earlier := ledger.unfinished_batch(planned.sha256, metadata)):
            return Submitted(earlier, planned.rows, True, trouble)
        twin = ledger.same_rows(planned.sha256)
        ledger.create_batch(
            batch_id=batch_id,
            input_file=FileRecord(
                id=new_id("file"),
                purpose="batch",
                filename=order.filename,
                path=str(folder.input.relative_to(settings.data_dir)),
                bytes=planned.bytes,
                sha256=planned.sha256,
                rows=planned.rows,
            ),
            plan=planned.shards,
            endpoint=planned.endpoint,
            priority=order.priority,
            name=order.name,
            metadata=metadata,
            window=order.window,
            idempotency_key=order.idempotency_key,
        )
        crashpoint("submit.recorded")
        recorded = True
    except sa.exc.IntegrityError:
        # Another submit with the same key was first.
        earlier = _keyed(ledger, order.idempotency_key, planned) if order.idempotency_key is not None else None
        if earlier is None:
            raise
        return Submitted(earlier, planned.rows, True, trouble)
    finally:
        # A commit may have been done though its answer never came: only what the ledger does not know goes.
        known = recorded or _known(ledger, batch_id)
        if known is False:
            shutil.rmtree(folder.root, ignore_errors=True)
        if known is not None:
            folder.note.unlink(missing_ok=True)
    return Submitted(batch_id, planned.rows, False, trouble, twin)


def _keyed(ledger: Ledger, key: str, planned: Plan) -> str | None:
    """Return the batch that has the key.

    Raises:
        InputError: Its rows are others (idempotency_conflict).
    """
    found = ledger.keyed_batch(key)
    if found is None:
        return None
    batch_id, sha256 = found
    if sha256 != planned.sha256:
        raise InputError(
            f"The idempotency key {key!r} is that of {batch_id}, which has other rows.",
            "Name another key, or submit the same file in the same way.",
            code="idempotency_conflict",
        )
    return batch_id


def _known(ledger: Ledger, batch_id: str) -> bool | None:
    try:
        ledger.status(batch_id)
    except NotFound:
        return False
    except MillraceError:  # nobody can tell; the folder stays, and its note, for the reaper to look at
        return None
    return True


async def _engine(settings: Settings) -> tuple[EngineState | None, str | None]:
    async with EngineClient.of(settings) as client:
        try:
            return await probe(client), None
        except KeyRefused as error:
            raise SettingsError(error.message, error.hint, code=error.code) from error
        except EngineError as error:
            return None, error.message


async def _check_served(settings: Settings, state: EngineState, planned: Plan, filename: str) -> None:
    """Refuse models and urls that the engine says it does not serve.

    Raises:
        InvalidInputFile: It serves some of them not.
    """
    problems = []
    served = ", ".join(state.models) or "none"
    for model, line in planned.models.items():
        if model not in state.names:
            message = f"the engine does not serve the model {model!r}; it serves {served}."
            problems.append(Problem(line, "model_not_found", message, param="body.model"))
    if EMBEDDINGS in planned.urls and not problems:
        async with EngineClient.of(settings) as client:
            if not await serves(client, EMBEDDINGS, next(iter(planned.models))):
                message = f"the engine at {state.url} does not serve {EMBEDDINGS}."
                problems.append(Problem(planned.urls[EMBEDDINGS], "invalid_url", message, param="url"))
    if problems:
        raise InvalidInputFile(
            f"{filename} asks for what the engine does not serve; nothing was run.",
            f"It serves {served}.",
            problems=problems,
            code=problems[0].code,
        )
