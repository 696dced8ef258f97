"""Saving: Redis and the ledger as they are, into one file. Workers may go on beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import sqlalchemy as sa

from millrace import presence
from millrace.backup import archive, broker, rows
from millrace.batch.database import REVISION
from millrace.batch.ledger import Ledger
from millrace.settings import Settings

REDIS = "redis.jsonl"


def member(table: sa.Table) -> str:
    """Return the name of a table's member in an archive."""
    return f"ledger/{table.name}.jsonl"


def save(settings: Settings, path: Path, *, embedded: bool) -> archive.Manifest:
    """Write a backup to `path`, over what is there, and return its manifest.

    Redis comes first. A message of work that the ledger then has done already finds nothing to do; the
    other way round, the work would be in neither.

    Args:
        settings: For Redis and the ledger.
        path: The file.
        embedded: Whether that Redis is the embedded one.

    Raises:
        StorageError: The file cannot be written.
        Unreachable: Redis or the ledger does not answer, or Redis holds too much (redis_too_large).
    """
    presence.ping(settings)
    with (
        archive.create(path) as writer,
        contextlib.closing(Ledger.open(settings)) as ledger,
        presence.connect(settings, broker.PATIENCE) as client,
    ):
        writer.add(REDIS, broker.read(client))
        with rows.snapshot(ledger) as of:
            for table in rows.TABLES:
                writer.add(member(table), of(table))
        source = archive.Source(
            redis=settings.redis_address,
            redis_version=broker.version(client),
            embedded=embedded,
            ledger=ledger.address,
            revision=REVISION,
        )
        return writer.finish(source)
