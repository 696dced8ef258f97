"""Backups: the file they lie in, and a ledger that goes back in time beside files that do not."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from millrace.backup import archive, rows
from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Finish, Lease, Leases, Renewal, free_expired
from millrace.batch.ledger import Ledger, new_id
from millrace.batch.merge import merge
from millrace.batch.planner import read_rows
from millrace.batch.schema import ShardState, Status, shards
from millrace.batch.segments import SegmentWriter, recover
from millrace.batch.verify import verify
from millrace.errors import InputError, StorageError
from millrace.settings import Settings
from tests.unit.batches import TTL, answer, planned, recorded, request, run_all, run_shard

SOURCE = archive.Source("redis://localhost:6379/0", "7.0.15", False, "sqlite:///ledger.db", "0001")
KINDS = ["sqlite", "postgresql"]


# The file


def written(path: Path, **members: list[Any]) -> bytes:
    with archive.create(path) as writer:
        for name, content in members.items():
            writer.add(name, content)
        writer.finish(SOURCE)
    return path.read_bytes()


def read(path: Path) -> archive.Manifest:
    with path.open("rb") as file, archive.opened(path, file) as found:
        return found.manifest


def refused(path: Path, raw: bytes, code: str = "backup_damaged") -> InputError:
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    written(path, one=[{"a": 1}, {"a": 2}], none=[])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    with path.open("rb") as file, archive.opened(path, file) as found:
        assert found.manifest.source == SOURCE
        assert [found.manifest.members[name].rows for name in ("one", "none")] == [2, 0]
        for _ in range(2):
            assert list(found.rows("one", dict[str, int])) == [{"a": 1}, {"a": 2}]
        assert list(found.rows("none", dict[str, int])) == []
        with pytest.raises(InputError):
            list(found.rows("another", dict[str, int]))
        with pytest.raises(InputError):
            list(found.rows("one", list[int]))


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "b.tar.gz")
    written(link, one=[1])
    assert link.is_symlink()
    assert read(tmp_path / "there" / "b.tar.gz") == read(link)


def test_what_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    raw = written(path, one=list(range(3000)))
    for length in [*range(0, 400, 7), *range(400, len(raw), 97)]:
        refused(path, raw[:length])


def test_what_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    raw = written(path, one=list(range(3000)))
    plain = bytearray(gzip.decompress(raw))
    # The compressed bytes, and those that somebody compressed again: a tar's own checksums are of headers alone.
    for place in random.Random(0).sample(range(10, len(raw) - 8), 200):
        changed = bytearray(raw)
        changed[place] ^= 0x10
        # A few bits of a compressed stream mean nothing, such as those that fill up its last byte.
        with contextlib.suppress(OSError, EOFError, zlib.error):
            if gzip.decompress(bytes(changed)) == plain:
                continue
        refused(path, bytes(changed))
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        start = tar.getmember("one").offset_data
    plain[start] = ord("7")
    assert "one is not what was saved" in str(refused(path, gzip.compress(plain)))


def test_what_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    refused(path, b"")
    refused(path, b"This is no backup.")
    refused(path, gzip.compress(b"nor is this"))
    refused(path, tarred(notes=b"nor this"))
    refused(path, tarred(**{"manifest.json": b"{}"}))
    refused(path, tarred(**{"manifest.json": b'{"format":1}'}))
    refused(path, tarred(**{"manifest.json": b"\xff"}))


def test_a_newer_one_is_refused(tmp_path: Path) -> None:
    head = json.dumps({"format": 2, "more": "of which we know nothing"}).encode()
    error = refused(tmp_path / "b.tar.gz", tarred(**{"manifest.json": head}), "backup_newer")
    assert "format 2; this Millrace knows 1" in error.message


def test_a_member_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    raw = written(path, one=[1], two=[2])
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert "three" in str(refused(path, tarred(**members, three=b"3\n")))
    del members["two"]
    assert "two" in str(refused(path, tarred(**members)))


def tarred(**members: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def test_what_is_not_finished_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    before = written(path, one=[1])

    def broken() -> Iterator[int]:
        yield 1
        raise RuntimeError

    with contextlib.suppress(RuntimeError), archive.create(path) as writer:
        writer.add("one", broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError), archive.create(tmp_path / "missing" / "b.tar.gz"):
        pass


# The ledger


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, new_ledger: Callable[[str], Settings]) -> Settings:
    return new_ledger(request.param)


@pytest.fixture
def new_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Settings]]:
    """Makes settings of an empty ledger of either kind; all of them share DATA_DIR."""
    with contextlib.ExitStack() as cleanup:

        def make(kind: str) -> Settings:
            name = new_id("test")
            if kind == "sqlite":
                return Settings(data_dir=tmp_path / "data", database_url=f"sqlite:///{tmp_path / name}.db")
            server = sa.create_engine(request.getfixturevalue("postgres"), isolation_level="AUTOCOMMIT")
            cleanup.callback(server.dispose)
            url = server.url.set(database=name).update_query_dict({"options": "-c lock_timeout=10s"})
            _statement(server, f"CREATE DATABASE {name}")
            cleanup.callback(_statement, server, f"DROP DATABASE {name} WITH (FORCE)")
            return Settings(data_dir=tmp_path / "data", database_url=url.render_as_string(hide_password=False))

        yield make


def _statement(server: sa.Engine, statement: str) -> None:
    with server.connect() as connection:
        connection.execute(sa.text(statement))


Saved = dict[str, list[rows.Row]]


def saved(ledger: Ledger) -> Saved:
    """Return what a backup would hold, by way of JSON."""
    with rows.snapshot(ledger) as of:
        return {table.name: json.loads(json.dumps(list(of(table)))) for table in rows.TABLES}


def put_back(settings: Settings, ledger: Ledger, backup: Saved) -> None:
    rows.replace(ledger, lambda table: (dict(row) for row in backup[table.name]), settings.data_dir)


def claimed(leases: Leases) -> Lease:
    lease = leases.claim()
    assert lease is not None
    return lease


def without_ids(backup: Saved) -> Saved:
    return backup | {"shards": [{**row, "id": None} for row in backup["shards"]]}


@pytest.mark.parametrize("into", KINDS)
def test_a_ledger_moves(settings: Settings, ledger: Ledger, new_ledger: Callable[[str], Settings], into: str) -> None:
    first = planned(settings, ledger, [request(f"ü{n}") for n in range(5)], rate=0.001)
    run_all(settings, ledger, failed=lambda row: row == 3)
    merge(ledger, settings.data_dir, first)
    second = planned(settings, ledger, [request("one more")])
    ledger.set_metadata(second, {"a": "b", "ключ": "✓"})
    backup = saved(ledger)
    other = new_ledger(into)
    with contextlib.closing(Ledger.open(other)) as moved:
        put_back(other, moved, backup)
        assert without_ids(saved(moved)) == without_ids(backup)
        assert moved.batch(first) == ledger.batch(first)
        assert verify(moved, other.data_dir, first).ok
        third = planned(other, moved, [request("and after that")])
        run_all(other, moved)
        for batch_id in (second, third):
            assert merge(moved, other.data_dir, batch_id) is Status.COMPLETED
            assert verify(moved, other.data_dir, batch_id).ok


def test_many_rows(settings: Settings, ledger: Ledger) -> None:
    batch_id = recorded(ledger, [1] * 2500)
    backup = saved(ledger)
    put_back(settings, ledger, backup)
    assert [row.number for row in ledger.shards(batch_id)] == list(range(2500))


def test_an_empty_ledger(settings: Settings, ledger: Ledger) -> None:
    empty = saved(ledger)
    recorded(ledger, [1])
    put_back(settings, ledger, empty)
    assert saved(ledger) == empty
    recorded(ledger, [1])


def test_a_batch_that_went_on_is_taken_up_where_it_is(settings: Settings, ledger: Ledger) -> None:
    batch_id = planned(settings, ledger, [request(f"c{n}") for n in range(6)], rate=0.001)
    leases = Leases(ledger, "test", TTL)
    run_shard(settings, leases, claimed(leases))
    held = claimed(leases)  # somebody's at the time of the backup
    backup = saved(ledger)
    run_shard(settings, leases, held)
    for _ in range(2):
        run_shard(settings, leases, claimed(leases))
    before = segments(settings, batch_id)
    put_back(settings, ledger, backup)
    states = [row.state for row in ledger.shards(batch_id)]
    assert states == [ShardState.DONE] + [ShardState.READY] * 5
    run_all(settings, ledger)
    assert merge(ledger, settings.data_dir, batch_id) is Status.COMPLETED
    assert verify(ledger, settings.data_dir, batch_id).ok
    after = segments(settings, batch_id)
    assert {name: after[name] for name in before} == before, "what was answered stays as it was"
    texts = [text_of(line) for line in outputs(settings, batch_id)]
    assert texts == ["epoch 1"] * 6
    assert all(not after[name] for name in after.keys() - before.keys() if name.endswith(".2.jsonl"))


def test_a_batch_that_ended_since_ends_again(settings: Settings, ledger: Ledger) -> None:
    batch_id = planned(settings, ledger, [request(f"c{n}") for n in range(4)], rate=0.001)
    backup = saved(ledger)
    run_all(settings, ledger, failed=lambda row: row == 2)
    merge(ledger, settings.data_dir, batch_id)
    folder = BatchFolder.of(settings.data_dir, batch_id)
    ended = folder.output.read_bytes(), folder.errors.read_bytes()
    put_back(settings, ledger, backup)
    assert ledger.status(batch_id) is Status.IN_PROGRESS
    run_all(settings, ledger, failed=lambda row: False)
    merge(ledger, settings.data_dir, batch_id)
    assert verify(ledger, settings.data_dir, batch_id).ok
    assert (folder.output.read_bytes(), folder.errors.read_bytes()) == ended


def test_a_batch_that_only_the_files_know(settings: Settings, ledger: Ledger) -> None:
    backup = saved(ledger)
    batch_id = planned(settings, ledger, [request("c")])
    run_all(settings, ledger)
    merge(ledger, settings.data_dir, batch_id)
    put_back(settings, ledger, backup)
    assert ledger.batches() == []
    assert BatchFolder.of(settings.data_dir, batch_id).output.exists()


def test_a_batch_that_was_being_cancelled(settings: Settings, ledger: Ledger) -> None:
    batch_id = planned(settings, ledger, [request(f"c{n}") for n in range(3)], rate=0.001)
    leases = Leases(ledger, "test", TTL)
    held = claimed(leases)
    ledger.cancel(batch_id)
    backup = saved(ledger)
    folder = BatchFolder.of(settings.data_dir, batch_id)
    append(settings, leases, held, 1)
    put_back(settings, ledger, backup)
    assert free_expired(ledger) == 1
    assert merge(ledger, settings.data_dir, batch_id) is Status.CANCELLED
    assert verify(ledger, settings.data_dir, batch_id).ok
    assert len(folder.output.read_bytes().splitlines()) == 1, "what its runner had answered counts"


def test_a_runner_of_the_replaced_ledger_changes_nothing(settings: Settings, ledger: Ledger) -> None:
    old = planned(settings, ledger, [request("old")])
    leases = Leases(ledger, "test", TTL)
    backup = saved(ledger)
    late = claimed(leases)  # and no file of it yet
    new = planned(settings, ledger, [request("new")])
    stranger = claimed(leases)  # of a batch that is about to be unknown
    put_back(settings, ledger, backup)
    planned(settings, ledger, [request("other")])
    owners = [claimed(leases), claimed(leases)]
    assert [owner.batch_id for owner in owners].count(old) == 1
    assert all(owner.batch_id != new for owner in owners)
    assert next(owner.epoch for owner in owners if owner.batch_id == old) == late.epoch + 1
    for zombie in (late, stranger):
        older = recover(BatchFolder.of(settings.data_dir, zombie.batch_id), 0, 1, [])
        assert leases.renew(zombie, older.counts) is Renewal.LOST
        assert leases.finish(zombie, [], older.counts, 1.0) is Finish.LOST
    for owner in owners:
        run_shard(settings, leases, owner)
        merge(ledger, settings.data_dir, owner.batch_id)
        assert verify(ledger, settings.data_dir, owner.batch_id).ok


def test_rows_that_fit_no_ledger_change_nothing(settings: Settings, ledger: Ledger) -> None:
    recorded(ledger, [1])
    before = saved(ledger)
    orphan = before | {"batches": []}
    with pytest.raises(sa.exc.SQLAlchemyError):
        put_back(settings, ledger, orphan)
    assert saved(ledger) == before


@given(
    seed=st.integers(0, 2**32),
    before=st.integers(0, 8),
    after=st.integers(0, 12),
)
def test_whatever_happened_every_row_has_one_answer(
    tmp_path_factory: pytest.TempPathFactory, seed: int, before: int, after: int
) -> None:
    """Runners that answer some rows and finish, give back, crash or tear their last line, before and after a backup."""
    choose = random.Random(seed)
    settings = Settings(data_dir=tmp_path_factory.mktemp("history"))
    with contextlib.closing(Ledger.open(settings)) as ledger:
        batch_id = planned(settings, ledger, [request(f"c{n}") for n in range(9)], rate=choose.choice([0.001, 1000]))
        leases = Leases(ledger, "test", TTL)
        for _ in range(before):
            _live(choose, settings, ledger, leases)
        backup = saved(ledger)
        for _ in range(after):
            _live(choose, settings, ledger, leases)
        if choose.random() < 0.5:
            merge(ledger, settings.data_dir, batch_id)
        answered = _whole_lines(settings, batch_id)
        put_back(settings, ledger, backup)
        run_all(settings, ledger)
        free_expired(ledger)
        assert merge(ledger, settings.data_dir, batch_id) is Status.COMPLETED
        report = verify(ledger, settings.data_dir, batch_id)
        assert report.ok, report.findings
        kept = {json.loads(line)["custom_id"]: line for line in outputs(settings, batch_id)}
        assert kept == kept | answered, "no answer that was there was asked for again"


def _live(choose: random.Random, settings: Settings, ledger: Ledger, leases: Leases) -> None:
    lease = leases.claim()
    if lease is None:
        return
    end = choose.choice(["finish", "release", "crash", "torn", "no file", "held"])
    if end == "finish":
        run_shard(settings, leases, lease)
        return
    if end != "no file":
        append(settings, leases, lease, choose.randint(0, lease.rows), torn=end == "torn")
    if end == "release":
        folder = BatchFolder.of(settings.data_dir, lease.batch_id)
        older = recover(folder, lease.number, lease.epoch + 1, lease.sealed)
        assert leases.release(lease, older.sealed, older.counts, 1.0)
    elif end != "held":
        with ledger.write() as connection:
            connection.execute(shards.update().where(shards.c.id == lease.shard_id).values(lease_until=1.0))


def append(settings: Settings, leases: Leases, lease: Lease, most: int, *, torn: bool = False) -> None:
    """Answer up to `most` of a shard's open rows, and seal nothing."""
    folder = BatchFolder.of(settings.data_dir, lease.batch_id)
    older = recover(folder, lease.number, lease.epoch, lease.sealed)
    assert leases.seal(lease, older.sealed, older.counts)
    writer = SegmentWriter(folder.segment(lease.number, lease.epoch), lease.epoch)
    for row, line in list(read_rows(folder, lease.first, lease.rows))[:most]:
        if row not in older.rows:
            custom_id = json.loads(line)["custom_id"]
            writer.append(row, True, 2, 3, answer(lease.batch_id, row, custom_id, f"epoch {lease.epoch}"))
    writer.flush()
    writer.close()
    if torn:
        with writer.path.open("ab") as file:
            file.write(b'{"row":0,"ok":tr')


def _whole_lines(settings: Settings, batch_id: str) -> dict[str, bytes]:
    """Return the first answer of each row that lies in the segments, by custom_id."""
    found: dict[str, bytes] = {}
    for path in sorted(BatchFolder.of(settings.data_dir, batch_id).segments.glob("*"), key=_epoch):
        for raw in path.read_bytes().splitlines(keepends=True):
            if raw.endswith(b"\n"):
                line = raw[raw.index(b'"line":') + 7 : -2]
                found.setdefault(json.loads(line)["custom_id"], line)
    return found


def _epoch(path: Path) -> int:
    return int(path.name.split(".")[1])


def segments(settings: Settings, batch_id: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in BatchFolder.of(settings.data_dir, batch_id).segments.glob("*")}


def outputs(settings: Settings, batch_id: str) -> list[bytes]:
    return BatchFolder.of(settings.data_dir, batch_id).output.read_bytes().splitlines()


def text_of(line: bytes) -> Any:
    return json.loads(line)["response"]["body"]["choices"][0]["message"]["content"]
