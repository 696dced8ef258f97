"""`millrace selftest`: proof, on this machine, that what dies loses nothing."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from millrace.cli.output import Json, answers, console, duration, print_json, say
from millrace.selftest.kills import schedule
from millrace.selftest.parts import Project
from millrace.selftest.run import Blow, Outcome, Run


def selftest(
    kills: Annotated[int, typer.Option(min=0, max=1000, help="How often something is killed.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is killed when.")] = 1,
    rows: Annotated[int, typer.Option(min=20, max=1_000_000, help="Rows of the batch.")] = 1000,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder with its files and logs.")] = False,
    as_json: Json = False,
) -> None:
    """Kill workers, Redis and the engine while a batch runs, and prove that every row has one answer.

    All parts are its own, in a temporary folder; nothing of yours is touched.
    """
    with _folder(keep=keep) as folder, _ended_by_sigterm(), Project(folder) as project:
        say(f"Starting a Redis, an engine made for tests and a worker in {folder}.")
        project.start()
        source = project.write_rows(rows)
        batch_id = project.submit(source)
        say(f"{rows} rows are running; {kills} kills, seed {seed}.")
        run = Run(project, batch_id, told=lambda blow: _show(blow, rows))
        status = run.until_end(schedule(kills, seed, rows))
        outcome = run.outcome(seed, source, status)
        if as_json:
            print_json(outcome.as_dict() | ({"folder": str(folder)} if keep else {}))
        else:
            _report(outcome)
    raise typer.Exit(0 if outcome.ok else 1)


@contextlib.contextmanager
def _folder(*, keep: bool) -> Iterator[Path]:
    """Yield a temporary folder, which goes at the end unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="millrace-selftest-"))
    try:
        yield folder
    finally:
        if keep:
            say(f"Its files lie in {folder}.")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end us as Ctrl-C does: with everything that we started."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(blow: Blow, rows: int) -> None:
    console.print(
        f"[dim]{blow.seconds:7.1f} s[/]  {blow.rows:>{len(str(rows))}}/{rows} rows  "
        f"[red]kill {blow.number}[/] {blow.part:<21} [dim]{blow.in_flight} in flight[/]"
    )


def _report(outcome: Outcome) -> None:
    verdict = outcome.verdict
    lines = [
        ("kills", f"{outcome.kills} in {duration(outcome.seconds)}, seed {outcome.seed}"),
        ("rows", f"{verdict.rows}: {verdict.answered} answered, {verdict.failed} failed"),
        ("lost", str(verdict.lost)),
        ("doubled", str(verdict.doubled)),
        ("run again", f"{verdict.run_again} requests; {verdict.in_flight} were in flight at the kills"),
    ]
    for what, took in sorted(outcome.recovery.items()):
        lines.append(("recovery", f"{took:.1f} s at most from {_SINCE[what]} to the next answer"))
    for name, value in lines:
        answers.print(f"[bold]{name:<10}[/] {value}")
    for finding in [*verdict.findings, *outcome.findings]:
        answers.print(f"[red]found[/]      {finding}", soft_wrap=True)
    if outcome.ok:
        answers.print("[green]passed[/]     every row has exactly one line, in order, with its own answer")
    else:
        answers.print(
            f"[bold red]failed[/]     the batch is {outcome.status}; run it again with --keep to look at its files"
        )


_SINCE = {"worker": "a worker's death", "engine": "the engine's return", "Redis": "Redis's return"}
