"""`millrace selftest`, as a user meets it."""

from __future__ import annotations

import signal

from tests.cli import Cli
from tests.faults.harness import until


def test_says_that_all_is_well_and_leaves_nothing(tmp_path):
    temp = tmp_path / "temp"
    temp.mkdir()
    # Settings of the user's, and a .env, of which it must take no notice.
    cli = Cli(tmp_path / "home", {"TMPDIR": temp, "REDIS_URL": "redis://127.0.0.1:1/0", "BATCH_PROCESSES": 3})
    cli.write(".env", "LLM_SERVER_URL=http://127.0.0.1:1\nDATABASE_URL=postgresql+psycopg://nobody@127.0.0.1:1/x\n")
    done = cli.run("selftest", "--kills", "3", "--seed", "5", "--rows", "300", "--json", seconds=300)
    assert done.code == 0, done
    said = done.json
    assert said["ok"] and said["status"] == "completed"
    assert (said["rows"], said["kills"], said["seed"]) == (300, 3, 5)
    verdict = said["verdict"]
    assert (verdict["answered"], verdict["lost"], verdict["doubled"]) == (300, 0, 0)
    assert verdict["run_again"] <= verdict["in_flight"]
    assert done.err.count("kill ") == 3
    Cli(temp, {}).gone()
    assert list(temp.iterdir()) == []
    assert not cli.data.exists()


def test_ctrl_c_ends_it_with_all_its_parts(tmp_path):
    temp = tmp_path / "temp"
    cli = Cli(tmp_path / "home", {"TMPDIR": temp})
    temp.mkdir()
    with cli.start("selftest", "--kills", "0", "--rows", "100000") as running:
        running.until(lambda: "rows are running" in running.err, "a batch that runs", 90)
        assert Cli(temp, {}).processes()
        running.send(signal.SIGINT)
        done = running.wait()
    assert done.code == 130, done
    until(lambda: not Cli(temp, {}).processes(), "no process of its own")
    assert list(temp.iterdir()) == []


def test_keeps_its_folder_where_asked(tmp_path):
    cli = Cli(tmp_path / "home", {"TMPDIR": tmp_path})
    done = cli.run("selftest", "--kills", "0", "--rows", "20", "--keep")
    assert done.code == 0, done
    assert "passed" in done.out and "20: 20 answered, 0 failed" in done.out
    (folder,) = tmp_path.glob("millrace-selftest-*")
    assert len((folder / "input.jsonl").read_text().splitlines()) == 20


def test_says_what_it_cannot_do(tmp_path):
    cli = Cli(tmp_path, {})
    assert cli.run("selftest", "--rows", "3").code == 2
    assert cli.run("selftest", "--kills", "-1").code == 2
