"""NVIDIA GPUs, where the settings ask for them: the driver, Docker's way to it, and the image's CUDA."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from millrace.cli.doctor.docker import Docker, engine_in_container
from millrace.cli.doctor.finding import Finding, note, ok, wrong
from millrace.cli.doctor.programs import MISSING, TOO_LATE, Answer, ask, together
from millrace.cli.output import size
from millrace.compose import SERVICE
from millrace.settings import Settings

CHECK = "gpu"
GPU_FILE = "docker-compose.gpu.yml"
_TOOLKIT = (
    "Install the NVIDIA Container Toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker "
    "&& sudo systemctl restart docker"
)

#: The first driver branch of each CUDA version (NVIDIA's CUDA release notes).
DRIVERS = {
    (13, 1): 590,
    (13, 0): 580,
    (12, 9): 575,
    (12, 8): 570,
    (12, 6): 560,
    (12, 5): 555,
    (12, 4): 550,
    (12, 3): 545,
    (12, 2): 535,
    (12, 1): 530,
    (12, 0): 525,
}

Version = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One GPU. `total` and `free` are its memory in bytes."""

    index: str
    uuid: str
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Driver:
    """The driver, the newest CUDA that it knows, and its GPUs."""

    version: str
    cuda: Version
    gpus: tuple[Gpu, ...]
    #: What computes on them, in words.
    busy: str

    def __str__(self) -> str:
        return f"driver {self.version} (CUDA {self.cuda[0]}.{self.cuda[1]})"


def gpu(settings: Settings, docker: Docker) -> list[Finding]:
    """Look at the GPU where a setting asks for one; say nothing where none does."""
    contained = engine_in_container(settings)
    if docker.silent and (GPU_FILE in settings.compose_file or contained):
        return []  # what the image needs, and what Docker can give, is not known
    if GPU_FILE in settings.compose_file:
        return _for_container(settings, docker)
    layers = settings.llm_backend == "llamacpp" and settings.n_gpu_layers != 0
    if contained:
        if layers:
            what = f"N_GPU_LAYERS={settings.n_gpu_layers}, and the engine's container is given no GPU"
            return [wrong(CHECK, what, f"Add :{GPU_FILE} to COMPOSE_FILE, or set N_GPU_LAYERS=0.")]
        if settings.llm_backend == "vllm" and _needs_gpu(settings, docker):
            what = f"{settings.vllm_image} needs a GPU, and its container is given none"
            mend = f"Add :{GPU_FILE} to COMPOSE_FILE, or set VLLM_IMAGE=vllm/vllm-openai-cpu:v0.33.0-x86_64."
            return [wrong(CHECK, what, mend)]
        return []
    # Metal needs no nvidia-smi, nor does ROCm.
    if not layers or sys.platform == "darwin" or Path("/dev/kfd").exists():
        return []
    found = _driver()
    if isinstance(found, Driver):
        return [ok(CHECK, f"{_names(found.gpus)}; {found}")]
    return [
        wrong(CHECK, f"N_GPU_LAYERS={settings.n_gpu_layers}, and {found.what}", "Set N_GPU_LAYERS=0, or mend that.")
    ]


def _for_container(settings: Settings, docker: Docker) -> list[Finding]:
    with ThreadPoolExecutor() as pool:
        image = pool.submit(_image_env, settings, docker)
        found, env = _driver(), image.result()
    if isinstance(found, Finding):
        return [found]
    findings = [
        *_way(docker),
        *_chosen(settings, found),
        *_cuda(settings, found, env),
        *_memory(settings, docker, found),
    ]
    if settings.llm_backend == "llamacpp" and settings.n_gpu_layers == 0:
        mend = "Set N_GPU_LAYERS=-1 for all of them."
        findings.append(note(CHECK, f"{GPU_FILE} is there, and N_GPU_LAYERS=0 puts no layer on the GPU", mend))
    return findings or [ok(CHECK, f"{_names(found.gpus)}; {found}")]


def _driver() -> Driver | Finding:
    """Ask nvidia-smi."""
    fields = "index,uuid,name,memory.total,memory.free"
    header, table, busy = together(
        [
            partial(ask, "nvidia-smi"),
            partial(ask, "nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"),
            partial(ask, "nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"),
        ]
    )
    if header.code == MISSING:
        mend = "Install the NVIDIA driver; without a GPU, take " + GPU_FILE + " out of COMPOSE_FILE."
        return wrong(CHECK, "there is no NVIDIA driver here (no nvidia-smi)", mend)
    # From driver 610 on it prints "KMD Version" and "CUDA UMD Version".
    version = re.search(r"(?:Driver|KMD) Version:\s*([\d.]+)", header.out)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*(\d+)\.(\d+)", header.out)
    if header.code != 0 or version is None or cuda is None:
        return wrong(CHECK, f"the NVIDIA driver does not work: {_said(header)}", _mend_driver(header))
    gpus = tuple(_gpus(table))
    if not gpus:
        return wrong(CHECK, "the NVIDIA driver finds no GPU", "Look at `lspci | grep -i nvidia` and `sudo dmesg`.")
    users = "; ".join(line.strip() for line in busy.out.splitlines() if line.strip()) if busy.code == 0 else ""
    return Driver(version[1], (int(cuda[1]), int(cuda[2])), gpus, users)


def _said(answer: Answer) -> str:
    spoken = [line.strip() for line in (answer.err + "\n" + answer.out).splitlines() if line.strip()]
    return spoken[0] if spoken else f"exit code {answer.code}"


def _mend_driver(answer: Answer) -> str:
    said = answer.out + answer.err
    if answer.code == TOO_LATE:
        return "It hangs: look at `sudo dmesg`; a restart of the machine mends most of it."
    if "version mismatch" in said:
        return "The driver was upgraded under the running one: restart the machine."
    return "Load it (sudo modprobe nvidia), or install the driver for this kernel again."


def _gpus(table: Answer) -> Iterator[Gpu]:
    for line in table.out.splitlines() if table.code == 0 else ():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 5:
            # Machines whose GPU shares their memory answer [N/A].
            total, free = (int(cell) << 20 if cell.isdecimal() else 0 for cell in cells[3:])
            yield Gpu(cells[0], cells[1], cells[2], total, free)


def _names(gpus: tuple[Gpu, ...]) -> str:
    return ", ".join(f"{found.name} {size(found.total)}" for found in gpus)


def _way(docker: Docker) -> list[Finding]:
    """Look at whether Docker can hand a GPU to a container."""
    if not docker.info:
        return []
    devices = [str(device.get("ID", "")) for device in docker.info.get("DiscoveredDevices") or []]
    if "nvidia" in (docker.info.get("Runtimes") or {}) or any(
        device.startswith("nvidia.com/gpu") for device in devices
    ):
        return []
    # `gpus` needs no runtime of that name, only the toolkit's hook where the daemon finds it.
    if any(map(shutil.which, ("nvidia-container-runtime-hook", "nvidia-container-toolkit"))):
        return []
    return [wrong(CHECK, "Docker has no NVIDIA runtime: it cannot give a GPU to a container", _TOOLKIT)]


def _chosen(settings: Settings, driver: Driver) -> list[Finding]:
    """Look at whether the GPUs that the settings name are there."""
    there = {found.index for found in driver.gpus} | {found.uuid for found in driver.gpus}
    asked = [name.strip() for name in settings.gpu_ids.split(",")] if settings.gpu_ids != "all" else []
    absent = [name for name in asked if name not in there]
    if absent:
        has = ", ".join(found.index for found in driver.gpus)
        return [wrong(CHECK, f"GPU_IDS names {', '.join(absent)}, and there are {has}", "Correct GPU_IDS.")]
    count = len(asked) or len(driver.gpus)
    if settings.llm_backend == "vllm" and settings.tensor_parallel_size > count:
        what = f"TENSOR_PARALLEL_SIZE={settings.tensor_parallel_size}, and the engine has {count} GPUs"
        return [wrong(CHECK, what, f"Set TENSOR_PARALLEL_SIZE={count}.")]
    return []


def _cuda(settings: Settings, driver: Driver, env: dict[str, str]) -> list[Finding]:
    """Compare the image's CUDA with the driver's."""
    require = env.get("NVIDIA_REQUIRE_CUDA", "")
    versions = [_version(env.get("CUDA_VERSION", "")), _version(re.sub(r".*?cuda>=", "", require))]
    needs = max((version for version in versions if version), default=None)
    if needs is None or needs <= driver.cuda:
        return []
    what = f"the image's CUDA {needs[0]}.{needs[1]} needs a newer driver than {driver.version}"
    what += f" (CUDA {driver.cuda[0]}.{driver.cuda[1]})"
    branch = DRIVERS.get(needs)
    mend = f"Upgrade the driver{f' (≥ {branch})' if branch else ''} or pick an older image"
    if needs[0] == driver.cuda[0] and not require:
        return [note(CHECK, what, f"{mend}, if it does not start: within CUDA {needs[0]} most of it works.")]
    if settings.llm_backend == "vllm":
        mend += "; on data-centre GPUs VLLM_ENABLE_CUDA_COMPATIBILITY=true in .env does as well"
    return [wrong(CHECK, what, f"{mend}.")]


def _version(words: str) -> Version | None:
    found = re.match(r"(\d+)\.(\d+)", words)
    return (int(found[1]), int(found[2])) if found else None


def _memory(settings: Settings, docker: Docker, driver: Driver) -> list[Finding]:
    """Look at whether vLLM will find the share of memory that it takes at its start."""
    if settings.llm_backend != "vllm" or docker.runs(SERVICE):
        return []
    asked = [name.strip() for name in settings.gpu_ids.split(",")] if settings.gpu_ids != "all" else []
    for found in driver.gpus:
        wants = int(settings.gpu_memory_utilization * found.total)
        if (asked and not {found.index, found.uuid} & set(asked)) or found.free >= wants:
            continue
        share = int(found.free / found.total * 20) / 20  # down to a twentieth
        busy = f"; it is used by {driver.busy}" if driver.busy else ""
        what = f"GPU {found.index} has {size(found.free)} of {size(found.total)} free, and vLLM will take {size(wants)}"
        return [wrong(CHECK, what + busy, f"End that, or set GPU_MEMORY_UTILIZATION={share:g}.")]
    return []


def _image_env(settings: Settings, docker: Docker) -> dict[str, str]:
    """Return the environment of the engine's image: the built one, or else the one it is built on."""
    service = docker.services.get(SERVICE, {})
    build: dict[str, Any] = (service.get("build") or {}).get("args") or {}
    chosen = [build.get(name) for name in ("VLLM_IMAGE", "LLAMACPP_IMAGE", "RUNTIME_IMAGE")]
    base = next((str(name) for name in chosen if name and name != "compiled"), "")
    candidates = [str(name) for name in (service.get("image"), base) if name] or [settings.vllm_image]
    inspect = ("docker", "image", "inspect", "--format", "{{json .Config.Env}}")
    for answer in together([partial(ask, *inspect, name) for name in candidates]):
        if answer.code == 0:
            return dict(word.partition("=")[::2] for word in json.loads(answer.out or "null") or [])
    # NVIDIA's own images have it in their tag.
    tag = re.search(r"nvidia/cuda:(\d+\.\d+)", base)
    return {"CUDA_VERSION": tag[1]} if tag else {}


def _needs_gpu(settings: Settings, docker: Docker) -> bool:
    env = _image_env(settings, docker)
    if env:
        return "CUDA_VERSION" in env or "NVIDIA_REQUIRE_CUDA" in env
    return "cpu" not in settings.vllm_image
