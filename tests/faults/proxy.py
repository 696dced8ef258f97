"""A TCP proxy that makes a network bad on demand: latency, a black hole, resets, narrow pipes, small pieces.

It runs in a thread with a loop of its own; its faults may be changed at any time, for connections that are
open too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Faults:
    """What becomes of the bytes. The defaults do nothing."""

    #: Seconds that each piece waits, each way.
    latency: float = 0.0
    #: Bytes a second, each way; 0: no limit.
    bandwidth: float = 0.0
    #: Pieces of at most so many bytes, each written by itself; 0: as they came.
    slice_bytes: int = 0
    #: Seconds between two slices.
    slice_pause: float = 0.0
    #: Nothing passes either way any more; connections stay open, new ones are accepted.
    blackhole: bool = False
    #: New connections are reset at once.
    refuse: bool = False


class Proxy:
    """A port of loopback that leads to another one.

    Args:
        port: Where to lead.
    """

    def __init__(self, port: int) -> None:
        self.faults = Faults()
        #: The port it leads to; another one is for new connections.
        self.target = port
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0
        #: Connections that were accepted so far.
        self.accepted = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def set(self, **faults: Any) -> None:
        """Set the faults; those that are not named go."""
        self.faults = Faults(**faults)

    def heal(self) -> None:
        """End all faults; what a black hole swallowed stays gone."""
        self.faults = Faults()

    def reset(self) -> int:
        """Reset every open connection (RST), and return how many there were."""
        return self._call(self._reset)

    @contextlib.contextmanager
    def having(self, **faults: Any) -> Iterator[None]:
        """Have these faults for a block."""
        self.set(**faults)
        try:
            yield
        finally:
            self.heal()

    def _call(self, what: Callable[[], int]) -> int:
        async def call() -> int:
            return what()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

    def _reset(self) -> int:
        found = list(self._open)
        for writer in found:
            _abort(writer)
        return len(found) // 2

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.faults.refuse:
            _abort(writer)
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _abort(writer)
            return
        self._open |= {writer, back}
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except (OSError, asyncio.CancelledError):
            _abort(writer)
            _abort(back)
        finally:
            self._open -= {writer, back}
            writer.close()
            back.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            size = self.faults.slice_bytes or len(data)
            for start in range(0, len(data), size):
                piece = data[start : start + size]
                faults = self.faults
                wait = faults.latency if start == 0 else faults.slice_pause
                if faults.bandwidth:
                    wait += len(piece) / faults.bandwidth
                if wait:
                    await asyncio.sleep(wait)
                if not self.faults.blackhole:
                    writer.write(piece)
            await writer.drain()
        # A black hole swallows a farewell too.
        while self.faults.blackhole:  # noqa: ASYNC110  # it is changed from another thread
            await asyncio.sleep(0.05)
        if writer.can_write_eof():
            writer.write_eof()


def _abort(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        found = writer.get_extra_info("socket")
        if found is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
