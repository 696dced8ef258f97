"""The canary: a batch whose first rows nearly all fail the same way is paused before the others do.

A wrong template or too small a context shows in the first hundred rows; a million rows later it has cost a
night. A session counts the rows that it answers itself, and asks the ledger only when they look bad.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from millrace.batch.ask import Answered
from millrace.batch.ledger import Ledger
from millrace.errors import MillraceError
from millrace.settings import Settings

log = logging.getLogger(__name__)


class _Error(msgspec.Struct):
    message: str


class _FailedLine(msgspec.Struct):
    error: _Error


@dataclass
class _First:
    """What became of the first rows of a batch that this session answered."""

    rows: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    #: The first message of each code.
    messages: dict[str, str] = field(default_factory=dict)


class Canary:
    """Watches the first rows that one session answers of each batch.

    Args:
        ledger: Where a batch is paused.
        settings: For BATCH_CANARY_ROWS and BATCH_CANARY_SHARE.
    """

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger = ledger
        self._rows = settings.batch_canary_rows
        self._share = settings.batch_canary_share
        #: None for a batch that is not watched any more.
        self._batches: dict[str, _First | None] = {}

    def ended(self, batch_id: str, answered: Answered) -> bool:
        """Count a row of a batch; True once, when so many of its first rows failed alike that `pause` is to judge."""
        first = self._batches.setdefault(batch_id, _First() if self._share else None)
        if first is None or first.rows == self._rows:  # more may end before it is paused
            return False
        first.rows += 1
        if not answered.ok:
            if answered.code not in first.messages:
                first.messages[answered.code] = msgspec.json.decode(answered.line, type=_FailedLine).error.message
            first.codes[answered.code] += 1
        if first.rows < self._rows:
            return False
        if max(first.codes.values(), default=0) < self._share * first.rows:
            self._batches[batch_id] = None
            return False
        return True

    def pause(self, batch_id: str) -> None:
        """Pause a batch of which `ended` said True, unless it is too small, was resumed, or did well before."""
        first = self._batches.pop(batch_id)
        try:
            if first is not None and self._is_new(batch_id):
                code, failed = first.codes.most_common(1)[0]
                reason = (
                    f"{failed} of the first {first.rows} rows failed with {code}: {first.messages[code].rstrip('.')}. "
                    f"Mend it and `millrace batch resume {batch_id}`, or resume to go on all the same; "
                    f"`millrace batch retry {batch_id}` runs the failed rows again at the end."
                )
                log.error("%s is paused: %s", batch_id, reason)
                self._ledger.pause(batch_id, reason)
        except MillraceError as error:
            log.warning("%s The next rows of %s are watched instead.", error, batch_id)
        else:
            self._batches[batch_id] = None

    def _is_new(self, batch_id: str) -> bool:
        if not self._ledger.canary(batch_id):
            return False
        counts = self._ledger.batch(batch_id)["request_counts"]
        # More may be answered well: by other sessions now, or by earlier ones, and then these were not the first rows.
        answered = max(self._rows, counts["completed"] + counts["failed"])
        return bool(counts["total"] > 2 * self._rows and counts["completed"] <= answered - self._share * answered)
