"""The canary: when the first rows of a batch fail alike, and when they do not."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.batch.again import resume
from millrace.batch.ask import Answered
from millrace.batch.canary import Canary
from millrace.batch.lease import Counts, Leases
from millrace.batch.ledger import Ledger
from millrace.batch.lines import failure_line
from millrace.batch.schema import Status
from millrace.settings import Settings
from tests.integration.test_runner import ended, on, rows, run
from tests.scripted_engine import scripted_engine
from tests.unit.batches import planned, recorded

REFUSED = {"when": {"contains": '"row '}, "then": {"do": "status", "status": 400, "body": {"error": "no such tool."}}}
GOOD = Answered(True, b"{}")


def bad(code: str = "context_length_exceeded") -> Answered:
    return Answered(False, failure_line("batch_0", 0, "a", code, f"about {code}"), code=code)


@pytest.fixture
def watched(settings: Settings) -> Settings:
    return settings.model_copy(update={"batch_canary_rows": 10})


def judged(settings: Settings, ledger: Ledger, batch: str, answers: list[Answered]) -> Status:
    """Return a batch's status after these answers of its first rows."""
    canary = Canary(ledger, settings)
    said = [canary.ended(batch, answered) for answered in answers]
    assert said.count(True) <= 1
    if any(said):
        canary.pause(batch)
        assert not canary.ended(batch, bad())
    return ledger.status(batch)


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([bad()] * 9 + [GOOD], Status.PAUSED),
        ([GOOD] + [bad()] * 12, Status.PAUSED),
        ([bad()] * 8 + [GOOD] * 2, Status.IN_PROGRESS),
        ([bad()] * 8 + [bad("invalid_request_error")] * 2, Status.IN_PROGRESS),
        ([GOOD] * 10 + [bad()] * 100, Status.IN_PROGRESS),
        ([bad()] * 9, Status.IN_PROGRESS),
    ],
)
def test_when_a_batch_is_paused(watched: Settings, ledger: Ledger, answers: list[Answered], status: Status) -> None:
    assert judged(watched, ledger, recorded(ledger, [500]), answers) is status


def test_the_reason_names_the_first_message_and_what_to_do(watched: Settings, ledger: Ledger) -> None:
    batch = recorded(ledger, [500])
    judged(watched, ledger, batch, [GOOD, *[bad()] * 9])
    reason = ledger.batch(batch)["millrace"]["reason"]
    assert reason.startswith("9 of the first 10 rows failed with context_length_exceeded: about context_length")
    assert f"`millrace batch resume {batch}`" in reason


def test_a_small_batch_is_not_paused(watched: Settings, ledger: Ledger) -> None:
    assert judged(watched, ledger, recorded(ledger, [20]), [bad()] * 10) is Status.IN_PROGRESS
    assert judged(watched, ledger, recorded(ledger, [21]), [bad()] * 10) is Status.PAUSED


def test_a_share_of_0_turns_it_off(watched: Settings, ledger: Ledger) -> None:
    never = watched.model_copy(update={"batch_canary_share": 0.0})
    assert judged(never, ledger, recorded(ledger, [500]), [bad()] * 50) is Status.IN_PROGRESS


def test_rows_after_many_good_ones_are_not_the_first(watched: Settings, ledger: Ledger) -> None:
    batch = recorded(ledger, [500])
    leases = Leases(ledger, "earlier", 60.0)
    lease = leases.claim()
    assert lease is not None
    leases.release(lease, [], Counts(completed=40), 1.0)
    assert judged(watched, ledger, batch, [bad()] * 10) is Status.IN_PROGRESS


def test_a_session_pauses_and_a_resumed_batch_goes_on_all_the_same(watched: Settings, ledger: Ledger) -> None:
    batch = planned(watched, ledger, rows(300))
    with scripted_engine(slots=1, rules=[REFUSED], ttft_ms=5) as engine:
        here = on(watched, engine)
        run(here, ledger)
        assert ledger.status(batch) is Status.PAUSED
        counts: dict[str, Any] = ledger.batch(batch)["request_counts"]
        assert 10 <= counts["failed"] < 300
        reason = ledger.batch(batch)["millrace"]["reason"]
        assert "10 of the first 10 rows failed with invalid_request_error" in reason
        assert "no such tool. Mend it" in reason
        resume(ledger, watched.data_dir, batch)
        run(here, ledger)
    output, errors = ended(watched, ledger, batch)
    assert (len(output), len(errors)) == (0, 300)
