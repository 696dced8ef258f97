"""A file that is not whole yet: its bytes, what they must become, and who may write them.

target.part        the bytes so far, only ever appended to
target.part.json   which file they belong to, written before the first of them
target.lock        held (flock) while one process writes
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from millrace.errors import MillraceError, StorageError

CHUNK = 1 << 20  # bytes read, written and hashed at once
_SPARE = 1.05  # of the bytes to come must fit on the disk
# Engines in containers run as another user than whoever downloads.
_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


@dataclass(frozen=True)
class Checksum:
    """What the bytes of a file must hash to."""

    #: git: SHA-1 of the bytes behind a header with their number, as git names a file.
    kind: Literal["sha256", "git"]
    #: Lower-case hex.
    digest: str
    #: Bytes; git's hash needs it.
    size: int | None = None

    def start(self) -> hashlib._Hash:
        """Return the hash of no bytes yet."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % (self.size or 0), usedforsecurity=False)

    def matches(self, path: Path) -> bool:
        """Whether a file has these bytes."""
        if self.size is not None and path.stat().st_size != self.size:
            return False
        found = self.start()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
        return found.hexdigest() == self.digest


class Part:
    """The bytes that have arrived, their running hash, and the note of which file they belong to.

    Args:
        target: What the part becomes.
        wanted: What it must hash to then; a part of something else starts over.
    """

    def __init__(self, target: Path, wanted: Checksum) -> None:
        self.target = target
        self.length = 0
        #: ETag of the server that sent the bytes, for `If-Range`: a CDN has other ETags than the hub.
        self.validator: str | None = None
        self._path = part_path(target)
        self._note = target.with_name(target.name + ".part.json")
        self._identity = {"kind": wanted.kind, "digest": wanted.digest, "size": wanted.size}
        self._wanted = wanted
        self._hash = wanted.start()
        self._file: BinaryIO = self._path.open("a+b")
        try:
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def _resume(self) -> None:
        try:
            note = json.loads(self._note.read_bytes())
        except (FileNotFoundError, ValueError):
            note = None
        if not isinstance(note, dict) or {key: note.get(key) for key in self._identity} != self._identity:
            self.restart()
            return
        validator = note.get("validator")
        self.validator = validator if isinstance(validator, str) else None
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            self._hash.update(chunk)
            self.length += len(chunk)
        if self._wanted.size is not None and self.length > self._wanted.size:
            self.restart()

    def restart(self) -> None:
        """Forget all bytes."""
        self._file.seek(0)
        self._file.truncate()
        self.length = 0
        self._hash = self._wanted.start()
        self.validator = None
        self._note.unlink(missing_ok=True)

    def begin(self, validator: str | None) -> None:
        """Note, before bytes are appended, which file and which server's version of it they are from."""
        self.validator = validator
        fresh = self._note.with_name(self._note.name + ".new")
        fresh.write_text(json.dumps({**self._identity, "validator": validator}), encoding="utf-8")
        fresh.replace(self._note)

    def append(self, chunk: bytes) -> None:
        """Add bytes; they are the kernel's when this returns, so that our own death does not lose them."""
        self._file.write(chunk)
        self._file.flush()
        self._hash.update(chunk)
        self.length += len(chunk)

    def finish(self) -> None:
        """Check the hash and turn the part into the target, which everybody may read.

        Raises:
            MillraceError: `checksum_mismatch`; nothing of the part is left then.
        """
        found = self._hash.hexdigest()
        if found != self._wanted.digest:
            self.discard()
            name = "sha256" if self._wanted.kind == "sha256" else "git hash"
            raise MillraceError(
                f"What was downloaded for {self.target.name} ({self.length} bytes) has the {name} {found}, "
                f"not {self._wanted.digest}; it was deleted.",
                f"Download again. If it happens again, a proxy changes the file or the {name} is wrong.",
                code="checksum_mismatch",
            )
        os.fchmod(self._file.fileno(), _FILE_MODE)
        os.fsync(self._file.fileno())
        self._path.replace(self.target)
        sync_folder(self.target.parent)
        self._note.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the part and its note."""
        self._path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the part; an empty one is deleted."""
        self._file.close()
        if not self.length:
            self.discard()


def part_path(target: Path) -> Path:
    """Return where the bytes of `target` lie until all of them are there."""
    return target.with_name(target.name + ".part")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that everybody may read them."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(_FOLDER_MODE)


def check_space(folder: Path, name: str, size: int) -> None:
    """Refuse what would fill the disk.

    Args:
        folder: Where it is to be written; it need not be there yet.
        name: What is to be written, for people.
        size: Bytes to come.

    Raises:
        StorageError: `disk_full`, when fewer than 105 % of them are free.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    needed, free = int(size * _SPARE), shutil.disk_usage(there).free
    if free < needed:
        raise StorageError(
            f"{name} needs {needed / 1e9:.1f} GB; {folder} has {free / 1e9:.1f}.",
            "Free some space, or choose another folder for the models (MODELS_DIR).",
            code="disk_full",
        )


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn errors of the file system into StorageError."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}.",
            "Free some space." if full else "Choose a folder that you may write to.",
            code="disk_full" if full else None,
        ) from error


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Keep other processes, and other threads, off `target`.

    The kernel drops the lock with its holder, so a killed download blocks nobody. The lock file is deleted
    while the lock is held; whoever opened it before that sees, by its inode, that its lock is on a file
    that is gone, and tries again.

    Raises:
        MillraceError: `download_busy`, when another one has it.
    """
    path = target.with_name(target.name + ".lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MillraceError(
                    f"Another process is downloading {target}.",
                    "Wait until it is done, then try again.",
                    code="download_busy",
                ) from None
            if not _is_at(handle, path):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
