"""The connections to an engine. Its answers and errors: test_retry.py and the integration tests."""

from __future__ import annotations

import asyncio
import socket

from millrace.engine.client import PROBES, EngineClient


def test_a_host_that_is_gone_is_noticed() -> None:
    async def main() -> None:
        async with EngineClient("http://localhost:1", None) as client:
            with client._socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as made:
                assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                for option, value in PROBES.items():
                    assert made.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) == value

    asyncio.run(main())
