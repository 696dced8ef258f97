"""`millrace batch run` and `up` from nothing, and what happens to them: signals, crashes, a second one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace import presence
from millrace.settings import Settings
from tests.cli import NOBODY, Cli, batch_file, redis_answers
from tests.scripted_engine import Engine, scripted_engine
from tests.services import OwnRedis, free_port, lives, redis_server, until
from worker.supervisor import Heard


def stack_json(cli: Cli) -> Path:
    return cli.data / "run" / "stack.json"


def complete(cli: Cli, output: str, rows: int) -> dict[str, Any]:
    """Check an output, and what verify says of the newest batch."""
    assert [row["custom_id"] for row in cli.rows(output)] == [f"row-{number}" for number in range(rows)]
    batch: dict[str, Any] = cli.run("batch", "list", "--json").json["data"][0]
    assert batch["request_counts"] == {"total": rows, "completed": rows, "failed": 0}
    report = cli.run("batch", "verify", batch["id"], "--json")
    assert report.code == 0, report
    assert report.json["ok"] is True
    return batch


def clean(cli: Cli) -> None:
    """Check that a stack has left nothing behind that runs or says that it does."""
    cli.gone()
    assert not stack_json(cli).exists()


def test_a_run_with_nothing_there(cli: Cli) -> None:
    path = cli.write("questions.jsonl", batch_file(30))
    done = cli.run("batch", "run", path, "-o", "answers.jsonl", "--json")
    assert done.code == 0, done
    assert done.json["status"] == "completed"
    assert f"Redis at redis://127.0.0.1:{NOBODY}/0 does not answer: using an embedded one." in done.err
    assert f"The engine at http://127.0.0.1:{NOBODY} does not answer: using an embedded one." in done.err
    assert "30 of 30 rows answered in " in done.err
    assert f"millrace batch verify {done.json['id']}" in done.err
    clean(cli)
    complete(cli, "answers.jsonl", 30)
    assert not (cli.folder / "answers.errors.jsonl").exists()
    # Everything else is where it belongs.
    assert {entry.name for entry in cli.folder.iterdir()} == {"questions.jsonl", "answers.jsonl", "millrace-data"}


def test_interrupted_and_taken_up(cli: Cli, scripted: Engine) -> None:
    path = cli.write("questions.jsonl", batch_file(120))
    command = ("batch", "run", path, "-o", "answers.jsonl")
    with cli.start(*command) as running:
        running.until(lambda: scripted.stats()["by_status"].get("200", 0) >= 20, "a run that is under way")
        running.send(signal.SIGINT)
        done = running.wait()
    assert done.code == 130, done
    batch_id = cli.run("batch", "list", "--json").json["data"][0]["id"]
    assert f"{batch_id} is kept; the same command takes it up again." in done.err
    assert not (cli.folder / "answers.jsonl").exists()
    clean(cli)
    scripted.script(tokens_per_second=0)
    asked = scripted.stats()["requests"]
    assert cli.run("batch", "pause", batch_id).code == 0
    other = cli.run("batch", "run", path, "-o", "others.jsonl")
    assert f"{batch_id} has the same rows and is paused; " in other.err
    assert scripted.stats()["requests"] == asked + 120
    newest = cli.run("batch", "list", "--json").json["data"][0]["id"]
    assert cli.run("batch", "delete", newest, "--yes").code == 0
    assert cli.run("batch", "resume", batch_id).code == 3  # recorded; no Redis runs that it could be told to
    again = cli.run(*command)
    assert again.code == 0, again
    assert f"Taking up {batch_id}: " in again.err
    kept = int(again.err.partition(f"Taking up {batch_id}: ")[2].split()[0])
    assert 20 <= kept < 120
    assert complete(cli, "answers.jsonl", 120)["id"] == batch_id
    # What was answered before was not asked again; in flight were at most as many as there are slots.
    assert scripted.stats()["requests"] <= 2 * 120 + 2 * 8
    clean(cli)


def test_a_run_whose_window_closes_says_so(cli: Cli, scripted: Engine) -> None:
    scripted.script(rules=[{"then": {"do": "hang"}}])
    path = cli.write("late.jsonl", batch_file(20, model="scripted"))
    done = cli.run("batch", "run", path, "-o", "late.out.jsonl", "--window", "1s", "--json")
    assert (done.code, done.json["status"]) == (1, "expired"), done
    assert "0 of 20 rows answered in " in done.err
    assert "(0.0 rows/s, 0 tokens/s)" in done.err
    assert "The batch has expired: 20 rows were not run → late.out.errors.jsonl; `millrace batch resume" in done.err
    assert len(cli.rows("late.out.errors.jsonl")) == 20


def test_a_run_ends_where_its_rows_have_one_mistake(cli: Cli, scripted: Engine) -> None:
    """A person has to mend it; whoever runs it at night must not wait for that."""
    scripted.script(rules=[{"then": {"do": "status", "status": 400}}])
    cli.environment["BATCH_CANARY_ROWS"] = "10"
    path = cli.write("wrong.jsonl", batch_file(60, model="scripted"))
    for _ in range(2):  # the same command says it again
        done = cli.run("batch", "run", path, "-o", "wrong.out.jsonl", "--json")
        assert (done.code, done.json["millrace"]["status"]) == (1, "paused"), done
        assert f"{done.json['id']} is paused: " in done.err
        assert done.err.count(f"`millrace batch resume {done.json['id']}`") == 1
    assert not (cli.folder / "wrong.out.jsonl").exists()
    scripted.script(rules=[])
    resumed = cli.run("batch", "resume", done.json["id"])
    assert (resumed.code, "It is recorded, but Redis did not take the tickets" in resumed.err) == (3, True), resumed
    assert cli.run("batch", "run", path, "-o", "wrong.out.jsonl").code == 1  # some rows have failed before
    assert cli.rows("wrong.out.jsonl")


def test_ended_while_it_starts(cli: Cli) -> None:
    path = cli.write("questions.jsonl", batch_file(3))
    with cli.start("batch", "run", path, "-o", "answers.jsonl") as running:
        running.until((cli.data / "log" / "engine.log").exists, "an engine that is being started")
        running.send(signal.SIGINT)
        done = running.wait()
    assert done.code == 130, done
    clean(cli)
    assert cli.run("batch", "run", path, "-o", "answers.jsonl").code == 0
    clean(cli)


def test_up_drains(cli: Cli, scripted: Engine) -> None:
    with cli.up() as (running, told):
        assert told["embedded"] == ["Redis", "workers"]
        assert told["engine"]["url"] == scripted.root
        second = cli.run("up")
        assert second.code == 2
        assert "stack_running" in second.err
        assert "millrace status" in second.err
        submitted = cli.run("batch", "submit", cli.write("q.jsonl", batch_file(100)), "--json")
        scripted.wait_for(lambda stats: stats["by_status"].get("200", 0) >= 5)
        running.send(signal.SIGTERM)
        done = running.wait()
    assert done.code == 0, done
    assert "Draining: requests in flight are answered, the rest is kept." in done.err
    assert done.err.count("1 open batch, ") <= 1  # nobody wants a line a second in a log
    clean(cli)
    counts = cli.run("batch", "show", submitted.json["id"], "--json").json["request_counts"]
    stats = scripted.stats()
    # Each answer that the engine gave is in the ledger: nothing was asked for nothing.
    assert (counts["completed"], stats["in_flight"], stats["cancelled"]) == (stats["by_status"]["200"], 0, 0)
    assert 5 <= counts["completed"] < 100


def test_a_second_ctrl_c_ends_at_once(cli: Cli, scripted: Engine) -> None:
    scripted.script(rules=[{"then": {"do": "hang"}}])
    with cli.up() as (running, _):
        assert cli.run("batch", "submit", cli.write("q.jsonl", batch_file(8))).code == 0
        scripted.wait_for(lambda stats: stats["in_flight"] > 0)
        began = time.monotonic()
        running.send(signal.SIGINT)
        running.until(lambda: "Draining" in running.err, "draining")
        for _ in range(5):  # the same one: from the terminal and from a wrapper, say
            running.send(signal.SIGINT)
        until(lambda: time.monotonic() - began > Heard.ECHO + 0.1, "the time of a second one")
        assert "Ending at once" not in running.err
        began = time.monotonic()
        running.send(signal.SIGINT)
        done = running.wait()
        assert time.monotonic() - began < 8, "the drain of 10 s was waited for"
    assert done.err.count("Ending at once.") == 1
    assert done.code == 130
    clean(cli)


def test_the_guard_ends_everything(cli: Cli) -> None:
    with cli.up() as (running, told):
        assert told["embedded"] == ["Redis", "llama.cpp server", "workers"]
        everything = cli.processes()
        assert len(everything) >= 9, cli.describe()
        running.send(signal.SIGKILL)
        running.process.wait()
        cli.gone(30)
    # Its stack.json is of a dead process: nobody believes it, and the next one starts.
    assert cli.run("status").code == 3
    done = cli.run("batch", "run", cli.write("q.jsonl", batch_file(3)), "-o", "a.jsonl")
    assert done.code == 0, done
    clean(cli)


def running_as(cli: Cli, word: str) -> set[int]:
    """Return the processes in whose command a word stands."""
    found = set()
    for process in cli.processes():
        with contextlib.suppress(psutil.Error):
            if any(word in part for part in process.cmdline()):
                found.add(process.pid)
    return found


def test_a_guard_that_is_killed_is_replaced(cli: Cli) -> None:
    with cli.up() as (running, _):
        before = running_as(cli, "millrace.guard")
        assert len(before) == 2
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(running_as(cli, "millrace.guard") - before) == 2, "two others")
        running.send(signal.SIGKILL)
        running.process.wait()
        cli.gone(30)


def test_what_a_stack_leaves_whose_guards_died_with_it_ends(cli: Cli) -> None:
    with cli.up() as (running, _):
        running.send(signal.SIGSTOP)  # so that it starts no other guards
        for pid in running_as(cli, "millrace.guard"):
            os.kill(pid, signal.SIGKILL)
        running.send(signal.SIGKILL)
        running.process.wait()
        (left,) = running_as(cli, "redis-server")
        until(lambda: {process.pid for process in cli.processes()} == {left}, "workers and an engine that end")
    # Two of them would write to one append-only file.
    with cli.up() as (running, _):
        (redis,) = running_as(cli, "redis-server")
        assert redis != left
    clean(cli)


def test_workers_end_whose_supervisor_guard_and_redis_died(cli: Cli) -> None:
    with cli.up() as (running, _):
        running.send(signal.SIGSTOP)
        for pid in running_as(cli, "millrace.guard") | running_as(cli, "redis-server"):
            os.kill(pid, signal.SIGKILL)
        running.send(signal.SIGKILL)
        running.process.wait()
        cli.gone()


def children(cli: Cli, role: str) -> tuple[psutil.Process, list[psutil.Process]]:
    """Return a Celery main process and its pool's processes."""
    for process in cli.processes():
        words = process.cmdline()
        if any(word.startswith(f"{role}.") for word in words) and "celery" in words:
            below = process.children()
            if below:
                return process, below
    raise AssertionError(f"no {role}: {cli.describe()}")


def test_killed_workers(cli: Cli, scripted: Engine) -> None:
    path = cli.write("questions.jsonl", batch_file(150))
    with cli.start("batch", "run", path, "-o", "answers.jsonl") as running:
        running.until(lambda: scripted.stats()["by_status"].get("200", 0) >= 20, "a run that is under way")
        _, (child, *_) = children(cli, "batch0")
        main, _ = children(cli, "batch1")
        for process in (child, main):
            process.kill()
        until(lambda: not (lives(child) or lives(main)), "their end")
        scripted.script(tokens_per_second=0)
        done = running.wait()
    assert done.code == 0, done
    complete(cli, "answers.jsonl", 150)
    clean(cli)


def test_an_engine_that_dies_and_comes_back(cli: Cli) -> None:
    port = free_port()
    cli.environment["LLM_SERVER_URL"] = f"http://127.0.0.1:{port}"
    path = cli.write("questions.jsonl", batch_file(60))
    with (
        scripted_engine(port, tokens_per_second=8, answer_tokens=4) as engine,
        cli.start("batch", "run", path, "-o", "answers.jsonl") as running,
    ):
        running.until(lambda: engine.stats()["by_status"].get("200", 0) >= 10, "a run that is under way")
        engine.kill()
        running.until(lambda: "Rows wait: " in running.err, "the reason why nothing goes on")
        with scripted_engine(port):
            done = running.wait()
    assert done.code == 0, done
    assert f"The engine at http://127.0.0.1:{port} " in done.err
    complete(cli, "answers.jsonl", 60)
    clean(cli)


def test_up_uses_what_env_names(cli: Cli, tmp_path: Path) -> None:
    for name in ("REDIS_HOST", "REDIS_PORT", "LLM_SERVER_URL"):
        del cli.environment[name]
    with redis_server(tmp_path / "redis") as redis_url, scripted_engine() as engine:
        cli.write(".env", f"REDIS_URL={redis_url}\nLLM_SERVER_URL={engine.url}\n")
        with cli.up() as (running, told):
            assert told["embedded"] == ["workers"]
            assert redis_url.rpartition("@")[2] in told["redis"]
            assert told["engine"]["url"] == engine.root
            assert told["workers"] == 3
            assert not stack_json(cli).exists()
            assert cli.run("up").code == 2
            done = cli.run("batch", "run", cli.write("q.jsonl", batch_file(8)), "-o", "a.jsonl")
            assert done.code == 0, done
            assert "embedded" not in done.err
            running.send(signal.SIGINT)
            assert running.wait().code == 0
        clean(cli)
        complete(cli, "a.jsonl", 8)


def test_a_part_on_another_machine_is_never_replaced(cli: Cli) -> None:
    cli.environment["REDIS_HOST"] = "192.0.2.1"  # nobody's, by RFC 5737
    cli.environment["REDIS_URL"] = "redis://no-such-host.invalid:6379/0"
    done = cli.run("batch", "run", cli.write("q.jsonl", batch_file(1)), "-o", "a.jsonl")
    assert done.code == 3
    assert "no-such-host.invalid" in done.err
    assert not (cli.data / "redis").exists()


def test_an_engine_that_comes_later(cli: Cli, tmp_path: Path) -> None:
    port = free_port()
    with redis_server(tmp_path / "redis") as redis_url:
        cli.environment |= {
            "REDIS_URL": redis_url,
            "LLM_SERVER_URL": f"http://127.0.0.1:{port}",
            "LLM_MODEL": "scripted",
        }
        submitted = cli.run("batch", "submit", cli.write("q.jsonl", batch_file(6)), "--json")
        assert submitted.code == 0, submitted
        assert "The batch is queued and waits: " in submitted.err
        assert f"http://127.0.0.1:{port}" in submitted.json["waiting_for"]
        with cli.start("worker") as running:
            running.until(lambda: "worker processes" in running.err, "a worker")
            until(lambda: presence.trouble(Settings(redis_url=redis_url)), "the reason why nothing goes on")
            assert str(port) in cli.run("status", "--json").json["trouble"]["message"]
            with scripted_engine(port):
                watched = cli.run("batch", "watch", submitted.json["id"], "--json")
            assert watched.code == 0, watched
            running.send(signal.SIGTERM)
            assert running.wait().code == 0
    clean(cli)


def test_redis_goes_away_while_a_batch_runs(cli: Cli, scripted: Engine, tmp_path: Path) -> None:
    redis = OwnRedis(tmp_path / "redis", free_port())
    cli.environment["REDIS_URL"] = redis.url
    redis.start()
    try:
        path = cli.write("questions.jsonl", batch_file(300))
        command = ("batch", "run", path, "-o", "answers.jsonl")
        cli.impatient("millrace.cli.watch", REDIS_PATIENCE=5.0)
        until(lambda: redis_answers(redis.url), "Redis")
        with cli.start(*command) as running:
            running.until(lambda: scripted.stats()["by_status"].get("200", 0) >= 5, "a run that is under way")
            running.until(lambda: len(presence.alive(Settings(redis_url=redis.url))) == 3, "all its workers")
            redis.kill()
            done = running.wait()
        assert done.code == 3, done
        assert "does not answer" in done.err
        clean(cli)
        redis.start()
        scripted.script(tokens_per_second=0)
        until(lambda: redis_answers(redis.url), "Redis")
        again = cli.run(*command)
        assert again.code == 0, again
        assert "Taking up " in again.err
        complete(cli, "answers.jsonl", 300)
    finally:
        redis.kill()
    clean(cli)


@pytest.fixture
def scripted(cli: Cli) -> Any:
    """A scripted engine that is slow enough to be interrupted, as the engine of `cli`."""
    with scripted_engine(tokens_per_second=8, answer_tokens=4, slots=8) as engine:
        cli.environment["LLM_SERVER_URL"] = engine.url
        yield engine


def test_embedded_servers_that_die_are_started_again(cli: Cli) -> None:
    """Nobody is there at night to do it: the run goes on when its Redis and its engine come back."""
    path = cli.write("questions.jsonl", batch_file(300, max_tokens=40))
    with cli.start("batch", "run", path, "-o", "answers.jsonl") as running:
        running.until(lambda: any((cli.data / "batches").rglob("segments/*")), "a run that is under way", 60)
        for word in ("llama_process", "redis-server"):
            (server,) = [process for process in cli.processes() if word in " ".join(process.cmdline())]
            server.kill()
        done = running.wait(120)
    assert done.code == 0, done
    assert done.err.count("it is started again") == 2
    complete(cli, "answers.jsonl", 300)
    clean(cli)
