"""The command tree, and the one place where errors become exit codes."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from millrace import __version__
from millrace.cli import backend, backup, batch, config, demo, doctor, flower, models, work
from millrace.cli.output import console, print_error
from millrace.errors import InputError, MillraceError

app = typer.Typer(
    name="millrace",
    help="Run files of prompts on your own models, and find every answer in the morning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"millrace {__version__}")
        raise typer.Exit


app.command("up")(work.up)
app.command("worker")(work.worker)
app.command("status")(work.status)
app.command("chat")(work.chat)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("flower")(flower.flower)
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.command("engine-sim")(models.engine_sim)
app.add_typer(batch.app, name="batch")
app.add_typer(backend.app, name="backend")
app.add_typer(config.app, name="config")
app.add_typer(models.app, name="models")


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="millrace", standalone_mode=False)
    except MillraceError as error:
        print_error(error, as_json=as_json)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        console.print("Interrupted.")
        return 130
    except typer.TyperException as error:
        if not error.format_message():  # a group without a command: its help is printed by now
            return 2
        context = getattr(error, "ctx", None)
        asked = context.command_path if context else "millrace"
        print_error(InputError(error.format_message(), f"See `{asked} --help`.", code="usage"), as_json=as_json)
        return 2
    return int(code or 0)
