"""CRASH_AT: a process dies at each named step of a batch's way, another one goes on, and nothing is lost."""

from __future__ import annotations

import os
import re
import time

import pytest

from millrace import crashpoints
from millrace.batch.folder import BatchFolder
from millrace.batch.ledger import Ledger
from millrace.batch.prune import remove_orphans
from millrace.selftest.parts import Project
from tests.faults.harness import judged, running, until, words
from tests.services import ROOT

#: What the module says there is, and where the code has it.
POINTS = re.findall(r"^    (\w+\.\w+) ", crashpoints.__doc__ or "", re.MULTILINE)
ROWS = 60

#: On the way of a first owner of shards; those of recovery need a shard that somebody left behind.
RUNNING = [name for name in POINTS if name.split(".")[0] in ("lease", "segment", "shard")]
RECOVERING = [name for name in POINTS if name.split(".")[0] == "recover"]
RETRYING = [name for name in POINTS if name.split(".")[0] == "retry"]
MERGING = [name for name in POINTS if name.split(".")[0] == "merge"]


def run(project: Project, batch: str, crash_at: str = "") -> int:
    """Run the batch in a process of its own, which may end at a crash point; return its exit code."""
    with running(project, batch, crash_at=crash_at) as process:
        code = process.wait()  # with a limit it would look every now and then, and the moment counts
    assert code in (0, crashpoints.KILLED), words(project)
    return code


def orphans_of_yesterday(project: Project, ledger: Ledger) -> list[str]:
    """Remove what was left behind, as the reaper does a day later."""
    for note in (project.data_dir / "unrecorded").iterdir():
        os.utime(note, (1.0, 1.0))
    return remove_orphans(ledger, project.data_dir)


@pytest.fixture
def ours(project):
    made = project({"slots": 4, "ttft_ms": 10}, batch_lease_seconds=3)
    made.start_redis()
    made.start_engine()
    return made


def crash(project: Project, batch: str, point: str) -> float:
    """Run the batch up to a crash point; return when it died."""
    assert run(project, batch, point) == crashpoints.KILLED, f"nothing passed {point}"
    return time.monotonic()


def test_the_code_has_every_point():
    source = "".join(path.read_text() for path in (ROOT / "millrace").rglob("*.py"))
    called = re.findall(r'\bcrashpoint\("([\w.]+)"\)', source)
    assert sorted(called) == sorted(set(called)), "each name stands for one place"
    assert sorted(called) == sorted(POINTS)
    assert len(POINTS) >= 12


@pytest.mark.parametrize("point", [*RUNNING, "segment.flushed:7", "shard.finished:15", "lease.claimed:15"])
def test_a_runner_dies(ours, point, figures):
    if point == "lease.renewed":
        ours.tell_engine(ttft_ms=1500)  # a renewal comes after a second
    source = ours.write_rows(ROWS)
    batch = ours.submit(source)
    killed = crash(ours, batch, point)
    ours.tell_engine(ttft_ms=10)
    assert run(ours, batch) == 0
    verdict, _ = judged(ours, batch, source, kills=[killed], attempts=2)
    note(figures, verdict)


def leases_over(project, batch):
    """Wait until no lease of a batch runs any more."""
    with project.ledger() as ledger:
        ends = [shard.lease_until or 0.0 for shard in ledger.shards(batch)]
    until(lambda: time.time() > max(ends), "the end of the leases", 20)


@pytest.mark.parametrize("point", RECOVERING)
def test_a_runner_dies_while_it_recovers(ours, point, figures):
    source = ours.write_rows(ROWS)
    batch = ours.submit(source)
    first = crash(ours, batch, "segment.flushed")
    # A point of recovery is passed for every claimed shard: by the one that has something to recover.
    leases_over(ours, batch)  # that of the first, which the second is to find run out
    second = crash(ours, batch, point)
    assert run(ours, batch) == 0
    verdict, _ = judged(ours, batch, source, kills=[first, second], attempts=3)
    note(figures, verdict)


def test_every_recovery_dies(ours, figures):
    """recovery_crash_loop: owner after owner dies of recovering; the one that does not die goes on."""
    source = ours.write_rows(ROWS)
    batch = ours.submit(source)
    kills = [crash(ours, batch, "segment.flushed")]
    for _ in range(3):
        leases_over(ours, batch)
        kills.append(crash(ours, batch, "recover.read"))
    assert run(ours, batch) == 0
    verdict, _ = judged(ours, batch, source, kills=kills, attempts=2)
    note(figures, verdict, len(kills))


@pytest.mark.parametrize("point", RETRYING)
def test_a_retry_dies(ours, point):
    """The failed rows run again, once, whenever the retry of them died; the answers stay."""
    source = ours.write_rows(ROWS)
    ours.tell_engine(rules=[{"when": {"contains": "Question 7"}, "then": {"do": "status", "status": 400}}])
    batch = ours.submit(source)
    assert run(ours, batch) == 0
    judged(ours, batch, source, may_fail=True)
    ours.tell_engine(rules=[])
    done = ours.run("batch", "retry", batch, crash_at=point)
    assert done.returncode == crashpoints.KILLED, f"{done.stdout}{done.stderr}"
    with ours.ledger() as ledger:
        if ledger.batch(batch)["millrace"]["ended"] is not None:  # it died before anybody knew: again
            again = ours.run("batch", "retry", batch)
            assert again.returncode == 0, again.stderr
    assert run(ours, batch) == 0
    judged(ours, batch, source, attempts=2)


def test_a_removal_dies(ours):
    """A batch of which a removal left half is no batch any more, and its files go."""
    source = ours.write_rows(ROWS)
    batch = ours.submit(source)
    assert run(ours, batch) == 0
    done = ours.run("batch", "delete", batch, "--yes", crash_at="delete.forgotten")
    assert done.returncode == crashpoints.KILLED, f"{done.stdout}{done.stderr}"
    with ours.ledger() as ledger:
        assert ledger.batches() == []
        assert orphans_of_yesterday(ours, ledger) == [batch]
    assert not BatchFolder.of(ours.data_dir, batch).root.exists()


@pytest.mark.parametrize("point", [*MERGING, "merge.renamed:2"])
def test_a_merge_dies(ours, point, figures):
    """finalization_strand, terminal_overwrite: a merge that died is done again, one that was done is not."""
    source = ours.write_rows(ROWS)
    batch = ours.submit(source)
    crash(ours, batch, point)
    assert run(ours, batch) == 0
    verdict, _ = judged(ours, batch, source, attempts=1)
    assert verdict.run_again == 0
    folder = BatchFolder.of(ours.data_dir, batch)
    assert not list(folder.root.glob(".*.part")), "a merge leaves nothing of its files behind"
    note(figures, verdict)


def test_submit_dies_before_the_ledger_knows(ours):
    """orphaned_blob: files without a batch harm nobody, and the same submit again is the only batch."""
    source = ours.write_rows(ROWS)
    done = ours.run("batch", "submit", str(source), crash_at="submit.planned")
    assert done.returncode == crashpoints.KILLED
    batch = ours.submit(source)
    with ours.ledger() as ledger:
        assert [found["id"] for found in ledger.batches()] == [batch]
        (orphan,) = orphans_of_yesterday(ours, ledger)
    assert orphan != batch
    assert [folder.name for folder in (ours.data_dir / "batches").iterdir()] == [batch]
    assert run(ours, batch) == 0
    judged(ours, batch, source, attempts=1)


def test_submit_dies_once_the_ledger_knows(ours):
    """create_crash_after_store: the batch is there, though nobody was told, and runs."""
    source = ours.write_rows(ROWS)
    done = ours.run("batch", "submit", str(source), crash_at="submit.recorded")
    assert done.returncode == crashpoints.KILLED
    with ours.ledger() as ledger:
        (batch,) = [found["id"] for found in ledger.batches()]
    assert run(ours, batch) == 0
    judged(ours, batch, source, attempts=1)


def note(figures, verdict, kills=1):
    figures("kills", kills)
    figures("rows", verdict.rows)
    figures("rows lost", verdict.lost)
    figures("rows doubled", verdict.doubled)
    figures("requests run again", verdict.run_again)
    figures("requests in flight at the kills", verdict.in_flight)
