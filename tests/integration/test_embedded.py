"""The embedded Redis and its folder: two must never write to one append-only file."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import pytest
import redis

from millrace import embedded
from millrace.errors import Unreachable


def test_a_redis_that_was_left_is_ended_by_the_next_with_what_it_had(tmp_path: Path) -> None:
    left = embedded.start_redis(tmp_path)
    with contextlib.closing(redis.Redis.from_url(left.url)) as client:
        client.set("kept", "yes")
    server = embedded.start_redis(tmp_path)
    try:
        assert left.process.wait(embedded.LEFT) == 0
        with contextlib.closing(redis.Redis.from_url(server.url)) as client:
            assert client.get("kept") == b"yes"
    finally:
        left.stop()
        server.stop()


def test_a_folder_that_stays_taken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    monkeypatch.setattr(embedded, "LEFT", 0.1)
    taken = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(taken, fcntl.LOCK_EX)
        with pytest.raises(Unreachable, match="still runs in") as caught:
            embedded.start_redis(tmp_path)
        assert caught.value.code == "redis_left"
    finally:
        os.close(taken)
