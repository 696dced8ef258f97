"""The guard: ends the processes of a stack when the process that started them is gone, however it went.

It reads `+PID` and `-PID` lines from its stdin. When its stdin closes, because its parent has ended or was
killed, it ends every process group it still knows: politely, then for good. One small process serves a
whole stack, on every system; Linux's PR_SET_PDEATHSIG would serve Linux alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time

log = logging.getLogger(__name__)

GRACE = 20.0  # seconds from SIGTERM to SIGKILL
PAUSE = 0.5  # seconds between starts of a guard


class Guard:
    """The parent's end: starts a guard, another one should that be killed, and tells it what to watch."""

    def __init__(self) -> None:
        self._watched: set[int] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def watch(self, pid: int) -> None:
        """End the process group of `pid` when we are gone."""
        with self._lock:
            self._watched.add(pid)
            self._say(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        """The process has ended."""
        with self._lock:
            self._watched.discard(pid)
            self._say(f"-{pid}\n")

    def close(self) -> None:
        """End what is still watched, and the guard."""
        with self._lock:
            self._closed.set()
            self._hang_up()
        self._keeper.join()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "millrace.guard"], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def _keep(self) -> None:
        while True:
            self._process.wait()
            with self._lock:
                if self._closed.is_set():
                    return
                self._hang_up()
                try:
                    self._process = self._start()
                except OSError as error:
                    log.warning("The guard has ended, and cannot be started again yet: %s.", error)
                else:
                    self._say("".join(f"+{pid}\n" for pid in self._watched))
            self._closed.wait(PAUSE)

    def _hang_up(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _say(self, lines: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it was killed a moment ago; the next one is told all of it
            self._process.stdin.write(lines)
            self._process.stdin.flush()


def main() -> None:
    """Guard until stdin closes."""
    # A Ctrl-C or a SIGTERM to the whole session is for the parent to handle; we follow it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            groups.add(pid)
        else:
            groups.discard(pid)
    if groups:
        end(groups)


def end(groups: set[int]) -> None:
    """Send SIGTERM to process groups, and SIGKILL to those that are still there after GRACE."""
    for group in groups:
        _signal(group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(_signal(group, 0) for group in groups):
        time.sleep(0.1)
    for group in groups:
        _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    main()
