"""`millrace batch` on batches in every state: what each command says, its exit code, and that no refusal changes anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.batch.folder import BatchFolder
from millrace.batch.ledger import Ledger, new_id
from millrace.batch.merge import merge
from millrace.batch.prune import note_new
from millrace.batch.schema import Status, batches
from millrace.settings import Settings, environment
from tests.cli import NOBODY
from tests.services import redis_server
from tests.unit.batches import planned, request, run_all

#: Runs command after command in one process, as starting one costs more than all of them.
COMMANDS = """
import contextlib, io, json, sys
from millrace.cli.app import run
for arguments in json.loads(sys.argv[1]):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    print(json.dumps([code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()]), flush=True)
"""


class Done:
    """A command that has ended."""

    def __init__(self, arguments: list[str], code: int, out: str, err: str) -> None:
        self.arguments, self.code, self.out, self.err = arguments, code, out, err
        assert "Traceback" not in err, self

    @property
    def refusal(self) -> tuple[int, str]:
        """The exit code and the error's code; it is one sentence."""
        errors = [line for line in self.err.splitlines() if line.startswith("error ")]
        assert (len(errors), self.out) == (1, ""), self
        assert errors[0].endswith("."), self
        return self.code, errors[0].partition("[")[2].partition("]")[0]

    def __repr__(self) -> str:
        return f"millrace {' '.join(self.arguments)} → {self.code}\n{self.out}{self.err}"


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def millrace(settings: Settings, redis_url: str, tmp_path: Path) -> Callable[..., list[Done]]:
    env = environment(
        data_dir=settings.data_dir, redis_url=redis_url, llm_server_url=f"http://127.0.0.1:{NOBODY}", llm_model="m"
    )

    def run(*commands: str) -> list[Done]:
        words = [["batch", *command.split()] for command in commands]
        child = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(words)],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (child.returncode, child.stderr) == (0, ""), child
        return [
            Done(arguments, *json.loads(line)) for arguments, line in zip(words, child.stdout.splitlines(), strict=True)
        ]

    return run


def made(settings: Settings, ledger: Ledger, failed: set[int] = frozenset(), *, end: bool = True) -> str:  # type: ignore[assignment]
    batch = planned(settings, ledger, [request(f"id-{n}") for n in range(4)])
    if end:
        run_all(settings, ledger, failed.__contains__)
        merge(ledger, settings.data_dir, batch)
    return batch


def change(ledger: Ledger, batch: str, **values: Any) -> None:
    with ledger.write() as connection:
        connection.execute(batches.update().where(batches.c.id == batch).values(**values))


def test_what_cannot_be_done_is_refused_in_one_sentence_and_changes_nothing(
    settings: Settings, ledger: Ledger, millrace: Callable[..., list[Done]]
) -> None:
    good, bad = made(settings, ledger), made(settings, ledger, {1})
    cancelled, failed, gone = made(settings, ledger, {1}), made(settings, ledger, {1}), made(settings, ledger, {1})
    change(ledger, cancelled, status=Status.CANCELLED, cancelled_at=1.0)
    change(ledger, failed, status=Status.FAILED, failed_at=1.0, errors=[{"code": "integrity", "message": "It is."}])
    BatchFolder.of(settings.data_dir, gone).root.rename(settings.data_dir / "moved")
    runs, ending = made(settings, ledger, end=False), made(settings, ledger, end=False)
    change(ledger, ending, status=Status.CANCELLING, cancelling_at=1.0)
    expected = {
        f"retry {runs}": (2, "batch_not_ended"),
        f"retry {good}": (2, "nothing_failed"),
        f"retry {cancelled}": (2, "batch_not_completed"),
        f"retry {gone}": (3, "batch_files_missing"),
        f"resume {good}": (2, "batch_completed"),
        f"resume {ending}": (2, "batch_ending"),
        f"pause {good}": (2, "batch_ended"),
        f"pause {ending}": (2, "batch_ended"),
        f"priority {good} high": (2, "batch_ended"),
        f"priority {runs} highest": (2, "invalid_priority"),
        f"delete {runs}": (2, "batch_not_ended"),
        f"delete {good}": (2, "confirmation_needed"),
        f"verify {runs}": (2, "batch_not_ended"),
        f"verify {failed}": (2, "batch_failed"),
        f"verify {gone}": (3, "batch_files_missing"),
        f"results {gone}": (3, "batch_files_missing"),
        f"results {gone} --follow": (3, "batch_files_missing"),
        f"results {runs}": (2, "batch_not_ended"),
        f"results {failed}": (1, "integrity"),
        f"results {failed} --follow": (1, "integrity"),
        f"results {good} --follow --json": (2, "usage"),
        **{f"{command} batch_none": (2, "not_found") for command in ("pause", "resume", "retry", "delete")},
        "priority batch_none low": (2, "not_found"),
        "results batch_none --follow": (2, "not_found"),
        "submit x.jsonl --window 1y": (2, "invalid_window"),
        "submit x.jsonl --window=": (2, "invalid_window"),
    }
    Path("x.jsonl").write_text(json.dumps(request("a")) + "\n")
    before = ledger.batches(100)
    done = millrace(*expected)
    told = {" ".join(one.arguments[1:]): one for one in done}
    wanted_json = told.pop(f"results {good} --follow --json")
    assert (wanted_json.code, json.loads(wanted_json.out)["error"]["code"]) == (2, "usage")
    expected.pop(f"results {good} --follow --json")
    answered = told[f"results {failed} --follow"]
    assert len(answered.out.splitlines()) == 3, "what it has comes first"
    answered.out = ""
    assert {command: one.refusal for command, one in told.items()} == expected
    assert ledger.batches(100) == before
    assert "--follow" in told[f"results {runs}"].err
    assert f"millrace batch retry {good}" in told[f"resume {good}"].err
    assert bad in {one["id"] for one in before}


def test_a_batch_through_its_life(settings: Settings, ledger: Ledger, millrace: Callable[..., list[Done]]) -> None:
    Path("x.jsonl").write_text("".join(json.dumps(request(f"id-{n}")) + "\n" for n in range(4)))
    first, again, twin, windowed = millrace(
        "submit x.jsonl --idempotency-key monday",
        "submit x.jsonl --idempotency-key monday",
        "submit x.jsonl --json",
        "submit x.jsonl --window 30m",
    )
    batch = first.out.strip()
    assert again.out == first.out
    assert f"{batch} has this idempotency key and these rows, and is in_progress" in again.err
    told = json.loads(twin.out)
    assert (told["same_rows_as"], told["existing"]) == (batch, False)
    assert f"{batch} has the same rows and is in_progress." in twin.err
    Path("x.jsonl").write_text(json.dumps(request("other")) + "\n")
    ledger.cancel(told["id"])
    merge(ledger, settings.data_dir, told["id"])

    conflict, paused, shown, listed, resumed, runs, priority = millrace(
        "submit x.jsonl --idempotency-key monday",
        f"pause {batch}",
        f"show {windowed.out.strip()}",
        "list",
        f"resume {batch}",
        f"resume {batch}",
        f"priority {batch} high --json",
    )
    assert conflict.refusal == (2, "idempotency_conflict")
    assert f"{batch} is paused." in paused.err
    assert "30m, until 20" in shown.out
    assert "expires in 29 min" in listed.out or "expires in 30 min" in listed.out
    assert f"{batch} was paused and goes on: 4 of 4 rows are still to be run." in resumed.err
    assert (runs.code, "runs already" in runs.err) == (0, True)
    assert json.loads(priority.out)["millrace"]["priority"] == "high"

    ledger.pause(batch, "the first 20 rows failed alike.")
    shown, listed = millrace(f"show {batch}", "list")
    for one in (shown, listed):
        assert "the first 20 rows failed alike." in one.out
    assert "monday" in shown.out
    change(ledger, batch, status=Status.IN_PROGRESS)
    ledger.cancel(windowed.out.strip())
    run_all(settings, ledger, {1, 2}.__contains__)
    merge(ledger, settings.data_dir, batch)

    follow, errors, retried = millrace(
        f"results {batch} --follow", f"results {batch} --errors --follow", f"retry {batch}"
    )
    assert [json.loads(line)["custom_id"] for line in follow.out.splitlines()] == ["id-0", "id-3"]
    assert [json.loads(line)["custom_id"] for line in errors.out.splitlines()] == ["id-1", "id-2"]
    assert (retried.code, f"{batch} goes on: 2 failed rows are run again." in retried.err) == (0, True)
    run_all(settings, ledger)
    merge(ledger, settings.data_dir, batch)

    verified, watched, resumed, deleted, gone = millrace(
        f"verify {batch}", f"watch {batch}", f"resume {told['id']}", f"delete {batch} --yes", f"show {batch}"
    )
    assert verified.out.startswith("ok  4 rows in = 4 answers + 0 failures out")
    assert "6 attempts at shards, 2 of them after an interruption or a retry." in verified.out
    assert watched.code == 0
    assert f"{told['id']} was cancelled and goes on: 4 of 4" in resumed.err
    assert (deleted.code, gone.code) == (0, 2)
    assert not BatchFolder.of(settings.data_dir, batch).root.exists()


REAP = """
import json, logging
from tasks.maintenance import reap
logging.basicConfig(level=logging.INFO, format="%(message)s")
print(json.dumps(reap()))
"""


def test_the_reaper_expires_and_prunes_and_says_so(settings: Settings, ledger: Ledger, redis_url: str) -> None:
    old, young, overdue = made(settings, ledger), made(settings, ledger), made(settings, ledger, end=False)
    change(ledger, overdue, expires_at=1.0)
    change(ledger, old, completed_at=1.0)
    orphan = BatchFolder.of(settings.data_dir, new_id("batch"))
    orphan.segments.mkdir(parents=True)
    note_new(orphan)
    os.utime(orphan.note, (1.0, 1.0))
    env = environment(data_dir=settings.data_dir, redis_url=redis_url, batch_keep_days=7)
    child = subprocess.run(
        [sys.executable, "-c", REAP], env=env, capture_output=True, text=True, timeout=100, check=True
    )
    told = json.loads(child.stdout)
    assert (told["expired"], told["merges"], told["removed"]) == (1, 1, 2)
    assert merge(ledger, settings.data_dir, overdue) is Status.EXPIRED
    assert {one["id"] for one in ledger.batches()} == {overdue, young}
    assert not orphan.root.exists()
    for words in (f"{overdue} has expired", f"{old} was removed", f"The folder of {orphan.root.name} was removed"):
        assert words in child.stderr
