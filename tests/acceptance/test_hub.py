"""The model of a first run: fetched from a Hub that is reachable, resumed when cut, checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli import Cli
from tests.hub import Hub, hub_server

REPO, FILE = "mill/small-GGUF", "small.gguf"


@pytest.fixture
def content(tiny: Path) -> bytes:
    return tiny.read_bytes()


@pytest.fixture
def hub(content: bytes) -> Iterator[Hub]:
    with hub_server() as hub:
        hub.add(REPO, {FILE: content, "README.md": b"# Small"})
        hub.cuts[FILE] = len(content) // 2
        yield hub


@pytest.fixture
def hub_cli(hub: Hub, tmp_path: Path, new_cli: Callable[..., Cli]) -> Iterator[Cli]:
    chosen = {
        "MODEL_PATH": None,
        "LLM_SERVER_URL": None,
        "HF_ENDPOINT": hub.url,
        "DEMO_MODEL_REPO": REPO,
        "DEMO_MODEL_FILE": FILE,
        "BATCH_PROCESSES": 1,
    }
    made = new_cli(tmp_path / "home", **chosen)
    (made.folder / "prompts.txt").write_text("one\ntwo\n")
    yield made
    made.kill_all()


def test_a_first_run_fetches_the_model_and_a_second_one_has_it(hub: Hub, hub_cli: Cli, content: bytes) -> None:
    first = hub_cli.run("batch", "run", "prompts.txt", "-o", "out.jsonl", seconds=100)
    assert first.code == 0, first
    assert f"Fetching {FILE}" in first.err
    assert "noise" not in first.err
    assert (hub_cli.folder / "models" / "gguf" / FILE).read_bytes() == content
    assert [line["response"]["body"]["model"] for line in map(json.loads, _lines(hub_cli, "out.jsonl"))] == [
        "small"
    ] * 2
    assert hub.transfers == [(FILE, None), (FILE, f"bytes={len(content) // 2}-")]
    second = hub_cli.run("batch", "run", "prompts.txt", "-o", "again.jsonl", seconds=100)
    assert second.code == 0, second
    assert len(hub.transfers) == 2


def test_a_model_that_is_not_the_one_that_was_asked_for_is_refused(hub: Hub, hub_cli: Cli) -> None:
    hub_cli.environment["DEMO_MODEL_SHA256"] = "0" * 64
    done = hub_cli.run("batch", "run", "prompts.txt", "-o", "out.jsonl", "--json", seconds=100)
    assert (done.code, done.error["code"]) == (3, "checksum_mismatch")
    assert not (hub_cli.folder / "models" / "gguf" / FILE).exists()
    assert not (hub_cli.folder / "out.jsonl").exists()


def _lines(cli: Cli, name: str) -> list[str]:
    return (cli.folder / name).read_text().splitlines()
