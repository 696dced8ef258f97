"""Restoring: Redis and the ledger as they were, while no worker is at work.

    1  the archive, its revision, Redis, the workers and the ledger are looked at
    2  Redis takes the keys under other names                 nobody sees them
    3  the ledger takes the rows                              one transaction
    4  Redis drops its old keys and renames the new ones      one script

What fails in 1 to 3 has changed nothing. A crash between 3 and 4 leaves an older ledger beside a newer
Redis, which does no harm, as a message is only a hint; and the same command again does all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from millrace import presence
from millrace.backup import broker, rows
from millrace.backup.archive import Archive
from millrace.backup.save import REDIS, member
from millrace.batch.database import REVISION
from millrace.batch.folder import BatchFolder
from millrace.batch.ledger import Ledger
from millrace.batch.schema import batches
from millrace.errors import InputError, Unreachable
from millrace.settings import Settings


@dataclass(frozen=True)
class Restored:
    """What is there now.

    Keys of Redis, batches of the ledger, batches of it whose files are not in DATA_DIR, and folders of
    batches in DATA_DIR that the ledger does not know.
    """

    keys: int
    batches: int
    without_files: int
    unknown_folders: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def check(settings: Settings, archive: Archive) -> None:
    """See whether `restore` may begin.

    Raises:
        InputError: The backup is of other tables (backup_revision), or workers are at work (workers_running).
        Unreachable: Redis does not answer.
    """
    if (written := archive.manifest.source.revision) != REVISION:
        raise InputError(
            f"{archive.path} is of a ledger of version {written}; this Millrace has version {REVISION}.",
            f"Restore it with the Millrace that wrote it ({archive.manifest.millrace}); "
            "a newer one brings the ledger up to date.",
            code="backup_revision",
        )
    if workers := presence.alive(settings):
        names = ", ".join(entry["name"] for entry in workers[:3]) + (", …" if len(workers) > 3 else "")
        raise InputError(
            f"Workers are at work: {names}.",
            f"End them first; one that was killed is forgotten after {presence.TTL} s.",
            code="workers_running",
        )


def restore(settings: Settings, archive: Archive) -> Restored:
    """Put back what `archive` holds, in the place of all that is there.

    Raises:
        InputError: See `check`; or this Redis cannot read it (backup_redis_version).
        StorageError: The ledger's disk is full.
        Unreachable: Redis or the ledger does not answer, or has no room.
    """
    check(settings, archive)
    with (
        contextlib.closing(Ledger.open(settings)) as ledger,
        presence.connect(settings, broker.PATIENCE) as client,
    ):
        stage = broker.Stage(client)
        try:
            stage.put(archive.rows(REDIS, broker.Key))
            # Once more: reading a large archive takes its time.
            check(settings, archive)
            _replace_ledger(settings, ledger, archive)
        except BaseException:
            with contextlib.suppress(Exception):
                stage.discard()
            raise
        try:
            keys = stage.switch()
            stage.written()
        except Exception as error:
            raise Unreachable(
                f"The ledger is restored, but Redis is not: {str(error).rstrip('.')}.",
                "Run the same command again.",
                code="half_restored",
            ) from error
        known = _known(ledger)
    folders = settings.data_dir / "batches"
    on_disk = {path.name for path in folders.iterdir()} if folders.is_dir() else set()
    return Restored(
        keys=keys,
        batches=len(known),
        without_files=sum(not BatchFolder.of(settings.data_dir, batch_id).input.exists() for batch_id in known),
        unknown_folders=len(on_disk - known),
    )


def _replace_ledger(settings: Settings, ledger: Ledger, archive: Archive) -> None:
    def saved(table: sa.Table) -> Iterator[rows.Row]:
        return archive.rows(member(table), rows.Row)

    try:
        rows.replace(ledger, saved, settings.data_dir)
    except SQLAlchemyError as error:
        raise InputError(
            f"The rows in {archive.path} do not fit the ledger {ledger.address}: {str(error).splitlines()[0]}.",
            "Use another backup; nothing was changed.",
            code="backup_damaged",
        ) from error


def _known(ledger: Ledger) -> set[str]:
    with ledger.read() as connection:
        return set(connection.scalars(sa.select(batches.c.id)))
