"""The machine: room on the disks and in memory."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from millrace.cli.doctor.docker import Docker, engine_in_container
from millrace.cli.doctor.finding import Finding, note, ok, wrong
from millrace.cli.doctor.model import served_gguf
from millrace.cli.doctor.sockets import listeners
from millrace.cli.output import size
from millrace.compose import SERVICE
from millrace.embedded import LOOPBACK
from millrace.settings import Settings

LOW_DISK = 2 * 2**30  # bytes
LOW_MEMORY = 2**30  # bytes
#: What a model needs beside its weights: the context, buffers and the server. A guess; the context may be more.
MARGIN_SHARE, MARGIN = 0.1, 512 * 2**20


def disk(settings: Settings, docker: Docker) -> list[Finding]:
    """Look at the disks of DATA_DIR, of the models and of Docker; each disk once."""
    folder = _existing(settings.data_dir)
    if not os.access(folder, os.W_OK):
        return [wrong("disk", f"{folder} is not yours to write", "Set DATA_DIR to another folder.")]
    places = {folder: "Free some space, or move DATA_DIR."}
    places.setdefault(_existing(settings.models_dir), "Free some space, or move MODELS_DIR.")
    root = Path(docker.info.get("DockerRootDir") or "/nowhere")
    if root.is_dir():
        places.setdefault(root, "Free some space: docker system df shows what Docker holds.")
    seen: set[int] = set()
    said, findings = [], []
    for place, mend in places.items():
        device = place.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(place).free
        if free < LOW_DISK:
            # Only DATA_DIR grows while a batch runs.
            verdict = wrong if place == folder else note
            findings.append(verdict("disk", f"{size(free)} are free at {place}", mend))
        else:
            said.append(f"{size(free)} are free at {place}")
    return [*([ok("disk", ", ".join(said))] if said else []), *findings]


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def memory(settings: Settings, docker: Docker) -> list[Finding]:
    """Compare the memory that is available with what a llama.cpp model on the CPU will take."""
    available = _available()
    if available is None:
        return []
    free = f"{size(available)} of memory are available"
    if _engine_is_up(settings) or docker.runs(SERVICE):  # it has its memory already
        if available < LOW_MEMORY:
            return [note("memory", free, "End something, or expect the kernel to.")]
        return [ok("memory", free)]
    model = served_gguf(settings, docker) if settings.n_gpu_layers == 0 else None
    if model is None:
        return [ok("memory", free)]
    need = int(model.bytes * (1 + MARGIN_SHARE)) + MARGIN
    wants = f"{model.path.name} will take some {size(need)}"
    limit = _bytes(settings.llm_memory) if engine_in_container(settings) else 0
    if limit and limit < need:
        mend = f"Set LLM_MEMORY={-(-need // 2**30)}g, or take a smaller quantization."
        return [wrong("memory", f"LLM_MEMORY is {size(limit)}, and {wants}", mend)]
    if available < need:
        mend = "End other programs, take a smaller quantization, or lower N_CTX and N_PARALLEL."
        return [wrong("memory", f"{free}, and {wants}", mend)]
    return [ok("memory", f"{free}; {wants}")]


def _engine_is_up(settings: Settings) -> bool:
    parts = urlsplit(settings.llm_server_url)
    return parts.hostname not in LOOPBACK or bool(listeners(parts.port or 80))


def _available() -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _bytes(words: str) -> int:
    """Return a size as Docker writes it: 8g, 512m, 0."""
    unit = {"k": 10, "m": 20, "g": 30}.get(words[-1].lower(), 0)
    return int(words.rstrip("bkmgBKMG")) << unit
