"""`millrace batch list`, `show`, `watch`, `results` and `verify`: what only looks."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from millrace.batch.folder import BatchFolder, storage_errors
from millrace.batch.follow import follow as follow_batch
from millrace.batch.ledger import Ledger
from millrace.batch.merge import rewrite
from millrace.batch.schema import Status
from millrace.batch.verify import verify as verify_batch
from millrace.cli.output import Json, answers, duration, print_json, say
from millrace.cli.watch import paused, watch_batch
from millrace.errors import InputError, IntegrityError, NotFound
from millrace.settings import Settings, get_settings

BatchId = Annotated[str, typer.Argument(help="A batch's id.")]


def opened(settings: Settings) -> Ledger:
    """Return the ledger, to look up a batch in.

    Raises:
        NotFound: There is none yet, or not any more.
        Unreachable: It does not answer.
    """
    ledger = Ledger.there(settings)
    if ledger is None:
        raise NotFound(
            f"There are no batches yet in {settings.data_dir}.",
            "`millrace batch submit FILE` makes one; DATA_DIR and DATABASE_URL may name another place.",
        )
    return ledger


def list_batches(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20, as_json: Json = False
) -> None:
    """List batches, newest first."""
    settings = get_settings()
    ledger = Ledger.there(settings)
    found = ledger.batches(limit) if ledger else []
    if as_json:
        print_json({"object": "list", "data": found})
        return
    table = Table(box=None, pad_edge=False)
    notes = [_note(batch) for batch in found]
    columns = ["id", "status", "rows", "done", "failed", "priority", "file", "name"]
    for column in columns + ["note"] * any(notes):
        # On a narrow terminal the file's name and the batch's give way; half an id is of no use.
        least = {"id": 30, "status": 11, "file": 4, "name": 4, "note": 4}.get(column, len(column))
        justify: JustifyMethod = "right" if column in ("rows", "done", "failed") else "left"
        table.add_column(column, justify=justify, no_wrap=True, min_width=least)
    for batch, note in zip(found, notes, strict=True):
        counts, more = batch["request_counts"], batch["millrace"]
        table.add_row(
            batch["id"],
            more["status"],
            *(str(counts[key]) for key in ("total", "completed", "failed")),
            more["priority"],
            escape(more["filename"]),
            escape(more["name"]),
            *[escape(note)] * any(notes),
        )
    answers.print(table if found else f"There are no batches yet in {settings.data_dir}: `millrace batch submit FILE`.")


def show(batch_id: BatchId, as_json: Json = False) -> None:
    """Show a batch; --json gives OpenAI's batch object, and more under `millrace`."""
    batch = opened(get_settings()).batch(batch_id)
    if as_json:
        print_json(batch)
        return
    counts, more, usage = batch["request_counts"], batch["millrace"], batch["usage"]
    ended = more["ended"] or time.time()
    shards = ", ".join(f"{count} {state}" for state, count in more["shards"].items() if count)
    rows = {
        "id": batch["id"],
        "name": more["name"],
        "status": f"{more['status']}: {more['reason']}" if more["reason"] else more["status"],
        "failure": batch["errors"]["data"][0]["message"] if batch["errors"] else "",
        "file": more["filename"],
        "rows": f"{counts['total']}: {counts['completed']} answered, {counts['failed']} failed",
        "tokens": f"{usage['input_tokens']} in, {usage['output_tokens']} out",
        "shards": shards,
        "priority": more["priority"],
        "key": more["idempotency_key"],
        "window": more["expires"] and f"{batch['completion_window']}, until {_local(more['expires'])}",
        "took" if more["ended"] else "runs for": duration(ended - more["created"]),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows.items():
        if value:
            table.add_row(f"[bold]{key}[/]", escape(value))
    answers.print(table)


def watch(batch_id: BatchId, as_json: Json = False) -> None:
    """Watch a batch until it ends; Ctrl-C stops watching, not the batch."""
    settings = get_settings()
    ledger = opened(settings)
    ledger.status(batch_id)
    asyncio.run(watch_batch(settings, ledger, batch_id, None))
    batch = ledger.batch(batch_id)
    if as_json:
        print_json(batch)
    else:
        counts = batch["request_counts"]
        say(
            f"{batch_id} is {batch['status']}: {counts['completed']} of {counts['total']} rows answered, "
            f"{counts['failed']} failed."
        )
    raise typer.Exit(exit_code(batch))


def results(
    batch_id: BatchId,
    errors: Annotated[bool, typer.Option("--errors", help="The failed rows instead.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of stdout.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Each row as it is answered, until the batch ends; in no order.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a batch's output lines to stdout."""
    if follow and (output is not None or as_json):
        raise InputError("--follow writes lines to stdout.", "Leave out --output and --json.", code="usage")
    settings = get_settings()
    ledger = opened(settings)
    if follow:
        _follow(settings, ledger, batch_id, errors=errors)
        return
    batch = ledger.batch(batch_id)
    status = Status(batch["millrace"]["status"])
    if not status.final:
        raise InputError(
            f"{batch_id} is {status}; its results are written when it ends.",
            f"Take what there is: `millrace batch results {batch_id} --follow`, or wait: "
            f"`millrace batch watch {batch_id}`.",
            code="batch_not_ended",
        )
    folder = BatchFolder.there(settings.data_dir, batch_id)
    source = folder.errors if errors else folder.output
    if as_json:
        files = {"output": folder.output, "errors": folder.errors}
        print_json(
            {"id": batch_id}
            | {key: {"path": str(path), "lines": _lines(path)} for key, path in files.items() if path.exists()}
        )
        return
    _refuse_failed(batch)
    _check_whole(ledger, batch, source, batch["error_file_id" if errors else "output_file_id"])
    if output is not None:
        check_target(settings, output)
        copy(source, output)
        return
    with storage_errors(source):
        lines = source.open("rb")
    with lines:
        shutil.copyfileobj(lines, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _check_whole(ledger: Ledger, batch: dict[str, Any], source: Path, file_id: str | None) -> None:
    """Refuse to hand out a file that has lost or got something; whether it was edited, verify knows.

    Raises:
        IntegrityError: It is not as long as it was.
    """
    recorded = ledger.file(file_id).bytes if file_id else 0
    found = source.stat().st_size if source.exists() else None
    if found != recorded:
        raise IntegrityError(
            f"{source} is gone." if found is None else f"{source} has {found} bytes; {recorded} were recorded.",
            f"`millrace batch verify {batch['id']} --repair` writes it again from the segments.",
        )


def _follow(settings: Settings, ledger: Ledger, batch_id: str, *, errors: bool) -> None:
    said = False

    def looked(status: Status) -> None:
        nonlocal said
        sys.stdout.buffer.flush()
        if status is Status.PAUSED and not said:
            say(paused(ledger.batch(batch_id)))
        said = status is Status.PAUSED

    for line in follow_batch(ledger, settings.data_dir, batch_id, errors=errors, looked=looked):
        sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()
    _refuse_failed(ledger.batch(batch_id))


def _refuse_failed(batch: dict[str, Any]) -> None:
    """Say why a batch has no files."""
    if batch["status"] == Status.FAILED:
        problem = batch["errors"]["data"][0]
        raise IntegrityError(
            f"{batch['id']} has failed: {problem['message']}",
            f"`millrace batch resume {batch['id']}` runs what is missing.",
            code=problem["code"],
        )


def verify(
    batch_id: BatchId,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write output and errors again from the segments if they are not right.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove that every row has exactly one line, in order, in files that nobody changed."""
    settings = get_settings()
    ledger = opened(settings)
    report = verify_batch(ledger, settings.data_dir, batch_id)
    if repair and report.repairable:
        rewrite(ledger, settings.data_dir, batch_id)
        say("Output and errors were written again from the segments.")
        report = verify_batch(ledger, settings.data_dir, batch_id)
    if as_json:
        print_json(report.as_dict())
    else:
        verdict = "[bold green]ok[/]" if report.ok else "[bold red]NOT OK[/]"
        answers.print(
            f"{verdict}  {report.rows} rows in = {report.output_lines} answers + {report.error_lines} failures out, "
            f"each once and in order; {report.segments} segments."
            if report.ok
            else verdict
        )
        for finding in report.findings:
            answers.print(f"  {finding}", markup=False)
        if report.more_findings:
            answers.print(f"  … and {report.more_findings} more.")
        if report.repairable:
            say(f"→ `millrace batch verify {batch_id} --repair` writes output and errors again from the segments.")
        elif not report.ok:
            whole = "" if report.damaged_results else " Output and errors are what was recorded."
            say(f"→ What they are made from is damaged: restore it from a backup.{whole} Nothing was changed.")
        if report.never_run:
            answers.print(f"  {report.never_run} of the failures are rows that were never run.")
        if report.extra_claims:
            answers.print(
                f"  {report.claims} attempts at shards, {report.extra_claims} of them after an interruption or a retry."
            )
        if report.wasted_rows:
            answers.print(
                f"  Wasted work: {report.wasted_rows} answers of {report.wasted_tokens} tokens that do not count, "
                "of runners that were replaced."
            )
    raise typer.Exit(0 if report.ok else 1)


def check_target(settings: Settings, output: Path) -> None:
    """Find out beforehand that answers cannot or must not be written there.

    Raises:
        InputError: Why not (unwritable_output).
    """
    wrong, hint = "", "Name another place after -o."
    parent = output.resolve().parent
    if output.is_dir():
        wrong, hint = f"{output} is a folder.", "Name a file after -o."
    elif output.exists() and not output.is_file():  # which a rename would replace
        wrong = f"{output} is no ordinary file."
        hint = "Name a file after -o; `millrace batch results ID` writes answers to stdout."
    elif output.resolve().is_relative_to(settings.data_dir.resolve()):
        wrong, hint = f"{output} lies in DATA_DIR, among the files of batches.", "Name a place outside it after -o."
    elif not os.access(parent, os.W_OK) or (output.exists() and not os.access(output, os.W_OK)):
        wrong = f"{output} cannot be written: {parent} is missing or not yours to write."
    if wrong:
        raise InputError(wrong, hint, code="unwritable_output")


def copy(source: Path, target: Path) -> None:
    """Copy a batch's file to where the user wants it, whole or not at all.

    Raises:
        StorageError: It cannot be written there.
    """
    target = target.resolve()  # through a link, not over it
    part = target.with_name(f".{target.name}.part")
    with storage_errors(target, "Name another place after -o; the answers are kept, see `millrace batch results`."):
        try:
            shutil.copyfile(source, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def exit_code(batch: dict[str, Any]) -> int:
    """Return 0 for a batch that is completed without a failed row, else 1."""
    clean = batch["status"] == Status.COMPLETED and not batch["request_counts"]["failed"]
    return 0 if clean else 1


def _note(batch: dict[str, Any]) -> str:
    """Return what a list says of a batch besides: why it is paused, when it expires."""
    more = batch["millrace"]
    if more["reason"] or more["ended"] or not more["expires"]:
        reason = str(more["reason"])
        return reason if len(reason) <= 60 else f"{reason[:59]}…"  # `show` has all of it
    return f"expires in {duration(max(0.0, more['expires'] - time.time()))}"


def _local(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
