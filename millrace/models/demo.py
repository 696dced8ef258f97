"""The model that serves when none is chosen: one from the Hub, Millrace's own small one, or one of noise."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from millrace.errors import InputError, Unreachable
from millrace.models.choose import choose_gguf
from millrace.models.llama_files import read_gguf, replace_folder, scratch, storage_errors, write_hf
from millrace.models.pull import fetch_gguf, look_hub
from millrace.models.tiny import make_tiny
from millrace.settings import Settings

OWN = "millrace-demo"
OWN_CONTEXT = 4096  # tokens; llama.cpp gives a slot no more than the model declares
TINY = "millrace-tiny"
Wanted = Literal["own", "hub"]


@dataclass(frozen=True)
class Choice:
    """A GGUF file to serve."""

    path: Path
    name: str
    #: What to know before believing an answer; empty for a model that somebody chose.
    caution: str = ""


def own_gguf(settings: Settings) -> Path | None:
    """Return Millrace's own demo model: in MODELS_DIR, else in the clone that runs; None where it is not."""
    name = Path("gguf") / f"{OWN}.gguf"
    clone = Path(str(resources.files("millrace"))).parent / "models"
    return next((folder / name for folder in (settings.models_dir, clone) if (folder / name).is_file()), None)


def write_own_hf(settings: Settings, folder: Path) -> None:
    """Write the weights of Millrace's own demo model as a folder for vLLM; files that are there are replaced.

    Raises:
        InputError: The model is not there: this is no clone of the repository.
        MillraceError: `extra_missing`, when the extra `embedded` is not installed.
        StorageError: It cannot be written.
    """
    own = own_gguf(settings)
    if own is None:
        raise InputError(
            f"There is no {settings.models_dir / 'gguf' / OWN}.gguf.",
            "Run this in a clone of the repository.",
            code="model_missing",
        )
    llama = read_gguf(own)
    folder = folder.absolute()
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch(folder.parent, folder.name) as half:
            write_hf(llama, half)
            replace_folder(half, folder)


def put_there(names: Collection[str]) -> list[str]:
    """Return the models of a folder that somebody put there to be served, as docker/llamacpp.sh sees it too.

    Millrace's own demo model comes with the repository, so beside another it does not count.
    """
    return [name for name in names if len(names) == 1 or name != OWN]


def chosen_model(settings: Settings) -> Choice | None:
    """Return the model that is there: MODEL_PATH, else the Hub's if it was fetched before.

    Raises:
        InputError: MODEL_PATH names no GGUF file.
    """
    if settings.model_path:
        path = _host_path(settings)
        if not path.is_file():
            raise InputError(
                f"MODEL_PATH names {settings.model_path}, and there is no file {path}.",
                "Correct it, or leave it out to use the demo's model.",
                code="model_missing",
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file.", "Name a .gguf file.", code="model_format")
        return Choice(path, settings.llm_model or path.stem)
    fetched = _hub_path(settings)
    return Choice(fetched, settings.llm_model or fetched.stem) if fetched.is_file() else None


def ensure_model(
    settings: Settings,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    wanted: Wanted | None = None,
) -> Choice:
    """Return a model to serve.

    The first of these that can be had: MODEL_PATH, the Hub's small instruct model, Millrace's own demo model,
    one of random weights.

    Args:
        settings: For MODEL_PATH and the DEMO_MODEL_ family.
        say: Told in a sentence what is being done.
        progress: Told (bytes there, bytes in all) while a download goes on.
        wanted: "hub": that of the Hub and no other; "own": Millrace's own where MODEL_PATH names none.

    Raises:
        InputError: MODEL_PATH names no GGUF file, or the Hub has no such model.
        MillraceError: The download failed; what came is kept for the next try.
        Unreachable: "hub" is wanted, and the Hub is not reachable.
    """
    if wanted == "hub":
        there = _hub_path(settings)
        path = there if there.is_file() else _fetch(settings, say, progress)
        return Choice(path, settings.llm_model or path.stem)
    own = own_gguf(settings)
    if wanted == "own" and own and not settings.model_path:
        return Choice(own, settings.llm_model or OWN)
    if (choice := chosen_model(settings)) is not None:
        return choice
    try:
        path = _fetch(settings, say, progress)
    except Unreachable as error:
        if error.code != "hub_unreachable":
            raise
    else:
        return Choice(path, settings.llm_model or path.stem)
    if own and settings.n_ctx <= OWN_CONTEXT:
        say(f"{settings.hf_endpoint} is not reachable: using Millrace's own demo model.")
        caution = "The demo model answers, which can only sort support tickets. Set MODEL_PATH to use another."
        return Choice(own, settings.llm_model or OWN, caution)
    path = settings.models_dir / "tiny" / f"{TINY}.gguf"
    if not path.is_file():
        say(f"{settings.hf_endpoint} is not reachable: making a tiny model of random weights.")
        path = make_tiny(path.parent, context=settings.n_ctx, name=TINY).gguf
    caution = "The model's weights are random: its answers are noise. Set MODEL_PATH to use a real one."
    return Choice(path, settings.llm_model or TINY, caution)


def _fetch(settings: Settings, say: Callable[[str], None], progress: Callable[[int, int], None] | None) -> Path:
    repository = look_hub(settings, settings.demo_model_repo, settings.demo_model_revision)
    model = choose_gguf(repository, settings.demo_model_file)
    sha256 = settings.demo_model_sha256 or None
    target, _ = fetch_gguf(repository, model, settings.models_dir / "gguf", say=say, progress=progress, sha256=sha256)
    return target


def _host_path(settings: Settings) -> Path:
    """Return MODEL_PATH on this machine: in a container the models' folder is /models."""
    path = Path(settings.model_path)
    if path.is_relative_to("/models") and not path.exists():
        return settings.models_dir / "gguf" / path.relative_to("/models")
    return path


def _hub_path(settings: Settings) -> Path:
    return settings.models_dir / "gguf" / Path(settings.demo_model_file).name
