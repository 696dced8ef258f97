"""Who listens at a port of this machine, from /proc; where there is none, only whether somebody does."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHOWN = 80  # characters of a command line
_LISTEN = "0A"  # a socket's state in /proc/net/tcp


@dataclass(frozen=True)
class Listener:
    """A listening socket. `address` is the numeric address it is bound to; `inode` its number, 0 if unknown."""

    address: str
    inode: int = 0

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.address).is_loopback

    def blocks(self, host: str) -> bool:
        """Whether nobody else can listen at `host`, an address or "" for all of them."""
        everywhere = ("", "0.0.0.0", "::")  # noqa: S104  # compared, not bound
        return self.address in everywhere or host in everywhere or self.address == host


@dataclass(frozen=True)
class Process:
    """Who holds a socket. `command` is its whole command line; `pid` is 0 for another user's process."""

    pid: int
    command: str = ""

    def __str__(self) -> str:
        if not self.pid:
            return "another user's process"
        shown = self.command if len(self.command) <= SHOWN else f"{self.command[: SHOWN - 1]}…"
        return f"{shown} (pid {self.pid})"

    @property
    def docker(self) -> bool:
        """Whether it is the program of Docker that listens for a container."""
        return Path(self.command.partition(" ")[0]).name == "docker-proxy"

    @property
    def millrace(self) -> bool:
        """Whether it is a worker of Millrace, or the process that shows its metrics."""
        words = [Path(word).name for word in self.command.split()]
        return {"millrace", "worker"} <= {*words} or {"millrace", "up"} <= {*words} or "worker.exporter" in words


def listeners(port: int) -> list[Listener]:
    """Return the sockets that listen at a TCP port."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    if not tables[0].exists():
        return [Listener("127.0.0.1")] if _answers(port) else []
    found = []
    for table in tables:
        with contextlib.suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                address, _, number = fields[1].rpartition(":")
                if fields[3] == _LISTEN and int(number, 16) == port:
                    found.append(Listener(_address(address), int(fields[9])))
    return found


def holder(listener: Listener) -> Process:
    """Return the process that holds a socket."""
    wanted = f"socket:[{listener.inode}]"
    for pid, path in _descriptors() if listener.inode else ():
        with contextlib.suppress(OSError):
            if str(path.readlink()) == wanted:
                return Process(pid, _command(pid))
    return Process(0)


def _descriptors() -> Iterator[tuple[int, Path]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            for name in os.listdir(folder / "fd"):  # noqa: PTH208  # thousands of them
                yield int(folder.name), folder / "fd" / name


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        return b" ".join(words).decode(errors="replace")
    return "a process"


def _address(word: str) -> str:
    """Return an address of /proc/net/tcp: 32-bit words in hexadecimal, each in this machine's byte order."""
    raw = b"".join(int(word[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(word), 8))
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
