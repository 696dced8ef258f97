"""The rows of the ledger, from SQLite or PostgreSQL into either.

A ledger that goes back in time meets files that did not: batches went on, and left segments of epochs
that it has not given out yet. So what is open comes back as ready, with an epoch above every one that
was ever given out. Its next owner reads all those segments, as after any crash, and asks only for rows
that none of them answers. Shards also get new ids, so that a runner of the ledger that is replaced
finds none of its shards again, however late it wakes up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from millrace.batch.folder import BatchFolder
from millrace.batch.ledger import Ledger
from millrace.batch.schema import ShardState, metadata, shards

Row = dict[str, Any]

#: In an order in which no row names one that comes later.
TABLES: tuple[sa.Table, ...] = tuple(metadata.sorted_tables)
_AT_ONCE = 1000  # rows
_LOCK_WAIT = "15s"  # as SQLite's, see millrace.batch.database


@contextlib.contextmanager
def snapshot(ledger: Ledger) -> Iterator[Callable[[sa.Table], Iterator[Row]]]:
    """Yield a function that yields the rows of a table, all tables as they were at one instant."""
    with ledger.read() as connection:
        if connection.dialect.name == "postgresql":
            # By default each statement would see the commits before it; SQLite's reader never does.
            connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))

        def rows(table: sa.Table) -> Iterator[Row]:
            ordered = sa.select(table).order_by(*table.primary_key)
            for row in connection.execute(ordered, execution_options={"yield_per": _AT_ONCE}).mappings():
                yield dict(row)

        yield rows


def replace(ledger: Ledger, rows: Callable[[sa.Table], Iterator[Row]], data_dir: Path) -> None:
    """Put `rows` in the place of all that the ledger has, in one transaction.

    Args:
        ledger: Of the same revision as the rows.
        rows: Yields the rows of a table.
        data_dir: DATA_DIR, where batches may have gone on.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The rows are none of this ledger's.
        Unreachable: The ledger does not answer.
    """
    with ledger.write() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'"))
            names = ", ".join(table.name for table in TABLES)
            connection.execute(sa.text(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE"))
        last_id = connection.scalar(sa.select(sa.func.max(shards.c.id))) or 0
        given_out = {
            (row.batch_id, row.number): row.epoch
            for row in connection.execute(sa.select(shards.c.batch_id, shards.c.number, shards.c.epoch))
        }
        for table in reversed(TABLES):
            connection.execute(table.delete())
        for table in TABLES:
            found = rows(table)
            if table is shards:
                found = _reopened(found, last_id, given_out, data_dir)
            while some := list(islice(found, _AT_ONCE)):
                connection.execute(table.insert(), some)
        if connection.dialect.name == "postgresql":
            # Its sequence does not know of ids that were given to it.
            newest = sa.func.coalesce(sa.func.max(shards.c.id), 1)
            sequence = sa.func.pg_get_serial_sequence(shards.name, shards.c.id.name)
            connection.execute(sa.select(sa.func.setval(sequence, newest)).select_from(shards))


def _reopened(
    rows: Iterator[Row], last_id: int, given_out: dict[tuple[str, int], int], data_dir: Path
) -> Iterator[Row]:
    """Yield shards with new ids; the open ones with nobody at work on them and the newest epoch there was."""
    on_disk: dict[str, dict[int, int]] = {}
    for new_id, row in zip(count(last_id + 1), rows):
        row["id"] = new_id
        if row["state"] in (ShardState.READY, ShardState.LEASED):
            batch_id, number = row["batch_id"], row["number"]
            if batch_id not in on_disk:
                on_disk[batch_id] = BatchFolder.of(data_dir, batch_id).newest_epochs()
            newest = max(row["epoch"], given_out.get((batch_id, number), 0), on_disk[batch_id].get(number, 0))
            row |= {"state": ShardState.READY, "owner": None, "lease_until": None, "epoch": newest}
        yield row
