"""What the fault suite does with a project: wait for its batch, watch for limbo, and have the files judged."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from millrace.batch.lease import waiting_shards
from millrace.batch.ledger import Ledger
from millrace.batch.verify import Report, verify
from millrace.selftest.parts import Project, Worker
from millrace.settings import environment
from tests.faults.oracle import Verdict, check
from tests.services import ROOT, until

__all__ = ["Limbo", "Project", "Worker", "answers", "ended", "judged", "progress", "running", "until", "words"]

#: I7: the longest that work may be ready with nothing in the broker that speaks of it, seconds.
MOST_LIMBO = 60.0
END = 120.0  # seconds that a batch may take to its end
LOOK = 0.1  # seconds between looks at what is awaited


@contextlib.contextmanager
def running(project: Project, batch_id: str, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker without Celery for a block, which ends with the batch: tests.faults.lone_worker."""
    with (project.folder / "lone_worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.lone_worker", batch_id],
            env=environment(**project.values(**settings)) | {"PYTHONPATH": str(ROOT)},
            cwd=project.folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def words(project: Project) -> str:
    """Return what such workers have logged."""
    path = project.folder / "lone_worker.log"
    return path.read_text(errors="replace") if path.exists() else ""


def progress(project: Project, batch_id: str) -> int:
    """Return the rows of a batch that the ledger counts as answered; up to a second behind."""
    with project.ledger() as ledger:
        counts = ledger.batch(batch_id)["request_counts"]
    return int(counts["completed"] + counts["failed"])


def answers(project: Project) -> int:
    """Return how many answers with status 200 the engine has given, over all its lives."""
    if not project.log.exists():
        return 0
    return sum(b'"status":200' in line for line in project.log.read_bytes().splitlines())


class Limbo:
    """Measures how long work is ready while Redis has no message about it (I7)."""

    def __init__(self, project: Project, ledger: Ledger) -> None:
        self._project, self._ledger = project, ledger
        self._since: float | None = None
        self.longest = 0.0

    def look(self) -> None:
        """Look once; to be called a few times a second."""
        now = time.monotonic()
        if not waiting_shards(self._ledger) or self._queued():
            self._since = None
            return
        self._since = self._since or now
        self.longest = max(self.longest, now - self._since)

    def _queued(self) -> bool:
        with contextlib.closing(redis.Redis.from_url(self._project.redis_url, socket_timeout=2)) as client:
            try:
                # A ticket lies in a list of its priority, or in `unacked` while a worker has it.
                return any(key != b"unacked_mutex" for key in client.scan_iter("batch*")) or bool(
                    client.hlen("unacked")
                )
            except redis.RedisError:
                return False


def ended(project: Project, batch_id: str, seconds: float = END, look: Callable[[], object] = lambda: None) -> str:
    """Wait until a batch has ended, and return its status; fails where work was in limbo meanwhile."""
    deadline = time.monotonic() + seconds
    with project.ledger() as ledger:
        limbo = Limbo(project, ledger)
        while (batch := ledger.batch(batch_id)["millrace"])["ended"] is None:
            look()
            limbo.look()
            assert limbo.longest <= MOST_LIMBO, f"work was ready for {limbo.longest:.0f} s, and no message spoke of it"
            if time.monotonic() > deadline:
                logs = "\n".join(f"{worker.log_path}:\n{worker.log[-2000:]}" for worker in project.workers)
                raise AssertionError(f"{batch_id} has not ended within {seconds} s: {batch}\n{logs}")
            time.sleep(LOOK)
    return str(batch["status"])


def judged(
    project: Project,
    batch_id: str,
    source: Path,
    *,
    kills: Sequence[float] = (),
    status: str = "completed",
    seconds: float = END,
    **options: Any,
) -> tuple[Verdict, Report]:
    """Wait for the end of a batch, and return what the oracle and `verify` say of it; both must be content.

    Args:
        project: Whose batch it is.
        batch_id: The batch.
        source: The file that was submitted.
        kills: When something was killed, cut off or stopped (time.monotonic()).
        status: How it must end.
        seconds: How long it may take.
        options: Of `oracle.judge`: attempts, may_fail, grace.
    """
    assert ended(project, batch_id, seconds) == status
    verdict = check(project, batch_id, source, kills=kills, **options)
    with project.ledger() as ledger:
        report = verify(ledger, project.data_dir, batch_id)
    assert report.ok, report.findings
    return verdict, report
