"""Follow: every answered row once, as it is answered, whatever becomes of the batch meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.batch import follow as following
from millrace.batch.again import retry
from millrace.batch.folder import BatchFolder
from millrace.batch.follow import follow
from millrace.batch.lease import Leases
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge
from millrace.batch.schema import Status
from millrace.batch.segments import SegmentWriter
from millrace.errors import StorageError
from millrace.settings import Settings
from tests.unit.batches import TTL, answer, expire, planned, request, run_all, run_shard

ROWS = 48  # three in a shard


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "POLL", 0.0)


@pytest.fixture
def batch(settings: Settings, ledger: Ledger) -> str:
    return planned(settings, ledger, [request(f"id-{n:02}") for n in range(ROWS)])


def followed(
    settings: Settings, ledger: Ledger, batch: str, *steps: Callable[[], object], errors: bool = False
) -> list[list[int]]:
    """Follow a batch to its end, and after each look do the next step; return the rows that each look gave."""
    looks: list[list[int]] = [[]]
    todo = list(steps)

    def looked(status: Status) -> None:
        looks.append([])
        assert todo or status.final, "it follows for ever"
        if todo:
            todo.pop(0)()

    for line in follow(ledger, settings.data_dir, batch, errors=errors, looked=looked):
        looks[-1].append(int(json.loads(line)["id"].rpartition("_")[2]))
    return [sorted(rows) for rows in looks]


class Steps:
    """What workers may do meanwhile."""

    def __init__(self, settings: Settings, ledger: Ledger, batch: str, failed: set[int]) -> None:
        self.settings, self.ledger, self.batch, self.failed = settings, ledger, batch, failed
        self.leases = Leases(ledger, "test", TTL)

    def one(self) -> None:
        lease = self.leases.claim()
        assert lease is not None
        run_shard(self.settings, self.leases, lease, self.failed.__contains__)

    def killed(self) -> None:
        """Answer one row, tear the next one's line, and die."""
        lease = self.leases.claim()
        assert lease is not None
        folder = BatchFolder.of(self.settings.data_dir, self.batch)
        writer = SegmentWriter(folder.segment(lease.number, lease.epoch), lease.epoch)
        writer.append(lease.first, True, 1, 1, answer(self.batch, lease.first, f"id-{lease.first:02}", "x"))
        writer.flush()
        writer.close()
        with writer.path.open("ab") as file:
            file.write(b'{"row":%d,"ok":tr' % (lease.first + 1))
        expire(self.ledger, lease.shard_id)

    def rest(self) -> None:
        run_all(self.settings, self.ledger, self.failed.__contains__)

    def end(self) -> None:
        merge(self.ledger, self.settings.data_dir, self.batch)

    def rest_and_end(self) -> None:
        self.rest()
        self.end()


def test_rows_come_as_they_are_answered_and_each_once(settings: Settings, ledger: Ledger, batch: str) -> None:
    do = Steps(settings, ledger, batch, {4})
    looks = followed(settings, ledger, batch, do.one, do.one, do.killed, do.rest, do.end)
    assert looks == [[], [0, 1, 2], [3, 5], [6], list(range(7, ROWS)), [], []]


def test_failures_come_too_and_those_of_rows_never_run_at_the_end(
    settings: Settings, ledger: Ledger, batch: str
) -> None:
    do = Steps(settings, ledger, batch, {1, 4})
    looks = followed(settings, ledger, batch, do.one, do.one, lambda: ledger.cancel(batch), do.end, errors=True)
    assert looks == [[], [1], [4], [], [], list(range(6, ROWS))]


def test_what_was_merged_between_two_looks_is_not_missed(settings: Settings, ledger: Ledger, batch: str) -> None:
    do = Steps(settings, ledger, batch, set())
    assert followed(settings, ledger, batch, do.one, do.rest_and_end) == [[], [0, 1, 2], [], list(range(3, ROWS))]


def test_an_ended_batch_gives_its_file(settings: Settings, ledger: Ledger, batch: str) -> None:
    Steps(settings, ledger, batch, {3}).rest_and_end()
    lines = list(follow(ledger, settings.data_dir, batch, errors=False))
    assert b"\n".join(lines) + b"\n" == BatchFolder.of(settings.data_dir, batch).output.read_bytes()
    assert len(list(follow(ledger, settings.data_dir, batch, errors=True))) == 1


@pytest.mark.parametrize("errors", [False, True])
def test_of_a_retry_come_the_answers_so_far_and_what_it_brings(
    settings: Settings, ledger: Ledger, batch: str, errors: bool
) -> None:
    Steps(settings, ledger, batch, {1, 4, 7}).rest_and_end()
    retry(ledger, settings.data_dir, batch)
    do = Steps(settings, ledger, batch, {4})
    looks = followed(settings, ledger, batch, do.rest, do.end, errors=errors)
    if errors:
        assert looks == [[], [4], [], []], "what failed before and is run again has not failed"
    else:
        assert looks == [[row for row in range(ROWS) if row not in {1, 4, 7}], [1, 7], [], []]


def test_of_a_batch_that_fails_come_its_answers(settings: Settings, ledger: Ledger, batch: str) -> None:
    do = Steps(settings, ledger, batch, set())
    looks = followed(settings, ledger, batch, do.one, lambda: ledger.fail(batch, "integrity", "x"))
    assert looks == [[], [0, 1, 2], [], []]


def test_a_batch_whose_files_are_elsewhere(settings: Settings, ledger: Ledger, batch: str, tmp_path: Path) -> None:
    BatchFolder.of(settings.data_dir, batch).root.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError) as caught:
        list(follow(ledger, settings.data_dir, batch, errors=False))
    assert caught.value.code == "batch_files_missing"
