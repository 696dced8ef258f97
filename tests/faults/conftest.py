"""Projects for the fault suite, the figures that it prints at its end, and the scenarios that still fail."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from millrace.selftest.parts import Project
from tests.cli import Cli
from tests.services import until

KNOWN = Path(__file__).with_name("known.yaml")
FIGURES = "faults_figures"

#: Figures that add up over tests; of the others the largest is shown.
SUMS = ("kills", "rows", "rows lost", "rows doubled", "requests run again", "requests in flight at the kills")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--seeds", type=int, default=3, help="seeds of the random kills")
    group.addoption("--kills", type=int, default=10, help="kills for each seed")
    group.addoption("--long", action="store_true", help="run what takes minutes as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; runs with --long alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(1, metafunc.config.getoption("--seeds") + 1))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = yaml.safe_load(KNOWN.read_text()) or {}
    for item in items:
        if reason := known.get(item.name):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --long, or make faults-long"))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Return a function that notes a figure for the end of the run: what, and how much."""

    def note(what: str, much: float) -> None:
        request.node.user_properties.append((FIGURES, [what, much]))

    return note


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Callable[..., Project]]:
    """Return a function that makes a project: `project(script={…}, **settings)`; they end with the test."""
    with contextlib.ExitStack() as stack:
        made: list[Project] = []

        def make(script: dict[str, Any] | None = None, **settings: Any) -> Project:
            made.append(stack.enter_context(Project(tmp_path / f"project{len(made)}", script, **settings)))
            return made[-1]

        yield make
    here = Cli(tmp_path, {})
    until(lambda: {one.pid for one in here.processes()} <= {os.getpid()}, lambda: f"left behind: {here.describe()}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for key, value in report.user_properties:
                    if key == FIGURES:
                        what, much = value
                        before = found.get(what)
                        if before is None:
                            found[what] = much
                        else:
                            found[what] = before + much if what in SUMS else max(before, much)
    if not found:
        return
    terminalreporter.section("figures")
    for what in sorted(found, key=lambda what: (what not in SUMS, SUMS.index(what) if what in SUMS else 0, what)):
        terminalreporter.write_line(f"{what + ' ':.<60} {found[what]:,.10g}")
    terminalreporter.write_line(json.dumps(found))
