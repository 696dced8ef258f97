"""The doctor on a real Docker Engine: containers that are not well, ports, sockets, and a stack that he leaves alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli import NOBODY
from tests.docker.project import Project, docker
from tests.doctor import checks_with, examine, found
from tests.scripted_engine import scripted_engine
from tests.services import free_port, until

IMAGE = "redis:7-alpine"

Projects = Callable[..., Project]


def with_services(project: Projects, *overrides: str, **services: dict[str, Any]) -> Project:
    """Return a project of services of our own, in files with the names that ours have."""
    made = project("llamacpp", *overrides)
    (made.folder / "docker-compose.yml").write_text("services: {}\n")
    # JSON is YAML.
    (made.folder / "docker-compose.llamacpp.yml").write_text(json.dumps({"services": services}))
    return made


# The compose files of the repository


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_our_compose_files(project: Projects, engine: str) -> None:
    made = project(engine, "worker")
    findings = examine(made.cli, 3)
    assert found(findings, "compose", "ok")["what"].endswith(made.variables["COMPOSE_FILE"])
    assert "llm-server, redis, worker are not started" in found(findings, "containers", "note")["what"]
    assert found(findings, "containers", "note")["mend"] == "docker compose up -d"
    assert f"{made.variables['REDIS_PORT']} is free" in found(findings, "ports", "ok")["what"]
    assert {"redis", "engine", "model"} <= set(checks_with(findings, "wrong"))


def test_password_that_is_missing(project: Projects) -> None:
    finding = found(examine(project("llamacpp", REDIS_PASSWORD="").cli, 3), "compose")
    assert finding["what"] == "REDIS_PASSWORD is not set, and the containers need it"
    assert ".env" in finding["mend"]


def test_compose_file_that_is_missing(project: Projects) -> None:
    findings = examine(project("llamacpp", "nowhere").cli, 3)
    assert "docker-compose.nowhere.yml, and there is no such file" in found(findings, "compose")["what"]


def test_compose_file_that_is_not_valid(project: Projects) -> None:
    made = with_services(project, **{"llm-server": {"imagge": IMAGE}})
    assert "imagge" in found(examine(made.cli, 3), "compose")["what"]


# The daemon


def test_daemon_that_is_not_there(project: Projects) -> None:
    cli = project("llamacpp").cli
    cli.environment["DOCKER_HOST"] = f"unix://{cli.folder}/nobody.sock"
    finding = found(examine(cli, 3), "docker")
    assert "nobody.sock" in finding["what"]
    assert "systemctl start docker" in finding["mend"]


@contextlib.contextmanager
def daemon_socket() -> Iterator[Path]:
    """A socket at which nobody says anything, as a daemon that hangs."""
    path = Path(f"/tmp/millrace-{uuid.uuid4().hex[:12]}.sock")  # a short path: the kernel asks for one
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(64)
        try:
            yield path
        finally:
            path.unlink()


def test_daemon_that_hangs(project: Projects) -> None:
    cli = project("llamacpp").cli
    with daemon_socket() as path:
        cli.environment["DOCKER_HOST"] = f"unix://{path}"
        assert "no answer within" in found(examine(cli, 3), "docker")["what"]


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may use every socket")
def test_daemon_that_is_not_ours(project: Projects) -> None:
    cli = project("llamacpp").cli
    unprivileged = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    with daemon_socket() as path:
        path.chmod(0)
        cli.environment["DOCKER_HOST"] = f"unix://{path}"
        finding = found(examine(cli, 3, unprivileged), "docker")
        assert "not yours to use" in finding["what"]
        assert "sudo usermod -aG docker $USER" in finding["mend"]


# Containers


def says(line: str, code: int = 1, **more: Any) -> dict[str, Any]:
    """A service that says its last words and ends."""
    command = f'echo "$$SAID" >&2; exit {code}'
    return {"image": IMAGE, "environment": {"SAID": line}, "entrypoint": ["sh", "-c", command]} | more


def runs(**more: Any) -> dict[str, Any]:
    # stop_signal: a shell as first process does not hear SIGTERM.
    return {"image": IMAGE, "entrypoint": ["sleep", "600"], "stop_signal": "SIGKILL"} | more


def probe(command: str) -> dict[str, Any]:
    return {"test": ["CMD-SHELL", command], "interval": "1s", "timeout": "5s", "retries": 1, "start_period": "0s"}


FREE = "ValueError: Free memory on device cuda:0 (1.2/8.0 GiB) on startup is less than desired GPU memory utilization"
LONG = "ValueError: To serve at least one request with the model's max seq len (8192), (4.0 GiB KV cache is needed"

#: Services that are not well; what the doctor says of each, and what is in the cure.
AILING: dict[str, tuple[dict[str, Any], str, str]] = {
    "model": (says("millrace: MODEL_PATH=/models/x.gguf is not there.", 2, restart="always"), "is not there", "up -d"),
    "busy": (says(FREE), "Free memory on device cuda:0", "GPU_MEMORY_UTILIZATION=0.7"),
    "long": (says(LONG), "max seq len (8192)", "MAX_MODEL_LEN"),
    "full": (says("torch.OutOfMemoryError: CUDA out of memory. Tried to"), "CUDA out of memory", "(0.7)"),
    "alien": (says("", 132), "Illegal instruction", "docker compose build"),
    "arch": (says("error loading model: unknown model architecture: qwen9"), "qwen9", "newer llama.cpp"),
    "lone": (says("Failed to infer device type"), "Failed to infer device type", "docker-compose.gpu.yml"),
    "aof": (says("# Bad file format reading the append only file a"), "Bad file format", "redis-check-aof --fix"),
    "odd": (says("something that nobody knows", 7), "exit code 7): something that nobody knows", "logs odd"),
    "secret": (
        {
            "image": IMAGE,
            "environment": {"PASSWORD": "${REDIS_PASSWORD}"},
            "entrypoint": ["sh", "-c", 'echo "my password is $$PASSWORD"; exit 1'],
        },
        "my password is ***",
        "logs secret",
    ),
    "greedy": (
        {"image": IMAGE, "entrypoint": ["tail", "/dev/zero"], "mem_limit": "16m"},
        "(exit code 137)",  # Docker may miss why it was killed
        "quantization",
    ),
    "shot": (runs(mem_limit="16m"), "was killed (exit code 137); its memory is limited to 16.0 MiB", "quantization"),
    "hit": (runs(), "was killed (exit code 137)", "if nobody killed it, `dmesg`"),
    "sick": (runs(healthcheck=probe("echo nobody home; false")), "is unhealthy: nobody home", "logs sick"),
    "held": (runs(), "held is paused", "docker compose unpause held"),
    "alone": (runs(), "is in no network", "--force-recreate alone"),
}


def test_containers_that_are_not_well(project: Projects) -> None:
    services = {name: service for name, (service, _, _) in AILING.items()}
    services["well"] = runs(healthcheck=probe("true"))
    services["late"] = runs(healthcheck=probe("false") | {"start_period": "10m", "interval": "10m"})
    services["ended"] = says("goodbye", 0)
    made = with_services(project, **services)
    made.compose("up", "--detach")
    made.compose("pause", "held")
    made.compose("kill", "shot", "hit")
    docker("network", "disconnect", f"{made.name}_default", made.container("alone")["Id"])

    def state(service: str) -> dict[str, Any]:
        return dict(made.container(service)["State"])

    ended = ("shot", "hit", "busy", "long", "arch", "lone", "aof", "odd", "full", "alien", "secret", "greedy", "ended")
    until(lambda: all(state(name)["Status"] == "exited" for name in ended), "the end of some")
    until(lambda: state("sick")["Health"]["Status"] == "unhealthy", "a sick one")
    until(lambda: state("well")["Health"]["Status"] == "healthy", "a well one")
    until(lambda: made.container("model")["RestartCount"] >= 2, "one that ends again and again")

    noticed = state("greedy")["OOMKilled"]
    findings = examine(made.cli, 3)
    mine = [finding for finding in findings if finding["check"] == "containers"]
    wrong = {finding["what"].split()[0]: finding for finding in mine if finding["verdict"] == "wrong"}
    assert wrong.keys() == AILING.keys(), findings
    for name, (_, what, mend) in AILING.items():
        assert what in wrong[name]["what"], wrong[name]
        assert mend in wrong[name]["mend"], wrong[name]
    by_limit = "ended by its memory limit" in wrong["greedy"]["what"]
    assert noticed <= by_limit <= state("greedy")["OOMKilled"]  # it may come to know of it meanwhile
    assert made.variables["REDIS_PASSWORD"] not in str(findings)
    assert "well healthy" in found(findings, "containers", "ok")["what"]
    notes = [finding["what"] for finding in mine if finding["verdict"] == "note"]
    assert any("late is starting" in what for what in notes)
    assert any("ended is stopped" in what for what in notes)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is an NVIDIA GPU here")
def test_container_that_asks_for_a_gpu(project: Projects) -> None:
    made = with_services(project, "gpu", **{"llm-server": runs()})
    made.compose("up", "--detach", "--no-build", check=False)
    findings = examine(made.cli, 3)
    assert "could not select device driver" in found(findings, "containers")["what"]
    assert "NVIDIA Container Toolkit" in found(findings, "containers")["mend"]
    assert "no NVIDIA driver here" in found(findings, "gpu")["what"]


def test_engine_that_has_not_heard_of_new_settings(project: Projects) -> None:
    made = with_services(project, **{"llm-server": runs()})
    made.compose("up", "--detach")
    made.set(N_PARALLEL=4, N_CTX=2048)
    key, port = made.variables["LLM_API_KEY"], int(made.variables["LLM_PORT"])
    with scripted_engine(port=port, models=["tiny"], api_key=key, slots=4, context=8192):
        finding = found(examine(made.cli, 3), "engine", "note")
        assert finding["what"] == "N_CTX is 2048, and it has 8192"
        assert finding["mend"].startswith("docker compose up -d llm-server")


def test_engine_whose_container_is_not_ready(project: Projects) -> None:
    made = with_services(project, **{"llm-server": runs()})
    made.compose("up", "--detach")
    finding = found(examine(made.cli, 3), "engine", "note")
    assert "does not answer yet" in finding["what"]
    assert "logs -f llm-server" in finding["mend"]


# Ports


def test_port_of_another_container(project: Projects) -> None:
    port = free_port()
    other = with_services(project, web=runs(ports=[f"127.0.0.1:{port}:80"]))
    other.compose("up", "--detach")
    finding = found(examine(project("llamacpp", LLM_PORT=port).cli, 3), "ports")
    assert f"{port} (LLM_PORT) is taken by the container {other.name}-web-1" in finding["what"]
    assert "set LLM_PORT=" in finding["mend"]


def test_port_of_another_process(project: Projects) -> None:
    made = project("llamacpp")
    port = int(made.variables["REDIS_PORT"])
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: _listens(port), "a web server")
            findings = examine(made.cli, 3)
            assert f"(pid {process.pid})" in found(findings, "ports")["what"]
            assert "(REDIS_PORT)" in found(findings, "ports")["what"]
            assert "redis" in checks_with(findings, "wrong")
        finally:
            process.kill()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_volume_that_is_not_there(project: Projects) -> None:
    made = project("llamacpp", MODELS_SOURCE="models")
    assert f"there is no volume {made.name}_models" in found(examine(made.cli, 3), "model")["what"]
    docker("volume", "create", "--label", f"com.docker.compose.project={made.name}", f"{made.name}_models")
    assert "is not looked at" in found(examine(made.cli, 3), "model", "ok")["what"]


# A stack that runs


def test_live_stack_is_left_alone(project: Projects) -> None:  # K15
    made = project(LLM_SERVER_URL=f"http://127.0.0.1:{NOBODY}", LLM_MODEL="")
    made.compose("up", "--detach")
    until(lambda: made.container("redis")["State"]["Health"]["Status"] == "healthy", "Redis")

    with contextlib.closing(made.redis()) as client:
        client.set("a", "1")
        client.rpush("interactive", "a task")

        def everything() -> dict[str, Any]:
            container = made.container("redis")
            label = f"label=com.docker.compose.project={made.name}"
            return {
                "container": [container[key] for key in ("Id", "RestartCount", "Config")],
                "process": [container["State"][key] for key in ("StartedAt", "Pid", "Status")],
                "others": [docker(kind, "ls", "-q", "--filter", label).stdout for kind in ("network", "volume")],
                "configuration": client.config_get("*"),
                "keys": (sorted(client.keys()), client.get("a"), client.lrange("interactive", 0, -1)),
                "folder": sorted(str(path) for path in made.folder.rglob("*")),
            }

        before = everything()
        findings = examine(made.cli, 0)
        assert everything() == before
        assert "PONG" in found(findings, "redis", "ok")["what"]
        assert found(findings, "containers", "ok")["what"] == "redis healthy"
        assert f"{made.variables['REDIS_PORT']} is ours" in found(findings, "ports", "ok")["what"]
        people = made.cli.run("doctor")
        assert people.code == 0
        assert made.variables["REDIS_PASSWORD"] not in people.out + people.err
        assert everything() == before

        right = made.variables["REDIS_PASSWORD"]
        made.set(REDIS_PASSWORD="another")  # and the container has not heard of it
        assert "refuses the password" in found(examine(made.cli, 3), "redis")["what"]
        made.set(REDIS_PASSWORD=right)
        assert everything() == before

    made.compose("stop", "redis")
    findings = examine(made.cli, 3)
    assert "redis is stopped" in found(findings, "containers", "note")["what"]
    assert found(findings, "redis")["mend"] == "docker compose up -d redis"
