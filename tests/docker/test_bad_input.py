"""What can be wrong with containers: one message, with the engine's last words, within seconds; the queue stays."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli import Done
from tests.docker.conftest import LIMIT
from tests.docker.project import Project, docker
from tests.services import environment

pytestmark = pytest.mark.timeout(LIMIT)

SOON = 30.0  # seconds; the health check alone would allow half an hour


def refused(project: Project, code: str, *, exit_code: int = 3, seconds: float = SOON) -> Done:
    """Start the containers, and return the one error that comes of it."""
    started = time.monotonic()
    done = project.cli.run("backend", "start", "--json", seconds=seconds + 30)
    assert time.monotonic() - started < seconds, done
    assert (done.code, done.error["code"]) == (exit_code, code), done
    assert done.error["hint"]
    assert project.variables["LLM_API_KEY"] not in done.out + done.err
    return done


@pytest.fixture
def queued(project: Callable[..., Project], llamacpp_image: str) -> Iterator[Callable[..., Project]]:
    """Makes projects whose Redis has a task queued, and checks at the end that it still has."""
    made: list[Project] = []

    def make(*overrides: str, **variables: object) -> Project:
        one = project(*overrides, **variables)
        one.add_models()
        one.compose("up", "--detach", "--wait", "redis")
        send = "from tasks.inference import chat; chat.delay([{'role': 'user', 'content': 'Hello'}])"
        settings = {"redis_port": one.variables["REDIS_PORT"], "redis_password": one.variables["REDIS_PASSWORD"]}
        subprocess.run(
            [sys.executable, "-c", send], cwd=one.folder, env=environment(**settings), check=True, timeout=60
        )
        made.append(one)
        return one

    yield make
    for one in made:
        one.compose("up", "--detach", "--wait", "redis")
        with one.redis() as client:
            assert client.llen("interactive\x06\x163") == 1


def test_a_wrong_value_in_dotenv(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    one.set(N_CTX="many")
    done = refused(one, "invalid_setting", exit_code=2)
    assert "N_CTX (from .env)" in done.error["message"]


def test_a_missing_model_file(queued: Callable[..., Project]) -> None:
    done = refused(queued("llamacpp", MODEL_PATH="/models/none.gguf"), "engine_failed")
    assert done.error["message"].startswith("The engine did not start. MODEL_PATH=/models/none.gguf is not there")
    assert "\x1b" not in done.error["message"]
    assert "tiny.gguf" in done.error["message"]  # what there is instead


def test_no_model_at_all(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    (one.folder / "models/gguf/tiny.gguf").unlink()
    assert "There is no .gguf file in /models" in refused(one, "engine_failed").error["message"]


def test_more_than_one_model_and_none_chosen(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    shutil.copy(one.folder / "models/gguf/tiny.gguf", one.folder / "models/gguf/other.gguf")
    assert "choose one with MODEL_PATH" in refused(one, "engine_failed").error["message"]


def test_a_gguf_that_is_none(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    (one.folder / "models/gguf/tiny.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is not a GGUF file" in refused(one, "engine_failed").error["message"]


def test_a_gguf_that_is_cut_off_ends_with_the_engines_last_words(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    path = one.folder / "models/gguf/tiny.gguf"
    path.write_bytes(path.read_bytes()[:100_000])
    assert "failed to load model" in refused(one, "engine_failed").error["message"]


def test_an_engine_that_exits_at_its_start(queued: Callable[..., Project]) -> None:
    done = refused(queued("llamacpp", LLAMACPP_ARGS="--no-such-option"), "engine_failed")
    assert "--no-such-option" in done.error["message"]


def test_too_little_memory(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp", LLM_MEMORY="12m")
    services = one.folder / "docker-compose.llamacpp.yml"  # its end is to be seen, not a next start
    services.write_text(services.read_text().replace("restart: unless-stopped", 'restart: "no"'))
    done = refused(one, "engine_failed")
    assert "ended with 137, killed" in done.error["message"]
    assert "LLM_MEMORY" in done.error["hint"]


def test_a_taken_port(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    with socket.create_server(("127.0.0.1", int(one.variables["LLM_PORT"]))):
        done = refused(one, "port_taken")
    assert one.variables["LLM_PORT"] in done.error["message"]


def test_a_gpu_that_is_not_there(queued: Callable[..., Project], vllm_image: str) -> None:
    runtimes = docker("info", "--format", "{{json .Runtimes}}").stdout
    if "nvidia" in runtimes:
        pytest.skip("this Docker has GPUs")
    one = queued("vllm", "gpu")
    assert "no NVIDIA GPU" in refused(one, "gpu_missing").error["message"]


def test_vllm_without_a_gpu(queued: Callable[..., Project]) -> None:
    # Everything of a vLLM for GPUs that is looked at before it starts: its version.
    base = "localhost/millrace-test-vllm:gpu"
    recipe = (
        "FROM python:3.11-slim\nRUN d=$(python3 -c 'import site; print(site.getsitepackages()[0])')/vllm-0.33.0.dist-info"
        " && mkdir -p $d && printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.33.0\\n' > $d/METADATA\n"
    )
    docker("build", "-t", base, "-", input=recipe)
    try:
        done = refused(queued("vllm", VLLM_IMAGE=base), "engine_failed")
        assert "vLLM 0.33.0 is built for GPUs, and this container has none" in done.error["message"]
    finally:
        docker("rmi", "-f", base)


def test_a_folder_without_safetensors(queued: Callable[..., Project], vllm_image: str) -> None:
    one = queued("vllm")
    for weights in (one.folder / "models/hf/tiny").glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    assert "has no .safetensors file" in refused(one, "engine_failed").error["message"]


def test_a_password_that_compose_cannot_read_is_not_shown(project: Callable[..., Project]) -> None:
    one = project("llamacpp")
    (one.folder / ".env").write_text((one.folder / ".env").read_text() + "REDIS_PASSWORD=s3cr${t\n")
    done = refused(one, "invalid_setting", exit_code=2)
    assert "REDIS_PASSWORD in .env has a $" in done.error["message"]
    assert "s3cr" not in done.out + done.err
    assert one.cli.run("config", "check").code == 2


def test_an_image_that_is_not_there(queued: Callable[..., Project]) -> None:
    one = queued("vllm", VLLM_IMAGE="registry.invalid/vllm:none")
    message = refused(one, "image_missing", seconds=60).error["message"]
    assert message.startswith("The image registry.invalid/vllm:none is not here")


def test_another_services_image_that_is_not_there(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    one.set(REDIS_IMAGE="registry.invalid/redis:none")
    error = refused(one, "image_missing", seconds=60).error
    one.set(REDIS_IMAGE=None)
    assert "redis" in error["message"]
    assert "take its file out of COMPOSE_FILE" in error["hint"]


def test_a_data_dir_that_is_not_there(queued: Callable[..., Project], worker_image: None) -> None:
    one = queued("llamacpp", "worker", DATA_DIR="nowhere")
    done = refused(one, "folder_missing", seconds=120)
    assert f"There is no folder {one.folder}/nowhere" in done.error["message"]
    (one.folder / "nowhere").mkdir()


def test_a_data_dir_that_workers_cannot_write(queued: Callable[..., Project], worker_image: None) -> None:
    one = queued("llamacpp", "worker", WORKER_USER="4242:4242")
    (one.folder / "millrace-data").mkdir(mode=0o700)
    done = refused(one, "container_failed", seconds=120)
    assert done.error["message"].startswith("worker ")
    assert "WORKER_USER must be able to write DATA_DIR" in done.error["message"]


def test_a_compose_file_that_is_not_there(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    (one.folder / "docker-compose.llamacpp.yml").rename(one.folder / "elsewhere.yml")
    done = refused(one, "compose_file_missing", exit_code=2)
    (one.folder / "elsewhere.yml").rename(one.folder / "docker-compose.llamacpp.yml")
    assert "docker-compose.llamacpp.yml" in done.error["message"]


def test_a_wrong_key_is_said(queued: Callable[..., Project]) -> None:
    one = queued("llamacpp")
    assert one.cli.run("backend", "start").code == 0
    one.set(LLM_API_KEY="another")  # the container keeps the one before
    done = one.cli.run("chat", "Hello", "--json")
    assert (done.code, done.error["code"]) == (3, "engine_key_refused")


def only(folder: Path, **programs: str) -> dict[str, str]:
    """Return an environment whose PATH has these programs, as shell scripts, and Python's own."""
    folder.mkdir()
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def test_no_docker(project: Callable[..., Project], tmp_path: Path) -> None:
    one = project("llamacpp")
    one.cli.environment |= only(tmp_path / "bin")
    assert "no Docker here" in refused(one, "docker_missing").error["message"]


def test_a_docker_without_compose(project: Callable[..., Project], tmp_path: Path) -> None:
    # What Docker 20.10 prints without its plugin.
    says = """printf "unknown shorthand flag: 'f' in -f\\nSee 'docker --help'.\\n" >&2; exit 125"""
    one = project("llamacpp")
    one.cli.environment |= only(tmp_path / "bin", docker=says)
    assert "no Compose v2" in refused(one, "compose_missing").error["message"]


def test_a_daemon_that_does_not_answer(project: Callable[..., Project]) -> None:
    one = project("llamacpp")
    one.cli.environment["DOCKER_HOST"] = "unix:///nowhere/docker.sock"
    assert "daemon does not answer" in refused(one, "docker_unreachable").error["message"]


def test_no_compose_file_is_chosen(project: Callable[..., Project]) -> None:
    one = project()
    one.set(COMPOSE_FILE=None)
    refused(one, "no_compose_file", exit_code=2)
    one.set(COMPOSE_FILE="docker-compose.yml")
    refused(one, "no_engine", exit_code=2)
