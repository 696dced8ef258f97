"""The doctor on Docker and GPUs that cannot be had here, or not in that state.

A `docker` or `nvidia-smi` of our own comes first on the PATH and prints what the real ones print: Docker Engine
20.10 and Compose 2.26 as recorded, nvidia-smi's header as its users' bug reports have it. What a real Docker Engine
can be brought to is in tests/docker/test_doctor.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.cli.doctor.sockets import listeners
from tests.cli import Cli
from tests.doctor import checks_with, examine, found
from tests.services import free_port, until

#: `docker info` of a real Docker Engine 20.10, with what the checks read.
INFO: dict[str, Any] = {
    "ServerVersion": "20.10.24+dfsg1",
    "OperatingSystem": "Debian GNU/Linux 12 (bookworm)",
    "Runtimes": {"io.containerd.runc.v2": {"path": "runc"}, "runc": {"path": "runc"}},
    "DockerRootDir": "/nowhere",
}
NVIDIA = INFO | {"Runtimes": INFO["Runtimes"] | {"nvidia": {"path": "nvidia-container-runtime"}}}

SMI = """\
Thu May 22 04:11:56 2025
+---------------------------------------------------------------------------------------+
| NVIDIA-SMI 535.247.01             Driver Version: 535.247.01   CUDA Version: 12.2     |
|-----------------------------------------+----------------------+----------------------+
"""
#: From driver 610 on the words differ.
NEW_SMI = """\
Sun Jun  7 08:16:57 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: 13.3     |
+-----------------------------------------+------------------------+----------------------+
"""
GPU = "0, GPU-2c1d0c3e-0001, NVIDIA GeForce RTX 3070, 8192, 8000\n"
BUSY_GPU = "0, GPU-2c1d0c3e-0001, NVIDIA GeForce RTX 3070, 8192, 2048\n"

Fake = Callable[..., None]


@pytest.fixture
def fake(cli: Cli, tmp_path: Path) -> Fake:
    """Makes a program that comes first on the PATH: the first word of `answers` that its arguments begin with
    decides what it prints, and with `!` before it, it says that on stderr and ends with 1."""
    folder = tmp_path / "bin"
    folder.mkdir()
    cli.environment["PATH"] = f"{folder}:{cli.environment['PATH']}"

    def make(program: str, **answers: str) -> None:
        script = ["#!/bin/sh", 'case "$*" in']
        for number, (begin, text) in enumerate(answers.items()):
            file = folder / f"{program}.{number}"
            file.write_text(text.removeprefix("!"))
            end = ">&2; exit 1" if text.startswith("!") else ""
            script.append(f'"{begin.replace("_", " ").strip()}"*) cat {file} {end};;')
        path = folder / program
        path.write_text("\n".join([*script, "esac", ""]))
        path.chmod(0o755)

    return make


def compose(cli: Cli, *names: str, **engine: Any) -> str:
    """Choose compose files, write them, and return what `docker compose config` says of them."""
    for name in names:
        cli.write(name, "services: {}\n")
    cli.environment["COMPOSE_FILE"] = ":".join(names)
    return json.dumps({"name": "project", "services": {"llm-server": {"image": "localhost/engine"} | engine}})


def fake_docker(fake: Fake, config: str, info: dict[str, Any] = INFO, **answers: str) -> None:
    said = {"image_inspect": "!Error: No such image", "info": json.dumps(info), "compose_version": "2.26.1-4"}
    fake("docker", **said | {"compose_config": config, "ps": ""} | answers)


LLAMA = ("docker-compose.yml", "docker-compose.llamacpp.yml")
LLAMA_GPU = (*LLAMA, "docker-compose.gpu.yml")
VLLM = ("docker-compose.yml", "docker-compose.vllm.yml")
VLLM_GPU = (*VLLM, "docker-compose.gpu.yml")


def test_no_docker_where_none_is_asked_for(cli: Cli, fake: Fake) -> None:
    fake("docker", **{"": "!he was asked all the same"})
    assert "not used" in found(examine(cli, 0), "docker", "ok")["what"]


def without_docker(cli: Cli, tmp_path: Path) -> None:
    """Give a PATH on which there is no docker, and all else."""
    folder = tmp_path / "path"
    folder.mkdir()
    for place in reversed(cli.environment["PATH"].split(":")):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            link = folder / program.name
            link.unlink(missing_ok=True)
            if program.name != "docker":
                link.symlink_to(program)
    cli.environment["PATH"] = str(folder)


@contextlib.contextmanager
def docker_proxy() -> Iterator[int]:
    """Run what listens for a container, and yield its port."""
    port = free_port()
    # Its name is that of the first word; the program is Python, which finds its home by that word.
    name = str(Path(sys.executable).with_name("docker-proxy"))
    command = [name, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", "/usr/share"]
    with subprocess.Popen(
        command, executable=sys.executable, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until(lambda: bool(listeners(port)), "a proxy")
            yield port
        finally:
            process.kill()


def test_no_docker_where_one_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    compose(cli, *LLAMA)
    without_docker(cli, tmp_path)
    findings = examine(cli, 3)
    assert "there is no `docker` here" in found(findings, "docker")["what"]
    assert "COMPOSE_FILE" in found(findings, "docker")["mend"]


@pytest.mark.parametrize("files", [LLAMA, LLAMA_GPU, VLLM, VLLM_GPU], ids=["llama", "llama-gpu", "vllm", "vllm-gpu"])
def test_without_docker_nothing_is_wrong_that_it_could_have_explained(
    cli: Cli, tmp_path: Path, files: tuple[str, ...]
) -> None:
    compose(cli, *files)
    without_docker(cli, tmp_path)
    cli.environment["MODELS_SOURCE"] = "models"
    with docker_proxy() as port:
        cli.environment["REDIS_PORT"] = str(port)
        findings = examine(cli, 3)
    assert f"{port} (REDIS_PORT) is held by a container" in found(findings, "ports", "note")["what"]
    assert "in the volume models" in found(findings, "model", "note")["what"]
    assert "gpu" not in [finding["check"] for finding in findings]
    assert "docker" in checks_with(findings, "wrong")
    assert not {"ports", "model"} & set(checks_with(findings, "wrong"))


def test_daemon_that_does_not_say_whose_a_port_is(cli: Cli, fake: Fake) -> None:
    config = compose(cli, *VLLM, ports=[{"published": "1", "protocol": "tcp"}])
    with docker_proxy() as port:
        config = config.replace('"published": "1"', f'"published": "{port}"')
        fake("docker", info="!Cannot connect to the Docker daemon", compose_version="2.26.1", compose_config=config)
        findings = examine(cli, 3)
        assert f"{port} (llm-server) is held by a container" in found(findings, "ports", "note")["what"]
        assert "gpu" not in [finding["check"] for finding in findings]
        # One that answers knows of no such container.
        fake_docker(fake, config)
        assert f"{port} (llm-server) is taken by" in found(examine(cli, 3), "ports")["what"]


def test_compose_that_is_missing(cli: Cli, fake: Fake) -> None:
    for said in ("!docker: 'compose' is not a docker command.\nSee 'docker --help'", "!unknown shorthand flag: 'f'"):
        fake_docker(fake, compose(cli, *LLAMA), compose_version=said)
        finding = found(examine(cli, 3), "compose")
        assert "no Compose plugin" in finding["what"]
        assert "docker-compose-plugin" in finding["mend"]


def test_compose_that_is_too_old(cli: Cli, fake: Fake) -> None:
    fake_docker(fake, compose(cli, *LLAMA), compose_version="2.17.3\n")
    assert "2.17.3 is too old" in found(examine(cli, 3), "compose")["what"]


def test_docker_that_never_answers(cli: Cli, tmp_path: Path) -> None:
    compose(cli, *LLAMA)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text("#!/bin/sh\nsleep 600 & wait\n")
    (folder / "docker").chmod(0o755)
    cli.environment["PATH"] = f"{folder}:{cli.environment['PATH']}"
    finding = found(examine(cli, 3), "docker")
    assert "no answer within" in finding["what"]


def test_docker_of_somebody_else(cli: Cli, fake: Fake) -> None:
    said = (
        "!permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: "
        'Get "http://%2Fvar%2Frun%2Fdocker.sock/v1.24/info": dial unix /var/run/docker.sock: connect: permission denied'
    )
    fake("docker", info=said, compose_version="2.26.1", compose_config=compose(cli, *LLAMA))
    finding = found(examine(cli, 3), "docker")
    assert "not yours to use" in finding["what"]
    assert "usermod -aG docker" in finding["mend"]


def test_docker_that_says_in_its_object_that_it_is_not_there(cli: Cli, fake: Fake) -> None:
    said = ["Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"]
    fake_docker(fake, compose(cli, *LLAMA), {"ServerVersion": "", "ServerErrors": said})
    assert "Cannot connect to the Docker daemon" in found(examine(cli, 3), "docker")["what"]


def test_large_model_through_docker_desktop(cli: Cli, fake: Fake) -> None:
    large = cli.write("large.gguf", b"GGUF\x03\0\0\0")
    os.truncate(large, 2 * 2**30)
    mount = {"type": "bind", "source": str(cli.folder), "target": "/models"}
    cli.environment["MODEL_PATH"] = "/models/large.gguf"
    config = compose(cli, *LLAMA, volumes=[mount])
    fake_docker(fake, config, INFO | {"OperatingSystem": "Docker Desktop"})
    finding = found(examine(cli, 3), "mount", "note")
    assert "Docker Desktop" in finding["what"]
    assert "MODELS_SOURCE=models" in finding["mend"]
    fake_docker(fake, config)
    assert "mount" not in checks_with(examine(cli, 3), "note")


def test_models_in_a_volume(cli: Cli, fake: Fake) -> None:
    cli.environment["MODELS_SOURCE"] = "models"
    mount = {"type": "volume", "source": "models", "target": "/models"}
    config = json.loads(compose(cli, *LLAMA, volumes=[mount]))
    text = json.dumps(config | {"volumes": {"models": {"name": "project_models"}}})
    fake_docker(fake, text, volume_inspect="!Error: No such volume: project_models")
    assert "there is no volume project_models" in found(examine(cli, 3), "model")["what"]
    fake_docker(fake, text, volume_inspect="[]")
    assert "project_models, whose content is not looked at" in found(examine(cli, 3), "model", "ok")["what"]


@pytest.mark.parametrize(
    ("chosen", "files", "words"),
    [
        ("", (), "There is no .gguf file in"),
        ("", ("a.gguf", "b.gguf"), "several models (a.gguf, b.gguf)"),
        ("/elsewhere/a.gguf", ("a.gguf",), "is not seen in the container"),
        ("/models/c.gguf", ("a.gguf",), "there is no file"),
        ("models/gguf/a.gguf", ("a.gguf",), ""),
        ("", ("a.gguf",), ""),
        ("", ("a.gguf", "millrace-demo.gguf"), ""),
        ("", ("a.gguf", "b.gguf", "millrace-demo.gguf"), "several models (a.gguf, b.gguf)"),
    ],
)
def test_model_of_a_container(cli: Cli, fake: Fake, chosen: str, files: tuple[str, ...], words: str) -> None:
    folder = cli.folder / "gguf"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"GGUF\x03\0\0\0")
    cli.environment["MODEL_PATH"] = chosen
    fake_docker(fake, compose(cli, *LLAMA, volumes=[{"type": "bind", "source": str(folder), "target": "/models"}]))
    findings = examine(cli, 3)
    if words:
        assert words in found(findings, "model")["what"]
    else:
        assert str(folder / "a.gguf") in found(findings, "model", "ok")["what"]


def test_the_demos_model_counts_where_it_is_alone(cli: Cli, fake: Fake) -> None:
    own = cli.write("millrace-demo.gguf", b"GGUF\x03\0\0\0")
    mount = {"type": "bind", "source": str(cli.folder), "target": "/models"}
    cli.environment["MODEL_PATH"] = ""
    fake_docker(fake, compose(cli, *LLAMA, volumes=[mount]))
    assert str(own) in found(examine(cli, 3), "model", "ok")["what"]
    yours = cli.write("yours.gguf", b"GGUF\x03\0\0\0")
    assert str(yours) in found(examine(cli, 3), "model", "ok")["what"]


def test_model_in_a_mount_of_ones_own(cli: Cli, fake: Fake) -> None:
    mounts = [{"type": "bind", "source": str(cli.folder), "target": target} for target in ("/models", "/more")]
    cli.environment["MODEL_PATH"] = "/more/a.gguf"
    fake_docker(fake, compose(cli, *LLAMA, volumes=mounts))
    assert "in /more of the container" in found(examine(cli, 3), "model", "note")["what"]


def test_memory_limit_that_is_too_small(cli: Cli, fake: Fake) -> None:
    mount = {"type": "bind", "source": str(cli.folder), "target": "/models"}
    cli.write("a.gguf", b"GGUF\x03\0\0\0")
    cli.environment |= {"MODEL_PATH": "/models/a.gguf", "LLM_MEMORY": "256m"}
    fake_docker(fake, compose(cli, *LLAMA, volumes=[mount]))
    finding = found(examine(cli, 3), "memory")
    assert "LLM_MEMORY is 256.0 MiB" in finding["what"]
    assert "LLM_MEMORY=1g" in finding["mend"]


def fake_gpu(fake: Fake, header: str = SMI, table: str = GPU, busy: str = "") -> None:
    fake("nvidia-smi", **{"--query-gpu": table, "--query-compute": busy, "": header})


def engine_image(*env: str) -> str:
    return json.dumps(["PATH=/usr/bin", *env])


def test_gpu_layers_without_a_gpu(cli: Cli, fake: Fake) -> None:
    cli.environment["N_GPU_LAYERS"] = "-1"
    fake_docker(fake, compose(cli, *LLAMA))
    finding = found(examine(cli, 3), "gpu")
    assert "N_GPU_LAYERS=-1, and the engine's container is given no GPU" in finding["what"]
    assert "docker-compose.gpu.yml" in finding["mend"]
    assert "N_GPU_LAYERS=0" in finding["mend"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is an NVIDIA GPU here")
@pytest.mark.skipif(Path("/dev/kfd").exists() or sys.platform == "darwin", reason="there is another GPU here")
def test_gpu_layers_on_a_machine_without_one(cli: Cli, fake: Fake) -> None:
    cli.environment["N_GPU_LAYERS"] = "20"
    assert "no NVIDIA driver here (no nvidia-smi)" in found(examine(cli, 3), "gpu")["what"]
    fake_gpu(fake)
    assert "RTX 3070" in found(examine(cli, 0), "gpu", "ok")["what"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is an NVIDIA GPU here")
def test_gpu_file_without_a_driver(cli: Cli, fake: Fake) -> None:
    fake_docker(fake, compose(cli, *LLAMA_GPU), NVIDIA)
    assert "no NVIDIA driver here" in found(examine(cli, 3), "gpu")["what"]


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("!Failed to initialize NVML: Driver/library version mismatch\n", "restart the machine"),
        (
            "!NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
            "NVIDIA driver is installed and running.\n",
            "modprobe nvidia",
        ),
    ],
)
def test_driver_that_does_not_work(cli: Cli, fake: Fake, said: str, mend: str) -> None:
    fake_docker(fake, compose(cli, *LLAMA_GPU), NVIDIA)
    fake_gpu(fake, said)
    finding = found(examine(cli, 3), "gpu")
    assert "the NVIDIA driver does not work" in finding["what"]
    assert mend in finding["mend"]


@pytest.mark.skipif(shutil.which("nvidia-container-runtime-hook") is not None, reason="the toolkit is installed here")
def test_docker_without_the_nvidia_runtime(cli: Cli, fake: Fake) -> None:
    cli.environment["N_GPU_LAYERS"] = "-1"
    fake_docker(fake, compose(cli, *LLAMA_GPU))
    fake_gpu(fake)
    finding = found(examine(cli, 3), "gpu")
    assert "no NVIDIA runtime" in finding["what"]
    assert "nvidia-ctk runtime configure" in finding["mend"]
    devices = INFO | {"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}
    for info in (NVIDIA, devices):
        fake_docker(fake, compose(cli, *LLAMA_GPU), info)
        assert "RTX 3070 8.0 GiB; driver 535.247.01 (CUDA 12.2)" in found(examine(cli, 3), "gpu", "ok")["what"]


def test_driver_that_is_too_old_for_the_image(cli: Cli, fake: Fake) -> None:
    image = engine_image("CUDA_VERSION=13.0.3", "NVIDIA_REQUIRE_CUDA=cuda>=13.0 brand=tesla,driver>=535,driver<536")
    fake_docker(fake, compose(cli, *VLLM_GPU), NVIDIA, image_inspect=image)
    fake_gpu(fake)
    finding = found(examine(cli, 3), "gpu")
    assert finding["what"] == "the image's CUDA 13.0 needs a newer driver than 535.247.01 (CUDA 12.2)"
    assert "(≥ 580)" in finding["mend"]
    assert "VLLM_ENABLE_CUDA_COMPATIBILITY=true" in finding["mend"]
    fake_gpu(fake, NEW_SMI)
    assert "driver 610.43.02 (CUDA 13.3)" in found(examine(cli, 3), "gpu", "ok")["what"]


def test_image_that_is_not_built_yet(cli: Cli, fake: Fake) -> None:
    base = {"context": ".", "args": {"LLAMACPP_IMAGE": "compiled", "RUNTIME_IMAGE": "nvidia/cuda:13.0.3-runtime"}}
    cli.environment["N_GPU_LAYERS"] = "-1"
    fake_docker(fake, compose(cli, *LLAMA_GPU, build=base), NVIDIA)
    fake_gpu(fake)
    # Without NVIDIA_REQUIRE_CUDA nothing refuses it, but CUDA 13 runs on no driver of CUDA 12.
    assert "CUDA 13.0 needs a newer driver" in found(examine(cli, 3), "gpu")["what"]
    fake_docker(fake, compose(cli, *LLAMA_GPU), NVIDIA, image_inspect=engine_image("CUDA_VERSION=12.4.1"))
    assert "CUDA 12.4 needs a newer driver" in found(examine(cli, 3), "gpu", "note")["what"]


def test_vllm_without_a_gpu(cli: Cli, fake: Fake) -> None:
    fake_docker(fake, compose(cli, *VLLM))
    finding = found(examine(cli, 3), "gpu")
    assert "vllm/vllm-openai:v0.33.0 needs a GPU" in finding["what"]
    assert "VLLM_IMAGE=vllm/vllm-openai-cpu" in finding["mend"]
    fake_docker(fake, compose(cli, *VLLM), image_inspect=engine_image())
    assert "gpu" not in checks_with(examine(cli, 3), "wrong")
    cli.environment["VLLM_IMAGE"] = "vllm/vllm-openai-cpu:v0.33.0-x86_64"
    fake_docker(fake, compose(cli, *VLLM))
    assert "gpu" not in checks_with(examine(cli, 3), "wrong")


def test_gpu_that_is_busy(cli: Cli, fake: Fake) -> None:
    fake_docker(fake, compose(cli, *VLLM_GPU), NVIDIA)
    fake_gpu(fake, table=BUSY_GPU, busy="4242, /usr/bin/blender, 5900 MiB\n")
    finding = found(examine(cli, 3), "gpu")
    assert "GPU 0 has 2.0 GiB of 8.0 GiB free, and vLLM will take 7.2 GiB" in finding["what"]
    assert "4242, /usr/bin/blender" in finding["what"]
    assert "GPU_MEMORY_UTILIZATION=0.25" in finding["mend"]


def test_gpus_that_are_not_there(cli: Cli, fake: Fake) -> None:
    fake_docker(fake, compose(cli, *VLLM_GPU), NVIDIA)
    fake_gpu(fake)
    cli.environment["TENSOR_PARALLEL_SIZE"] = "2"
    assert "TENSOR_PARALLEL_SIZE=2, and the engine has 1 GPUs" in found(examine(cli, 3), "gpu")["what"]
    cli.environment["GPU_IDS"] = "0,1"
    assert "GPU_IDS names 1, and there are 0" in found(examine(cli, 3), "gpu")["what"]
    fake_gpu(fake, table="No devices were found\n")
    assert "finds no GPU" in found(examine(cli, 3), "gpu")["what"]


def test_gpu_that_nothing_uses(cli: Cli, fake: Fake) -> None:
    fake_docker(fake, compose(cli, *LLAMA_GPU), NVIDIA)
    fake_gpu(fake)
    assert "N_GPU_LAYERS=0 puts no layer on the GPU" in found(examine(cli, 3), "gpu", "note")["what"]
