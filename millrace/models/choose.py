"""Which files of a repository are the model: one GGUF model of several, or the safetensors and what belongs to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePosixPath

from millrace.errors import InputError, NotFound
from millrace.models.gguf_header import part_names, part_of
from millrace.models.hub import RemoteFile, Repository

#: What is taken of a GGUF repository when nothing is named: a quarter of the size, and little worse.
DEFAULT_QUANT = "Q4_K_M"

_SHOWN = 12  # names in a hint
#: Their loading runs code that may lie in them.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
#: Configuration, tokenizer and chat template.
_BESIDE = (".json", ".jinja", ".model", ".txt", ".tiktoken")
#: Folders of embedding models (1_Pooling) and of further templates; others hold the model in other formats.
_FOLDER = re.compile(r"\d+_\w+|additional_chat_templates")
_STANDARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_LEAVE_OUT = "It has none; leave FILE out for the folder with its safetensors."
#: GGUF files that are no model by themselves: a model's eyes and ears, and a quantizer's notes.
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)


@dataclass(frozen=True)
class GgufModel:
    """A GGUF model of a repository: the path of its first file, and all its files by their name on disk."""

    path: str
    files: dict[str, RemoteFile]

    @property
    def size(self) -> int:
        """Bytes of all files, as far as the hub says."""
        return sum(file.size or 0 for file in self.files.values())

    def __str__(self) -> str:
        parts = f", {len(self.files)} files" if len(self.files) > 1 else ""
        return f"{self.path} ({gigabytes(self.size)}{parts})"


def gigabytes(size: int) -> str:
    """Return a size as the hub's pages show it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def gguf_models(repository: Repository) -> list[GgufModel]:
    """Return the whole GGUF models of a repository, by path; one in parts is one."""
    found = []
    for path in sorted(repository.files):
        name = PurePosixPath(path).name
        part = part_of(name)
        if not name.lower().endswith(".gguf") or (part is not None and part[1] != 1):
            continue
        beside = {other: str(PurePosixPath(path).with_name(other)) for other in part_names(name)}
        if beside and all(other in repository.files for other in beside.values()):
            found.append(GgufModel(path, {other: repository.files[where] for other, where in beside.items()}))
    return found


def choose_gguf(repository: Repository, wanted: str = "") -> GgufModel:
    """Return the GGUF model that is meant.

    Args:
        repository: Where it is.
        wanted: Its path, its file's name, one of its parts, or a quantization such as Q5_K_M; empty takes
            the only one, else the only Q4_K_M.

    Raises:
        InputError: `choice_needed`, when several could be meant.
        NotFound: None is.
    """
    models = gguf_models(repository)
    if wanted:
        found = [model for model in models if wanted == model.path or PurePosixPath(wanted).name in model.files]
        exact = [model for model in found if wanted == model.path]
        found = exact or found or [model for model in models if _is_quant(model, wanted)]
    else:
        models = [model for model in models if not _NO_MODEL.search(model.path)]
        found = models if len(models) == 1 else [model for model in models if _is_quant(model, DEFAULT_QUANT)]
    if len(found) == 1:
        return found[0]
    name, some = repository.name, found or models
    shown = ", ".join(map(str, some[:_SHOWN])) + (", …" if len(some) > _SHOWN else "")
    if wanted and not found:
        near = get_close_matches(wanted, [model.path for model in models], 3)
        hint = f"Near to it: {', '.join(near)}." if near else f"It has {shown}." if shown else _LEAVE_OUT
        raise NotFound(f"{name} has no GGUF model {wanted}.", hint)
    if not some:
        raise NotFound(f"{name} has no whole GGUF model.", "Look for a repository with GGUF in its name.")
    which = f"are {wanted}" if wanted else f"are {DEFAULT_QUANT}" if found else "are there"
    raise InputError(
        f"{len(some)} GGUF models of {name} {which}: name one.", f"Choices: {shown}.", code="choice_needed"
    )


def _is_quant(model: GgufModel, quant: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", model.path, re.IGNORECASE) is not None


def has_safetensors(repository: Repository) -> bool:
    """Whether a repository has safetensors in its root."""
    return any(path.endswith(".safetensors") and "/" not in path for path in repository.files)


def choose_hf(repository: Repository) -> dict[str, RemoteFile]:
    """Return the files of a model in Hugging Face's layout, by their path in it.

    Raises:
        InputError: `pickle_only` or `no_model`, when there are no safetensors or no config.json.
    """
    name, files = repository.name, repository.files
    if not has_safetensors(repository):
        pickled = [path for path in sorted(files) if path.endswith(_PICKLED)]
        if pickled:
            raise InputError(
                f"{name} has only pickled weights ({pickled[0]}), and loading those can run code that lies in them.",
                "Look for a repository or a --revision with .safetensors; the page's pull requests often have one.",
                code="pickle_only",
            )
        raise InputError(f"{name} has neither safetensors nor GGUF files.", "Check its page.", code="no_model")
    if "config.json" not in files:
        raise InputError(
            f"{name} has no config.json: it is no model that vLLM loads, but an adapter, say, or one for diffusers.",
            "Pull the model that it is made for.",
            code="no_model",
        )
    # Beside the standard names lie the same weights once more, in Mistral's format or another precision; vLLM
    # would load both.
    standard = any(_STANDARD.fullmatch(path) for path in files)
    return {path: file for path, file in files.items() if _belongs(path, standard=standard)}


def _belongs(path: str, *, standard: bool) -> bool:
    folder, _, name = path.rpartition("/")
    if folder and not _FOLDER.fullmatch(folder):
        return False
    if name.endswith(".safetensors"):
        return bool(folder) or not standard or _STANDARD.fullmatch(name) is not None
    return name.endswith(_BESIDE) and not name.startswith(".")
