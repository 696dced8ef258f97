"""What the command says of itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.core import TyperGroup

from millrace import __version__
from millrace.cli.app import tree
from tests.cli import Cli

#: The commands that print an answer.
ANSWER = {
    "up",
    "backup",
    "restore",
    "status",
    "chat",
    "demo",
    "doctor",
    "selftest",
    "backend start",
    "backend switch",
    "config init",
    "config check",
    "config show",
    "models demo-hf",
    "models list",
    "models make-tiny",
    "models pull",
    *(f"dlq {name}" for name in ("list", "show", "retry", "purge")),
    *(f"batch {name}" for name in ("submit", "run", "list", "show", "watch", "results", "verify")),
    *(f"batch {name}" for name in ("cancel", "pause", "resume", "retry", "priority", "delete")),
}
#: Those that serve until they are ended.
SERVE = {"worker", "flower", "engine-sim"}


def commands() -> dict[str, typer.core.TyperCommand]:
    found = {}

    def walk(group: TyperGroup, path: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if isinstance(command, TyperGroup):
                assert command.help, name
                walk(command, (*path, name))
            else:
                found[" ".join((*path, name))] = command

    root = typer.main.get_command(tree())
    assert isinstance(root, TyperGroup)
    walk(root, ())
    return found


def test_every_command_is_known_to_these_tests() -> None:
    assert set(commands()) == ANSWER | SERVE


@pytest.mark.parametrize("name", sorted(ANSWER | SERVE))
def test_a_command_and_its_parameters_have_help(name: str) -> None:
    command = commands()[name]
    assert command.help
    assert command.help.strip().splitlines()[0].endswith(".")
    for parameter in command.params:
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("name", sorted(ANSWER))
def test_a_command_that_prints_an_answer_has_json(name: str) -> None:
    assert "--json" in {option for parameter in commands()[name].params for option in parameter.opts}


def test_help_of_all_levels(cli: Cli) -> None:
    everything = cli.run("--help")
    assert everything.code == 0
    for command in ("up", "batch", "doctor", "engine-sim"):
        assert re.search(rf"\b{command}\b", everything.out)
    assert "Usage: millrace batch " in cli.run("batch", "-h").out


def test_a_group_without_a_command_shows_its_help(cli: Cli) -> None:
    done = cli.run("batch")
    assert done.code == 2
    assert done.out.count("Usage: millrace batch ") == 1
    assert done.err == ""


def test_version(cli: Cli) -> None:
    done = cli.run("--version")
    assert (done.code, done.out, done.err) == (0, f"millrace {__version__}\n", "")


def test_version_loads_nothing_that_is_slow(cli: Cli) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from millrace.cli import main; main()", "--version"],
        cwd=cli.folder,
        env=cli.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == f"millrace {__version__}\n"
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "millrace" in loaded
    assert not loaded & {"typer", "rich", "click", "celery", "kombu", "sqlalchemy", "aiohttp", "pydantic", "redis"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["btach"], "No such command"),
        (["batch", "run", "x.jsonl"], "--output"),
        (["batch", "submit", "--nonsense", "x.jsonl"], "--nonsense"),
        (["batch", "list", "--limit", "none"], "--limit"),
    ],
)
def test_a_mistyped_command_line(cli: Cli, arguments: list[str], word: str) -> None:
    done = cli.run(*arguments)
    assert done.code == 2
    assert word in done.err
    assert re.search(r"See `millrace[a-z ]* --help`", done.err)
    assert done.out == ""


def test_a_mistyped_command_line_as_json(cli: Cli) -> None:
    done = cli.run("batch", "list", "--limit", "none", "--json")
    assert done.code == 2
    assert done.error["code"] == "usage"
    assert "--limit" in json.dumps(done.error)
