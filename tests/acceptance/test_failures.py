"""What a run needs and does not find: Redis, the ledger, the disk. One sentence, exit 3, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.batch.ledger import Ledger
from millrace.settings import Settings
from tests.cli import NOBODY, Cli, Done, batch_file, redis_answers, request
from tests.scripted_engine import Engine, scripted_engine
from tests.services import OwnRedis, free_port, redis_server, until


def one_sentence(done: Done, code: str, *words: str) -> None:
    """Check that a command ended with one error and one thing to do about it."""
    assert done.code == 3, done
    assert done.out == ""
    errors = [line for line in done.err.splitlines() if line.startswith("error ")]
    assert len(errors) == 1, done
    assert errors[0].startswith(f"error [{code}] ")
    assert errors[0].endswith(".")
    assert done.err.count("  → ") == 1, done
    for word in words:
        assert word in errors[0], done


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine]]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis_url, scripted_engine() as engine:
        yield redis_url, engine


@pytest.fixture
def ready(cli: Cli, parts: tuple[str, Engine]) -> Cli:
    """A command line with a Redis and an engine, and a file to run."""
    redis_url, engine = parts
    cli.environment |= {"REDIS_URL": redis_url, "LLM_SERVER_URL": engine.url}
    cli.write("q.jsonl", batch_file(3))
    return cli


def test_redis_down(cli: Cli) -> None:
    path = cli.write("q.jsonl", batch_file(3))
    for command in (("batch", "submit", path), ("worker",)):
        one_sentence(cli.run(*command), "redis_unreachable", f"redis://127.0.0.1:{NOBODY}/0")
    assert not cli.data.exists(), "nothing was changed"
    as_json = cli.run("batch", "submit", path, "--json")
    assert as_json.code == 3
    assert as_json.error["code"] == "redis_unreachable"
    assert "millrace up" in as_json.error["hint"]


def test_a_wrong_redis_password(ready: Cli, parts: tuple[str, Engine]) -> None:
    ready.environment["REDIS_URL"] = "redis://:not-the-word@" + parts[0].rpartition("@")[2]
    for command in (("batch", "submit", "q.jsonl"), ("batch", "run", "q.jsonl", "-o", "a.jsonl")):
        done = ready.run(*command)
        one_sentence(done, "redis_password", "refuses the password")
        assert "not-the-word" not in done.err
    assert not ready.data.exists()


def test_who_only_looks_makes_nothing(ready: Cli) -> None:
    assert ready.run("batch", "list", "--json").json["data"] == []
    for command in (("show", "x"), ("verify", "x"), ("results", "x"), ("retry", "x"), ("delete", "x")):
        done = ready.run("batch", *command, "--json")
        assert (done.code, done.error["code"]) == (2, "not_found"), done
    assert ready.run("status", "--json").json["batches"] == []
    assert not ready.data.exists()


def test_a_data_dir_that_is_a_file(ready: Cli) -> None:
    ready.environment["DATA_DIR"] = "q.jsonl"
    one_sentence(ready.run("batch", "list"), "storage", "DATA_DIR is q.jsonl, which is no folder")


def test_a_ledger_that_is_gone(ready: Cli) -> None:
    (ready.data / "batches" / "batch_0").mkdir(parents=True)
    for command in (("list",), ("verify", "batch_0"), ("resume", "batch_0")):
        done = ready.run("batch", *command, "--json")
        assert (done.code, done.error["code"]) == (2, "ledger_missing"), done
        assert "1 batches" in done.error["message"]
    assert not (ready.data / "ledger.db").exists()


def test_a_locked_ledger(ready: Cli) -> None:
    Ledger.open(Settings(data_dir=ready.data)).close()
    with contextlib.closing(sqlite3.connect(ready.data / "ledger.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        ready.impatient("millrace.batch.database", LOCK_WAIT=0.5)
        one_sentence(ready.run("batch", "submit", "q.jsonl"), "ledger_locked", "ledger.db", "locked by another program")
        holder.execute("ROLLBACK")
    assert ready.run("batch", "list", "--json").json["data"] == []
    assert not list(ready.data.glob("batches/*")), "nothing was changed"
    assert ready.run("batch", "submit", "q.jsonl").code == 0


def test_a_newer_ledger(ready: Cli) -> None:
    Ledger.open(Settings(data_dir=ready.data)).close()
    with contextlib.closing(sqlite3.connect(ready.data / "ledger.db", isolation_level=None)) as ledger:
        (old,) = ledger.execute("SELECT version_num FROM alembic_version").fetchone()
        ledger.execute("UPDATE alembic_version SET version_num = '9999'")
        for command in (("batch", "submit", "q.jsonl"), ("batch", "list"), ("worker",)):
            one_sentence(ready.run(*command), "ledger_newer", "9999")
        ledger.execute("UPDATE alembic_version SET version_num = ?", [old])
    assert ready.run("batch", "list", "--json").json["data"] == []
    assert ready.run("batch", "submit", "q.jsonl").code == 0


def test_a_ledger_that_is_something_else(ready: Cli) -> None:
    ready.data.mkdir()
    (ready.data / "ledger.db").write_bytes(b"This is no database, and long enough to be looked at. " * 40)
    one_sentence(ready.run("batch", "submit", "q.jsonl"), "ledger_unreachable", "ledger.db")
    assert (ready.data / "ledger.db").read_bytes().startswith(b"This is no database")


def test_a_data_dir_that_is_not_ours(ready: Cli, unprivileged: tuple[str, ...]) -> None:
    (ready.folder / "locked").mkdir(mode=0o500)
    ready.environment["DATA_DIR"] = "locked/data"
    one_sentence(ready.run("batch", "submit", "q.jsonl", wrap=unprivileged), "storage", "locked/data")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=30)


def test_a_full_disk(cli: Cli, parts: tuple[str, Engine], small_disk: Path) -> None:
    with scripted_engine(answer_tokens=2000) as engine:
        cli.environment |= {
            "REDIS_URL": parts[0],
            "LLM_SERVER_URL": engine.url,
            "DATA_DIR": str(small_disk / "data"),
        }
        path = cli.write("q.jsonl", "".join(json.dumps(request(n, max_tokens=2000)) + "\n" for n in range(60)))
        (small_disk / "ballast").write_bytes(b"x" * 3_500_000)
        command = ("batch", "run", path, "-o", "a.jsonl")
        done = cli.run(*command)
        one_sentence(done, "disk_full", str(small_disk), "full")
        cli.gone()
        (small_disk / "ballast").unlink()
        again = cli.run(*command)
        assert again.code == 0, again
        assert "Taking up " in again.err
        batch = cli.run("batch", "list", "--json").json["data"][0]
        assert batch["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
        assert [row["custom_id"] for row in cli.rows("a.jsonl")] == [f"row-{n}" for n in range(60)]
        assert cli.run("batch", "verify", batch["id"]).code == 0
    cli.gone()


def test_a_disk_that_is_full_before_anything(cli: Cli, parts: tuple[str, Engine], small_disk: Path) -> None:
    redis_url, engine = parts
    cli.environment |= {"REDIS_URL": redis_url, "LLM_SERVER_URL": engine.url, "DATA_DIR": str(small_disk / "data")}
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(b"x" * 8_000_000)
    one_sentence(cli.run("batch", "submit", cli.write("q.jsonl", batch_file(3))), "disk_full", "full")
    (small_disk / "ballast").unlink()
    assert cli.run("batch", "submit", "q.jsonl").code == 0


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"MODEL_PATH": "nowhere.gguf"}, "model_missing", ("MODEL_PATH", "nowhere.gguf")),
        ({"MODEL_PATH": "q.jsonl"}, "model_format", ("q.jsonl", "not a GGUF")),
    ],
)
def test_a_model_that_is_none(cli: Cli, settings: dict[str, str], code: str, words: tuple[str, ...]) -> None:
    cli.environment |= settings
    path = cli.write("q.jsonl", batch_file(1))
    done = cli.run("batch", "run", path, "-o", "a.jsonl")
    assert done.code == 2
    assert f"error [{code}]" in done.err
    assert all(word in done.err for word in words)
    cli.gone()


def test_a_gguf_file_that_does_not_load(cli: Cli) -> None:
    cli.environment["MODEL_PATH"] = str(cli.write("broken.gguf", b"GGUF" + b"\0" * 100))
    done = cli.run("batch", "run", cli.write("q.jsonl", batch_file(1)), "-o", "a.jsonl")
    assert done.code == 3, done
    assert "error [engine_failed]" in done.err
    assert "broken.gguf" in done.err
    assert "engine.log" in done.err
    cli.gone()


def test_a_remote_kind_of_engine_is_not_replaced(cli: Cli) -> None:
    cli.environment["LLM_BACKEND"] = "vllm"
    done = cli.run("batch", "run", cli.write("q.jsonl", batch_file(1)), "-o", "a.jsonl")
    assert done.code == 3
    assert "error [engine_unreachable]" in done.err
    cli.gone()


def test_answers_are_written_over_nothing_that_is_no_answer_file(cli: Cli, tmp_path: Path) -> None:
    """Refused before anything starts: a device, the input itself, the files of batches, a folder."""
    path = cli.write("q.txt", "one\ntwo\n")
    (cli.data / "batches").mkdir(parents=True)
    (cli.folder / "same.txt").symlink_to(path)
    for target in ("/dev/null", "q.txt", "same.txt", "millrace-data/ledger.db", "millrace-data"):
        done = cli.run("batch", "run", "q.txt", "-o", target, "--json")
        assert (done.code, done.error["code"]) == (2, "unwritable_output"), done
    assert path.read_text() == "one\ntwo\n"
    assert Path("/dev/null").is_char_device()
    cli.gone()


def test_a_model_of_noise_never_stands_in_for_a_named_engine(cli: Cli) -> None:
    cli.write("q.txt", "one\n")
    del cli.environment["MODEL_PATH"]
    done = cli.run("batch", "run", "q.txt", "-o", "out.jsonl", "--json")
    assert (done.code, done.error["code"]) == (3, "engine_unreachable"), done
    assert "MODEL_PATH" in done.error["hint"]
    assert not (cli.folder / "out.jsonl").exists()
    cli.gone()


def test_a_cancel_without_redis_is_recorded(cli: Cli, tmp_path: Path) -> None:
    redis = OwnRedis(tmp_path / "redis", free_port())
    cli.environment |= {"REDIS_URL": redis.url, "LLM_MODEL": "m"}
    redis.start()
    try:
        until(lambda: redis_answers(redis.url), "Redis")
        path = cli.write("q.jsonl", batch_file(3))
        batch = cli.run("batch", "submit", path, "--json").json["id"]
    finally:
        redis.kill()
    done = cli.run("batch", "cancel", batch, "--json")
    assert (done.code, done.json["status"]) == (0, "cancelling"), done


def test_a_broken_env_file_is_one_sentence(cli: Cli) -> None:
    for content in ("JUST GARBAGE\n", "===\n", 'REDIS_HOST="open\n'):
        cli.write(".env", content)
        done = cli.run("config", "check", "--json")
        assert (done.code, done.error["code"]) == (2, "invalid_setting"), done
        assert "Line 1 of .env" in done.error["message"]
    cli.write(".env", "LLM_SERVER_URL=http://user:pw123@localhost/v1\n")
    done = cli.run("config", "show")
    assert done.code == 2 or "LLM_SERVER_URL" in cli.environment
    assert "pw123" not in done.out + done.err


def test_a_template_without_a_column_is_refused(cli: Cli) -> None:
    cli.write("q.csv", "a\n1\n")
    for template in ("none", "{a and"):
        done = cli.run("batch", "run", "q.csv", "-o", "out.jsonl", "-t", template, "--json")
        assert (done.code, done.error["code"]) == (2, "invalid_template"), done
