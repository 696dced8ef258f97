"""Which processes run, and who started them, on Linux and macOS, without a package for it.

An ended process whose parent does not ask for its exit code, such as PID 1 of many a container, does not run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process of this machine."""

    pid: int
    parent: int
    command: str


def tree(root: int) -> list[Process]:
    """Return the processes below `root`, those nearest to it first."""
    children: dict[int, list[Process]] = {}
    for process in _all():
        children.setdefault(process.parent, []).append(process)
    found, next_ones = [], [root]
    while next_ones:
        below = [child for pid in next_ones for child in children.get(pid, [])]
        found += below
        next_ones = [child.pid for child in below]
    return found


def still_there(processes: Iterable[Process]) -> list[Process]:
    """Return those that have not ended, whoever their parent is by now."""
    known = {one.pid: one.command for one in processes}
    return [one for one in _all() if known.get(one.pid) == one.command]


def alive(pid: int) -> bool:
    """Return whether a process is there, and not only its exit code for whom it concerns."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self/stat").exists()


def _all() -> Iterator[Process]:
    return _linux() if Path("/proc/self/stat").exists() else _anywhere()


def _linux() -> Iterator[Process]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # The name, in parentheses, may hold anything: "pid (name) state parent …".
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    yield Process(int(folder.name), int(parent), command.strip())


def _anywhere() -> Iterator[Process]:
    listing = subprocess.run(["ps", "-axo", "pid=,ppid=,command="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        pid, parent, command = line.split(maxsplit=2)
        yield Process(int(pid), int(parent), command)
