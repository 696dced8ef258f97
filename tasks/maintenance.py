"""Periodic work; queue `maintenance`. worker.lifecycle sends it, one worker a round."""

from __future__ import annotations

import logging
from typing import Any

from millrace.batch.lease import free_expired
from millrace.batch.prune import prune, remove_orphans
from millrace.errors import StorageError
from millrace.settings import get_settings
from tasks.batch import ledger, send_merge, send_tickets
from worker.app import app

log = logging.getLogger(__name__)


@app.task(name="maintenance.reap")
def reap() -> dict[str, Any]:
    """Free shards whose leases ran out, end what is overdue, merge what was left behind, send tickets, and prune.

    An empty Redis is a normal start: everything here comes from the ledger.
    """
    expired = ledger().expire_overdue()
    for batch_id in expired:
        log.info("%s has expired: its completion window is over.", batch_id)
    freed = free_expired(ledger())
    batches = ledger().ready_to_merge()
    for batch_id in batches:
        send_merge(batch_id)
    # Tickets are counted, not remembered: whether Redis has lost any, only its queue's length tells.
    sent = send_tickets() if not _queued() else 0
    return {"expired": len(expired), "freed": freed, "merges": len(batches), "tickets": sent, "removed": _prune()}


def _prune() -> int:
    """Remove what is old or was left by a kill; return how many batches and folders."""
    settings = get_settings()
    try:
        old = prune(ledger(), settings.data_dir, settings.batch_keep_days)
        orphans = remove_orphans(ledger(), settings.data_dir)
    except StorageError as error:  # a folder that is not ours to remove is no reason to stop reaping
        log.warning("%s", error)
        return 0
    for batch_id in old:
        log.info("%s was removed: it ended more than BATCH_KEEP_DAYS=%s days ago.", batch_id, settings.batch_keep_days)
    for batch_id in orphans:
        log.warning("The folder of %s was removed: whoever made or removed it was killed, over a day ago.", batch_id)
    return len(old) + len(orphans)


def _queued() -> bool:
    """Whether tickets lie in Redis, over all priorities."""
    with app.connection_for_read() as connection:
        # Not passive: an empty Redis list does not exist, and a passive declare of it fails.
        return bool(connection.default_channel.queue_declare("batch").message_count)
