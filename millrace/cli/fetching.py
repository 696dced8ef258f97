"""The bar of a download."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from millrace.cli.output import console
from millrace.models.download import Progress as Told


@contextlib.contextmanager
def fetching() -> Iterator[Told]:
    """Show a bar, where somebody watches, once the yielded function is told of bytes."""
    words, left = TextColumn("{task.description}"), TimeRemainingColumn(compact=True)
    columns = (words, BarColumn(), DownloadColumn(), TransferSpeedColumn(), left)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Fetching", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None, visible=True)

        yield progress
