"""`millrace dlq`: what failed for good, and another try."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from millrace import dead_letters, presence
from millrace.cli.output import Json, answers, confirm, print_json, say
from millrace.dead_letters import Letter
from millrace.errors import InputError, NotFound
from millrace.settings import get_settings

app = typer.Typer(help="Dead letters: tasks that failed for good, and messages that no worker could read.")

LetterId = Annotated[str, typer.Argument(metavar="ID", help="A letter's id, as `dlq list` shows it.")]
SomeId = Annotated[str | None, typer.Argument(metavar="[ID]", help="A letter's id, as `dlq list` shows it.")]


@app.command("list")
def list_letters(as_json: Json = False) -> None:
    """List dead letters, the oldest first; prompts are not shown."""
    settings = get_settings()
    with presence.connect(settings) as client:
        found = dead_letters.letters(client, settings)
    if as_json:
        print_json({"object": "list", "data": [letter.as_dict() for letter in found]})
        return
    if not found:
        say("There are no dead letters.")
        return
    table = Table("id", "task", "queue", "when", "why", "tries", box=None, pad_edge=False)
    for letter in found:
        words = (letter.id, letter.task or "?", letter.queue, _moment(letter), letter.code, str(letter.attempts))
        table.add_row(*map(escape, words))
    answers.print(table)


@app.command()
def show(letter_id: LetterId, as_json: Json = False) -> None:
    """Show a dead letter with its reason and its message: prompts too."""
    with presence.connect(get_settings()) as client:
        letter = dead_letters.letter(client, letter_id)
    contents = letter.contents()
    if as_json:
        print_json(letter.as_dict() | {"reason": letter.reason, "message": contents})
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    rows: dict[str, Any] = {
        "id": letter.id,
        "task": letter.task or "?",
        "queue": letter.queue,
        "when": _moment(letter),
        "why": f"{letter.code}: {letter.reason}" if letter.reason else letter.code,
        "tries": letter.attempts,
        "worker": letter.worker,
    } | {name: json.dumps(value) for name, value in contents.items()}
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape("".join(c if c.isprintable() else " " for c in str(value))))
    answers.print(table)


@app.command()
def retry(
    letter_id: SomeId = None,
    everything: Annotated[bool, typer.Option("--all", help="Every letter, the oldest first.")] = False,
    as_json: Json = False,
) -> None:
    """Send a message again: to its queue, with its priority and its task id, and with all its tries."""
    settings = get_settings()
    _one_of(letter_id, everything)
    sent = []
    with presence.connect(settings) as client:
        for chosen in [letter_id] if letter_id else _ids(client, settings):
            try:
                dead_letters.send_again(client, chosen)
            except NotFound:
                if letter_id:
                    raise
                continue  # somebody else has just sent or removed it
            sent.append(chosen)
    if as_json:
        print_json({"retried": sent})
    else:
        say(f"Sent again: {_letters(len(sent))}.")


@app.command()
def purge(
    letter_id: SomeId = None,
    everything: Annotated[bool, typer.Option("--all", help="Every letter.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a dead letter, and the prompt in it; its task is not run again."""
    settings = get_settings()
    _one_of(letter_id, everything)
    removed = []
    with presence.connect(settings) as client:
        chosen = [dead_letters.letter(client, letter_id).id] if letter_id else _ids(client, settings)
        if chosen:
            lost = _letters(len(chosen))
            confirm(
                f"Remove {lost}? No command brings them back.",
                f"{lost.capitalize()} would be removed for good, and nobody is there to be asked.",
                yes=yes,
            )
        for one in chosen:
            try:
                dead_letters.remove(client, one)
            except NotFound:
                if letter_id:
                    raise
                continue
            removed.append(one)
    if as_json:
        print_json({"purged": removed})
    else:
        say(f"Removed: {_letters(len(removed))}.")


def _one_of(letter_id: str | None, everything: bool) -> None:
    if (letter_id is None) is not everything:
        raise InputError(
            "Name one dead letter, or --all." if letter_id is None else f"{letter_id} and --all contradict each other.",
            "`millrace dlq list` shows those there are.",
            code="usage",
        )


def _ids(client: Any, settings: Any) -> list[str]:
    return [letter.id for letter in dead_letters.letters(client, settings)]


def _moment(letter: Letter) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.when))


def _letters(count: int) -> str:
    return "1 dead letter" if count == 1 else f"{count} dead letters"
