"""The model files that lie in MODELS_DIR: GGUF files in gguf/, Hugging Face folders in hf/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millrace.errors import InputError
from millrace.models.gguf_header import part_names, read_header
from millrace.models.hf_folder import read_folder


@dataclass(frozen=True)
class ModelFile:
    """A model on disk; a GGUF model in parts is one."""

    #: As an engine calls it where LLM_MODEL does not name it.
    name: str
    #: gguf or hf.
    format: str
    #: The file, or the first of its parts, or the folder.
    path: str
    #: Of all its files.
    bytes: int
    #: Such as Q4_K_M, awq or bfloat16; empty where it is not known.
    quantization: str = ""
    architecture: str = ""
    #: How many numbers the model has.
    parameters: int | None = None
    #: The longest context the model was made for, in tokens.
    context: int | None = None
    chat_template: bool | None = None
    #: GGUF files it consists of.
    parts: int = 1
    #: Why it cannot be loaded; empty where nothing is wrong with it.
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def model_files(folder: Path) -> list[ModelFile]:
    """Return what lies in `folder`/gguf and `folder`/hf, by name; a missing folder holds nothing.

    Reads the headers alone, some 0.1 s for a model with a large vocabulary.
    """
    return [*_ggufs(folder / "gguf"), *(_hf(path.parent) for path in sorted((folder / "hf").glob("[!.]*/config.json")))]


def _ggufs(folder: Path) -> Iterator[ModelFile]:
    seen: set[str] = set()
    for path in sorted(folder.glob("[!.]*.gguf")):
        if path.name not in seen:
            names = part_names(path.name)
            seen.update(names)
            yield _gguf([folder / name for name in names] or [path])


def _gguf(paths: list[Path]) -> ModelFile:
    first = paths[0]
    there = [path for path in paths if path.is_file()]
    described: dict[str, Any] = {"parts": len(paths)}
    try:
        if len(there) < len(paths):
            missing = next(path for path in paths if path not in there)
            raise InputError(f"{missing} is missing.")
        headers = [read_header(path) for path in paths]
        described |= {
            "quantization": headers[0].quantization,
            "architecture": headers[0].architecture,
            "parameters": sum(header.parameters for header in headers),
            "context": headers[0].context,
            "chat_template": headers[0].chat_template,
        }
    except (InputError, OSError) as error:
        described["problem"] = _why(error)
    return ModelFile(first.stem, "gguf", str(first), sum(path.stat().st_size for path in there), **described)


def _hf(folder: Path) -> ModelFile:
    described: dict[str, Any] = {}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        described = asdict(read_folder(folder))
    except (InputError, OSError) as error:
        described["problem"] = _why(error)
    return ModelFile(folder.name, "hf", str(folder), size, **described)


def _why(error: InputError | OSError) -> str:
    return error.message if isinstance(error, InputError) else f"{error.filename} cannot be read: {error.strerror}."
