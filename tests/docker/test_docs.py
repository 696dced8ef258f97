"""Every command of docs/docker.md, in the order in which they stand there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docker.conftest import BUILD, LIMIT
from tests.docker.project import Project, docker
from tests.services import ROOT, free_port

pytestmark = pytest.mark.timeout(LIMIT)


def commands() -> list[str]:
    text = (ROOT / "docs/docker.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.M | re.S)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_every_command_of_the_page_runs(
    project: Callable[..., Project], llamacpp_image: str, vllm_image: str
) -> None:  # K11
    one = project()
    (one.folder / ".env").unlink()
    # What a clone has: the page's model comes to stand beside the demo's.
    (one.folder / "models/gguf").mkdir(parents=True)
    shutil.copy(ROOT / "models/gguf/millrace-demo.gguf", one.folder / "models/gguf")
    one.cli.write("prompts.txt", "Name a river.\nName a lake.\n")
    environment = one.cli.environment | {
        "PATH": f"{Path(sys.executable).parent}:{one.cli.environment['PATH']}",
        "COMPOSE_PROJECT_NAME": one.name,
        "REDIS_PORT": one.variables["REDIS_PORT"],
        "LLM_PORT": one.variables["LLM_PORT"],
        "HEALTH_CHECK_PORT": one.variables["HEALTH_CHECK_PORT"],
        "METRICS_PORT": "0",
        "VLLM_ARGS": "--enforce-eager --dtype bfloat16",
        "LLM_MODEL": "tiny",
        "N_THREADS": "1",
        "DOCKER_BUILDKIT": "1",  # whose cache knows what was compiled
    }
    found = commands()
    assert len(found) > 15
    for command in found:
        # Names and ports of this machine may be taken; the rest is as it is printed.
        own = re.sub(r"127\.0\.0\.1:800\d:", lambda _: f"127.0.0.1:{free_port()}:", command)
        own = re.sub(r"--name (\w+)", rf"--name {one.name}-\1 --label com.docker.compose.project={one.name}", own)
        done = subprocess.run(
            ["sh", "-c", own],
            cwd=one.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=BUILD,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        for path in one.folder.glob("models/**/*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if command.startswith("docker run -d"):
            name = re.search(r"--name (\S+)", own)
            assert name is not None
            _healthy(name[1])
            docker("rm", "-f", name[1])


def _healthy(name: str) -> None:
    from tests.services import until

    def health() -> str:
        return docker("inspect", "-f", "{{.State.Status}} {{.State.Health.Status}}", name).stdout.strip()

    until(lambda: health() != "running starting", f"{name} that is up", 900)
    assert health() == "running healthy", docker("logs", name, check=False).stderr
