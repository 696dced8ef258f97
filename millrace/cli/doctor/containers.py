"""The containers of our compose files: each one's state, and the last words of those that are not well."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from typing import Any

from millrace.cli.doctor.docker import Container, Docker
from millrace.cli.doctor.finding import Finding, note, ok, wrong
from millrace.cli.doctor.programs import ask, together
from millrace.cli.output import size
from millrace.settings import Settings, hide_secrets
from millrace.symptoms import telling

CHECK = "containers"
LAST_WORDS = "80"  # lines of a log to look for a cause in
STEADY = 60.0  # seconds after which a container without a health check counts as started
#: Exit codes: SIGKILL, SIGILL; of its own will or at SIGTERM.
KILLED, ILLEGAL, ASKED_TO_END = 137, 132, (0, 143)


def containers(settings: Settings, docker: Docker) -> list[Finding]:
    """Look at each service of our compose files."""
    if not docker.info or not docker.services:
        return []
    absent = [name for name in docker.services if not docker.ours(name)]
    found = [container for name in docker.services for container in docker.ours(name)]
    findings: list[Finding] = []
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        findings.append(note(CHECK, f"{', '.join(absent)} {verb} not started", "docker compose up -d"))
    if not found:
        return findings
    described, *logs = together(
        [
            partial(ask, "docker", "inspect", *(container.id for container in found)),
            *(partial(ask, "docker", "logs", "--tail", LAST_WORDS, container.id) for container in found),
        ]
    )
    try:
        inspected = {entry["Id"]: entry for entry in json.loads(described.out or "[]")}
    except ValueError:
        inspected = {}
    well = []
    for container, log in zip(found, logs, strict=True):
        if container.id not in inspected:  # it has gone since it was listed
            continue
        lines = hide_secrets(log.out + log.err, settings).splitlines()
        finding = _judge(container, inspected[container.id], lines, settings)
        if finding is None:
            well.append(f"{container.service} {_health(inspected[container.id]) or 'runs'}")
        else:
            findings.append(finding)
    return [*([ok(CHECK, ", ".join(well))] if well else []), *findings]


def _health(entry: dict[str, Any]) -> str:
    return str((entry["State"].get("Health") or {}).get("Status") or "")


def _judge(container: Container, entry: dict[str, Any], lines: list[str], settings: Settings) -> Finding | None:
    """Return what is not well with a container."""
    service, state = container.service, entry["State"]
    status, code, restarts, health = state["Status"], state["ExitCode"], entry.get("RestartCount", 0), _health(entry)
    logs = f"docker compose logs {service} says why."
    if error := hide_secrets(state.get("Error") or "", settings):
        line, mend = telling([error])
        return wrong(CHECK, f"{service} cannot be started: {line}", mend or "Correct that, then: docker compose up -d")
    line, mend = telling([*lines, "Illegal instruction"] if code == ILLEGAL else lines)
    said = f": {line}" if line else ""
    if state.get("OOMKilled"):
        return wrong(CHECK, f"{service} was ended by its memory limit (exit code {code}){said}", _less_memory(service))
    if status != "running" and code == KILLED:
        # By hand; or by the kernel, which without a limit leaves no more than this. Of one with a limit Docker
        # hears apart from its end, and may miss it.
        what = f"{service} was killed (exit code {code}){said}"
        if limit := entry["HostConfig"].get("Memory"):
            what += f"; its memory is limited to {size(limit)}"
            mend = f"docker compose up -d {service}; if nobody killed it, that is too little. {_less_memory(service)}"
            return wrong(CHECK, what, mend)
        mend = f"docker compose up -d {service}; if nobody killed it, `dmesg` says whether memory was short."
        return wrong(CHECK, what, mend)
    if status == "restarting" or (status == "running" and restarts and _unsteady(state)):
        what = f"{service} ends and is started again ({restarts} times; exit code {code}){said}"
        return wrong(CHECK, what, mend or (logs if not line else "Correct that, then: docker compose up -d"))
    if status == "exited" and code in ASKED_TO_END:
        return note(CHECK, f"{service} is stopped", "docker compose up -d")
    if status == "paused":
        return wrong(CHECK, f"{service} is paused", f"docker compose unpause {service}")
    if status != "running":
        how = "has ended" if status == "exited" else f"is {status}"
        return wrong(CHECK, f"{service} {how} (exit code {code}){said}", mend or logs)
    if not (entry.get("NetworkSettings") or {}).get("Networks"):
        mend = f"docker compose up -d --force-recreate {service}"
        return wrong(CHECK, f"{service} runs, and is in no network: nobody reaches it", mend)
    if health == "unhealthy":
        probes = state["Health"].get("Log") or [{}]
        output = hide_secrets(str(probes[-1].get("Output", "")), settings).strip().splitlines()
        why = output[-1] if output else f"exit code {probes[-1].get('ExitCode', '?')}"
        return wrong(CHECK, f"{service} is unhealthy: {why}", mend or logs)
    if health == "starting":
        mend = f"Wait; docker compose logs -f {service} shows how far it is."
        return note(CHECK, f"{service} is starting{said}", mend)
    if restarts:
        return note(CHECK, f"{service} runs, and has ended {restarts} times before", logs)
    return None


def _unsteady(state: dict[str, Any]) -> bool:
    """Whether a container that has ended before may well do so again."""
    health = (state.get("Health") or {}).get("Status")
    since = datetime.now(UTC) - datetime.fromisoformat(state["StartedAt"])
    return health in ("starting", "unhealthy") or (health is None and since.total_seconds() < STEADY)


def _less_memory(service: str) -> str:
    if service == "redis":
        return "Raise mem_limit of redis in docker-compose.yml, or lower its maxmemory."
    return "Raise LLM_MEMORY, lower N_CTX, N_PARALLEL or MAX_MODEL_LEN, or take a smaller quantization."
