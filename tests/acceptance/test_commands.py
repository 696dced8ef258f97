"""config, doctor, status, chat, models, engine-sim, worker and demo."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import signal
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from millrace import presence
from millrace.batch.ledger import Ledger
from millrace.settings import Settings
from tests.cli import NOBODY, Cli, batch_file, redis_answers
from tests.scripted_engine import Engine, scripted_engine
from tests.services import ROOT, OwnRedis, free_port, redis_server, until

SECRETS = ("s3cret-redis", "s3cret-key", "s3cret-hub", "s3cret-db")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine]]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis_url, scripted_engine() as engine:
        yield redis_url, engine


@pytest.fixture
def ready(cli: Cli, parts: tuple[str, Engine]) -> Cli:
    redis_url, engine = parts
    cli.environment |= {"REDIS_URL": redis_url, "LLM_SERVER_URL": engine.url}
    return cli


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file with its mode and content, but for what SQLite keeps while it reads."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
        if path.suffix not in (".db-shm", ".db-wal")
    }


# config


def test_config_check(cli: Cli) -> None:
    cli.write(".env", "N_PARALEL=3\nXYZZY=1\nCOMPOSE_PROJECT_NAME=x\nTOP_P=0.5\n")
    done = cli.run("config", "check")
    assert done.code == 0
    assert "N_PARALEL in .env is no setting; did you mean N_PARALLEL?" in done.out
    assert "XYZZY in .env is no setting." in done.out
    assert "COMPOSE" not in done.out
    told = cli.run("config", "check", "--json").json
    assert told["ok"] is True
    assert told["unknown"] == ["N_PARALEL", "XYZZY"]
    assert "top_p" in [name.lower() for name in told["set"]]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("N_PARALLEL", "many", ("N_PARALLEL (from .env)", "integer", "'many'")),
        ("REDIS_PORT", "70000", ("REDIS_PORT (from .env)", "65535")),
        ("LLM_BACKEND", "ollama", ("LLM_BACKEND (from .env)", "llamacpp", "vllm")),
        ("LLM_SERVER_URL", "localhost:8000", ("LLM_SERVER_URL (from .env)", "http://")),
        ("REDIS_URL", "s3cret-redis@host", ("REDIS_URL (from .env)", "redis://")),
        ("TASK_TIME_LIMIT", "10", ("TASK_TIME_LIMIT (10 s)", "TASK_SOFT_TIME_LIMIT (180 s)")),
    ],
)
def test_a_wrong_setting(cli: Cli, name: str, value: str, words: tuple[str, ...]) -> None:
    cli.environment.pop(name, None)
    cli.write(".env", f"{name}={value}\n")
    done = cli.run("config", "check")
    assert done.code == 2
    assert all(word in done.err for word in words), done
    assert "s3cret" not in done.err
    assert ".env.sample" in done.err


def test_all_wrong_settings_at_once_wherever_settings_are_read(cli: Cli) -> None:
    cli.write(".env", "N_CTX=1\nTOP_P=7\n")
    del cli.environment["N_CTX"]
    for command in (["config", "show"], ["batch", "list"], ["doctor"], ["status"]):
        done = cli.run(*command, "--json")
        assert done.code == 2
        assert done.error["code"] == "invalid_setting"
        assert "N_CTX" in done.error["message"]
        assert "TOP_P" in done.error["message"]
    assert not cli.data.exists()


def test_config_show_masks_secrets(cli: Cli) -> None:
    secret_file = cli.write("hub-token", "s3cret-hub\n")
    cli.write(
        ".env",
        "REDIS_URL=redis://:s3cret-redis@127.0.0.1:1/0\nLLM_API_KEY=s3cret-key\nTOP_K=7\n"
        f"HF_TOKEN_FILE={secret_file}\nDATABASE_URL=postgresql+psycopg://u:s3cret-db@127.0.0.1:1/x\n",
    )
    shown = cli.run("config", "show")
    told = cli.run("config", "show", "--json")
    for done in (shown, told):
        assert done.code == 0
        assert not [secret for secret in SECRETS if secret in done.out + done.err]
    assert told.json["TOP_K"] == {"value": 7, "from": ".env"}
    assert told.json["N_PARALLEL"] == {"value": 4, "from": "environment"}
    assert told.json["TEMPERATURE"] == {"value": 0.7, "from": "default"}
    assert told.json["HF_TOKEN"] == {"value": "********", "from": "*_FILE"}
    assert told.json["REDIS_URL"]["value"] == "redis://:***@127.0.0.1:1/0"
    row = next(line for line in shown.out.splitlines() if line.startswith("TOP_K"))
    assert row.split() == ["TOP_K", "7", ".env"]
    revealed = cli.run("config", "show", "--reveal").out
    assert all(secret in revealed for secret in SECRETS)
    for command in (["doctor"], ["status"], ["batch", "submit", "hub-token", "--format", "text"]):
        done = cli.run(*command)
        assert not [secret for secret in SECRETS if secret in done.out + done.err], done


# doctor


def checks(cli: Cli, code: int) -> dict[str, Any]:
    """Run the doctor, who must change nothing, and return what he found."""
    before = tree(cli.folder)
    done = cli.run("doctor", "--json")
    assert tree(cli.folder) == before
    assert done.code == code, done
    assert done.json["ok"] is (code == 0)
    return {check["check"]: check for check in done.json["checks"]}


def test_doctor_on_a_bare_machine(cli: Cli) -> None:
    found = checks(cli, 0)
    verdicts = {name: check["verdict"] for name, check in found.items()}
    assert verdicts == {
        "settings": "ok",
        "redis": "note",
        "ledger": "ok",
        "engine": "note",
        "model": "ok",
        "docker": "ok",
        "disk": "ok",
        "memory": "ok",
    }
    assert "millrace up" in found["redis"]["mend"]
    people = cli.run("doctor")
    assert people.code == 0
    assert [line.split()[1] for line in people.out.splitlines() if not line.strip().startswith("→")] == list(verdicts)


def test_doctor_where_all_is_well(ready: Cli) -> None:
    assert ready.run("batch", "list").code == 0
    found = checks(ready, 0)
    assert {check["verdict"] for check in found.values()} == {"ok"}
    assert "serving scripted" in found["engine"]["what"]


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        ({"REDIS_URL": "redis://:wrong@{redis}"}, "redis", "refuses the password"),
        ({"REDIS_URL": "redis://no-such-host.invalid/0"}, "redis", "does not answer"),
        ({"LLM_BACKEND": "vllm", "LLM_SERVER_URL": f"http://127.0.0.1:{NOBODY}"}, "engine", "does not answer"),
        ({"LLM_SERVER_URL": "http://no-such-host.invalid:8000"}, "engine", "does not answer"),
        ({"LLM_MODEL": "gpt-9"}, "engine", "gpt-9"),
        ({"MODEL_PATH": "nowhere.gguf"}, "model", "nowhere.gguf"),
        ({"MODEL_PATH": "/etc/hostname"}, "model", "not a GGUF"),
    ],
    ids=["password", "redis-host", "vllm", "engine-host", "model-name", "no-model", "no-gguf"],
)
def test_doctor_finds(ready: Cli, parts: tuple[str, Engine], settings: dict[str, str], check: str, words: str) -> None:
    redis = parts[0].rpartition("@")[2]
    ready.environment |= {name: value.format(redis=redis) for name, value in settings.items()}
    found = checks(ready, 3)
    assert found[check]["verdict"] == "wrong", found
    assert words in found[check]["what"]
    assert found[check]["mend"]
    assert [name for name, other in found.items() if other["verdict"] == "wrong"] == [check]


def test_doctor_finds_a_newer_ledger(ready: Cli) -> None:
    Ledger.open(Settings(data_dir=ready.data)).close()
    with contextlib.closing(sqlite3.connect(ready.data / "ledger.db", isolation_level=None)) as ledger:
        ledger.execute("UPDATE alembic_version SET version_num = '9999'")
    found = checks(ready, 3)
    assert found["ledger"]["verdict"] == "wrong"
    assert "9999" in found["ledger"]["what"]


def test_doctor_finds_a_redis_that_throws_work_away(cli: Cli, tmp_path: Path) -> None:
    redis = OwnRedis(tmp_path / "redis", free_port())
    redis.start()
    try:
        cli.environment["REDIS_URL"] = redis.url
        until(lambda: redis_answers(redis.url), "Redis")
        assert checks(cli, 0)["redis"]["verdict"] == "ok"
        with contextlib.closing(Redis.from_url(redis.url)) as connection:
            connection.config_set("maxmemory-policy", "allkeys-lru")
        assert "allkeys-lru" in checks(cli, 3)["redis"]["what"]
    finally:
        redis.kill()


# status, chat


def test_status_and_chat_with_nothing_there(cli: Cli) -> None:
    done = cli.run("status")
    assert done.code == 3
    assert "none; start one with `millrace worker` or `millrace up`" in done.out
    told = cli.run("status", "--json")
    assert told.code == 3
    assert told.json["redis"]["ok"] is False
    assert told.json["engine"]["ok"] is False
    assert told.json["ledger"]["ok"] is True
    cli.environment["TASK_MAX_RETRIES"] = "0"
    chat = cli.run("chat", "Hello")
    assert chat.code == 3
    assert "[engine_unreachable]" in chat.err


def test_status(ready: Cli) -> None:
    assert ready.run("batch", "submit", ready.write("q.jsonl", batch_file(3))).code == 0
    told = ready.run("status", "--json")
    assert told.code == 0
    assert told.json["engine"]["models"] == ["scripted"]
    assert told.json["workers"] == []
    assert [batch["request_counts"]["total"] for batch in told.json["batches"]] == [3]
    assert "in_progress, 0/3 rows" in ready.run("status").out


def test_chat(ready: Cli, parts: tuple[str, Engine]) -> None:
    done = ready.run("chat", "What is a river?", "--system", "Be brief.", "--max-tokens", "5")
    assert done.code == 0
    assert len(done.out.split()) == 5
    told = ready.run("chat", "-", "--json", stdin="What is a lake?")
    assert told.json["choices"][0]["message"]["content"]


def test_chat_without_the_right_key(cli: Cli) -> None:
    with scripted_engine(api_key="sesame") as engine:
        cli.environment |= {"LLM_SERVER_URL": engine.url, "LLM_API_KEY": "s3cret-key"}
        done = cli.run("chat", "Hello")
        assert done.code in (2, 3)
        assert "LLM_API_KEY" in done.err
        assert "s3cret-key" not in done.err
        cli.environment["LLM_API_KEY"] = "sesame"
        assert cli.run("chat", "Hello").code == 0


# models, engine-sim


def test_models(cli: Cli) -> None:
    assert "There are no models in models/gguf and models/hf." in cli.run("models", "list").out
    assert cli.run("models", "list", "--json").json == {"files": []}
    made = cli.run("models", "make-tiny", "made", "--json").json
    assert (cli.folder / made["gguf"]).read_bytes()[:4] == b"GGUF"
    (cli.folder / "models" / "gguf").mkdir(parents=True)
    shutil.move(cli.folder / made["gguf"], cli.folder / "models" / "gguf" / "my.gguf")
    (listed,) = cli.run("models", "list", "--json").json["files"]
    assert listed["name"].startswith("my")
    assert "my.gguf" in cli.run("models", "list").out


def test_engine_sim(cli: Cli) -> None:
    log = cli.folder / "requests.jsonl"
    with cli.start("engine-sim", "--slots", "2", "--dialect", "vllm", "--log", log) as running:
        running.until(lambda: running.out.endswith("\n"), "its address")
        url = json.loads(running.out)["url"]
        cli.environment |= {"LLM_SERVER_URL": url, "LLM_BACKEND": "vllm"}
        assert cli.run("chat", "Hello").code == 0
        assert cli.run("doctor", "--json").json["checks"][3]["what"].startswith("vllm ")
        running.send(signal.SIGTERM)
        done = running.wait(15)
    assert done.code == 0, done
    assert '"status":200' in log.read_text()
    cli.gone()


def test_engine_sim_with_a_wrong_script(cli: Cli) -> None:
    done = cli.run("engine-sim", "--script", cli.write("script.json", '{"slotz": 3}'))
    assert done.code == 2
    assert "slotz" in done.err


# worker


def health(port: int, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except urllib.error.URLError:
        return 0, None


def test_worker(ready: Cli, tmp_path: Path) -> None:
    port = free_port()
    redis = OwnRedis(tmp_path / "redis", free_port())
    redis.start()
    ready.environment |= {"HEALTH_CHECK_ENABLED": "true", "HEALTH_CHECK_PORT": str(port), "REDIS_URL": redis.url}
    try:
        with scripted_engine() as engine:
            ready.environment["LLM_SERVER_URL"] = engine.url
            until(lambda: redis_answers(redis.url), "Redis")
            with ready.start("worker") as running:
                running.until(lambda: health(port, "health/ready")[0] == 200, "a worker that is ready")
                assert health(port, "health")[1] == {
                    "status": "ready",
                    "workers": "3/3",
                    "redis": "connected",
                    "llm": "connected",
                }
                until(lambda: len(presence.alive(Settings(redis_url=redis.url))) == 3, "three processes in Redis")
                assert len(ready.run("status", "--json").json["workers"]) == 3
                done = ready.run("batch", "run", ready.write("q.jsonl", batch_file(10)), "-o", "a.jsonl")
                assert done.code == 0, done
                engine.kill()
                code, told = health(port, "health")
                assert (code, told["status"], told["llm"]) == (503, "not_ready", "unreachable")
                assert engine.root in told["reason"]
                redis.kill()
                assert health(port, "health")[1]["redis"] == "unreachable"
                assert health(port, "health/live") == (200, {"status": "alive"})
                redis.start()
                until(lambda: health(port, "health")[1]["redis"] == "connected", "Redis again")
                running.send(signal.SIGTERM)
                ended = running.wait()
        assert ended.code == 0
        assert "Draining" in ended.err
        ready.gone()
    finally:
        redis.kill()


# demo


def test_demo(cli: Cli) -> None:
    del cli.environment["MODEL_PATH"]
    shutil.copytree(ROOT / "examples", cli.folder / "examples")
    done = cli.run("demo", seconds=100)
    assert done.code == 0, done
    assert "noise" not in done.err
    found = re.findall(r"(?m)^(held-out|hand-written) +\d+ +(\d+) +[\d.]+% +(\d+) ", done.err)
    right = {source: (int(all_right), int(two)) for source, all_right, two in found}
    # The card's figures, less what another processor's rounding may turn.
    assert right["held-out"][0] >= 0.94 * 150
    assert right["hand-written"][1] >= 0.7 * 50
    assert "category and urgency right" in done.err
    assert "200 rows in, 200 answers out, 0 failed; verified: every row has exactly one line, in order." in done.err
    asked = [row["custom_id"] for row in cli.rows("examples/support-tickets.jsonl")]
    assert [row["custom_id"] for row in cli.rows("output.jsonl")] == asked
    assert len(asked) == 200
    cli.gone()
