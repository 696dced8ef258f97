"""A model from the Hub into MODELS_DIR: GGUF files for llama.cpp, a folder with safetensors for vLLM.

    gguf/FILE             appears whole; of a model in parts, the first part comes last
    hf/.incomplete/NAME/  where a folder's files gather; a further pull goes on there
    hf/NAME/              appears by rename when all of them are there

A model that is there already is never replaced: an engine may be at work on it, and another repository may
have one of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millrace.errors import InputError
from millrace.models.choose import (
    GgufModel,
    choose_gguf,
    choose_hf,
    gguf_models,
    gigabytes,
    has_safetensors,
)
from millrace.models.download import Progress, checksum, download
from millrace.models.hub import RemoteFile, Repository, look_up
from millrace.models.part import check_space, lock, make_folder, part_path, storage_errors, sync_folder
from millrace.settings import Settings

INCOMPLETE = ".incomplete"
_LISTING = 30.0  # seconds without a byte; a repository of thousands of files takes the Hub a while


@dataclass(frozen=True)
class Pulled:
    """A model that is there now."""

    repo: str
    commit: str
    #: gguf or hf.
    format: str
    #: The file, or the first of its parts, or the folder.
    path: str
    files: list[str]
    bytes: int
    #: False when all of it was there already.
    downloaded: bool
    #: The line of .env that chooses it.
    setting: str
    #: The name under which the engine then serves it.
    serves: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def pull(
    settings: Settings,
    repo: str,
    file: str = "",
    *,
    revision: str = "main",
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> Pulled:
    """Download a model, or go on with it.

    Args:
        settings: For MODELS_DIR, the Hub and its token, LLM_BACKEND and LLM_MODEL.
        repo: `owner/name`.
        file: Of a GGUF repository: the file, or its quantization; empty leaves the choice to `choose_gguf`.
            A repository that has safetensors as well is taken for what LLM_BACKEND loads.
        revision: Branch, tag or commit.
        say: Told in a sentence what is being done.
        progress: Told (bytes there, bytes in all) while the download goes on.

    Raises:
        InputError: It is not clear what is meant, or it is nothing that can be loaded safely (`pickle_only`),
            or another model of that name is there (`model_exists`).
        MillraceError: As in `hub.look_up` and `download.download`; what came is kept for the next call.
    """
    repository = look_hub(settings, repo, revision, timeout=_LISTING)
    if not file and not _wants_gguf(settings, repository, say):
        return _pull_hf(settings, repository, say, progress)
    model = choose_gguf(repository, file)
    if not file and (others := len(gguf_models(repository)) - 1):
        say(f"{repo} has {others + 1} GGUF files: taking {model}. Name another to have that.")
    path, downloaded = fetch_gguf(repository, model, settings.models_dir / "gguf", say=say, progress=progress)
    return Pulled(
        repo,
        repository.commit,
        "gguf",
        str(path),
        list(model.files),
        model.size,
        downloaded,
        f"MODEL_PATH=/models/{path.name}",
        settings.llm_model or path.stem,
    )


def look_hub(settings: Settings, repo: str, revision: str, *, timeout: float = 5.0) -> Repository:
    """Look a repository up with the settings' Hub and token; raises what `hub.look_up` does."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    return look_up(settings.hf_endpoint, repo, revision=revision, timeout=timeout, token=token)


def _wants_gguf(settings: Settings, repository: Repository, say: Callable[[str], None]) -> bool:
    if not gguf_models(repository):
        return False
    if not has_safetensors(repository):
        return True
    gguf = settings.llm_backend != "vllm"
    kind = "GGUF" if gguf else "safetensors"
    say(f"{repository.name} has GGUF files and safetensors: taking {kind}, as LLM_BACKEND is {settings.llm_backend}.")
    return gguf


def fetch_gguf(
    repository: Repository,
    model: GgufModel,
    folder: Path,
    *,
    say: Callable[[str], None],
    progress: Progress | None = None,
    sha256: str | None = None,
) -> tuple[Path, bool]:
    """Download a GGUF model to `folder`, all its parts.

    Returns:
        The path of its first file, and whether anything was downloaded.

    Raises:
        InputError: `model_exists`, when another file of that name is there.
        MillraceError: As in `download.download`.
    """
    # The first part is the one that engines load: it comes when the others are there.
    wanted = [(file, folder / name) for name, file in reversed(model.files.items())]
    path = wanted[-1][1]
    with storage_errors(path):
        _refuse_others(wanted, repository, sha256)
        if all(target.is_file() for _, target in wanted):
            say(f"{path} is there already, with the right sha256.")
            return path, False
        say(f"Fetching {model} of {repository.name} to {folder}.")
        _fetch(wanted, sha256, progress)
    return path, True


def _pull_hf(
    settings: Settings, repository: Repository, say: Callable[[str], None], progress: Progress | None
) -> Pulled:
    files = choose_hf(repository)
    folder = settings.models_dir / "hf" / repository.name.partition("/")[2]
    gathered = folder.parent / INCOMPLETE / folder.name
    total = sum(file.size or 0 for file in files.values())
    with storage_errors(folder):
        make_folder(gathered.parent)
        with lock(gathered):
            if there := folder.exists():
                _refuse_other_folder(folder, files, repository)
                say(f"{folder} is there already, with the right hashes.")
            else:
                say(f"Fetching {len(files)} files ({gigabytes(total)}) of {repository.name} to {folder}.")
                make_folder(gathered)
                _drop_others(gathered, files)
                # Small ones first: a refused token shows before the gigabytes.
                smallest = sorted(files, key=lambda name: files[name].size or 0)
                _fetch([(files[name], gathered / name) for name in smallest], None, progress)
                gathered.rename(folder)
                sync_folder(folder.parent)
        with suppress(OSError):  # another pull may be at work there
            gathered.parent.rmdir()
    return Pulled(
        repository.name,
        repository.commit,
        "hf",
        str(folder),
        sorted(files),
        total,
        not there,
        f"MODEL_NAME=/models/{folder.name}",
        settings.llm_model or folder.name,
    )


def _fetch(wanted: list[tuple[RemoteFile, Path]], sha256: str | None, progress: Progress | None) -> None:
    """Download files that are one model, when all of them fit on the disk."""
    total = sum(remote.size or 0 for remote, _ in wanted)
    target = wanted[-1][1]
    for remote, _ in wanted:
        checksum(remote, sha256)  # what cannot be checked is refused before anything is downloaded
    check_space(target.parent, target.name, total - sum(_there(path) for _, path in wanted))
    before = 0
    for remote, target in wanted:
        download(remote, target, sha256=sha256, progress=_onward(progress, before, total))
        before += remote.size or 0


def _onward(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Count a file's bytes behind those of the files before it."""
    return None if progress is None else lambda done, size: progress(before + done, total or size)


def _there(target: Path) -> int:
    """Return the bytes of a file that are on disk."""
    return next((path.stat().st_size for path in (target, part_path(target)) if path.is_file()), 0)


def _refuse_others(wanted: list[tuple[RemoteFile, Path]], repository: Repository, sha256: str | None) -> None:
    for remote, target in wanted:
        if target.exists() and not checksum(remote, sha256).matches(target):
            raise _exists(target, repository)


def _refuse_other_folder(folder: Path, files: dict[str, RemoteFile], repository: Repository) -> None:
    # By size first: to hash the weights takes long, and a file that is not there shows at once.
    for name in sorted(files, key=lambda name: files[name].size or 0):
        if not (folder / name).is_file() or not checksum(files[name]).matches(folder / name):
            raise _exists(folder, repository)


def _exists(path: Path, repository: Repository) -> InputError:
    return InputError(
        f"{path} is there, and it is not what {repository.name} has at {repository.commit[:12]}.",
        "Move it away or delete it, then pull again.",
        code="model_exists",
    )


def _drop_others(folder: Path, files: dict[str, RemoteFile]) -> None:
    """Delete what an earlier pull, of another revision, has left."""
    kept = {folder / name for name in files}
    kept |= {target.with_name(target.name + end) for target in kept for end in (".part", ".part.json")}
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
