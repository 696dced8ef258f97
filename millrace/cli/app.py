"""The command tree, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
import sys
from importlib import import_module
from typing import Annotated

import typer

from millrace import __version__
from millrace.cli.output import console, print_error
from millrace.errors import InputError, MillraceError, StorageError

#: Where each command or group of commands is; what is not asked for is not loaded.
COMMANDS = {
    "up": "work.up",
    "worker": "work.worker",
    "status": "work.status",
    "chat": "work.chat",
    "demo": "demo.demo",
    "doctor": "doctor.doctor",
    "flower": "flower.flower",
    "selftest": "selftest.selftest",
    "backup": "backup.backup",
    "restore": "backup.restore",
    "engine-sim": "models.engine_sim",
    "batch": "batch.app",
    "backend": "backend.app",
    "config": "config.app",
    "dlq": "dlq.app",
    "models": "models.app",
}


def tree(name: str = "") -> typer.Typer:
    """Return the command tree: with that command alone, or with all where there is none of that name."""
    app = typer.Typer(
        name="millrace",
        help="Run files of prompts on your own models, and find every answer in the morning.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in [name] if name in COMMANDS else COMMANDS:
        module, _, attribute = COMMANDS[command].rpartition(".")
        found = getattr(import_module(f"millrace.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=command)
        else:
            app.command(command)(found)
    return app


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"millrace {__version__}")
        raise typer.Exit


#: Of writes; an OSError that no path caused and that has one of these is stdout's.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    as_json = "--json" in arguments
    # No option before the command's name has a value.
    command = typer.main.get_command(tree(next((word for word in arguments if not word.startswith("-")), "")))
    gc.freeze()
    gc.enable()
    try:
        code = command.main(arguments, prog_name="millrace", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_gone():
            raise
        _leave_stdout()  # `| head` has seen enough
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        _leave_stdout()
        full = f"What stands behind stdout cannot be written: {error.strerror}."
        print_error(StorageError(full, "Make room, then run the command again.", code="disk_full"), as_json=False)
        return StorageError.exit_code
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


def _reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more; another broken pipe is a fault of ours."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # that alone is told without being asked for
    return bool(poll.poll(0))


def _leave_stdout() -> None:
    """Write no more there: Python would try again, and complain, when it flushes stdout at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
