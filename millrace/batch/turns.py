"""Turns: which sessions of a machine may have rows in flight, so that a suspect can run with nothing beside it.

Two lock files in DATA_DIR/run, which the kernel frees when a process dies:

    engine.lock      held together by sessions with rows in flight; by one alone that has suspects
    turnstile.lock   held by whoever waits for the engine or has it alone: nobody new comes in meanwhile

A session looks at the turnstile several times a second, not for each row. Sessions of other machines at the
same engine, of another DATA_DIR and interactive requests are not kept away; LONE_DEATHS allows for that.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from millrace.batch.folder import storage_errors

#: Seconds that rows in flight get to end when another session needs the engine alone; they run again later.
YIELD = 60.0
#: Seconds after which who waits for the engine no longer waits for a session that does not leave: it is stopped.
_PATIENCE = YIELD + 15.0
#: Seconds without a sign of life after which who holds the turnstile keeps nobody away: it is stopped.
_SILENCE = 60.0
#: Seconds in which the turnstile is free at some try, if it is only looked at.
_GLANCES = 5.0


class Turn:
    """One session's part in it. None of the methods waits.

    Args:
        data_dir: DATA_DIR.

    Raises:
        StorageError: The lock files cannot be made.
    """

    def __init__(self, data_dir: Path) -> None:
        folder = data_dir / "run"
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._engine = os.open(folder / "engine.lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._turnstile = os.open(folder / "turnstile.lock", os.O_RDWR | os.O_CREAT, 0o644)
        #: Since when we ask for the turnstile, and since when we pass for its holder, on the monotonic clock.
        self._asked: float | None = None
        self._since: float | None = None
        self._holds = False

    def join(self) -> bool:
        """Come in, to have rows in flight among others; False while another session needs the engine alone."""
        if not _lock(self._turnstile, fcntl.LOCK_SH):
            return self._silent()
        joined = _lock(self._engine, fcntl.LOCK_SH)
        fcntl.flock(self._turnstile, fcntl.LOCK_UN)
        return joined or self._silent()

    def wanted(self) -> bool:
        """Whether another session waits for us to leave."""
        if _lock(self._turnstile, fcntl.LOCK_SH):
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)
            return False
        return not self._silent()

    def take(self) -> bool:
        """Get the engine alone, to be called again until it answers True; our own rows must have ended."""
        now = time.monotonic()
        self._asked = self._asked or now
        self._holds = self._holds or _lock(self._turnstile, fcntl.LOCK_EX)
        if self._since is None:
            # Others hold it for an instant whenever they look; only one that holds on can have stopped.
            if not self._holds and (now - self._asked < _GLANCES or not self._silent()):
                return False
            self._since = now
        self.live()
        return _lock(self._engine, fcntl.LOCK_EX) or now - self._since > _PATIENCE

    def live(self) -> None:
        """Give a sign of life while we wait for the engine or have it alone."""
        if self._since is not None:
            os.utime(self._turnstile)

    def leave(self) -> None:
        """Let the others in."""
        fcntl.flock(self._engine, fcntl.LOCK_UN)
        fcntl.flock(self._turnstile, fcntl.LOCK_UN)
        self._asked = self._since = None
        self._holds = False

    def close(self) -> None:
        """Leave for good."""
        os.close(self._engine)
        os.close(self._turnstile)

    def _silent(self) -> bool:
        # The file's time and not a monotonic one: it is another process's. A clock that jumps lets someone in once.
        return time.time() - os.fstat(self._turnstile).st_mtime > _SILENCE


def _lock(descriptor: int, how: int) -> bool:
    """Whether a lock was free to take; where files have no locks, nobody is kept away."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
