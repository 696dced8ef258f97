"""`millrace batch …` on a running `millrace up`: every way in, and every way to look at what comes out."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch

from tests.acceptance.conftest import Up
from tests.cli import MILLRACE, Cli, Done, batch_file, request
from tests.services import until

#: Rows of a batch that must not come to its end before slow commands have stopped it.
ENDLESS = 20_000


@pytest.fixture
def cli(up: Up) -> Cli:
    return up.cli


def submit(cli: Cli, name: str, content: str | bytes, *arguments: str) -> Any:
    done = cli.run("batch", "submit", cli.write(name, content), *arguments, "--json")
    assert done.code == 0, done
    return done.json


def finish(cli: Cli, batch_id: str) -> Done:
    return cli.run("batch", "watch", batch_id, "--json")


def lines(done: Done) -> list[Any]:
    assert done.code == 0, done
    return [json.loads(line) for line in done.out.splitlines()]


def test_submit_watch_show_results_verify_list(cli: Cli) -> None:
    told = submit(cli, "questions.jsonl", batch_file(20), "--name", "twenty [/questions]", "--priority", "high")
    batch_id = told["id"]
    new = {"existing": False, "same_rows_as": None}
    assert told == {"id": batch_id, "rows": 20, "status": "in_progress", "waiting_for": None} | new
    watched = finish(cli, batch_id)
    assert watched.code == 0, watched

    shown = cli.run("batch", "show", batch_id, "--json")
    assert shown.code == 0
    batch = shown.json
    assert (batch["id"], batch["object"], batch["status"]) == (batch_id, "batch", "completed")
    assert batch["endpoint"] == "/v1/chat/completions"
    assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert batch["output_file_id"]
    assert batch["error_file_id"] is None
    assert batch["created_at"] <= batch["in_progress_at"] <= batch["completed_at"]
    assert batch["usage"]["output_tokens"] > 0
    assert batch["millrace"]["priority"] == "high"

    people = cli.run("batch", "show", batch_id)
    for word in (batch_id, "completed", "20 answered, 0 failed", "twenty [/questions]", "questions.jsonl"):
        assert word in people.out, people

    results = cli.run("batch", "results", batch_id)
    assert [line["custom_id"] for line in lines(results)] == [f"row-{number}" for number in range(20)]
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in lines(results))
    assert lines(cli.run("batch", "results", batch_id, "--errors")) == []
    copied = cli.run("batch", "results", batch_id, "-o", "copy.jsonl")
    assert (copied.code, copied.out) == (0, "")
    assert (cli.folder / "copy.jsonl").read_text() == results.out
    assert cli.run("batch", "results", batch_id, "--json").json["output"]["lines"] == 20

    verified = cli.run("batch", "verify", batch_id, "--json")
    assert verified.code == 0
    assert verified.json["ok"] is True
    assert (verified.json["rows"], verified.json["output_lines"], verified.json["error_lines"]) == (20, 20, 0)
    assert "20 rows in = 20 answers + 0 failures out" in cli.run("batch", "verify", batch_id).out

    listed = cli.run("batch", "list", "--limit", "1", "--json").json
    assert [entry["id"] for entry in listed["data"]] == [batch_id]
    table = cli.run("batch", "list").out
    assert batch_id in table
    assert "twenty [/questions]" in table


def test_show_gives_the_batch_object_of_openai(cli: Cli) -> None:
    batch_id = submit(cli, "object.jsonl", batch_file(2))["id"]
    for shown in (cli.run("batch", "show", batch_id, "--json"), finish(cli, batch_id)):
        assert shown.code == 0
        assert set(shown.json) - set(Batch.model_fields) == {"millrace"}
        assert set(Batch.model_fields) - set(shown.json) <= {"model"}
        Batch.model_validate(shown.json, strict=True)


def test_the_id_alone_on_stdout(cli: Cli) -> None:
    done = cli.run("batch", "submit", cli.write("one.jsonl", batch_file(1)), "--priority", "idle")
    assert done.code == 0
    assert done.out == done.out.strip() + "\n"
    assert finish(cli, done.out.strip()).code == 0


def test_prompts_of_a_text_file(cli: Cli) -> None:
    done = cli.run("batch", "run", cli.write("p.txt", "One?\n\nTwo?\r\nThrée?"), "-o", "p.out", "--system", "Be brief.")
    assert done.code == 0, done
    assert [row["custom_id"] for row in cli.rows("p.out")] == ["row-1", "row-2", "row-3"]
    sent = [row["body"]["messages"] for row in sent_rows(cli)]
    assert [messages[-1]["content"] for messages in sent] == ["One?", "Two?", "Thrée?"]
    assert all(messages[0] == {"role": "system", "content": "Be brief."} for messages in sent)


def test_a_run_with_a_key_runs_once(cli: Cli) -> None:
    path = cli.write("k.txt", "One?\nTwo?\n")
    first = cli.run("batch", "run", path, "-o", "k1.out", "--idempotency-key", "k", "--json")
    again = cli.run("batch", "run", path, "-o", "k2.out", "--idempotency-key", "k", "--window", "1h", "--json")
    assert (first.code, again.code) == (0, 0), again
    assert again.json["id"] == first.json["id"]
    assert "2 of 2 rows are answered" in again.err
    assert cli.rows("k1.out") == cli.rows("k2.out")


def test_a_template_over_csv(cli: Cli) -> None:
    sheet = io.StringIO()
    csv.writer(sheet).writerows(
        [["custom_id", "name", "text"], ["a", "Ann", "one,\n\ntwo"], ["b", "Bob", 'say "hi" {name}']]
    )
    template = "{name} wrote: {text} {{sic}}"
    path = cli.write("t.csv", "\ufeff" + sheet.getvalue())
    done = cli.run("batch", "run", path, "-o", "t.jsonl", "--prompt-template", template, "--json")
    assert done.code == 0, done
    assert [row["custom_id"] for row in cli.rows("t.jsonl")] == ["a", "b"]
    prompts = [row["body"]["messages"][0]["content"].replace("\r\n", "\n") for row in sent_rows(cli)]
    assert prompts == ["Ann wrote: one,\n\ntwo {sic}", 'Bob wrote: say "hi" {name} {sic}']


def test_a_template_over_objects(cli: Cli) -> None:
    path = cli.write("o.jsonl", '{"q": "Why?", "n": 3}\n{"q": "How?", "n": [1]}\n')
    done = cli.run("batch", "run", path, "-o", "o.out", "-t", "{q} / {n}")
    assert done.code == 0, done
    assert [row["body"]["messages"][0]["content"] for row in sent_rows(cli)] == ["Why? / 3", "How? / [1]"]
    wrong = cli.run("batch", "submit", path, "-t", "{question}")
    assert wrong.code == 2
    assert "line 1" in wrong.err
    assert "question" in wrong.err
    assert "q, n" in wrong.err


def test_from_a_pipe(cli: Cli) -> None:
    done = cli.run("batch", "run", "-", "-o", "piped.jsonl", "--json", stdin=batch_file(3))
    assert done.code == 0, done
    assert done.json["millrace"]["filename"] == "stdin"
    assert [row["custom_id"] for row in cli.rows("piped.jsonl")] == ["row-0", "row-1", "row-2"]
    text = cli.run("batch", "run", "-", "-o", "piped.txt", "--format", "text", stdin="A?\nB?\n")
    assert text.code == 0, text
    assert len(cli.rows("piped.txt")) == 2


def test_completions_and_embeddings(cli: Cli) -> None:
    rows = [
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 4}},
        {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"input": "A river"}},
    ]
    path = cli.write("mixed.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = cli.run("batch", "run", path, "-o", "mixed.out")
    assert done.code == 0, done
    completion, embedding = cli.rows("mixed.out")
    assert completion["response"]["body"]["choices"][0]["text"]
    assert len(embedding["response"]["body"]["data"][0]["embedding"]) > 8


def test_a_prompt_that_does_not_fit_fails_alone(cli: Cli) -> None:
    rows = [request(0), request(1, "word " * 3000), request(2)]
    path = cli.write("long.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = cli.run("batch", "run", path, "-o", "long.out.jsonl")
    assert done.code == 1, done
    assert "1 row failed" in done.err
    assert [row["custom_id"] for row in cli.rows("long.out.jsonl")] == ["row-0", "row-2"]
    (failed,) = cli.rows("long.out.errors.jsonl")
    assert failed["custom_id"] == "row-1"
    assert failed["error"]["code"] == "context_length_exceeded"
    batch = cli.run("batch", "list", "--limit", "1", "--json").json["data"][0]
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    errors = cli.run("batch", "results", batch["id"], "--errors")
    assert json.loads(errors.out)["custom_id"] == "row-1"
    verified = cli.run("batch", "verify", batch["id"], "--json")
    assert verified.json["error_lines"] == 1
    (cli.data / "batches" / batch["id"] / "output.jsonl").unlink()
    broken = cli.run("batch", "verify", batch["id"])
    assert (broken.code, "--repair" in broken.err) == (1, True), broken
    refused = cli.run("batch", "results", batch["id"], "-o", "never.out")
    assert (refused.code, "is gone" in refused.err, "--repair" in refused.err) == (1, True, True), refused
    assert cli.run("batch", "verify", batch["id"], "--repair", "--json").json == verified.json
    assert finish(cli, batch["id"]).code == 1
    assert "1 failed row is run again" in cli.run("batch", "retry", batch["id"]).err
    again = finish(cli, batch["id"])
    assert (again.code, again.json["status"]) == (1, "completed")
    assert again.json["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert cli.run("batch", "verify", batch["id"], "--json").json["ok"] is True


def test_pause_follow_and_resume(cli: Cli) -> None:
    batch_id = submit(cli, "paused.jsonl", batch_file(ENDLESS, max_tokens=64), "-p", "urgent")["id"]
    with cli.start("batch", "results", batch_id, "--follow") as follower:
        follower.until(lambda: follower.out, "a first answer")
        assert cli.run("batch", "pause", batch_id).code == 0
        with cli.start("batch", "watch", batch_id) as watcher:
            watcher.until(lambda: f"{batch_id} is paused. " in watcher.err, "the word that it is paused")
            follower.until(lambda: f"{batch_id} is paused. " in follower.err, "the word that it is paused")
            paused = until(lambda: resting(cli, batch_id), "a batch that nobody runs")["request_counts"]["completed"]
            assert paused < ENDLESS
            follower.until(lambda: follower.out.count("\n") == paused, f"its {paused} answers, and no more")
            assert cli.run("batch", "resume", batch_id).code == 0
            follower.until(lambda: follower.out.count("\n") > paused, f"more than {paused} answers")
            assert cli.run("batch", "cancel", batch_id).code == 0
            watched, followed = watcher.wait(), follower.wait()
    assert (watched.code, watched.err.count("is paused")) == (1, 1)
    assert sorted(followed.out.splitlines()) == sorted(cli.run("batch", "results", batch_id).out.splitlines())
    verified = cli.run("batch", "verify", batch_id, "--json").json
    assert (verified["ok"], verified["output_lines"]) == (True, followed.out.count("\n"))


def resting(cli: Cli, batch_id: str) -> Any:
    """The batch, once all its runners have given back what they held."""
    batch = cli.run("batch", "show", batch_id, "--json").json
    return batch if not batch["millrace"]["shards"]["leased"] else None


def test_cancel(cli: Cli) -> None:
    batch_id = submit(cli, "many.jsonl", batch_file(ENDLESS, max_tokens=64), "-p", "low")["id"]
    until(lambda: any((cli.data / "batches" / batch_id / "segments").glob("*.jsonl")), "a first segment")
    early = cli.run("batch", "results", batch_id)
    assert early.code == 2
    assert "batch_not_ended" in early.err
    assert cli.run("batch", "verify", batch_id, "--json").error["code"] == "batch_not_ended"
    cancelled = cli.run("batch", "cancel", batch_id, "--json")
    assert cancelled.code == 0
    assert cancelled.json["millrace"]["status"] in ("cancelling", "cancelled")
    watched = finish(cli, batch_id)
    assert watched.code == 1
    assert watched.json["status"] == "cancelled"
    counts = watched.json["request_counts"]
    assert counts["completed"] < counts["total"] == ENDLESS
    assert cli.run("batch", "verify", batch_id, "--json").json["ok"] is True
    again = cli.run("batch", "cancel", batch_id)
    assert again.code == 0
    assert "cancelled" in again.err


@pytest.mark.parametrize("command", ["show", "watch", "cancel", "results", "verify"])
def test_an_unknown_batch(cli: Cli, command: str) -> None:
    done = cli.run("batch", command, "batch_nope")
    assert done.code == 2
    assert "There is no batch batch_nope" in done.err
    assert "millrace batch list" in done.err


def test_a_head_that_has_seen_enough(cli: Cli) -> None:
    batch = cli.run("batch", "run", cli.write("h.txt", "One?\nTwo?\n"), "-o", "h.out", "--json").json["id"]
    pipe = subprocess.run(
        ["sh", "-c", f"{MILLRACE} batch results {batch} | head -c 10"],
        cwd=cli.folder,
        env=cli.environment,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert pipe.stderr == b""


def test_another_broken_pipe_is_not_taken_for_that(cli: Cli) -> None:
    broken = "lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError('of something else'))"
    program = (
        f"import typer.main\nfrom millrace.cli.app import run\ntyper.main.TyperGroup.main = {broken}\nrun(['status'])"
    )
    pipe = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" | cat', sys.executable, program],
        cwd=cli.folder,
        env=cli.environment,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert b"BrokenPipeError: of something else" in pipe.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
def test_a_full_disk_behind_stdout(cli: Cli) -> None:
    batch = cli.run("batch", "run", cli.write("f.txt", "One?\nTwo?\n"), "-o", "f.out", "--json").json["id"]
    for command in (
        f"batch results {batch}",
        f"batch results {batch} --follow",
        "batch list",
        f"batch show {batch} --json",
        f"batch verify {batch}",
        "config show",
    ):
        done = cli.run(wrap=("sh", "-c", f'exec "$0" {command} > /dev/full'))
        assert done.code == 3, done
        assert done.err.startswith("error [disk_full] What stands behind stdout cannot be written"), done


def test_results_replace_nothing_that_is_no_answer_file(cli: Cli) -> None:
    batch = cli.run("batch", "run", cli.write("r.txt", "One?\n"), "-o", "r.out", "--json").json["id"]
    os.mkfifo(cli.folder / "fifo")
    for target in ("fifo", "/dev/null", "/dev/stdout", "millrace-data/ledger.db", "nowhere/a.jsonl"):
        done = cli.run("batch", "results", batch, "-o", target)
        assert (done.code, "error [unwritable_output]" in done.err) == (2, True), done
    assert (cli.folder / "fifo").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_what_cannot_be_repaired_is_left_alone(cli: Cli) -> None:
    batch = cli.run("batch", "run", cli.write("v.txt", "One?\nTwo?\n"), "-o", "v.out", "--json").json["id"]
    folder = cli.data / "batches" / batch
    segment = next(iter(sorted(path for path in (folder / "segments").glob("*.jsonl") if path.stat().st_size)))
    os.truncate(segment, segment.stat().st_size - 1)
    before = (folder / "output.jsonl").stat().st_mtime_ns
    for more in ((), ("--repair",)):
        done = cli.run("batch", "verify", batch, *more)
        assert done.code == 1, done
        assert "is not what was sealed" in done.out
        assert "restore it from a backup. Output and errors are what was recorded. Nothing was changed." in done.err
        assert "--repair" not in done.err
    assert (folder / "output.jsonl").stat().st_mtime_ns == before


def sent_rows(cli: Cli) -> list[Any]:
    """What the newest batch asked the engine."""
    newest = cli.run("batch", "list", "--limit", "1", "--json").json["data"][0]["id"]
    content = (cli.data / "batches" / newest / "input.jsonl").read_bytes()
    return [json.loads(line) for line in content.splitlines()]
