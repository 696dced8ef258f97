"""A PostgreSQL server for the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Postgres:
    """A server that may be killed and started again."""

    folder: Path
    control: Path
    #: For subprocess.run: who it runs as.
    user: dict[str, str]

    @property
    def url(self) -> str:
        """Where its database `postgres` is."""
        return f"postgresql+psycopg://postgres@/postgres?host={self.folder}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off -c max_connections=100"
        self.run(str(self.control), "-D", self._data, "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def kill(self) -> None:
        """End it as a crash would: at once, and with its log to be read at the next start."""
        self.run(str(self.control), "-D", self._data, "-m", "immediate", "stop")

    def make(self, initdb: str) -> None:
        """Make its folder of data."""
        self.run(initdb, "-D", self._data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def run(self, *command: str) -> None:
        """Run a command of PostgreSQL's."""
        # Not pipes: the server would hold them open.
        with (self.folder / "output").open("w+b") as output:
            code = subprocess.run(
                command, cwd=self.folder, stdout=output, stderr=output, timeout=60, check=False, **self.user
            )
            output.seek(0)
            assert code.returncode == 0, f"{command}: {output.read().decode()}"


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run a server for a block; skips the test where there is none."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(programs[-1]) if programs else shutil.which("initdb")
    if found is None:
        pytest.skip("no PostgreSQL server is installed")
    folder = Path(tempfile.mkdtemp(prefix="millrace-pg-"))  # a short path: it holds a Unix socket
    try:
        user: dict[str, str] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            try:
                account = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
            os.chown(folder, account.pw_uid, account.pw_gid)
            user = {"user": "postgres"}
        server = Postgres(folder, Path(found).with_name("pg_ctl"), user)
        server.make(found)
        server.start()
        try:
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
