"""Runner's sessions in this process, for faults that need no worker: of the disk, the clock and the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from millrace.batch.lease import Leases
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge
from millrace.batch.runner import Outcome, Session
from millrace.batch.submit import Order, open_input, submit
from millrace.batch.verify import verify
from millrace.selftest.parts import Project
from millrace.settings import environment
from tests.faults.oracle import Verdict, check

LEASE = 3.0  # seconds; the shortest there is, for tests that wait for its end


def submitted(project: Project, source: Path, ledger: Ledger, **order: Any) -> str:
    """Submit a file by the library, which needs no Redis, and return the batch's id."""
    with open_input(str(source)) as stream:
        return submit(project.settings(), ledger, stream, Order(filename=source.name, **order)).batch_id


@contextlib.contextmanager
def session(project: Project, ledger: Ledger, owner: str = "runner", ttl: float = 30.0) -> Iterator[Future[Outcome]]:
    """Run a session in a thread of its own; the end of the block stops it."""
    stop = threading.Event()
    running = Session(Leases(ledger, owner, ttl), project.settings(), stop=stop.is_set, seconds=300.0)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(lambda: asyncio.run(running.run()))
        try:
            yield outcome
        finally:
            stop.set()


def run(project: Project, ledger: Ledger, owner: str = "runner") -> Outcome:
    """Run a session to its end."""
    with session(project, ledger, owner) as outcome:
        return outcome.result(120)


def merged(project: Project, ledger: Ledger, batch_id: str, source: Path, **options: Any) -> Verdict:
    """Merge a batch whose shards have ended, and return what the oracle says; it and `verify` must be content."""
    merge(ledger, project.data_dir, batch_id)
    report = verify(ledger, project.data_dir, batch_id)
    assert report.ok, report.findings
    return check(project, batch_id, source, **options)


@contextlib.contextmanager
def process(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """Run a session in a process of its own, which the end of the block kills."""
    with subprocess.Popen([sys.executable, "-c", _SESSION], env=environment(**project.values())) as child:
        try:
            yield child
        finally:
            child.kill()


_SESSION = """
import asyncio
from millrace.batch.lease import Leases
from millrace.batch.ledger import Ledger
from millrace.batch.runner import Session
from millrace.settings import get_settings

settings = get_settings()
leases = Leases(Ledger.open(settings), "child", settings.batch_lease_seconds)
asyncio.run(Session(leases, settings, stop=lambda: False, seconds=300.0).run())
"""
