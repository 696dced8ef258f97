"""`millrace doctor`: is everything there that a run needs? It looks and never changes anything."""

from __future__ import annotations

from millrace.cli.doctor.command import doctor

__all__ = ["doctor"]
