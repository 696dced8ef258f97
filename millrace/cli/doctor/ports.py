"""The ports that our parts listen at: free, ours, or taken by whom."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.cli.doctor.docker import Docker
from millrace.cli.doctor.finding import Finding, note, ok, wrong
from millrace.cli.doctor.sockets import Process, holder, listeners
from millrace.compose import SERVICE
from millrace.settings import Settings

CHECK = "ports"


@dataclass(frozen=True)
class _Wanted:
    port: int
    #: Address it will be bound to; "" for all of them.
    host: str
    #: The setting that moves it; "" where there is none.
    setting: str
    #: The service of our compose files whose port it is; "" for our own processes.
    service: str = ""


def ports(settings: Settings, docker: Docker) -> list[Finding]:
    """Look at each port that a container or a worker of ours wants."""
    said, findings = [], []
    for wanted in _wanted(settings, docker):
        taken = _taken_by(wanted, docker)
        if not taken or taken == "ours":
            said.append(f"{wanted.port} is {taken or 'free'}")
            continue
        if docker.silent and isinstance(taken, Process) and (taken.docker or not taken.pid):
            whom = "a container" if taken.docker else f"a container, or {taken}"
            what = f"{wanted.port} ({wanted.setting or wanted.service}) is held by {whom}"
            findings.append(note(CHECK, f"{what}; Docker is not there to say which"))
            continue
        move = f"set {wanted.setting}={_free_after(wanted.port)}" if wanted.setting else "give ours another port"
        what = f"{wanted.port} ({wanted.setting or wanted.service}) is taken by {taken}"
        findings.append(wrong(CHECK, what, f"End that, or {move}."))
    return [*([ok(CHECK, ", ".join(said))] if said else []), *findings]


def _wanted(settings: Settings, docker: Docker) -> list[_Wanted]:
    names = {getattr(settings, name): name.upper() for name in Settings.model_fields if name.endswith("_port")}
    found: dict[int, _Wanted] = {}
    for service, described in docker.services.items():
        for port in described.get("ports", []):
            number = str(port.get("published", ""))
            if number.isdecimal() and port.get("protocol", "tcp") == "tcp":
                host = str(port.get("host_ip", ""))
                found[int(number)] = _Wanted(int(number), host, names.get(int(number), ""), service)
    if settings.compose_file and not docker.services:  # not valid, or no Compose: what our files would ask for
        found[settings.redis_port] = _Wanted(settings.redis_port, "127.0.0.1", "REDIS_PORT", "redis")
        found[settings.llm_port] = _Wanted(settings.llm_port, "127.0.0.1", "LLM_PORT", SERVICE)
    health = settings.health_check_port if settings.health_check_enabled else 0
    for own, setting in ((settings.metrics_port, "METRICS_PORT"), (health, "HEALTH_CHECK_PORT")):
        if own:
            found.setdefault(own, _Wanted(own, "127.0.0.1", setting))
    return list(found.values())


def _taken_by(wanted: _Wanted, docker: Docker) -> str | Process:
    """Return who has a port: "" for nobody, "ours", a container in words, or a process."""
    for container in docker.containers:
        if container.state == "running" and container.publishes(wanted.port):
            if container in docker.ours(wanted.service):
                return "ours"
            return f"the container {container.name} (docker stop {container.name})"
    for listener in listeners(wanted.port):
        if listener.blocks(wanted.host):
            process = holder(listener)
            # A container of ours that is being started again is not listed with its ports.
            if wanted.service and docker.ours(wanted.service) and process.docker:
                return "ours"
            return "ours" if process.millrace and not wanted.service else process
    return ""


def _free_after(port: int) -> int:
    return next((number for number in range(port + 1, 65536) if not listeners(number)), port + 1)
