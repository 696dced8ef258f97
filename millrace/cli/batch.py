"""`millrace batch …`: the command group, and the two ways in: submit and run."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from millrace import presence
from millrace.batch.folder import BatchFolder
from millrace.batch.inputs import Format, Request, columns, detect_format
from millrace.batch.ledger import Ledger, Window
from millrace.batch.schema import Priority, Status
from millrace.batch.submit import Order, Submitted, open_input, submit
from millrace.cli import batch_life, batch_look
from millrace.cli.batch_life import send_tickets
from millrace.cli.batch_look import copy, exit_code
from millrace.cli.output import Json, duration, print_json, say
from millrace.cli.stack import Stack, running_stack
from millrace.cli.watch import watch_batch
from millrace.errors import InputError, IntegrityError
from millrace.settings import Settings, get_settings

app = typer.Typer(help="Run files of prompts.", no_args_is_help=True)


File = Annotated[str, typer.Argument(help="OpenAI Batch JSONL, .txt (a prompt a line), .csv, .jsonl; - for stdin.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Model of rows that name none.")]
PriorityName = Annotated[str, typer.Option("--priority", "-p", help="urgent, high, normal, low or idle.")]
Name = Annotated[str, typer.Option("--name", "-n", help="A name of your own for the batch.")]
Template = Annotated[
    str | None, typer.Option("--prompt-template", "-t", help='For .csv and .jsonl of objects: "… {column} …".')
]
System = Annotated[str | None, typer.Option("--system", help="System message of prompts that Millrace builds.")]
FormatName = Annotated[Format | None, typer.Option("--format", "-f", help="Else told by the file's name.")]
Key = Annotated[
    str | None, typer.Option("--idempotency-key", help="A word of yours: given again, it names the same batch.")
]
WindowText = Annotated[
    str | None, typer.Option("--window", help="End the batch after this, such as 30m, 24h or 7d; else it has no end.")
]


@app.command("submit")
def submit_command(
    file: File,
    model: Model = "",
    priority: PriorityName = "normal",
    name: Name = "",
    prompt_template: Template = None,
    system: System = None,
    file_format: FormatName = None,
    idempotency_key: Key = None,
    window: WindowText = None,
    as_json: Json = False,
) -> None:
    """Validate a file and queue it; print the batch's id."""
    settings = get_settings()
    order = _order(settings, file, model, priority, name, prompt_template, system, file_format)
    order = replace(order, idempotency_key=idempotency_key, window=None if window is None else Window.parse(window))
    with _input(file) as stream:
        presence.ping(settings)
        ledger = Ledger.open(settings)
        submitted = submit(settings, ledger, stream, order)
    send_tickets()
    status = ledger.status(submitted.batch_id).value
    if submitted.resumed:
        say(f"{submitted.batch_id} has this idempotency key and these rows, and is {status}: nothing new is queued.")
    elif submitted.twin:
        say(f"{submitted.twin} has the same rows and is {ledger.status(submitted.twin)}.")
    if submitted.trouble:
        say(f"The batch is queued and waits: {submitted.trouble}")
    elif not presence.at_work(settings):
        say("The batch is queued and waits: no worker is running. Start one: `millrace worker` or `millrace up`.")
    if as_json:
        print_json(
            {"id": submitted.batch_id, "rows": submitted.rows, "waiting_for": submitted.trouble}
            | {"status": status, "existing": submitted.resumed, "same_rows_as": submitted.twin}
        )
    else:
        print(submitted.batch_id)


@app.command("run")
def run_command(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the answers go.")],
    model: Model = "",
    priority: PriorityName = "normal",
    name: Name = "",
    prompt_template: Template = None,
    system: System = None,
    file_format: FormatName = None,
    idempotency_key: Key = None,
    window: WindowText = None,
    as_json: Json = False,
) -> None:
    """Run a file to its end and write the answers, starting what is not running.

    The same command again takes up a run that was interrupted.
    """
    settings = get_settings()
    order = _order(settings, file, model, priority, name, prompt_template, system, file_format)
    order = replace(order, idempotency_key=idempotency_key, window=None if window is None else Window.parse(window))
    batch_look.check_target(settings, output)
    if file != "-" and output.exists() and Path(file).exists() and output.samefile(file):
        raise InputError(f"{output} is the input file.", "Name another file after -o.", code="unwritable_output")
    with _input(file) as stream:
        code = asyncio.run(_run(stream, order, output, as_json=as_json))
    raise typer.Exit(code)


async def _run(stream: BinaryIO, order: Order, output: Path, *, as_json: bool) -> int:
    async with running_stack(always_own_workers=False) as stack:
        if stack.caution:
            say(stack.caution)
        result, code = await run_batch(stack, stream, order, output)
    if as_json:
        print_json(result)
    return code


async def run_batch(stack: Stack, stream: BinaryIO, order: Order, output: Path) -> tuple[dict[str, Any], int]:
    """Submit, watch and fetch a batch on a running stack; return the batch object and the exit code."""
    settings = stack.settings
    ledger = await asyncio.to_thread(Ledger.open, settings)
    metadata = {"output": str(output.absolute())}
    order = replace(order, metadata=metadata, resume=True)
    submitted = await asyncio.to_thread(submit, settings, ledger, stream, order)
    batch_id = submitted.batch_id
    if submitted.resumed:
        counts = ledger.batch(batch_id)["request_counts"]
        done = counts["completed"] + counts["failed"]
        say(f"Taking up {batch_id}: {done} of {counts['total']} rows are answered.")
    elif submitted.twin and not (status := ledger.status(submitted.twin)).final:
        say(f"{submitted.twin} has the same rows and is {status}; {batch_id} asks for them anew.")
    await asyncio.to_thread(send_tickets)
    # Not before: workers at once go on with what was interrupted, and could end it before we took it up.
    await stack.ensure_workers()
    final = await watch_batch(settings, ledger, batch_id, stack)
    batch = ledger.batch(batch_id)
    if final is None:
        say(f"{batch_id} is kept; the same command takes it up again.")
        return batch, 130
    if final is Status.PAUSED:
        return batch, 1
    if batch["errors"]:
        problem = batch["errors"]["data"][0]
        raise IntegrityError(f"{batch_id} has failed: {problem['message']}", code=problem["code"])
    failures = output.with_name(f"{output.stem}.errors{output.suffix or '.jsonl'}")
    fetch(settings, batch, output, failures)
    # From now on the same command is a new run; until now it would have fetched these answers.
    ledger.set_metadata(batch_id, metadata | {"written": "yes"})
    # The ledger's stamps: workers that were there already may have ended it before we began to watch.
    more = batch["millrace"]
    _summarize(batch, submitted, more["ended"] - more["created"], output, failures)
    return batch, exit_code(batch)


def _order(
    settings: Settings,
    file: str,
    model: str,
    priority: str,
    name: str,
    template: str | None,
    system: str | None,
    file_format: Format | None,
) -> Order:
    if template is not None and not columns(template):
        raise InputError(
            f"The template {template!r} names no column.",
            'Write columns in braces: "… {column} …".',
            code="invalid_template",
        )
    return Order(
        filename="stdin" if file == "-" else Path(file).name,
        format=file_format or detect_format(file, template),
        request=Request(template, system, settings.sampling),
        model=model,
        priority=Priority.parse(priority),
        name=name,
    )


@contextlib.contextmanager
def _input(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
    else:
        with open_input(file) as stream:
            yield stream


def fetch(settings: Settings, batch: dict[str, Any], output: Path, failures: Path) -> None:
    """Copy a batch's files to where the user wants them; a failures file of an earlier run goes."""
    folder = BatchFolder.of(settings.data_dir, batch["id"])
    copy(folder.output, output)
    if batch["error_file_id"]:
        copy(folder.errors, failures)
    else:
        failures.unlink(missing_ok=True)


def _summarize(batch: dict[str, Any], submitted: Submitted, seconds: float, output: Path, failures: Path) -> None:
    counts, usage = batch["request_counts"], batch["usage"]
    ended = counts["completed"] + counts["failed"]
    say(
        f"{counts['completed']} of {counts['total']} rows answered in {duration(seconds)} "
        f"({ended / max(seconds, 1e-3):.1f} rows/s, "
        f"{usage['output_tokens'] / max(seconds, 1e-3):.0f} tokens/s) → {output}"
        if not submitted.resumed
        else f"{counts['completed']} of {counts['total']} rows answered → {output}"
    )
    if counts["failed"]:
        say(f"{counts['failed']} {'row' if counts['failed'] == 1 else 'rows'} failed → {failures}")
    if never := counts["total"] - ended:
        say(
            f"The batch {'has expired' if batch['status'] == Status.EXPIRED else 'was cancelled'}: {never} "
            f"{'row was' if never == 1 else 'rows were'} not run → {failures}; "
            f"`millrace batch resume {batch['id']}` runs them."
        )
    say(f"Check it: millrace batch verify {batch['id']}")


app.command("list")(batch_look.list_batches)
app.command("show")(batch_look.show)
app.command("watch")(batch_look.watch)
app.command("results")(batch_look.results)
app.command("verify")(batch_look.verify)
app.command("cancel")(batch_life.cancel)
app.command("pause")(batch_life.pause)
app.command("resume")(batch_life.resume)
app.command("retry")(batch_life.retry)
app.command("priority")(batch_life.priority)
app.command("delete")(batch_life.delete)
