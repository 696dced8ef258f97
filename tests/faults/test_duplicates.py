"""Everything comes twice (F16): orders, callbacks, runners, and a cancellation with the last answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from millrace.batch.folder import BatchFolder
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge
from millrace.batch.schema import Status, batches, files
from millrace.selftest.parts import Project
from millrace.settings import environment
from tests.faults.harness import answers
from tests.faults.oracle import check
from tests.faults.sessions import merged, process, session, submitted
from tests.services import until

Make = Callable[..., Project]
PROCESSES = 8

#: Says that it is ready; then answers each word that it is given.
_CHILD = """
import sys
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge
from millrace.batch.submit import Order, open_input, submit
from millrace.settings import get_settings

settings = get_settings()
ledger = Ledger.open(settings)
print("ready", flush=True)
for line in sys.stdin:
    what, argument = line.split()
    if what == "submit":
        with open_input(argument) as stream:
            said = submit(settings, ledger, stream, Order("input.jsonl", idempotency_key="tonight")).batch_id
    else:
        said = merge(ledger, settings.data_dir, argument)
    print(said, flush=True)
"""


class Crowd:
    """Processes that do the same at one moment."""

    def __init__(self, ours: Project) -> None:
        self._children = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                env=environment(**ours.values()),
            )
            for _ in range(PROCESSES)
        ]

    def __enter__(self) -> Crowd:
        assert self._said() == ["ready"] * PROCESSES
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
            child.communicate()

    def __call__(self, what: str, argument: object) -> list[str]:
        """Have all of them do it, and return what each of them said."""
        for child in self._children:
            assert child.stdin is not None
            child.stdin.write(f"{what} {argument}\n")
        return self._said()

    def _said(self) -> list[str]:
        return [child.stdout.readline().strip() for child in self._children if child.stdout is not None]


@pytest.fixture
def ours(project: Make) -> Project:
    made = project(script={"slots": 8, "ttft_ms": 20}, batch_concurrency=8)
    made.start_engine()
    return made


def count(ledger: Ledger, table: sa.Table) -> int:
    with ledger.read() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def test_orders_runners_and_merges_come_many_times(ours: Project) -> None:
    """One key, one batch; three runners, each row asked once; eight merges, one effect (replicas_execute_once)."""
    source = ours.write_rows(150)
    with ours.ledger() as ledger, Crowd(ours) as crowd:
        (batch,) = set(crowd("submit", source))
        assert count(ledger, batches) == 1
        assert [path.name for path in (ours.data_dir / "batches").iterdir()] == [batch]
        with process(ours) as one, process(ours) as two, process(ours) as three:
            for runner in (one, two, three):
                assert runner.wait(60) == 0
        assert ledger.status(batch) is Status.FINALIZING
        assert "completed" in crowd("merge", batch)
        assert ledger.status(batch) is Status.COMPLETED
        # The input's record and the output's: the effects of one merge.
        assert count(ledger, files) == 2
        folder = BatchFolder.of(ours.data_dir, batch)
        written, ended = folder.output.read_bytes(), ledger.batch(batch)["completed_at"]
        assert crowd("merge", batch) == ["completed"] * PROCESSES
        assert (folder.output.read_bytes(), ledger.batch(batch)["completed_at"]) == (written, ended)
        merged(ours, ledger, batch, source, attempts=1)
        assert set(crowd("submit", source)) == {batch}
        assert not list(folder.root.glob(".*.part"))


def test_a_cancellation_races_the_last_answers(ours: Project) -> None:
    """cancel_racing_completion, cancel_reverted, terminal_overwrite: one of both wins, and it stays so."""
    with ours.ledger() as ledger, ThreadPoolExecutor(1) as canceller:
        for number in range(6):
            source = ours.write_rows(16, f"{number}.jsonl", seed=number)
            batch, before = submitted(ours, source, ledger), answers(ours)
            late = 16 if number % 2 else 12

            def cancel(batch: str = batch, wanted: int = before + late) -> Status:
                until(lambda: answers(ours) >= wanted, "answers")
                return ledger.cancel(batch)

            told = canceller.submit(cancel)
            with session(ours, ledger) as outcome:
                outcome.result(60)
            told.result(60)
            final = merge(ledger, ours.data_dir, batch)
            assert final in (Status.COMPLETED, Status.CANCELLED)
            # Neither another merge nor another cancellation changes what has ended.
            assert ledger.cancel(batch) is final
            assert merge(ledger, ours.data_dir, batch) is final
            check(ours, batch, source, attempts=1, may_fail=final is Status.CANCELLED)
