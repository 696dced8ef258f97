"""Crash points: named places in the code where a test can have this process end as `kill -9` would end it.

CRASH_AT names one of them, `segment.synced`, or its n-th pass, `segment.synced:3`. Unset, which is how
everybody but a test runs, a crash point is one call of a function that returns.

    submit.planned      the batch's folder is whole, the ledger does not know it
    submit.recorded     the ledger knows it, nobody was told
    lease.claimed       the claim is committed, nothing was done with it
    segment.created     our segment is there and empty
    recover.read        older segments were read, none of it was sealed
    recover.sealed      …and now was
    segment.flushed     answers were handed to the operating system, and not synced
    segment.synced      …and now were
    lease.renewed       a renewal is committed
    shard.synced        every row is answered and synced, the shard is not finished
    shard.finished      the shard is done in the ledger, the merge was not asked for
    merge.indexed       the segments were read
    merge.written       the files are written under their temporary names
    merge.synced        …and synced, neither renamed
    merge.renamed       the output is renamed, the errors are not
    merge.placed        both are renamed, the batch is not ended
    merge.completed     the batch is ended
    retry.rewritten     segments without the failed rows are written, the ledger does not know them
    retry.reopened      …and now does
    delete.forgotten    the ledger has forgotten the batch, its files are there
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from millrace.errors import MillraceError
from millrace.settings import get_settings

#: The exit code of a process that was killed, as a shell shows it.
KILLED = 137


def crashpoint(name: str) -> None:
    """End this process at once, with exit code 137, if CRASH_AT names this pass of this point."""
    _armed()(name)


@functools.cache
def _armed() -> Callable[[str], None]:
    try:
        chosen = get_settings().crash_at
    except MillraceError:  # a library in a program whose settings are not ours to read
        chosen = ""
    if not chosen:
        return lambda name: None
    wanted, _, number = chosen.partition(":")
    left = int(number or 1)

    def crash(name: str) -> None:
        nonlocal left
        if name == wanted:
            left -= 1
            if left == 0:
                os._exit(KILLED)

    return crash
