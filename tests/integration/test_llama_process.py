"""The llama.cpp server of the embedded default."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from millrace.engine.llama_process import Launch
from millrace.models.tiny import make_tiny

pytest.importorskip("xllamacpp")


def test_who_asks_how_it_is_finds_a_thread_beside_requests_that_wait(tmp_path: Path) -> None:
    launch = Launch(str(make_tiny(tmp_path).gguf), "tiny", slots=1, context=1024)
    body = json.dumps({"model": "tiny", "prompt": "a river", "max_tokens": 1000, "ignore_eos": True}).encode()
    head = b"HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with (
        contextlib.ExitStack() as stack,
        subprocess.Popen(
            [sys.executable, "-m", "millrace.engine.llama_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        stack.callback(server.kill)
        server.stdin.write(launch.to_json() + "\n")
        server.stdin.flush()
        address = urlsplit(json.loads(server.stdout.readline())["url"])
        waiting = []
        for _ in range(24):
            one = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=10))
            one.sendall(b"POST /v1/completions %bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
            waiting.append(one)
        asking = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=10))
        asking.sendall(b"GET /health %b\r\n" % head)
        assert asking.recv(64).startswith(b"HTTP/1.1 200")
        waiting[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # it was not the turn of all of them yet
            waiting[-1].recv(1)
