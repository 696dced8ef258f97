"""Programs that are not ours, asked for what they know: without a shell, and never for long."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

#: Seconds for one program. No check asks two of them one after the other once Docker has been asked, so
#: that the whole doctor takes less than ten.
LIMIT = 4.5

MISSING, TOO_LATE = 127, 124  # exit codes, as a shell and timeout(1) have them


@dataclass(frozen=True)
class Answer:
    """What a program said."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def last_line(self) -> str:
        """The last line of stderr, or else of stdout: where programs say why they failed."""
        lines = [line.strip() for line in (self.err.strip() or self.out.strip()).splitlines()]
        return lines[-1] if lines else f"exit code {self.code}"


def ask(*command: str) -> Answer:
    """Run a program that only looks; one that is missing or does not end has a code of its own."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # `docker compose` is a child of `docker`: both have to end.
            start_new_session=True,
        )
    except OSError:
        return Answer(MISSING)
    with process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return Answer(TOO_LATE, err=f"no answer within {LIMIT:g} s")
    return Answer(process.returncode, out, err)


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make calls at once and return their answers in order."""
    if not calls:
        return []
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))
