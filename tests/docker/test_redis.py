"""The container of Redis."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import redis

from tests.docker.project import Project, docker
from tests.services import environment, until

PASSWORD = 'p@ss"w\\ord $1/#'


@pytest.fixture
def running(project: Callable[..., Project]) -> Project:
    one = project(REDIS_PASSWORD=PASSWORD)
    one.compose("up", "--detach", "--wait")
    return one


def health(project: Project) -> str:
    return str(project.container("redis")["State"]["Health"]["Status"])


def test_it_is_as_the_broker_needs_it(running: Project) -> None:  # K3
    with running.redis() as client:
        assert client.ping()  # a password of strange characters arrives as it is
        wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec", "save": ""}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert int(client.config_get("maxmemory")["maxmemory"]) > 0
    container = running.container("redis")
    assert PASSWORD not in str(container["Args"])
    assert container["HostConfig"]["ReadonlyRootfs"] is True
    assert running.compose("exec", "-T", "redis", "id", "-un").stdout.strip() == "redis"


def test_what_is_queued_survives_a_kill(running: Project) -> None:
    # As a program that only knows Celery: three tasks that no worker has taken.
    send = (
        "from tasks.inference import chat\n"
        "for number in range(3): chat.delay([{'role': 'user', 'content': str(number)}])\n"
    )
    settings = {"redis_port": running.variables["REDIS_PORT"], "redis_password": PASSWORD}
    subprocess.run(
        [sys.executable, "-c", send], cwd=running.folder, env=environment(**settings), check=True, timeout=60
    )
    with running.redis() as client:
        before = {key: client.type(key) for key in client.scan_iter()}
        assert client.llen("interactive") + client.llen("interactive\x06\x163") == 3
        # It syncs once a second: what it has acknowledged by now is on the disk a moment later.
        until(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0, "a synced file")
    started = running.container("redis")["State"]["StartedAt"]
    docker("kill", "--signal", "KILL", running.container("redis")["Id"])
    # Docker does not start again what was killed by hand: `up` does.
    until(lambda: not running.container("redis")["State"]["Running"], "a dead Redis")
    running.compose("up", "--detach", "--wait")
    assert running.container("redis")["State"]["StartedAt"] != started
    with running.redis() as client:
        assert {key: client.type(key) for key in client.scan_iter()} == before


def test_a_wrong_password_is_unhealthy(running: Project) -> None:  # K37
    assert health(running) == "healthy"
    with running.redis() as client:
        client.config_set("requirepass", "another")
    until(lambda: health(running) == "unhealthy", "an unhealthy Redis")


def test_the_worker_says_that_the_password_is_wrong(running: Project) -> None:
    running.set(REDIS_PASSWORD="wrong")
    done = running.cli.run("worker")
    assert done.code == 3
    assert "[redis_password]" in done.err
    assert PASSWORD not in done.err


def test_it_is_reached_from_its_own_network_alone(running: Project) -> None:  # K14
    port = int(running.variables["REDIS_PORT"])
    address = next(iter(running.container("redis")["NetworkSettings"]["Networks"].values()))["IPAddress"]
    ask = ("timeout", "3", "redis-cli", "-h", address, "ping")
    label = ("--rm", "--label", f"com.docker.compose.project={running.name}")
    inside = docker("run", *label, "--network", f"{running.name}_default", "redis:7-alpine", *ask, check=False)
    assert "NOAUTH" in inside.stdout + inside.stderr
    outside = docker("run", *label, "redis:7-alpine", *ask, check=False)
    assert outside.returncode != 0
    assert "NOAUTH" not in outside.stdout + outside.stderr
    # Nor from another machine: this one's address on any other network does not listen.
    gateway = docker("network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}").stdout.strip()
    with pytest.raises(redis.ConnectionError), contextlib.closing(redis.Redis(gateway, port)) as client:
        client.ping()
