"""Redis: whether it answers, lets us in, keeps what it is given, and is closed to others."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from millrace import embedded, presence
from millrace.cli.doctor.docker import Docker
from millrace.cli.doctor.finding import Finding, note, ok, told, wrong
from millrace.cli.doctor.programs import LIMIT
from millrace.cli.doctor.sockets import listeners
from millrace.cli.output import size
from millrace.embedded import LOOPBACK
from millrace.errors import MillraceError
from millrace.settings import Settings

CHECK = "redis"
OLDEST = (6, 2)
FULL = 0.9  # of maxmemory


def redis(settings: Settings, docker: Docker) -> list[Finding]:
    """Look at Redis; one finding for each trouble."""
    try:
        with presence.connect(settings, LIMIT) as client:
            info = client.info()
    except MillraceError as error:
        return [_unreachable(settings, docker, error)]
    assert isinstance(info, dict)
    version = str(info.get("redis_version", "?"))
    troubles = [*_keeping(settings, info), *_room(info), *_closed(settings)]
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < OLDEST:
        troubles.append(wrong(CHECK, f"version {version} is too old", "Install Redis 6.2 or later, or Valkey."))
    if any(trouble.verdict == "wrong" for trouble in troubles):
        return troubles
    kept = ", append-only file on" if info.get("aof_enabled") else ""
    return [ok(CHECK, f"{settings.redis_address}: PONG, version {version}{kept}, noeviction"), *troubles]


def _unreachable(settings: Settings, docker: Docker, error: MillraceError) -> Finding:
    parts = urlsplit(settings.redis_dsn)
    # One on another machine is never replaced by an embedded one.
    if error.code != "redis_unreachable" or parts.hostname not in LOOPBACK:
        return told(CHECK, error)
    if settings.compose_file:
        return wrong(CHECK, error.message, "docker compose up -d redis")
    try:
        program = embedded.find_redis()
    except MillraceError as missing:
        return wrong(CHECK, error.message, missing.hint)
    return note(CHECK, error.message, f"`millrace up` starts {program}.")


def _keeping(settings: Settings, info: dict[str, Any]) -> list[Finding]:
    """Look at what happens to queued work when memory or the process ends."""
    findings = []
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        findings.append(
            wrong(
                CHECK,
                f"{settings.redis_address} has maxmemory-policy {policy}, which throws queued work away",
                "redis-cli CONFIG SET maxmemory-policy noeviction, and write it into its configuration.",
            )
        )
    if info.get("aof_last_write_status", "ok") != "ok":
        findings.append(
            wrong(CHECK, "it cannot write its append-only file, and refuses to be written", "Look at its log and disk.")
        )
    elif not info.get("aof_enabled"):
        findings.append(
            note(
                CHECK,
                "its append-only file is off: interactive tasks in the queue are lost when it ends (batches are not)",
                "redis-cli CONFIG SET appendonly yes, and write it into its configuration.",
            )
        )
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        findings.append(
            wrong(
                CHECK,
                "its last snapshot failed, and it may refuse to be written",
                "Look at its log and disk; with an append-only file, redis-cli CONFIG SET save ''.",
            )
        )
    return findings


def _room(info: dict[str, Any]) -> list[Finding]:
    limit, used = int(info.get("maxmemory") or 0), int(info.get("used_memory") or 0)
    if not limit or used < FULL * limit:
        return []
    return [
        wrong(
            CHECK,
            f"it uses {size(used)} of its maxmemory of {size(limit)}: new tasks will be refused",
            f"redis-cli CONFIG SET maxmemory {2 * max(limit, used) >> 20}mb, and write it into its configuration.",
        )
    ]


def _closed(settings: Settings) -> list[Finding]:
    """Look at whether others get in without a password, as we did when we have none."""
    parts = urlsplit(settings.redis_dsn)
    if parts.password or parts.scheme == "unix":
        return []
    if parts.hostname in LOOPBACK:
        found = [listener.address for listener in listeners(parts.port or 6379) if not listener.loopback]
        where = f"{', '.join(found)}, port {parts.port or 6379}" if found else ""
    else:
        where = str(parts.hostname)
    if not where:
        return []
    return [
        wrong(
            CHECK,
            f"whoever reaches {where} gets in without a password",
            "redis-cli CONFIG SET requirepass … and the same in REDIS_PASSWORD; or bind it to 127.0.0.1.",
        )
    ]
