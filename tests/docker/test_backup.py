"""The drill on the Redis container: old, backup, new, restore, old."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.docker.project import Project, docker
from tests.services import until

PASSWORD = "p@ss/w:rd"


def written(client: Any) -> bool:
    """Whether the append-only file has everything: it is synced once a second."""
    told = client.info("persistence")
    return not told["aof_pending_bio_fsync"] and not told["aof_buffer_length"]


def kill(project: Project) -> None:
    with project.redis() as client:
        until(lambda: written(client), "a synced file")
    docker("kill", "--signal", "KILL", project.container("redis")["Id"])
    until(lambda: not project.container("redis")["State"]["Running"], "a dead Redis")


def up(project: Project) -> None:
    project.compose("up", "--detach", "--wait", "redis")


def test_the_drill(project: Callable[..., Project]) -> None:  # K38, X7
    one = project(REDIS_PASSWORD=PASSWORD)
    up(one)
    with one.redis() as client:
        client.set("k", "old")
        client.set("short", "old", ex=1000)
        client.rpush("interactive", *range(100))
        queue = client.lrange("interactive", 0, -1)
    assert one.cli.run("backup", "b.tar.gz").code == 0
    with one.redis() as client:
        client.set("k", "new")
        client.delete("short", "interactive")
    # From here on its own file says "new", and a start reads nothing else.
    kill(one)
    up(one)
    with one.redis() as client:
        assert client.get("k") == "new"

    done = one.cli.run("restore", "b.tar.gz", "--yes")
    assert done.code == 0, done
    assert PASSWORD not in done.err
    kill(one)
    stopped = one.cli.run("backup", "c.tar.gz", "--json")
    assert (stopped.code, stopped.error["code"]) == (3, "redis_unreachable"), stopped
    up(one)
    with one.redis() as client:
        assert client.get("k") == "old"
        assert 0 < client.ttl("short") <= 1000
        assert client.lrange("interactive", 0, -1) == queue

    # On an empty volume, as after the loss of all of it.
    one.compose("down", "--volumes", "--timeout", "5")
    up(one)
    with one.redis() as client:
        assert client.dbsize() == 0
    assert one.cli.run("restore", "b.tar.gz", "--yes").code == 0
    with one.redis() as client:
        assert client.get("k") == "old"
