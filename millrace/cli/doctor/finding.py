"""What a check found, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.errors import MillraceError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ok, a note, or wrong with what mends it."""

    check: str
    #: ok, note (nothing to mend for a first run) or wrong.
    verdict: str
    what: str
    mend: str = ""


def ok(check: str, what: str) -> Finding:
    """Return that all is well."""
    return Finding(check, "ok", what)


def note(check: str, what: str, mend: str = "") -> Finding:
    """Return what is good to know and stops no run."""
    return Finding(check, "note", what, mend)


def wrong(check: str, what: str, mend: str) -> Finding:
    """Return what stops a run, and what mends it."""
    return Finding(check, "wrong", what, mend)


def told(check: str, error: MillraceError) -> Finding:
    """Return an error as a finding."""
    return wrong(check, error.message, error.hint)
