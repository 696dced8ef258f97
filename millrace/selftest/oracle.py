"""The oracle: what became of a batch, from the files alone.

It reads the user's file, the output files and the engine's request log, and nothing that Millrace keeps for
itself: no ledger, no segment. It shares no code with what it judges.

**Run again.** A row is asked once. Asked again, the time before must have been cut off by something that
happened to it: one of the `kills`, at a moment when it was in flight. (Or refused: an answer that is not 200
is tried again by right.) In flight is a request from when the worker sends it until its answer lies in the
worker's file; the engine sees it arrive a moment later than the one, and end a moment earlier than the other: GRACE.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

#: Seconds between what the engine sees and what the worker does, on a busy machine.
GRACE = 1.0
#: The same for the number in flight at a moment, which a longer one would flatter.
INSTANT = 0.1
MOST_FINDINGS = 20
#: What the errors file says of a row that its batch's end came before.
_NEVER_RUN = frozenset({"batch_cancelled", "batch_expired"})


class _Row(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


class _Line(msgspec.Struct):
    custom_id: str
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Event(msgspec.Struct):
    """A line of the scripted engine's request log; `t` is seconds of the machine's monotonic clock."""

    event: str
    n: int
    t: float
    sha256: str = ""
    status: int | None = None
    cancelled: bool = False
    fault: str | None = None


decode_event = msgspec.json.Decoder(Event).decode


@dataclass(slots=True)
class Attempt:
    """One request for a row, as the engine saw it; `end` is None where the engine died with it."""

    start: float
    end: float | None = None
    status: int | None = None
    cancelled: bool = False


@dataclass
class Verdict:
    """What the oracle found; `ok` where that is nothing."""

    rows: int = 0
    answered: int = 0
    failed: int = 0
    #: Rows in the errors file because their batch was ended before.
    never_run: int = 0
    #: Rows without a line, and lines beyond one a row.
    lost: int = 0
    doubled: int = 0
    #: Requests that the engine got beyond one a row, and those that were in flight at the kills.
    run_again: int = 0
    in_flight: int = 0
    most_attempts: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row has its line, and nothing was run again without a cause."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as a JSON object."""
        return {"ok": self.ok, **asdict(self)}

    def find(self, what: str) -> None:
        """Add a finding; the first ones say enough."""
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(what)


def judge(
    source: Path,
    output: Path,
    errors: Path,
    log: Path,
    *,
    kills: Sequence[float] = (),
    counts: Mapping[str, int] | None = None,
    attempts: int | None = None,
    may_fail: bool = False,
    grace: float = GRACE,
) -> Verdict:
    """Return what became of a batch.

    Args:
        source: The file that was submitted, in OpenAI's Batch format, each body another one.
        output: The batch's output file.
        errors: The batch's errors file; it need not be there.
        log: The request log of the scripted engine, over all its lives.
        kills: When something was killed, cut off or stopped: seconds of the monotonic clock.
        counts: What the batch says of itself: its `request_counts`.
        attempts: The most requests that one row may cost.
        may_fail: Rows may stand in the errors file.
        grace: See the module.
    """
    verdict = Verdict()
    with source.open("rb") as file:
        rows = [msgspec.json.decode(line, type=_Row) for line in file]
    verdict.rows = len(rows)
    _judge_lines(verdict, rows, output, errors, may_fail)
    _judge_requests(verdict, rows, read_log(log), sorted(kills), grace)
    if attempts is not None and verdict.most_attempts > attempts:
        verdict.find(f"a row was asked {verdict.most_attempts} times, {attempts} are allowed")
    lines = {"total": verdict.rows, "completed": verdict.answered, "failed": verdict.failed}
    if counts is not None and dict(counts) != lines:
        verdict.find(f"the batch counts {dict(counts)}, its files have {lines}")
    return verdict


def _judge_lines(verdict: Verdict, rows: list[_Row], output: Path, errors: Path, may_fail: bool) -> None:
    place = {row.custom_id: number for number, row in enumerate(rows)}
    seen = [0] * len(rows)
    for path in (output, errors):
        last = -1
        for number, line in enumerate(_lines(verdict, path), 1):
            row = place.get(line.custom_id)
            if row is None:
                verdict.find(f"{path.name} line {number} is of {line.custom_id}, which is no row")
                continue
            seen[row] += 1
            if row <= last:
                verdict.find(f"{path.name} line {number} ({line.custom_id}) is out of order")
            last = row
            if path == output:
                verdict.answered += 1
                _judge_answer(verdict, rows[row], line)
            else:
                over = (line.error or {}).get("code") in _NEVER_RUN
                verdict.never_run += over
                verdict.failed += not over
                if line.error is None or not may_fail:
                    verdict.find(f"{line.custom_id} failed: {line.error}")
    verdict.lost = seen.count(0)
    verdict.doubled = sum(times - 1 for times in seen if times > 1)
    if verdict.lost:
        verdict.find(f"{verdict.lost} rows have no line, the first is {rows[seen.index(0)].custom_id}")
    if verdict.doubled:
        verdict.find(f"{verdict.doubled} lines too many")


def _lines(verdict: Verdict, path: Path) -> Iterator[_Line]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield msgspec.json.decode(raw, type=_Line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                verdict.find(f"{path.name} line {number} is no line of a batch: {error}")


def _judge_answer(verdict: Verdict, row: _Row, line: _Line) -> None:
    response = line.response or {}
    body = response.get("body") or {}
    # The scripted engine makes an answer's id from the digest of the body it was asked with.
    if response.get("status_code") != 200 or line.error is not None:
        verdict.find(f"{line.custom_id} stands in the output without an answer")
    elif not str(body.get("id", "")).endswith(f"-{digest(row.body)[:24]}"):
        verdict.find(f"{line.custom_id} has the answer to another row")


def digest(body: bytes | msgspec.Raw) -> str:
    """Return what the engine's log and its answers call a request's body."""
    return hashlib.sha256(bytes(body)).hexdigest()


def read_log(path: Path) -> dict[str, list[Attempt]]:
    """Return the requests that the engine got, by the digest of their body, in the order of arrival."""
    requests: dict[str, list[Attempt]] = {}
    running: dict[int, Attempt] = {}
    if not path.exists():
        return requests
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break  # being written
            event = decode_event(raw)
            if event.event == "start":
                if event.n == 1:
                    running.clear()  # another life of the engine: what ran in the one before was cut off
                attempt = running[event.n] = Attempt(event.t)
                requests.setdefault(event.sha256, []).append(attempt)
            elif (ended := running.pop(event.n, None)) is not None:
                ended.end, ended.status, ended.cancelled = event.t, event.status, event.cancelled
    return requests


def in_flight(requests: Iterable[Sequence[Attempt]], moments: Iterable[float], grace: float = INSTANT) -> int:
    """Return how many requests were in flight at one of these moments of the monotonic clock, or at several."""
    found = {
        id(attempt)
        for moment in moments
        for attempts in requests
        for attempt in attempts
        if attempt.start <= moment + grace and (attempt.end is None or attempt.end >= moment - grace)
    }
    return len(found)


def _judge_requests(
    verdict: Verdict, rows: list[_Row], requests: dict[str, list[Attempt]], kills: list[float], grace: float
) -> None:
    names = {digest(row.body): row.custom_id for row in rows}
    of_ours = {sha: attempts for sha, attempts in requests.items() if sha in names}
    for sha, attempts in of_ours.items():
        verdict.most_attempts = max(verdict.most_attempts, len(attempts))
        # Of two that overlap, one was dropped; the engine hears of that a little later.
        for before, after in itertools.pairwise(attempts):
            if before.status not in (200, None):
                continue
            verdict.run_again += 1
            latest = after.start if before.end is None else min(before.end + grace, after.start)
            at = bisect.bisect_left(kills, before.start - grace)
            if at == len(kills) or kills[at] > latest:
                verdict.find(f"{names[sha]} was run again, though nothing was killed while it was in flight")
    verdict.in_flight = in_flight(of_ours.values(), kills)
    if verdict.run_again > (most := in_flight(of_ours.values(), kills, grace)):
        verdict.find(f"{verdict.run_again} requests were run again, {most} were in flight at the kills")
