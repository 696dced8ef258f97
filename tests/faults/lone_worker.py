"""A worker without Celery: `python -m tests.faults.lone_worker BATCH`, which ends with the batch.

It does what the tasks do, in their order: free, run, merge. It starts in a second, where a whole worker takes ten.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from millrace.batch.lease import Leases, free_expired
from millrace.batch.ledger import Ledger
from millrace.batch.merge import merge
from millrace.batch.runner import Session
from millrace.settings import get_settings


def main(batch_id: str) -> None:
    settings = get_settings()
    ledger = Ledger.open(settings)
    leases = Leases(ledger, f"lone:{os.getpid()}", settings.batch_lease_seconds)
    while ledger.batch(batch_id)["millrace"]["ended"] is None:
        free_expired(ledger)
        asyncio.run(Session(leases, settings, stop=lambda: False, seconds=60.0).run())
        for ready in ledger.ready_to_merge():
            merge(ledger, settings.data_dir, ready)
        time.sleep(0.1)  # others hold the rest; what Celery's messages would wait for


if __name__ == "__main__":
    main(sys.argv[1])
