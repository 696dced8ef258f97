"""Tests on a real Docker Engine. They are skipped where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.docker.project import Project, docker

BUILD = 1500.0  # seconds to compile llama.cpp on two cores, with room
LIMIT = 3 * BUILD  # of a test, with the images that it is the first to need


def _missing() -> str:
    if shutil.which("docker") is None:
        return "there is no Docker here"
    try:
        if docker("info", seconds=20, check=False).returncode:
            return "the Docker daemon does not answer"
        if docker("compose", "version", check=False).returncode:
            return "this Docker has no Compose v2"
    except subprocess.TimeoutExpired:
        return "the Docker daemon does not answer in time"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (reason := _missing()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Callable[..., Project]]:
    """Makes projects, and removes what they started."""
    made: list[Project] = []

    def make(*overrides: str, **variables: object) -> Project:
        made.append(Project(tmp_path / f"project{len(made)}", *overrides, **variables))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def llamacpp_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Our llama.cpp image, compiled once; what has not changed since comes from Docker's cache."""
    built = Project(tmp_path_factory.mktemp("image") / "project", "llamacpp")
    built.compose("build", "llm-server", seconds=BUILD)
    return "localhost/millrace-llamacpp"


@pytest.fixture(scope="session")
def worker_image(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Our image of workers, built once."""
    Project(tmp_path_factory.mktemp("image") / "project", "worker").compose("build", "worker", seconds=BUILD)


@pytest.fixture(scope="session", autouse=True)
def _left_by_killed_runs() -> None:
    """Remove what runs have left that were killed: their workers come back with the daemon, and take ports."""
    if _missing():
        return
    for listed, remove in (
        (
            ("ps", "--all", "--format", '{{.ID}} {{.Label "com.docker.compose.project"}}'),
            ("rm", "--force", "--volumes"),
        ),
        (("network", "ls", "--format", '{{.ID}} {{.Label "com.docker.compose.project"}}'), ("network", "rm")),
        (("volume", "ls", "--format", '{{.Name}} {{.Label "com.docker.compose.project"}}'), ("volume", "rm")),
    ):
        for line in docker(*listed).stdout.splitlines():
            one, _, name = line.partition(" ")
            run = re.match(r"millrace-test-(\d+)-", name)
            if run and not psutil.pid_exists(int(run[1])):
                docker(*remove, one, check=False)


@pytest.fixture(scope="session")
def vllm_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Our vLLM image, where the public one is there and needs no GPU."""
    base = "vllm/vllm-openai:v0.33.0"
    if docker("image", "inspect", base, check=False).returncode:
        pytest.skip(f"the image {base} is not here")
    version = docker(
        "run", "--rm", "--entrypoint", "python3", base, "-c", "import importlib.metadata as m; print(m.version('vllm'))"
    )
    if "cpu" not in version.stdout:
        pytest.skip("vLLM is built for GPUs here")
    built = Project(tmp_path_factory.mktemp("image") / "project", "vllm")
    built.compose("build", "llm-server", seconds=300)
    return "localhost/millrace-vllm"
