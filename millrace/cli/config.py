"""`millrace config …`: what the settings are, where they come from, and whether they make sense."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.markup import escape
from rich.table import Table

from millrace.cli.output import Json, answers, print_json
from millrace.dotenv_file import unknown_variables
from millrace.errors import InputError
from millrace.settings import ENGINES, Loaded, Settings, hide_password, load, secret_fields, variables

app = typer.Typer(help="Look at the settings.", no_args_is_help=True)

MASK = "********"


@app.command("init")
def init(
    engine: Annotated[str, typer.Argument(help="llamacpp or vllm, to run in a container.")] = "llamacpp",
    as_json: Json = False,
) -> None:
    """Make .env out of .env.sample, for containers: with an engine chosen, and with secrets of its own."""
    if engine not in ENGINES:
        raise InputError(f"There is no engine {engine!r}.", f"It is one of {', '.join(ENGINES)}.", code="usage")
    sample, target = Path(".env.sample"), Path(".env")
    if not sample.is_file():
        raise InputError("There is no .env.sample here.", "Be in the repository's folder.", code="not_found")
    chosen = {
        "COMPOSE_FILE": f"docker-compose.yml:docker-compose.{engine}.yml",
        "REDIS_PASSWORD": secrets.token_urlsafe(24),
        "LLM_API_KEY": secrets.token_urlsafe(24),
        "FLOWER_BASIC_AUTH": f"millrace:{secrets.token_urlsafe(12)}",
        "GRAFANA_PASSWORD": secrets.token_urlsafe(12),
        # Worker containers write DATA_DIR as whoever owns it.
        "WORKER_USER": f"{os.getuid()}:{os.getgid()}",
    }
    lines = sample.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        name = line.removeprefix("# ").partition("=")[0]
        if name in chosen:
            lines[number] = f"{name}={chosen[name]}"
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # it holds secrets
    except FileExistsError:
        raise InputError(
            "There is a .env already.", "Change it by hand, or move it away first.", code="exists"
        ) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    if as_json:
        print_json({"file": str(target), "set": sorted(chosen)})
    else:
        answers.print(f"Wrote {target}, with {engine} and new secrets.", markup=False)


@app.command("check")
def check(as_json: Json = False) -> None:
    """Check every setting; unknown variables of .env are named."""
    loaded = load()
    unknown = unknown_variables(variables())
    if as_json:
        print_json({"ok": True, "set": sorted(loaded.origins), "unknown": [name for name, _ in unknown]})
        return
    for name, near in unknown:
        answers.print(
            f"[yellow]warning[/] {escape(name)} in .env is no setting" + (f"; did you mean {near}?" if near else ".")
        )
    answers.print(f"[green]ok[/] {len(loaded.origins)} of {len(Settings.model_fields)} settings are set.")


@app.command("show")
def show(
    reveal: Annotated[bool, typer.Option("--reveal", help="Show passwords and keys.")] = False, as_json: Json = False
) -> None:
    """Show every setting and where it comes from; secrets are masked."""
    loaded = load()
    rows = {name: _value(loaded, name, reveal=reveal) for name in Settings.model_fields}
    if as_json:
        print_json(
            {
                name.upper(): {"value": value, "from": loaded.origins.get(name, "default")}
                for name, value in rows.items()
            }
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("variable", "value", "from"):
        table.add_column(column, overflow="fold")
    for name, value in rows.items():
        table.add_row(name.upper(), "" if value is None else escape(str(value)), loaded.origins.get(name, "default"))
    answers.print(table)


def _value(loaded: Loaded, name: str, *, reveal: bool) -> Any:
    value = getattr(loaded.settings, name)
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        if reveal:
            return secret
        # Of a URL only the password is secret.
        return hide_password(secret) if name.endswith("_url") and "://" in secret else MASK
    if isinstance(value, Path):
        return str(value)
    assert name not in secret_fields() or value is None
    return value
