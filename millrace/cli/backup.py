"""`millrace backup` and `restore`: Redis and the ledger in one file, and back again."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from millrace import embedded, presence
from millrace.batch.folder import storage_errors
from millrace.batch.submit import open_input
from millrace.cli.output import Json, print_json, say, size
from millrace.embedded import LOOPBACK
from millrace.errors import InputError, Unreachable
from millrace.guard import Guard
from millrace.settings import Settings, get_settings
from millrace.settings_sources import read_stack

if TYPE_CHECKING:
    from millrace.backup.archive import Manifest


def backup(
    file: Annotated[Path, typer.Argument(help="Where the backup goes, such as monday.tar.gz.")],
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Save Redis and the ledger in one file; workers may go on.

    The files of batches in DATA_DIR are not in it.
    """
    from millrace.backup.save import save

    settings = get_settings()
    _check_target(settings, file, force=force)
    with _redis(settings, was_embedded=False) as (used, is_embedded):
        manifest = save(used, file, embedded=is_embedded)
    written = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "bytes": written, "created_at": manifest.created_at, **_counts(manifest)})
        return
    say(f"{_words(manifest)} → {file} ({size(written)})")
    say(f"The files of batches are not in it: copy {settings.data_dir / 'batches'} too, after this.")


def restore(
    file: Annotated[Path, typer.Argument(help="What `millrace backup` wrote.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Put Redis and the ledger back as they were; no worker may be at work.

    The files of batches in DATA_DIR stay as they are.
    """
    from millrace.backup.archive import opened
    from millrace.backup.restore import check
    from millrace.backup.restore import restore as put_back

    settings = get_settings()
    with open_input(str(file)) as stream, opened(file, stream) as archive:
        manifest = archive.manifest
        if not yes and not sys.stdin.isatty():
            raise InputError(
                f"Restoring {file} replaces all of Redis and the ledger, and nobody is there to be asked.",
                "Say --yes.",
                code="confirmation_needed",
            )
        with _redis(settings, was_embedded=manifest.source.embedded) as (used, _):
            check(used, archive)
            if not yes:
                typer.confirm(
                    f"Replace everything in Redis {used.redis_address} and in the ledger by {_words(manifest)}, "
                    f"of {_local(manifest)}?",
                    abort=True,
                    err=True,
                )
            restored = put_back(used, archive)
    if as_json:
        print_json({"file": str(file), "created_at": manifest.created_at, **restored.as_dict()})
        return
    say(f"Restored as of {_local(manifest)}: {_count(restored.keys, 'key')} of Redis, {_batches(restored.batches)}.")
    if restored.unknown_folders:
        say(
            f"{_count(restored.unknown_folders, 'folder')} in {settings.data_dir / 'batches'} "
            "of batches that this ledger does not know: left as they are."
        )
    if restored.without_files:
        say(f"The files of {_batches(restored.without_files)} are not in {settings.data_dir}: copy them back.")


def _check_target(settings: Settings, file: Path, *, force: bool) -> None:
    with storage_errors(file, "Name another place for the backup."):
        there, ordinary = file.exists(), file.is_file()
    if there and not ordinary:
        raise InputError(f"{file} is no ordinary file.", "Name a file.", code="unwritable_output")
    if file.resolve().is_relative_to(settings.data_dir.resolve()):
        raise InputError(f"{file} lies in DATA_DIR.", "Name a place outside it.", code="unwritable_output")
    if there and not force:
        raise InputError(f"{file} is there already.", "Name another file, or say --force.", code="backup_exists")


@contextlib.contextmanager
def _redis(settings: Settings, *, was_embedded: bool) -> Iterator[tuple[Settings, bool]]:
    """Yield settings of a Redis that answers, and whether it is the embedded one.

    The embedded one runs beside the workers of `millrace up` and ends with them: it is started here for
    as long as it takes. One with a password is a container or somebody's, and is never replaced.
    """
    try:
        presence.ping(settings)
    except Unreachable as error:
        named = urlsplit(settings.redis_dsn)
        ours = was_embedded or (settings.data_dir / "redis").is_dir()
        if error.code != "redis_unreachable" or named.hostname not in LOOPBACK or named.password or not ours:
            raise
    else:
        yield settings, "redis_url" in read_stack(settings.data_dir).get("settings", {})
        return
    with embedded.only_one(settings.data_dir), contextlib.closing(Guard()) as guard:
        server = embedded.start_redis(settings.data_dir, started=guard.watch)
        try:
            say(f"Redis at {settings.redis_address} does not answer: using the embedded one of {settings.data_dir}.")
            yield settings.model_copy(update={"redis_url": SecretStr(server.url)}), True
        finally:
            server.stop()
            guard.forget(server.process.pid)


def _counts(manifest: Manifest) -> dict[str, int]:
    return {Path(name).stem: member.rows for name, member in manifest.members.items()}


def _words(manifest: Manifest) -> str:
    counts = _counts(manifest)
    return f"{_count(counts['redis'], 'key')} of Redis and {_batches(counts['batches'])} of the ledger"


def _local(manifest: Manifest) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created_at))


def _batches(count: int) -> str:
    return f"{count} {'batch' if count == 1 else 'batches'}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
