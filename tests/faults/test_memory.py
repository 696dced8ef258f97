"""100,000 rows under kills need the memory of 100,000 rows without."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from millrace.selftest.kills import schedule
from millrace.selftest.run import Run
from tests.faults.harness import Project

ROWS = 100_000
KILLS = 30
#: What one process may need more, MiB: the allocator's whims.
SLACK = 32


class Peak:
    """The largest resident memory that a process of the project's workers has had, MiB."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self.mib = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                for worker in list(self._project.workers):
                    for one in worker.pool() if worker.running else []:
                        with contextlib.suppress(psutil.Error):
                            self.mib = max(self.mib, psutil.Process(one.pid).memory_info().rss / 2**20)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def peak(project: Project, kills: int) -> float:
    """Run a batch under so many kills, and return the most that one process of its workers has needed."""
    project.start()
    source: Path = project.write_rows(ROWS)
    batch = project.submit(source)
    run, memory = Run(project, batch), Peak(project)
    with memory.watching():
        status = run.until_end(schedule(kills, 1, ROWS))
    outcome = run.outcome(1, source, status)
    assert outcome.ok, f"{outcome}\n{outcome.verdict.findings}"
    return memory.mib


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_of_a_hundred_thousand_rows(project, figures):
    """1M_rows_rss, in small."""
    fast = {"slots": 64, "ttft_ms": 20}
    quiet = peak(project(fast), 0)
    figures("memory of a process, 100,000 rows without kills, MiB", quiet)
    killed = peak(project(fast), KILLS)
    figures("memory of a process, 100,000 rows under 30 kills, MiB", killed)
    assert killed <= quiet + SLACK
