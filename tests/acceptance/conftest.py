"""A folder, a model and a running stack for the tests of the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli import MILLRACE, NOBODY, Cli, Running
from tests.services import ROOT


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of `millrace models make-tiny`, made once."""
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run(
        [MILLRACE, "models", "make-tiny", str(folder)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        timeout=60,
    )
    return next(folder.glob("*.gguf"))


@pytest.fixture(scope="session")
def new_cli(tiny: Path) -> Callable[..., Cli]:
    """Makes a command line that finds nothing of this machine: what it needs it has to start."""

    def make(folder: Path, **settings: object) -> Cli:
        basic: dict[str, object] = {
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "MODEL_PATH": tiny,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": NOBODY,
            "LLM_SERVER_URL": f"http://127.0.0.1:{NOBODY}",
            "N_PARALLEL": 4,
            "N_THREADS": 1,
            "N_CTX": 1024,
            "MAX_TOKENS": 8,
            "WORKER_CONCURRENCY": 1,
            "HEALTH_CHECK_ENABLED": "false",
            "METRICS_PORT": 0,
            "BATCH_LEASE_SECONDS": 3,
        }
        merged = {name: value for name, value in (basic | settings).items() if value is not None}
        return Cli(folder, merged)

    return make


@pytest.fixture
def cli(tmp_path: Path, new_cli: Callable[..., Cli]) -> Iterator[Cli]:
    made = new_cli(tmp_path / "home")
    yield made
    made.kill_all()


@dataclass(frozen=True)
class Up:
    """A running `millrace up`, and what its --json said."""

    cli: Cli
    running: Running
    told: dict[str, Any]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, new_cli: Callable[..., Cli]) -> Iterator[Up]:
    """One `millrace up` with everything embedded, for a whole module."""
    # Nobody dies in it: a slow disk is not to cost a lease.
    cli = new_cli(tmp_path_factory.mktemp("up") / "home", BATCH_LEASE_SECONDS=30)
    try:
        with cli.up() as (running, told):
            yield Up(cli, running, told)
        cli.gone()
    finally:
        cli.kill_all()


@pytest.fixture(scope="session")
def unprivileged() -> tuple[str, ...]:
    """Goes before a command so that files' permissions hold for it, for root too."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv to give that up")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
