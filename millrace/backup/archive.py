"""The file of a backup: a gzipped tar of JSON lines, and a manifest that says what belongs in it.

    manifest.json           who wrote it and when; rows, bytes and sha256 of each member
    redis.jsonl             a key a line (millrace.backup.broker)
    ledger/<table>.jsonl    a row a line (millrace.backup.rows)

It appears under its name only when it is whole, readable for its owner alone: prompts wait in Redis.
Every byte is checked before anything of it is used.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import secrets
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import msgspec

from millrace import __version__
from millrace.batch.folder import storage_errors, sync_folder
from millrace.errors import InputError

T = TypeVar("T")

FORMAT = 1
_MANIFEST = "manifest.json"
_CHUNK = 1 << 20  # bytes
_HINT = "Name another place for the backup."


class Member(msgspec.Struct, frozen=True):
    """What a member holds: lines, bytes, and their sha256 in hex."""

    rows: int
    bytes: int
    sha256: str


class Source(msgspec.Struct, frozen=True):
    """Where the content came from; addresses without passwords."""

    redis: str
    redis_version: str
    #: Whether that Redis was the embedded one, which nothing but `millrace up` starts.
    embedded: bool
    ledger: str
    #: Of the ledger's tables.
    revision: str


class Manifest(msgspec.Struct, frozen=True):
    """What a backup says of itself. `created_at` is in seconds since 1970, UTC."""

    format: int
    millrace: str
    created_at: float
    source: Source
    members: dict[str, Member]


class _Format(msgspec.Struct):
    format: int


class Writer:
    """Takes the members of a new archive, one after the other."""

    def __init__(self, file: IO[bytes], folder: Path, spools: contextlib.ExitStack) -> None:
        self._file = file
        self._folder = folder
        self._spools = spools
        self._members: dict[str, tuple[Member, IO[bytes]]] = {}
        self._created_at = time.time()

    def add(self, name: str, rows: Iterable[Any]) -> None:
        """Take a member's rows, to be written as JSON lines.

        They wait in a file without a name: a tar needs a member's length before its content.
        """
        spool = self._spools.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115  # it does
        encode, digest, count, size = msgspec.json.Encoder().encode, hashlib.sha256(), 0, 0
        for row in rows:
            line = encode(row) + b"\n"
            spool.write(line)
            digest.update(line)
            count += 1
            size += len(line)
        self._members[name] = (Member(count, size, digest.hexdigest()), spool)

    def finish(self, source: Source) -> Manifest:
        """Write the archive from what was taken, and return its manifest."""
        members = {name: member for name, (member, _) in self._members.items()}
        manifest = Manifest(FORMAT, __version__, self._created_at, source, members)
        head = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
        with tarfile.open(fileobj=self._file, mode="w:gz", compresslevel=6) as tar:
            _put(tar, _MANIFEST, len(head), io.BytesIO(head), manifest.created_at)
            for name, (member, spool) in self._members.items():
                _put(tar, name, member.bytes, spool, manifest.created_at)
        return manifest


def _put(tar: tarfile.TarFile, name: str, size: int, content: IO[bytes], mtime: float) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(mtime)
    content.seek(0)
    tar.addfile(info, content)


@contextlib.contextmanager
def create(path: Path) -> Iterator[Writer]:
    """Yield a writer of a new archive, which takes the place of `path` at the end of the block.

    Raises:
        StorageError: It cannot be written, or the disk is full.
    """
    path = path.resolve()  # through a link, not over it
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with storage_errors(path, _HINT), contextlib.ExitStack() as spools:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield Writer(file, path.parent, spools)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


class Archive:
    """An archive that was checked; see `opened`."""

    def __init__(self, path: Path, file: BinaryIO, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._file = file

    def rows(self, name: str, kind: type[T]) -> Iterator[T]:
        """Yield a member's rows.

        Raises:
            InputError: It has no such member, or a row is none of that kind (backup_damaged).
        """
        decode = msgspec.json.Decoder(kind).decode
        with _reading(self.path):
            self._file.seek(0)
            with tarfile.open(fileobj=self._file, mode="r:gz") as tar:
                content = tar.extractfile(name)
                if content is None:
                    raise KeyError(name)
                for line in content:
                    yield decode(line)


@contextlib.contextmanager
def opened(path: Path, file: BinaryIO) -> Iterator[Archive]:
    """Yield the archive in `file`, every member of it checked against the manifest.

    Raises:
        InputError: It is no backup (not_a_backup), a damaged one (backup_damaged) or a newer
            Millrace's (backup_newer).
    """
    with _reading(path), gzip.GzipFile(fileobj=file) as plain:
        with tarfile.open(fileobj=plain, mode="r:") as tar:
            manifest = _manifest(path, tar)
            found = {info.name: _measure(tar, info) for info in tar if info.name != _MANIFEST}
        while plain.read(_CHUNK):  # to gzip's own checksum, at the very end
            pass
    if found != manifest.members:
        wrong = min(name for name, _ in found.items() ^ manifest.members.items())
        raise _damaged(path, f"{wrong} is not what was saved")
    yield Archive(path, file, manifest)


def _manifest(path: Path, tar: tarfile.TarFile) -> Manifest:
    info = tar.next()
    content = tar.extractfile(info) if info is not None and info.name == _MANIFEST else None
    if content is None:
        raise tarfile.ReadError("no manifest")
    raw = content.read()
    if (written := msgspec.json.decode(raw, type=_Format).format) > FORMAT:
        raise InputError(
            f"{path} is a backup of format {written}; this Millrace knows {FORMAT}.",
            "Use the newer Millrace.",
            code="backup_newer",
        )
    return msgspec.json.decode(raw, type=Manifest)


def _measure(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    content = tar.extractfile(info)
    rows, size, digest = 0, 0, hashlib.sha256()
    while content is not None and (chunk := content.read(_CHUNK)):
        rows += chunk.count(b"\n")
        size += len(chunk)
        digest.update(chunk)
    return Member(rows, size, digest.hexdigest())


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, msgspec.MsgspecError, UnicodeError, KeyError, OSError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is no backup of Millrace, or a damaged one: {reason.rstrip('.')}.",
        "Use another backup; nothing was changed.",
        code="backup_damaged",
    )
