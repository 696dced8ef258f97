"""Running the doctor, and reading what he found."""

from __future__ import annotations

import time

from tests.cli import Cli

Findings = list[dict[str, str]]


def examine(cli: Cli, code: int, wrap: tuple[str, ...] = ()) -> Findings:
    """Run the doctor and return his findings; whatever he finds, he is quick and names a cure."""
    started = time.monotonic()
    done = cli.run("doctor", "--json", wrap=wrap)
    assert time.monotonic() - started < 40  # ten, and a loaded machine
    assert done.code == code, done
    findings: Findings = done.json["checks"]
    assert all(finding["mend"] for finding in findings if finding["verdict"] == "wrong"), findings
    assert done.json["ok"] is (code == 0)
    return findings


def found(findings: Findings, check: str, verdict: str = "wrong") -> dict[str, str]:
    """Return the one finding of a check that has this verdict."""
    matching = [finding for finding in findings if (finding["check"], finding["verdict"]) == (check, verdict)]
    assert len(matching) == 1, findings
    return matching[0]


def checks_with(findings: Findings, verdict: str) -> list[str]:
    """Return the checks that came to a verdict."""
    return [finding["check"] for finding in findings if finding["verdict"] == verdict]
