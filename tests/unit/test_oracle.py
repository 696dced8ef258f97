"""The oracle of the self-test: it is content with what is right, and finds each thing that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.selftest.kills import Part, schedule
from millrace.selftest.oracle import Verdict, digest, judge
from millrace.selftest.parts import row

ROWS = 4


class Files:
    """A batch of four rows that was answered as it should be; each test breaks something of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = [row(number) for number in range(ROWS)]
        self.shas = [digest(json.dumps(one["body"], separators=(",", ":")).encode()) for one in self.rows]
        self.output = [self.answer(number) for number in range(ROWS)]
        self.errors: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        for number in range(ROWS):
            self.ask(number, float(number), number + 0.5)

    def answer(self, number: int) -> dict[str, Any]:
        body = {"id": f"chatcmpl-{self.shas[number][:24]}", "choices": []}
        return {"custom_id": f"row-{number}", "response": {"status_code": 200, "body": body}, "error": None}

    def ask(self, number: int, start: float, end: float | None, **what: Any) -> None:
        n = 1 + sum(event["event"] == "start" for event in self.log)
        self.log.append({"event": "start", "n": n, "t": start, "sha256": self.shas[number]})
        if end is not None:
            ended = {"event": "end", "n": n, "t": end, "status": 200, "cancelled": False, "fault": None}
            self.log.append(ended | what)

    def judge(self, **options: Any) -> Verdict:
        names = ("input.jsonl", "output.jsonl", "errors.jsonl", "log.jsonl")
        paths = [self.folder / name for name in names]
        for path, lines in zip(paths, (self.rows, self.output, self.errors, self.log), strict=True):
            path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
        return judge(*paths, **options)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_is_content_with_what_is_right(files: Files):
    counts = {"total": ROWS, "completed": ROWS, "failed": 0}
    verdict = files.judge(counts=counts, attempts=1)
    assert verdict.ok, verdict.findings
    assert (verdict.rows, verdict.answered, verdict.run_again, verdict.most_attempts) == (ROWS, ROWS, 0, 1)


def failed(files: Files, code: str) -> None:
    files.output.pop(2)
    files.errors.append({"custom_id": "row-2", "response": None, "error": {"code": code, "message": ""}})


def twice(files: Files) -> None:
    files.output.insert(1, files.answer(0))


def another_rows(files: Files) -> None:
    files.output[1]["response"] = files.answer(3)["response"]


def nobodys(files: Files) -> None:
    files.output[1]["custom_id"] = "row-9"


def unordered(files: Files) -> None:
    files.output[1:3] = reversed(files.output[1:3])


@pytest.mark.parametrize(
    ("breaks", "finding"),
    [
        (lambda files: files.output.pop(), "1 rows have no line, the first is row-3"),
        (twice, "1 lines too many"),
        (unordered, "out of order"),
        (another_rows, "row-1 has the answer to another row"),
        (nobodys, "row-9, which is no row"),
        (lambda files: failed(files, "some_code"), "row-2 failed"),
        (lambda files: files.ask(1, 2.0, 2.5), "row-1 was run again, though nothing was killed"),
        (lambda files: files.ask(1, 1.2, 1.7), "row-1 was run again, though nothing was killed"),
    ],
)
def test_finds_what_is_wrong(files: Files, breaks: Callable[[Files], object], finding: str):
    breaks(files)
    verdict = files.judge()
    assert not verdict.ok
    assert any(finding in found for found in verdict.findings), verdict.findings


def test_finds_counts_that_are_not_the_lines(files: Files):
    assert not files.judge(counts={"total": ROWS, "completed": 3, "failed": 1}).ok


def test_finds_too_many_attempts(files: Files):
    files.ask(1, 2.0, 2.5)
    assert not files.judge(kills=[1.2], attempts=1).ok


@pytest.mark.parametrize("kill", [1.2, 0.9, 1.9])  # at work; still on its way; answered and not yet written
def test_takes_a_kill_as_a_cause(files: Files, kill: float):
    files.ask(1, 2.0, 2.5)
    verdict = files.judge(kills=[kill], attempts=2)
    assert verdict.ok, verdict.findings
    assert verdict.run_again == 1


def test_a_kill_at_another_time_is_no_cause(files: Files):
    files.ask(1, 5.0, 5.5)
    assert not files.judge(kills=[3.7]).ok


def test_a_refused_row_is_tried_again_by_right(files: Files):
    files.log[2:4] = []
    files.ask(1, 1.0, 1.1, status=503)
    files.ask(1, 2.0, 2.5)
    verdict = files.judge()
    assert verdict.ok, verdict.findings
    assert verdict.run_again == 0


def test_an_engine_that_died_takes_what_it_had(files: Files):
    """Its next life counts requests from 1 again."""
    files.log.pop()
    files.log.append({"event": "start", "n": 1, "t": 5.0, "sha256": files.shas[3]})
    files.log.append({"event": "end", "n": 1, "t": 5.5, "status": 200, "cancelled": False, "fault": None})
    verdict = files.judge(kills=[3.6])
    assert verdict.ok, verdict.findings
    assert (verdict.run_again, verdict.in_flight) == (1, 1)


def test_rows_of_a_batch_that_was_ended_are_no_failures(files: Files):
    failed(files, "batch_cancelled")
    verdict = files.judge(counts={"total": ROWS, "completed": 3, "failed": 0}, may_fail=True)
    assert verdict.ok, verdict.findings
    assert verdict.never_run == 1


def test_a_seed_decides_the_kills():
    assert schedule(30, 7, 1000) == schedule(30, 7, 1000)
    assert schedule(30, 7, 1000) != schedule(30, 8, 1000)
    moments = [kill.at for kill in schedule(30, 7, 1000)]
    assert moments == sorted(moments)
    assert moments[0] > 0 and moments[-1] < 1000
    assert {kill.part for kill in schedule(12, 7, 1000)} == set(Part)
