"""The ledger in PostgreSQL, for workers of several machines: they are killed at random, and the database is, too."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from millrace.selftest.kills import schedule
from millrace.selftest.run import Run
from tests.faults.harness import answers, judged, until
from tests.faults.test_kills import note
from tests.postgres import Postgres, postgres_server

ROWS = 1000


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


def test_random_kills_on_postgresql(project, postgres, figures, request):
    ours = project(database_url=postgres.url)
    ours.start(workers=2)
    source = ours.write_rows(ROWS)
    run = Run(ours, ours.submit(source))
    outcome = run.outcome(1, source, run.until_end(schedule(request.config.getoption("--kills"), 1, ROWS)))
    note(figures, outcome.verdict, outcome.kills)
    assert outcome.ok, f"{outcome}\n{[f'{blow.seconds:.1f} s: {blow}' for blow in run.blows]}"


def test_postgresql_crashes_while_a_batch_runs(project, postgres, figures):
    """It is back before the leases run out: nothing is asked again."""
    ours = project(database_url=postgres.url, batch_lease_seconds=30)
    ours.start(workers=2)
    source = ours.write_rows(ROWS)
    batch = ours.submit(source)
    until(lambda: answers(ours) > 100, "some answers", 60)
    ours.tell_engine(ttft_ms=500)  # what is claimed lasts for seconds
    postgres.kill()
    gone = answers(ours)
    # What is claimed goes on without the ledger; nothing more can be claimed.
    until(lambda: answers(ours) > gone, "answers without a ledger", 20)
    postgres.start()
    ours.tell_engine(ttft_ms=50)
    back = time.monotonic()
    verdict, _ = judged(ours, batch, source, attempts=1)
    figures("the end of a batch after PostgreSQL's return, s", time.monotonic() - back)
    assert verdict.run_again == 0
