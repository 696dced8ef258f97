"""`millrace backup` and `restore`: old, backup, new, restore, old."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from redis import Redis

from millrace.batch.ledger import new_id
from tests.acceptance.test_failures import small_disk  # noqa: F401  # a fixture
from tests.cli import MILLRACE, Cli, Done, batch_file, redis_answers
from tests.scripted_engine import Engine, scripted_engine
from tests.services import OwnRedis, free_port, until


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with scripted_engine(slots=8) as engine:
        yield engine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    own = OwnRedis(tmp_path / "redis", free_port())
    own.start()
    until(lambda: redis_answers(own.url), "Redis")
    yield own
    own.kill()


@pytest.fixture
def client(server: OwnRedis) -> Iterator[Any]:
    with contextlib.closing(Redis.from_url(server.url, decode_responses=True)) as client:
        yield client


@pytest.fixture
def ready(cli: Cli, server: OwnRedis, engine: Engine) -> Cli:
    engine.script(rules=[], tokens_per_second=0)
    cli.environment |= {"REDIS_URL": server.url, "LLM_SERVER_URL": engine.url, "BATCH_PROCESSES": "1"}
    return cli


def fails(done: Done, exit_code: int, code: str, *words: str) -> None:
    """Check that a command ended with one error, which says what to do."""
    assert (done.code, done.error["code"]) == (exit_code, code), done
    assert done.error["hint"]
    for word in words:
        assert word in done.error["message"], done


@contextlib.contextmanager
def worker(cli: Cli) -> Iterator[None]:
    with cli.start("worker") as running:
        running.until(lambda: "worker processes on Redis" in running.err, "a worker")
        yield
        running.send(signal.SIGTERM)
        assert running.wait().code == 0, running


# The drill


def test_the_drill(ready: Cli, server: OwnRedis, client: Any) -> None:
    client.set("k", "old")
    client.set("short", "old", ex=500)
    path = ready.write("q.jsonl", batch_file(3))
    batch = ready.run("batch", "submit", path, "--json").json["id"]
    done = ready.run("backup", "monday.tar.gz")
    assert done.code == 0, done
    assert done.out == ""
    assert "1 batch of the ledger → monday.tar.gz" in done.err
    assert "The files of batches are not in it: copy millrace-data/batches too" in done.err
    assert stat.S_IMODE((ready.folder / "monday.tar.gz").stat().st_mode) == 0o600

    client.set("k", "new")
    client.delete("short")
    ready.run("batch", "cancel", batch)
    since = ready.run("batch", "submit", path, "--json").json["id"]

    done = ready.run("restore", "monday.tar.gz", "--yes")
    assert done.code == 0, done
    assert "1 folder in millrace-data/batches of batches that this ledger does not know" in done.err
    server.kill()
    server.start()
    until(lambda: redis_answers(server.url), "Redis")
    assert client.get("k") == "old"
    assert 0 < client.ttl("short") <= 500
    assert [one["id"] for one in ready.run("batch", "list", "--json").json["data"]] == [batch]
    assert (ready.data / "batches" / since).is_dir()
    with worker(ready):
        assert ready.run("batch", "watch", batch).code == 0
    assert ready.run("batch", "verify", batch).code == 0


def test_a_batch_that_went_on(ready: Cli, engine: Engine) -> None:
    """Half done at the backup, which is made beside the worker; done; restored; and done again with nothing asked twice."""
    ready.environment |= {"BATCH_SHARD_SECONDS": "1", "BATCH_CONCURRENCY": "4"}
    engine.script(rules=[], tokens_per_second=20, answer_tokens=8)
    before = engine.stats()["requests"]
    ready.write("q.jsonl", batch_file(200))
    batch = ready.run("batch", "submit", "q.jsonl", "--json").json["id"]

    def answered() -> int:
        return int(ready.run("batch", "show", batch, "--json").json["request_counts"]["completed"])

    with worker(ready):
        engine.wait_for(lambda stats: stats["requests"] >= before + 10, 60)
        until(lambda: answered() >= 10, "some answers")
        done = ready.run("backup", "half.tar.gz", "--json")
        assert done.code == 0, done
        assert done.json["batches"] == 1
        fails(
            ready.run("restore", "half.tar.gz", "--yes", "--json"), 2, "workers_running", "Workers are at work: batch0"
        )
        engine.script(tokens_per_second=0)
        assert ready.run("batch", "watch", batch).code == 0
    first = ready.run("batch", "results", batch).out
    asked = engine.stats()
    done = ready.run("restore", "half.tar.gz", "--yes", "--json")
    assert done.code == 0, done
    assert done.json["without_files"] == done.json["unknown_folders"] == 0
    shown = ready.run("batch", "show", batch, "--json").json
    assert shown["status"] == "in_progress"
    assert 10 <= shown["request_counts"]["completed"] < 200
    with worker(ready):
        assert ready.run("batch", "watch", batch).code == 0
    verified = ready.run("batch", "verify", batch, "--json")
    assert verified.code == 0, verified
    assert verified.json["output_lines"] == 200
    assert ready.run("batch", "results", batch).out == first
    assert engine.stats()["requests"] == asked["requests"], "the files had every answer"


def test_queued_tasks_are_answered_after_a_restore(ready: Cli, server: OwnRedis, client: Any, engine: Engine) -> None:
    """Those that a worker held when it was killed, too, and at once."""
    # Celery calls what redis-py no longer likes.
    ready.environment["PYTHONWARNINGS"] += ",ignore::DeprecationWarning"
    engine.script(tokens_per_second=0.01)
    with Celery(broker=server.url) as app:
        sent = [
            app.send_task("inference.chat", args=[[{"role": "user", "content": f"{n}?"}]], queue="interactive").id
            for n in range(5)
        ]
    with ready.start("worker") as running:
        running.until(lambda: engine.stats()["in_flight"], "a task in a worker's hands")
        for process in ready.processes():
            process.suspend()  # so that none of them puts anything in order before it is killed
        ready.kill_all()
        ready.gone()
    assert ready.run("backup", "b.tar.gz").code == 0
    assert client.hlen("unacked")
    client.flushdb()
    engine.script(tokens_per_second=0)
    assert ready.run("restore", "b.tar.gz", "--yes").code == 0

    def states() -> list[str]:
        raw = client.mget([f"celery-task-meta-{task}" for task in sent])
        return [json.loads(result)["status"] if result else "" for result in raw]

    with worker(ready):
        until(lambda: states() == ["SUCCESS"] * 5, lambda: f"answers: {states()}")
        until(lambda: not client.exists("unacked"), "tasks that are acknowledged")


def test_the_embedded_redis(cli: Cli, engine: Engine) -> None:
    """It runs beside the workers only; for a restore it runs alone."""
    cli.environment["LLM_SERVER_URL"] = engine.url

    @contextlib.contextmanager
    def redis() -> Iterator[Any]:
        with cli.up(), contextlib.closing(Redis.from_url(url(), decode_responses=True)) as client:
            yield client
        cli.gone()

    def url() -> str:
        found = json.loads((cli.data / "run" / "stack.json").read_text())["settings"]["redis_url"]
        return str(found)

    fails(cli.run("backup", "b.tar.gz", "--json"), 3, "redis_unreachable")
    assert not cli.data.exists(), "nothing was changed"
    with redis() as client:
        client.set("k", "old")
        assert cli.run("backup", "b.tar.gz").code == 0
        client.set("k", "new")
        fails(cli.run("restore", "b.tar.gz", "--yes", "--json"), 2, "workers_running")
        assert client.get("k") == "new"
    # Entries of the workers of a stack fade with it: it ended in order.
    done = cli.run("restore", "b.tar.gz", "--yes")
    assert done.code == 0, done
    assert "using the embedded one of millrace-data" in done.err
    cli.gone()
    done = cli.run("backup", "c.tar.gz", "--json")
    assert done.code == 0, done
    with redis() as client:
        assert client.get("k") == "old"
    # On a new machine, where there is nothing yet, the backup knows that its Redis was embedded.
    (cli.folder / "elsewhere").mkdir()
    cli.environment["DATA_DIR"] = "elsewhere/data"
    assert cli.run("restore", "b.tar.gz", "--yes").code == 0
    cli.gone()
    cli.data = cli.folder / "elsewhere" / "data"
    with redis() as client:
        assert client.get("k") == "old"


def test_from_sqlite_to_postgresql(ready: Cli, postgres: str) -> None:
    ready.write("q.jsonl", batch_file(3))
    batch = ready.run("batch", "submit", "q.jsonl", "--json").json["id"]
    assert ready.run("backup", "b.tar.gz").code == 0
    name = new_id("test")
    server = sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    server.dispose()
    ready.environment["DATABASE_URL"] = server.url.set(database=name).render_as_string(hide_password=False)
    # psycopg warns of connections that the end of a command closes.
    ready.environment["PYTHONWARNINGS"] += ",ignore::ResourceWarning"
    assert ready.run("restore", "b.tar.gz", "--yes").code == 0
    with worker(ready):
        assert ready.run("batch", "watch", batch).code == 0
        again = ready.run("batch", "submit", "q.jsonl", "--json").json["id"]
        assert ready.run("batch", "watch", again).code == 0
    for one in (batch, again):
        assert ready.run("batch", "verify", one).code == 0
    assert len(ready.run("batch", "list", "--json").json["data"]) == 2


def test_files_that_are_missing_are_counted(ready: Cli) -> None:
    ready.run("batch", "submit", ready.write("q.jsonl", batch_file(3)))
    assert ready.run("backup", "b.tar.gz").code == 0
    ready.environment["DATA_DIR"] = str(ready.folder / "elsewhere")
    done = ready.run("restore", "b.tar.gz", "--yes")
    assert done.code == 0, done
    assert "The files of 1 batch are not in" in done.err


# Being asked


def asked(cli: Cli, word: str) -> tuple[int, str]:
    """Restore on a terminal and answer `word`; return the exit code and what was said."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [MILLRACE, "restore", "b.tar.gz"],
        cwd=cli.folder,
        env=cli.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.write(ours, f"{word}\n".encode())
    said = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(ours, 4096):
            said += piece
    os.close(ours)
    return process.wait(30), said.decode()


def test_a_terminal_is_asked(ready: Cli, client: Any) -> None:
    client.set("k", "old")
    assert ready.run("backup", "b.tar.gz").code == 0
    client.set("k", "new")
    code, said = asked(ready, "n")
    assert code == 130
    assert "Replace everything in Redis" in said
    assert client.get("k") == "new"
    code, said = asked(ready, "y")
    assert code == 0, said
    assert client.get("k") == "old"


def test_a_pipe_is_not_asked(ready: Cli, client: Any) -> None:
    assert ready.run("backup", "b.tar.gz").code == 0
    client.set("k", "new")
    fails(ready.run("restore", "b.tar.gz", "--json", stdin="y\n"), 2, "confirmation_needed", "b.tar.gz")
    assert client.get("k") == "new"


# What may be wrong


def test_a_backup_is_not_written_over(ready: Cli) -> None:
    taken = ready.write("taken", "somebody's")
    fails(ready.run("backup", "taken", "--json"), 2, "backup_exists", "taken is there already")
    assert taken.read_text() == "somebody's"
    assert ready.run("backup", "taken", "--force").code == 0
    assert ready.run("restore", "taken", "--yes").code == 0


def test_places_that_cannot_be_written(ready: Cli, unprivileged: tuple[str, ...]) -> None:
    (ready.folder / "folder").mkdir()
    for target in ("/dev/null", "folder", "millrace-data/ledger.db"):
        fails(ready.run("backup", target, "--force", "--json"), 2, "unwritable_output", target)
    fails(ready.run("backup", "missing/b.tar.gz", "--json"), 3, "storage", "missing")
    (ready.folder / "locked").mkdir(mode=0o500)
    fails(ready.run("backup", "locked/b.tar.gz", "--json", wrap=unprivileged), 3, "storage", "locked")
    (ready.folder / "closed").mkdir(mode=0)
    fails(ready.run("backup", "closed/b.tar.gz", "--json", wrap=unprivileged), 3, "storage", "closed")
    assert Path("/dev/null").is_char_device()


def test_a_full_disk(ready: Cli, client: Any, small_disk: Path) -> None:  # noqa: F811
    for number in range(10):
        client.set(f"noise-{number}", os.urandom(2**19).hex())
    fails(ready.run("backup", small_disk / "b.tar.gz", "--json"), 3, "disk_full", str(small_disk))
    assert list(small_disk.iterdir()) == []


def test_files_that_are_no_backup(ready: Cli, client: Any) -> None:
    client.set("k", "now")
    ready.run("batch", "submit", ready.write("q.jsonl", batch_file(3)))
    assert ready.run("backup", "b.tar.gz").code == 0
    raw = (ready.folder / "b.tar.gz").read_bytes()
    ready.write("cut.tar.gz", raw[:-40])
    before = ready.run("batch", "list", "--json").out
    for name, code, exit_code in (
        ("missing.tar.gz", "no_such_file", 2),
        (".", "unreadable_file", 2),
        ("q.jsonl", "backup_damaged", 2),
        ("cut.tar.gz", "backup_damaged", 2),
    ):
        fails(ready.run("restore", name, "--yes", "--json"), exit_code, code, name)
    assert client.get("k") == "now"
    assert ready.run("batch", "list", "--json").out == before


def test_a_backup_of_another_version(ready: Cli, client: Any) -> None:
    """As a Millrace of later tables writes it."""
    from millrace.backup import archive

    path = ready.folder / "b.tar.gz"
    with archive.create(path) as writer:
        writer.add("redis.jsonl", [])
        writer.finish(archive.Source("redis://localhost", "7.0", False, "sqlite:///x.db", "9999"))
    client.set("k", "now")
    done = ready.run("restore", "b.tar.gz", "--yes", "--json")
    fails(done, 2, "backup_revision", "version 9999", "version 0002")
    assert client.get("k") == "now"
    assert not ready.data.exists()


def test_redis_or_the_ledger_away(ready: Cli, server: OwnRedis, client: Any) -> None:
    client.set("k", "old")
    assert ready.run("backup", "b.tar.gz").code == 0
    client.set("k", "new")
    ledger = ready.data / "ledger.db"
    kept = ledger.read_bytes()
    ledger.write_bytes(b"This is no database, and long enough to be looked at. " * 40)
    for command in (("backup", "c.tar.gz"), ("restore", "b.tar.gz", "--yes")):
        fails(ready.run(*command, "--json"), 3, "ledger_unreachable", "ledger.db")
    assert client.keys("*") == ["k"]
    assert client.get("k") == "new"
    # What a damaged ledger wants: out of the way, and back.
    ledger.rename(ready.folder / "damaged.db")
    assert ready.run("restore", "b.tar.gz", "--yes").code == 0
    ledger.write_bytes(kept)
    server.kill()
    for command in (("backup", "c.tar.gz"), ("restore", "b.tar.gz", "--yes")):
        fails(ready.run(*command, "--json"), 3, "redis_unreachable", server.url)
    assert ledger.read_bytes() == kept
    assert not (ready.folder / "c.tar.gz").exists()


def test_a_redis_with_a_password_is_never_replaced(cli: Cli) -> None:
    """A container that is down: what an embedded one of last week holds is not what was meant."""
    (cli.data / "redis").mkdir(parents=True)
    cli.environment["REDIS_PASSWORD"] = "a-container's"
    done = cli.run("backup", "b.tar.gz", "--json")
    fails(done, 3, "redis_unreachable")
    assert "a-container's" not in done.out + done.err
