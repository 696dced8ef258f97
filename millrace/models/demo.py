"""The model that serves when none is chosen: a small one from the Hub where it is reachable, else noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import InputError, Unreachable
from millrace.models.choose import choose_gguf
from millrace.models.pull import fetch_gguf, look_hub
from millrace.models.tiny import make_tiny
from millrace.settings import Settings

TINY = "millrace-tiny"


@dataclass(frozen=True)
class Choice:
    """A GGUF file to serve. `noise` tells that its weights are random."""

    path: Path
    name: str
    noise: bool = False


def chosen_model(settings: Settings) -> Choice | None:
    """Return the model that is there: MODEL_PATH, else the demo's if it was fetched before.

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
    fetched = _demo_path(settings)
    return Choice(fetched, settings.llm_model or fetched.stem) if fetched.is_file() else None


def ensure_model(
    settings: Settings,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Return a model to serve; fetch the demo's from the Hub, or make a tiny one where there is no Hub.

    Args:
        settings: For MODEL_PATH and the DEMO_MODEL_ family.
        say: Told in a sentence what is being done.
        progress: Told (bytes there, bytes in all) while a download goes on.

    Raises:
        InputError: MODEL_PATH names no GGUF file, or the Hub has no such model.
        MillraceError: The download failed; what came is kept for the next try.
    """
    if (choice := chosen_model(settings)) is not None:
        return choice
    try:
        repository = look_hub(settings, settings.demo_model_repo, settings.demo_model_revision)
    except Unreachable as error:
        if error.code != "hub_unreachable":
            raise
    else:
        model = choose_gguf(repository, settings.demo_model_file)
        sha256 = settings.demo_model_sha256 or None
        target, _ = fetch_gguf(
            repository, model, settings.models_dir / "gguf", say=say, progress=progress, sha256=sha256
        )
        return Choice(target, settings.llm_model or target.stem)
    path = settings.models_dir / "tiny" / f"{TINY}.gguf"
    if not path.is_file():
        say(f"{settings.hf_endpoint} is not reachable: making a tiny model of random weights.")
        path = make_tiny(path.parent, context=settings.n_ctx, name=TINY).gguf
    return Choice(path, settings.llm_model or TINY, noise=True)


def _host_path(settings: Settings) -> Path:
    """Return MODEL_PATH on this machine: in a container the models' folder is /models."""
    path = Path(settings.model_path)
    if path.is_relative_to("/models") and not path.exists():
        return settings.models_dir / "gguf" / path.relative_to("/models")
    return path


def _demo_path(settings: Settings) -> Path:
    return settings.models_dir / "gguf" / Path(settings.demo_model_file).name
