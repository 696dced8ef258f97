"""`millrace config init`: a .env for containers, with secrets of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from dotenv import dotenv_values

from tests.cli import NOBODY, Cli
from tests.services import ROOT, redis_server

SECRETS = ("REDIS_PASSWORD", "LLM_API_KEY", "FLOWER_BASIC_AUTH", "GRAFANA_PASSWORD")


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Cli]:
    made = Cli(tmp_path / "home", {})
    shutil.copy(ROOT / ".env.sample", made.folder)
    yield made
    made.kill_all()


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_it_chooses_the_engine_and_makes_secrets(bare: Cli, engine: str) -> None:
    done = bare.run("config", "init", engine)
    assert done.code == 0
    values = dotenv_values(bare.folder / ".env")
    assert values["COMPOSE_FILE"] == f"docker-compose.yml:docker-compose.{engine}.yml"
    assert all(len(str(values[name])) >= 16 and str(values[name]) not in done.out + done.err for name in SECRETS)
    assert len({values[name] for name in SECRETS}) == len(SECRETS)
    assert (bare.folder / ".env").stat().st_mode & 0o777 == 0o600
    shown = bare.run("config", "show", "--json").json
    assert (shown["LLM_BACKEND"]["value"], shown["COMPOSE_FILE"]["from"]) == (engine, ".env")
    assert bare.run("config", "check", "--json").json["unknown"] == []


def test_two_runs_make_two_secrets(bare: Cli) -> None:
    bare.run("config", "init")
    first = dotenv_values(bare.folder / ".env")["REDIS_PASSWORD"]
    (bare.folder / ".env").unlink()
    bare.run("config", "init")
    assert dotenv_values(bare.folder / ".env")["REDIS_PASSWORD"] != first


def test_it_changes_no_dotenv_that_is_there(bare: Cli) -> None:
    bare.write(".env", "REDIS_PORT=6390\n")
    done = bare.run("config", "init", "--json")
    assert (done.code, done.error["code"]) == (2, "exists")
    assert (bare.folder / ".env").read_text() == "REDIS_PORT=6390\n"


def test_it_says_what_it_needs(bare: Cli) -> None:
    assert bare.run("config", "init", "ollama", "--json").error["code"] == "usage"
    (bare.folder / ".env.sample").unlink()
    done = bare.run("config", "init", "--json")
    assert (done.code, done.error["code"]) == (2, "not_found")
    assert not (bare.folder / ".env").exists()


def test_a_container_that_is_not_there_is_not_replaced_by_an_embedded_one(bare: Cli) -> None:
    bare.run("config", "init")
    bare.environment |= {"REDIS_PORT": str(NOBODY), "LLM_PORT": str(NOBODY)}
    bare.write("in.txt", "Name a river.\n")
    done = bare.run("batch", "run", "in.txt", "-o", "out.jsonl", "--json")
    assert (done.code, done.error["code"]) == (3, "redis_unreachable")
    assert "docker compose up" in done.error["hint"]
    with redis_server(bare.folder / "redis") as url:
        bare.environment["REDIS_URL"] = url
        done = bare.run("batch", "run", "in.txt", "-o", "out.jsonl", "--json")
    assert (done.code, done.error["code"]) == (3, "engine_unreachable")
    assert "millrace backend start" in done.error["hint"]
