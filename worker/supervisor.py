"""One worker as people think of it: a parent that keeps its Celery processes running and ends them.

    parent (no Celery in it)
    ├── celery worker  -Q interactive,models,maintenance,celery  -c WORKER_CONCURRENCY
    └── celery worker  -Q batch  -c 1                             BATCH_PROCESSES times

Batch and interactive never share a process, so a batch never stands before someone who waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from millrace.metrics import Table
from millrace.settings import Settings

log = logging.getLogger(__name__)

#: Seconds that tasks get after SIGQUIT; see worker.ending.
SOFT_SHUTDOWN = 30.0
GRACE = 45.0  # seconds from SIGTERM to SIGQUIT: a runner drains in about ten
KILL = SOFT_SHUTDOWN + 10.0  # seconds from SIGQUIT to SIGKILL: a soft shutdown puts messages back
NOW = signal.SIGUSR2  # to a Celery process: end at once; see worker.ending
LAST_WORDS = 3.0  # seconds from NOW to SIGKILL: it gives its messages back
STEADY = 30.0  # seconds after which a process counts as started well
LONGEST_PAUSE = 30.0  # seconds between restarts of a process that does not start


class Heard:
    """Tells a first signal to end from a second one, which means now.

    What comes within ECHO of the first one is the same one: an init system may repeat itself, and a Ctrl-C
    may come from the terminal and from a wrapper.
    """

    ECHO = 1.0  # seconds

    def __init__(self) -> None:
        self._first: float | None = None

    def hear(self) -> Literal["first", "echo", "second"]:
        """Return what the signal is that has just come."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return "first"
        return "echo" if now - self._first < self.ECHO else "second"


@dataclass
class _Role:
    name: str
    queues: tuple[str, ...]
    concurrency: int
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0
    failures: int = 0


class Supervisor:
    """Starts a worker's processes, restarts those that die, and ends them in order.

    Args:
        settings: For the numbers of processes.
        log_file: A descriptor where their logs go; None for this process's stderr.
        started: Told the pid of every process that starts.
        ended: Told the pid of every process that has ended.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        log_file: int | None = None,
        started: Callable[[int], None] = lambda pid: None,
        ended: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self._settings = settings
        self._log_file = log_file
        self._started = started
        self._ended = ended
        #: What all of its processes count in.
        self.metrics = Table.create()
        self._stopping = False
        self._keepers: list[asyncio.Task[None]] = []
        self._roles = [
            _Role("interactive", ("maintenance", "interactive", "models", "celery"), settings.worker_concurrency),
            *(_Role(f"batch{number}", ("batch",), 1) for number in range(settings.batch_processes)),
        ]

    @property
    def running(self) -> int:
        """How many processes are there."""
        return sum(role.process is not None and role.process.returncode is None for role in self._roles)

    @property
    def wanted(self) -> int:
        """How many processes there should be."""
        return len(self._roles)

    async def start(self) -> None:
        """Start every process."""
        for role in self._roles:
            await self._spawn(role)
            self._keepers.append(asyncio.create_task(self._keep(role)))

    async def stop(self) -> None:
        """End every process: rows in flight are answered or given back, then it goes."""
        self._stopping = True
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGQUIT, KILL), (signal.SIGKILL, KILL)):
            if not self._signal(number):
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await asyncio.gather(*(role.process.wait() for role in self._roles if role.process))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def end_now(self) -> None:
        """End every process now; leases run out, and messages are delivered again."""
        self._stopping = True
        if self._signal(NOW):
            asyncio.get_running_loop().call_later(LAST_WORDS, self.kill)

    def kill(self) -> None:
        """Kill every process."""
        self._stopping = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> bool:
        sent = False
        for role in self._roles:
            if role.process is not None and role.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    if number is signal.SIGKILL:
                        os.killpg(role.process.pid, number)  # the pool's children too
                    else:
                        role.process.send_signal(number)
                    sent = True
        return sent

    async def _spawn(self, role: _Role) -> None:
        command = [sys.executable, "-m", "celery", "-A", "worker", "worker"]
        command += ["--queues", ",".join(role.queues), "--concurrency", str(role.concurrency)]
        # Two workers on one machine must not share a node name.
        command += ["--hostname", f"{role.name}.{os.getpid()}@{socket.gethostname()}"]
        command += ["--without-mingle", "--without-gossip", "--loglevel", self._settings.log_level]
        command += ["--metrics-fd", str(self.metrics.descriptor), "--supervisor", str(os.getpid())]
        role.process = await asyncio.create_subprocess_exec(
            *command,
            pass_fds=(self.metrics.descriptor,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # Celery's banner
            stderr=self._log_file,
            # A Ctrl-C at the terminal reaches only us: we end the parts in order.
            start_new_session=True,
        )
        role.started = time.monotonic()
        self._started(role.process.pid)

    async def _keep(self, role: _Role) -> None:
        while True:
            assert role.process is not None
            code = await role.process.wait()
            with contextlib.suppress(ProcessLookupError):
                # Its pool may outlive it, and would go on without anybody to tell it to stop.
                os.killpg(role.process.pid, signal.SIGKILL)
            self._ended(role.process.pid)
            if self._stopping:
                return
            steady = time.monotonic() - role.started > STEADY
            role.failures = 0 if steady else role.failures + 1
            pause = 0.0 if role.failures == 0 else min(LONGEST_PAUSE, 2.0 ** (role.failures - 1))
            log.warning("The %s process ended with %s; a new one starts in %g s.", role.name, code, pause)
            await asyncio.sleep(pause)
            if self._stopping:
                return
            await self._spawn(role)
