"""What commands print: answers to stdout, everything else to stderr; `--json` one object on stdout."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from millrace.errors import InputError, InvalidInputFile, MillraceError

#: For people: progress, notices, errors.
console = Console(stderr=True, highlight=False)
#: For what was asked for, when a person asked. In a pipe nothing is cut or wrapped to a width of 80.
answers = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]

SHOWN_PROBLEMS = 20


def print_json(value: Any) -> None:
    """Print the one object of `--json`."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(error: MillraceError, *, as_json: bool) -> None:
    """Print an error: its sentence, what to do, and the problems of a file."""
    if as_json:
        print_json({"error": error.as_dict()})
        return
    console.print("[bold red]error[/]", end=" ")
    console.print(f"[{error.code}] {error.message}", markup=False, soft_wrap=True)
    if isinstance(error, InvalidInputFile):
        for problem in error.problems[:SHOWN_PROBLEMS]:
            console.print(f"  {problem}", markup=False, soft_wrap=True)
        if (left := len(error.problems) - SHOWN_PROBLEMS) > 0:
            console.print(f"  … and {left} more; --json shows all.")
    if error.hint:
        console.print(f"  → {error.hint}", markup=False, soft_wrap=True)


def say(sentence: str) -> None:
    """Tell a person what is being done."""
    console.print(sentence, markup=False, soft_wrap=True)


def confirm(question: str, nobody: str, *, yes: bool) -> None:
    """Ask a person before something is lost for good; `yes` was said beforehand.

    Raises:
        InputError: Nobody is there to be asked (confirmation_needed): `nobody` says so, for this case.
        typer.Abort: The answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(nobody, "Say --yes.", code="confirmation_needed")
    typer.confirm(question, abort=True, err=True)


def size(count: float) -> str:
    """Return bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
