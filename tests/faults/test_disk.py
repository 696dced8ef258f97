"""The disk is full, turns read-only, fails, and loses what it had (F9)."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Leases, free_expired
from millrace.batch.ledger import Ledger
from millrace.batch.schema import ShardState, Status
from millrace.batch.segments import recover
from millrace.errors import IntegrityError, MillraceError
from millrace.selftest.parts import Project
from tests.faults.oracle import read_log
from tests.faults.sessions import LEASE, merged, process, run, session, submitted
from tests.services import freeze, until
from tests.unit.batches import expire

ROWS = 120
Make = Callable[..., Project]


@pytest.fixture
def ours(project: Make) -> Project:
    made = project(script={"slots": 4, "ttft_ms": 150}, batch_concurrency=8)
    made.start_engine()
    return made


@pytest.fixture
def small_disk(ours: Project) -> Iterator[Path]:
    """DATA_DIR as a file system of its own, of 4 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(ours.data_dir)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system, and not in every container")
    yield ours.data_dir
    subprocess.run(["umount", str(ours.data_dir)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only for whoever opens a file of it from now on; root writes wherever modes forbid it."""
    bind = ["mount", "--bind", str(folder), str(folder)]
    if os.geteuid() != 0 or subprocess.run(bind, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root can mount, and not in every container")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def begun(ours: Project) -> Iterator[tuple[Ledger, str, Path]]:
    source = ours.write_rows(ROWS)
    with ours.ledger() as ledger:
        yield ledger, submitted(ours, source, ledger), source


def answered(ours: Project) -> int:
    return sum(any(one.status == 200 for one in found) for found in read_log(ours.log).values())


def free_all(ledger: Ledger, batch: str) -> None:
    """Let every lease run out."""
    expire(ledger, *(shard.id for shard in ledger.shards(batch) if shard.state == ShardState.LEASED))
    free_expired(ledger)


def test_the_disk_is_full_in_the_middle(ours: Project, small_disk: Path) -> None:
    """disk_full: the session ends in a sentence, nothing is committed that is not there, and the rest runs later."""
    with begun(ours) as (ledger, batch, source):
        filler = small_disk / "filler"
        with session(ours, ledger) as outcome:
            until(lambda: answered(ours) > 20, "some answers")
            killed = time.monotonic()
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            with pytest.raises(MillraceError) as caught:
                outcome.result(60)
            stopped = time.monotonic()
        assert caught.value.code == "disk_full"
        filler.unlink()
        free_all(ledger, batch)
        run(ours, ledger)
        merged(ours, ledger, batch, source, kills=[killed, stopped])


def test_the_disk_turns_read_only(ours: Project) -> None:
    with begun(ours) as (ledger, batch, source):
        with session(ours, ledger) as outcome:
            until(lambda: answered(ours) > 20, "some answers")
            killed = time.monotonic()
            with read_only(ours.data_dir / "batches"):
                with pytest.raises(MillraceError) as caught:
                    outcome.result(60)
                assert caught.value.exit_code == 3
                assert "Read-only file system" in caught.value.message
                # A runner that comes meanwhile finds the same.
                with pytest.raises(MillraceError):
                    run(ours, ledger)
        ended = time.monotonic()
        free_all(ledger, batch)
        run(ours, ledger)
        merged(ours, ledger, batch, source, kills=[killed, ended])


def test_a_sync_fails(ours: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not known to be on the disk does not count: those rows run again, and no others."""
    with begun(ours) as (ledger, batch, source):
        folder = BatchFolder.of(ours.data_dir, batch)
        real, broken = os.fsync, threading.Event()
        synced: dict[str, int] = {}

        def fsync(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if path.endswith(".jsonl") and str(folder.segments) in path:
                if broken.is_set():
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                synced[path] = os.fstat(descriptor).st_size
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with session(ours, ledger) as outcome:
            until(lambda: answered(ours) > 20, "some answers")
            broken.set()
            began = time.monotonic()
            with pytest.raises(MillraceError) as caught:
                outcome.result(60)
            ended = time.monotonic()
        assert caught.value.code == "storage"
        assert "cannot be used: Input/output error" in caught.value.message
        unsealed = [path for path in folder.segments.iterdir() if path.name.startswith("0") and path.suffix == ".jsonl"]
        assert all(path.stat().st_size <= synced.get(str(path), 0) for path in unsealed)
        broken.clear()
        free_all(ledger, batch)
        run(ours, ledger)
        # Answers are synced every fifth of a second, if the disk is as fast; the others are asked again.
        kills = [began + 0.05 * step for step in range(-40, int((ended - began) / 0.05) + 2)]
        verdict = merged(ours, ledger, batch, source, kills=kills)
        assert verdict.run_again > 0


def broken_off(ours: Project, ledger: Ledger, batch: str) -> tuple[float, Path]:
    """Run a session in a process, kill it in the middle of a shard; return when, and the shard's segment."""
    folder = BatchFolder.of(ours.data_dir, batch)
    with process(ours) as child:

        def halfway() -> Path | None:
            if answered(ours) < 20:
                return None
            freeze(child.pid, ours.data_dir / "ledger.db")
            for shard in ledger.shards(batch):
                path = folder.segment(shard.number, shard.epoch)
                if shard.state == ShardState.LEASED and path.exists() and path.read_bytes().count(b"\n") >= 2:
                    return path
            os.kill(child.pid, signal.SIGCONT)
            return None

        path = until(halfway, "a shard in its middle")
        assert path is not None
        return time.monotonic(), path


def test_the_last_line_is_torn(ours: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """truncated_last_line: of what a dead runner left the whole lines count, once they are on the disk."""
    with begun(ours) as (ledger, batch, source):
        killed, torn = broken_off(ours, ledger, batch)
        os.truncate(torn, torn.stat().st_size - 5)
        real, synced = os.fsync, set()

        def fsync(descriptor: int) -> None:
            synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        free_all(ledger, batch)
        run(ours, ledger)
        assert str(torn) in synced
        merged(ours, ledger, batch, source, kills=[killed])


def test_a_sealed_segment_is_cut_short(ours: Project) -> None:
    """Nobody can complete such a batch: it fails in one sentence, and is not run for ever."""
    with begun(ours) as (ledger, batch, _):
        broken_off(ours, ledger, batch)
        free_all(ledger, batch)
        folder = BatchFolder.of(ours.data_dir, batch)
        # Owners that seal what the killed one had answered, and are killed in turn.
        leases = Leases(ledger, "killed", LEASE)
        while lease := leases.claim():
            found = recover(folder, lease.number, lease.epoch, [])
            assert leases.seal(lease, found.sealed, found.counts)
            if found.rows:
                break
        assert lease is not None
        sealed = folder.segment(lease.number, lease.epoch - 1)
        os.truncate(sealed, sealed.stat().st_size // 2)
        free_all(ledger, batch)
        with pytest.raises(IntegrityError):
            run(ours, ledger)
        assert ledger.status(batch) is Status.FAILED
        (problem,) = ledger.batch(batch)["errors"]["data"]
        assert problem["code"] == "integrity"
        assert str(sealed) in problem["message"]
        assert "\n" not in problem["message"]
        # The next session leaves it alone.
        assert run(ours, ledger).rows == 0
