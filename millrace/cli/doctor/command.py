"""The command: settings and ledger here, everything else in the modules beside it, and one table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import sqlalchemy as sa
import typer
from rich.markup import escape
from rich.table import Table

from millrace.batch.database import REVISION
from millrace.batch.ledger import Ledger
from millrace.cli.doctor.containers import containers
from millrace.cli.doctor.docker import Docker, look
from millrace.cli.doctor.engine import engine
from millrace.cli.doctor.finding import Finding, note, ok, told, wrong
from millrace.cli.doctor.gpu import gpu
from millrace.cli.doctor.machine import disk, memory
from millrace.cli.doctor.model import model
from millrace.cli.doctor.ports import ports
from millrace.cli.doctor.programs import together
from millrace.cli.doctor.redis import redis
from millrace.cli.output import Json, answers, print_json
from millrace.dotenv_file import unknown_variables
from millrace.errors import MillraceError
from millrace.settings import Settings, load, variables


def doctor(as_json: Json = False) -> None:
    """Check Redis, ledger, engine, model, Docker, GPU, ports, disk and memory; say what mends each trouble."""
    settings = load().settings
    docker = look(settings)
    checked = together([partial(check, settings, docker) for check in CHECKS])
    findings = [finding for found in checked for finding in found]
    sick = any(finding.verdict == "wrong" for finding in findings)
    if as_json:
        print_json({"ok": not sick, "checks": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    raise typer.Exit(3 if sick else 0)


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    colors = {"ok": "green", "note": "yellow", "wrong": "red"}
    for finding in findings:
        table.add_row(
            f"[{colors[finding.verdict]}]{finding.verdict}[/]", f"[bold]{finding.check}[/]", escape(finding.what)
        )
        if finding.mend:
            table.add_row("", "", f"→ {escape(finding.mend)}")
    answers.print(table)


def _settings(_: Settings, __: Docker) -> list[Finding]:
    return [
        note("settings", f"{name} in .env is no setting", f"Write {near}." if near else "Remove it.")
        for name, near in unknown_variables(variables())
    ] or [ok("settings", "every variable is known and valid")]


def _ledger(settings: Settings, _: Docker) -> list[Finding]:
    url = sa.make_url(settings.ledger_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return [ok("ledger", f"none yet; {url.database} is made at the first use")]
    try:
        with contextlib.closing(Ledger.connect(settings)) as ledger:
            found, address = ledger.revision(), ledger.address
    except MillraceError as error:
        return [told("ledger", error)]
    if found is not None and found > REVISION:
        return [wrong("ledger", f"version {found}; this Millrace knows {REVISION}", "Use the newer Millrace.")]
    if found != REVISION:
        return [note("ledger", f"version {found}", "The next command brings it up to date.")]
    return [ok("ledger", f"{address}, version {found}")]


#: In the order of the table. Each looks, says what it found, and changes nothing.
CHECKS: tuple[Callable[[Settings, Docker], list[Finding]], ...] = (
    _settings,
    redis,
    _ledger,
    engine,
    model,
    lambda _, docker: list(docker.findings),
    containers,
    gpu,
    ports,
    disk,
    memory,
)
