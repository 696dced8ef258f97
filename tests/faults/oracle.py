"""The oracle of `millrace selftest`, and what the fault suite asks of it: a verdict without findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.batch.folder import BatchFolder
from millrace.selftest.oracle import Attempt, Verdict, digest, in_flight, judge, read_log
from millrace.selftest.parts import Project

__all__ = ["Attempt", "Verdict", "check", "digest", "in_flight", "judge", "read_log"]


def check(
    project: Project,
    batch_id: str,
    source: Path,
    *,
    kills: Sequence[float] = (),
    counts: Mapping[str, int] | None = None,
    **options: Any,
) -> Verdict:
    """Judge a batch that has ended, and fail with what was found.

    Args:
        project: Whose batch it is.
        batch_id: The batch.
        source: The file that was submitted.
        kills: When something was killed, cut off or stopped (time.monotonic()).
        counts: Its `request_counts`; read from the ledger where None.
        options: Of `judge`.
    """
    folder = BatchFolder.of(project.data_dir, batch_id)
    if counts is None:
        with project.ledger() as ledger:
            counts = ledger.batch(batch_id)["request_counts"]
    verdict = judge(source, folder.output, folder.errors, project.log, kills=kills, counts=counts, **options)
    assert verdict.ok, f"{verdict.findings}\n{verdict}"
    return verdict
