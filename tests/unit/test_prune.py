"""What is removed, and above all what is not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from millrace.batch.folder import BatchFolder
from millrace.batch.ledger import Ledger
from millrace.batch.merge import alone_with, merge
from millrace.batch.prune import ORPHAN_AGE, delete, note_new, prune, remove_orphans
from millrace.batch.schema import Status, batches
from millrace.batch.submit import Order, submit
from millrace.errors import InputError, MillraceError, NotFound
from millrace.settings import Settings, environment
from tests.cli import NOBODY
from tests.unit.batches import planned, request, run_all

DAY = 86400.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", llm_server_url=f"http://127.0.0.1:{NOBODY}", llm_model="m")


def ended(settings: Settings, ledger: Ledger, days_ago: float = 0.0) -> str:
    batch = planned(settings, ledger, [request("a"), request("b")])
    run_all(settings, ledger)
    merge(ledger, settings.data_dir, batch)
    with ledger.write() as connection:
        stamp = time.time() - days_ago * DAY
        connection.execute(batches.update().where(batches.c.id == batch).values(completed_at=stamp))
    return batch


def folders(settings: Settings) -> set[str]:
    return {path.name for path in (settings.data_dir / "batches").iterdir()}


def notes(settings: Settings) -> set[str]:
    return {path.name for path in (settings.data_dir / "unrecorded").glob("*")}


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def rows(count: int) -> io.BytesIO:
    return io.BytesIO(b"".join(json.dumps(request(f"r{n}")).encode() + b"\n" for n in range(count)))


# Deleting and pruning


def test_a_deleted_batch_is_gone_from_the_ledger_and_the_disk(settings: Settings, ledger: Ledger) -> None:
    batch, other = ended(settings, ledger), ended(settings, ledger)
    delete(ledger, settings.data_dir, batch)
    assert (folders(settings), notes(settings)) == ({other}, set())
    with pytest.raises(NotFound):
        delete(ledger, settings.data_dir, batch)
    assert [one["id"] for one in ledger.batches()] == [other]


def test_a_batch_that_runs_or_is_in_hand_is_not_deleted(settings: Settings, ledger: Ledger) -> None:
    batch = planned(settings, ledger, [request("a")])
    for status in set(Status):
        if status.final:
            continue
        with ledger.write() as connection:
            connection.execute(batches.update().values(status=status))
        with pytest.raises(InputError) as caught:
            delete(ledger, settings.data_dir, batch)
        assert caught.value.code == "batch_not_ended"
    done = ended(settings, ledger)
    with alone_with(BatchFolder.of(settings.data_dir, done)), pytest.raises(MillraceError) as busy:
        delete(ledger, settings.data_dir, done)
    assert busy.value.code == "batch_busy"
    assert (folders(settings), notes(settings)) == ({batch, done}, set())


def test_a_batch_whose_folder_is_gone_can_be_deleted(settings: Settings, ledger: Ledger) -> None:
    batch = ended(settings, ledger)
    folder = BatchFolder.of(settings.data_dir, batch)
    folder.root.rename(folder.root.with_name("elsewhere"))
    delete(ledger, settings.data_dir, batch)
    assert ledger.batches() == []


def test_old_batches_are_pruned_and_younger_and_running_ones_stay(settings: Settings, ledger: Ledger) -> None:
    old, young, runs = ended(settings, ledger, 8), ended(settings, ledger, 6), planned(settings, ledger, [request("a")])
    with ledger.write() as connection:
        connection.execute(batches.update().where(batches.c.id == runs).values(created_at=1.0))
    assert prune(ledger, settings.data_dir, 0) == []
    with alone_with(BatchFolder.of(settings.data_dir, old)):
        assert prune(ledger, settings.data_dir, 7) == [], "it is being retried"
    assert prune(ledger, settings.data_dir, 7) == [old]
    assert prune(ledger, settings.data_dir, 7) == []
    assert folders(settings) == {young, runs}


CRASH = """
import sys
from millrace.batch.ledger import Ledger
from millrace.batch.prune import delete
from millrace.batch.submit import Order, submit
from millrace.settings import get_settings
settings = get_settings()
if sys.argv[1] == "submit":
    with open(sys.argv[2], "rb") as file:
        submit(settings, Ledger.open(settings), file, Order("x"))
else:
    delete(Ledger.open(settings), settings.data_dir, sys.argv[2])
"""


def killed(settings: Settings, at: str, *arguments: str) -> None:
    env = environment(data_dir=settings.data_dir, llm_server_url=settings.llm_server_url, llm_model="m", crash_at=at)
    done = subprocess.run([sys.executable, "-c", CRASH, *arguments], env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (137, b"")


def test_a_delete_that_is_killed_leaves_nothing_that_breaks_and_is_ended_later(
    settings: Settings, ledger: Ledger
) -> None:
    batch = ended(settings, ledger)
    killed(settings, "delete.forgotten", "delete", batch)
    assert ledger.batches() == []
    assert (folders(settings), notes(settings)) == ({batch}, {batch})
    assert remove_orphans(ledger, settings.data_dir) == []
    age(BatchFolder.of(settings.data_dir, batch).note, ORPHAN_AGE + 60)
    assert remove_orphans(ledger, settings.data_dir) == [batch]
    assert (folders(settings), notes(settings)) == (set(), set())


# Orphans


@pytest.mark.parametrize("at", ["submit.planned", "submit.recorded"])
def test_a_submit_that_is_killed_leaves_an_orphan_or_a_batch(
    settings: Settings, ledger: Ledger, tmp_path: Path, at: str
) -> None:
    (tmp_path / "x.jsonl").write_bytes(rows(3).read())
    killed(settings, at, "submit", str(tmp_path / "x.jsonl"))
    (batch,) = folders(settings)
    assert notes(settings) == {batch}
    recorded = at == "submit.recorded"
    assert len(ledger.batches()) == recorded
    assert remove_orphans(ledger, settings.data_dir) == []
    assert notes(settings) == (set() if recorded else {batch})
    if not recorded:
        age(BatchFolder.of(settings.data_dir, batch).note, ORPHAN_AGE + 60)
    assert remove_orphans(ledger, settings.data_dir) == ([] if recorded else [batch])
    assert folders(settings) == ({batch} if recorded else set())


def test_a_ledger_that_knows_nothing_takes_nothing_away(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    """A new ledger, one that was restored, another DATABASE_URL: every folder looks like an orphan."""
    batch = ended(settings, ledger)
    waiting = submit(settings, ledger, rows(2), Order("x")).batch_id
    for path in [settings.data_dir, *settings.data_dir.rglob("*")]:
        age(path, 400 * DAY)
    other = settings.model_copy(update={"database_url": None, "data_dir": tmp_path / "other"})
    empty = Ledger.open(other)
    assert remove_orphans(empty, settings.data_dir) == []
    assert prune(empty, settings.data_dir, 1) == []
    empty.close()
    assert folders(settings) == {batch, waiting}


def test_what_was_answered_is_no_orphan_of_a_submit(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    """Killed right after its commit, it was run by that ledger's workers; today there is another ledger."""
    batch = ended(settings, ledger)
    folder = BatchFolder.of(settings.data_dir, batch)
    note_new(folder)
    age(folder.note, 2 * ORPHAN_AGE)
    empty = Ledger.open(settings.model_copy(update={"data_dir": tmp_path / "other"}))
    assert remove_orphans(empty, settings.data_dir) == []
    empty.close()
    assert folders(settings) == {batch}


def test_a_note_of_something_else_removes_nothing(settings: Settings, ledger: Ledger) -> None:
    (settings.data_dir / "batches" / "mine").mkdir(parents=True)
    folder = BatchFolder.of(settings.data_dir, "mine")
    note_new(folder)
    age(folder.note, 2 * ORPHAN_AGE)
    assert remove_orphans(ledger, settings.data_dir) == []
    assert folders(settings) == {"mine"}


# Keys


def test_the_same_key_and_rows_are_the_same_batch(settings: Settings, ledger: Ledger) -> None:
    first = submit(settings, ledger, rows(3), Order("x", idempotency_key="k"))
    again = submit(settings, ledger, rows(3), Order("y", idempotency_key="k"))
    assert (again.batch_id, again.resumed, first.resumed, again.twin) == (first.batch_id, True, False, None)
    with pytest.raises(InputError) as caught:
        submit(settings, ledger, rows(4), Order("x", idempotency_key="k"))
    assert (caught.value.code, caught.value.exit_code) == ("idempotency_conflict", 2)
    assert first.batch_id in caught.value.message
    other = submit(settings, ledger, rows(3), Order("x", idempotency_key="l"))
    assert (other.resumed, other.twin) == (False, first.batch_id)
    assert submit(settings, ledger, rows(4), Order("x")).twin is None
    assert len(folders(settings)) == len(ledger.batches()) == 3
    assert notes(settings) == set()


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_what_is_no_key(settings: Settings, ledger: Ledger, key: str) -> None:
    with pytest.raises(InputError) as caught:
        submit(settings, ledger, rows(1), Order("x", idempotency_key=key))
    assert caught.value.code == "invalid_idempotency_key"


def test_of_many_at_once_the_ledger_decides(either_settings: Settings) -> None:
    settings = either_settings.model_copy(update={"llm_server_url": f"http://127.0.0.1:{NOBODY}", "llm_model": "m"})
    barrier = threading.Barrier(4)
    with contextlib.closing(Ledger.open(settings)) as ledger:

        def one(_: int) -> str:
            barrier.wait()
            return submit(settings, ledger, rows(3), Order("x", idempotency_key="k")).batch_id

        with ThreadPoolExecutor(4) as pool:
            (batch,) = set(pool.map(one, range(4)))
        assert [one["id"] for one in ledger.batches()] == [batch]
    assert (folders(settings), notes(settings)) == ({batch}, set())
