"""The model's files: whether they are there, readable, whole, of the engine's format, and where it sees them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from millrace.cli.doctor.docker import Docker, engine_in_container, models_mount
from millrace.cli.doctor.finding import Finding, note, ok, wrong
from millrace.cli.doctor.programs import ask
from millrace.cli.output import size
from millrace.compose import SERVICE
from millrace.errors import InputError
from millrace.models.demo import chosen_model, put_there
from millrace.settings import Settings

CHECK = "model"
SLOW_MOUNT = 1_500_000_000  # bytes; larger files hang or crawl through Docker Desktop's mounts
#: Any of them makes a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json", "spiece.model")
PICKLED = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Gguf:
    """A GGUF model: its first file, and the bytes of all its files."""

    path: Path
    bytes: int


def model(settings: Settings, docker: Docker) -> list[Finding]:
    """Look at the model of MODEL_PATH or MODEL_NAME."""
    mount = models_mount(settings, docker)
    if mount and mount[0] == "volume":
        return _volume(mount[1])
    if mount and (place := _mounted_elsewhere(settings, docker)):
        return [note(CHECK, f"in {place} of the container, which is not looked at")]
    if settings.llm_backend == "vllm":
        return _hf(settings, docker, Path(mount[1]) if mount else settings.models_dir / "hf")
    if mount:
        return _gguf_of_container(settings, docker, Path(mount[1]))
    return _gguf_of_machine(settings)


def served_gguf(settings: Settings, docker: Docker) -> Gguf | None:
    """Return the GGUF model that will be served; None where it is none, or not there, or in a volume."""
    if settings.llm_backend != "llamacpp":
        return None
    mount = models_mount(settings, docker)
    try:
        if mount is None:
            choice = chosen_model(settings)
            path = choice.path if choice else None
        else:
            path = _chosen_gguf(settings, Path(mount[1])) if mount[0] == "bind" else None
        return Gguf(path, sum(part.stat().st_size for part in _parts(path))) if path else None
    except (InputError, OSError):
        return None


def _mounted_elsewhere(settings: Settings, docker: Docker) -> str:
    """Return where else the chosen model is mounted in the container, by a compose file of one's own; "" if nowhere."""
    chosen = settings.model_name if settings.llm_backend == "vllm" else settings.model_path
    mounts = docker.services.get(SERVICE, {}).get("volumes", [])
    targets = [str(mount.get("target")) for mount in mounts if mount.get("target") != "/models"]
    return next((target for target in targets if Path(chosen).is_relative_to(target)), "")


def _volume(name: str) -> list[Finding]:
    answer = ask("docker", "volume", "inspect", name)
    if answer.code != 0 and "no such volume" not in answer.err.lower():
        return [note(CHECK, f"in the volume {name}, and Docker is not there to say whether there is one")]
    if answer.code != 0:
        mend = f"docker volume create {name}, and copy the model into it (docs/troubleshooting.md)."
        return [wrong(CHECK, f"there is no volume {name}, which MODELS_SOURCE names", mend)]
    return [ok(CHECK, f"in the volume {name}, whose content is not looked at")]


# GGUF


def _gguf_of_machine(settings: Settings) -> list[Finding]:
    try:
        choice = chosen_model(settings)
    except InputError as error:
        path = Path(settings.model_path)
        if error.code == "model_format":
            path = Path(error.message.removesuffix(" is not a GGUF file."))
            return [
                wrong(CHECK, f"{path} is not a GGUF file: {_content(path)}", "Name a .gguf file, or fetch it again.")
            ]
        return [wrong(CHECK, error.message, error.hint)]
    except OSError as error:
        return [wrong(CHECK, f"MODEL_PATH={settings.model_path} cannot be read: {error.strerror}", "chmod a+r it.")]
    if choice is None:
        return [note(CHECK, "no MODEL_PATH", "An embedded engine uses the demo's model.")]
    return [_gguf(choice.path)]


def _gguf_of_container(settings: Settings, docker: Docker, folder: Path) -> list[Finding]:
    try:
        path = _chosen_gguf(settings, folder)
    except InputError as error:
        return [wrong(CHECK, error.message, error.hint)]
    finding = _gguf(path)
    return [finding, *(_slow_mount(docker, path.stat().st_size) if finding.verdict == "ok" else [])]


def _chosen_gguf(settings: Settings, folder: Path) -> Path:
    """Return the file that docker/llamacpp.sh will load, as this machine calls it.

    Raises:
        InputError: There is none, or several.
    """
    chosen = settings.model_path
    if not chosen:
        found = [folder / f"{name}.gguf" for name in put_there([path.stem for path in sorted(folder.glob("*.gguf"))])]
        if len(found) == 1:
            return found[0]
        if not found:
            raise InputError(f"There is no .gguf file in {folder}.", "Put one there.")
        names = ", ".join(path.name for path in found[:5])
        raise InputError(f"{folder} has several models ({names}).", f"Set MODEL_PATH=/models/{found[0].name}, say.")
    inside = re.sub(r"^(\./)?models/gguf/", "/models/", chosen)
    if not inside.startswith("/models/"):
        hint = f"Put it into {folder} and set MODEL_PATH=/models/{Path(chosen).name}."
        raise InputError(f"MODEL_PATH={chosen} is not seen in the container, which has {folder} as /models.", hint)
    path = folder / inside.removeprefix("/models/")
    if not path.is_file():
        others = ", ".join(file.name for file in sorted(folder.glob("*.gguf"))[:5]) or "no .gguf file"
        raise InputError(f"MODEL_PATH names {chosen}, and there is no file {path}.", f"{folder} has {others}.")
    return path


def _gguf(path: Path) -> Finding:
    """Look at the first bytes: the magic, and the version of the format."""
    try:
        missing = [part.name for part in _parts(path) if not part.is_file()]
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        return wrong(CHECK, f"{path} cannot be read: {error.strerror}", f"chmod a+r {path}")
    if head[:4] != b"GGUF":
        mend = "Name a .gguf file, or fetch it again."
        return wrong(CHECK, f"{path} is not a GGUF file: {_content(path)}", mend)
    version = int.from_bytes(head[4:8], "little")
    if version not in (2, 3):
        return wrong(CHECK, f"{path} is GGUF version {version}, which llama.cpp does not load", "Take a newer file.")
    if missing:
        return wrong(CHECK, f"{path} is one part of several, and {missing[0]} is not there", "Fetch all its parts.")
    return ok(CHECK, f"{path}, {size(sum(part.stat().st_size for part in _parts(path)))}")


def _parts(path: Path) -> list[Path]:
    """Return the files of a model: itself, or all of x-00001-of-00003.gguf."""
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if found is None:
        return [path]
    return [path.with_name(f"{found[1]}-{part:05}-of-{found[2]}.gguf") for part in range(1, int(found[2]) + 1)]


def _content(path: Path) -> str:
    """Return what a file is that should be a model."""
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, and `git lfs pull` fetches the file"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    return f"it begins with {head[:8]!r}"


# Hugging Face folders


def _hf(settings: Settings, docker: Docker, folder: Path) -> list[Finding]:
    name = re.sub(r"^(\./)?models/hf/", "/models/", settings.model_name).rstrip("/")
    if not name:
        if not engine_in_container(settings):
            return [note(CHECK, "no MODEL_NAME", "The engine's own settings say what it serves.")]
        found = sorted(config.parent.name for config in folder.glob("*/config.json"))
        if len(found) != 1:
            has = ", ".join(found[:5]) or "no model folder"
            return [wrong(CHECK, f"no MODEL_NAME, and {folder} has {has}", "Set MODEL_NAME, such as /models/NAME.")]
        name = f"/models/{found[0]}"
    if not name.startswith("/"):
        if name.lower().endswith(".gguf"):
            mend = "Choose llama.cpp: docker-compose.llamacpp.yml in COMPOSE_FILE, and MODEL_PATH."
            return [wrong(CHECK, f"MODEL_NAME={name} is a GGUF file, and vLLM loads Hugging Face folders", mend)]
        return [
            note(CHECK, f"{name}, which vLLM fetches from {settings.hf_endpoint}", "It needs the network at the start.")
        ]
    path = folder / name.removeprefix("/models/") if name.startswith("/models/") else Path(name)
    if engine_in_container(settings) and not name.startswith("/models/"):
        what = f"MODEL_NAME={name} is not seen in the container, which has {folder} as /models"
        return [wrong(CHECK, what, f"Put it into {folder} and set MODEL_NAME=/models/{path.name}.")]
    trouble = _hf_trouble(settings, path)
    if trouble is not None:
        return [trouble]
    weights = list(path.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in weights)
    largest = max(file.stat().st_size for file in weights)
    return [ok(CHECK, f"{path}, {size(total)} in {len(weights)} files"), *_slow_mount(docker, largest)]


def _hf_trouble(settings: Settings, path: Path) -> Finding | None:
    if not path.is_dir():
        has = ", ".join(sorted(entry.name for entry in path.parent.glob("*") if entry.is_dir())[:5]) or "no folder"
        return wrong(CHECK, f"there is no folder {path}, which MODEL_NAME names", f"{path.parent} has {has}.")
    try:
        names = {file.name for file in path.iterdir()}
        if "config.json" not in names:
            mend = "Fetch the whole repository, not the weights alone."
            return wrong(CHECK, f"{path} has no config.json: it is no Hugging Face model", mend)
        weights = sorted(name for name in names if name.endswith(".safetensors"))
        if not weights:
            pickled = next((name for name in sorted(names) if name.endswith(PICKLED)), "")
            has = f"only {pickled}, and pickled weights can run code" if pickled else "no .safetensors"
            return wrong(CHECK, f"{path} has {has}: vLLM loads safetensors here", _CONVERT)
        for index in path.glob("*.safetensors.index.json"):
            missing = set(json.loads(index.read_bytes())["weight_map"].values()) - names
            if missing:
                return wrong(CHECK, f"{path} lacks {min(missing)} and {len(missing) - 1} more", "Fetch it again.")
        for name in weights:
            with (path / name).open("rb") as file:
                head = file.read(9)  # 8 bytes of length, then JSON
            if len(head) < 9 or head[8:] != b"{":
                what = f"{path / name} is no safetensors file: {_content(path / name)}"
                return wrong(CHECK, what, "Fetch it again.")
        # --tokenizer and --skip-tokenizer-init need none here.
        if not names.intersection(TOKENIZERS) and "tokenizer" not in settings.vllm_args:
            return wrong(CHECK, f"{path} has no tokenizer", "Fetch tokenizer.json and tokenizer_config.json as well.")
    except OSError as error:
        return wrong(CHECK, f"{error.filename or path} cannot be read: {error.strerror}", f"chmod -R a+rX {path}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return wrong(CHECK, f"an index file in {path} is damaged: {error}", "Fetch it again.")
    return None


_CONVERT = (
    "Take a revision with .safetensors, or convert it where transformers is installed: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
)


def _slow_mount(docker: Docker, largest: int) -> list[Finding]:
    if largest <= SLOW_MOUNT or "Docker Desktop" not in str(docker.info.get("OperatingSystem", "")):
        return []
    what = f"{size(largest)} through a bind mount of Docker Desktop load slowly, or hang"
    return [note("mount", what, "Use a volume: MODELS_SOURCE=models; docs/troubleshooting.md shows how to fill it.")]
