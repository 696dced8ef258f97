"""Docker: the program, the daemon, Compose and our compose files. Asked once, for every check."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from millrace.cli.doctor.finding import Finding, ok, wrong
from millrace.cli.doctor.programs import MISSING, TOO_LATE, Answer, ask, together
from millrace.compose import SERVICE
from millrace.settings import Settings, compose_files, engine_override, hide_secrets

#: docker-compose.vllm.yml has a config with `content`, which came with it.
OLDEST_COMPOSE = (2, 23, 1)

_LISTED = "\t".join(
    (
        "{{.ID}}",
        "{{.Names}}",
        "{{.State}}",
        "{{.Ports}}",
        '{{.Label "com.docker.compose.project"}}',
        '{{.Label "com.docker.compose.service"}}',
        '{{.Label "com.docker.compose.oneoff"}}',
    )
)


@dataclass(frozen=True)
class Container:
    """A container of this machine, whoever started it. `ports` is as `docker ps` prints it."""

    id: str
    name: str
    state: str
    ports: str
    project: str
    service: str

    def publishes(self, port: int) -> bool:
        """Whether it has a port of this machine."""
        for first, last in re.findall(r":(\d+)(?:-(\d+))?->", self.ports):
            if int(first) <= port <= int(last or first):
                return True
        return False


@dataclass(frozen=True)
class Docker:
    """What Docker and Compose say; all empty where COMPOSE_FILE is, because nothing is asked then."""

    #: `docker info`; empty where the daemon does not answer.
    info: dict[str, Any] = field(default_factory=dict)
    #: `docker compose config`, with every variable filled in; empty where it is not valid.
    config: dict[str, Any] = field(default_factory=dict)
    containers: tuple[Container, ...] = ()
    findings: tuple[Finding, ...] = ()
    #: Asked, and not there to answer: what follows from its silence alone is not wrong.
    silent: bool = False

    @property
    def services(self) -> dict[str, Any]:
        """The services of our compose files, by name."""
        return dict(self.config.get("services", {}))

    def ours(self, service: str) -> list[Container]:
        """Return our containers of a service."""
        project = self.config.get("name")
        return [found for found in self.containers if (found.project, found.service) == (project, service)]

    def runs(self, service: str) -> bool:
        """Whether a container of ours runs that service."""
        return any(found.state == "running" for found in self.ours(service))


def engine_in_container(settings: Settings) -> bool:
    """Whether COMPOSE_FILE brings an engine, and it is the one that the settings mean."""
    return engine_override(settings.compose_file) == settings.llm_backend


def models_mount(settings: Settings, docker: Docker) -> tuple[str, str] | None:
    """Return what the engine's container has as /models: (bind, folder) or (volume, name); None without one."""
    if not engine_in_container(settings):
        return None
    for volume in docker.services.get(SERVICE, {}).get("volumes", []):
        if volume.get("target") == "/models":
            source = str(volume.get("source", ""))
            if volume.get("type") == "volume":
                source = docker.config.get("volumes", {}).get(source, {}).get("name", source)
            return str(volume.get("type")), source
    # The files are not valid, or there is no Compose to read them.
    source = settings.models_source or f"models/{'hf' if settings.llm_backend == 'vllm' else 'gguf'}"
    return "bind" if source.startswith((".", "/", "~")) or not settings.models_source else "volume", source


def look(settings: Settings) -> Docker:
    """Ask Docker, if COMPOSE_FILE says that it is used."""
    if not settings.compose_file:
        return Docker(findings=(ok("docker", "not used; COMPOSE_FILE is empty, and the embedded default needs none"),))
    info, version, config, listed = together(
        [
            partial(ask, "docker", "info", "--format", "{{json .}}"),
            partial(ask, "docker", "compose", "version", "--short"),
            partial(ask, "docker", "compose", "config", "--format", "json"),
            partial(ask, "docker", "ps", "--all", "--no-trunc", "--format", _LISTED),
        ]
    )
    if info.code == MISSING:
        missing = wrong(
            "docker",
            "COMPOSE_FILE chooses containers, and there is no `docker` here",
            "Install Docker Engine and its Compose plugin, or take COMPOSE_FILE out: `millrace up` needs no Docker.",
        )
        return Docker(findings=(missing,), silent=True)
    told, compose = _daemon(info, settings), _compose(version) or _files(settings, config)
    silent = told is not None
    described = {} if silent else _json(info.out)
    if told is None:
        told = ok("docker", f"Engine {described.get('ServerVersion', '?')}")
    if compose is None:
        compose = ok("compose", f"Compose {version.out.strip()}; {settings.compose_file}")
    return Docker(
        info=described,
        config=_json(config.out) if config.code == 0 else {},
        containers=tuple(_containers(listed.out)) if listed.code == 0 else (),
        findings=(told, compose),
        silent=silent,
    )


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _containers(listed: str) -> list[Container]:
    rows = [line.split("\t") for line in listed.splitlines()]
    return [Container(*row[:6]) for row in rows if len(row) == 7 and row[6] != "True"]


def _daemon(info: Answer, settings: Settings) -> Finding | None:
    # With a format, some versions end with 0 and say it in the object.
    errors = _json(info.out).get("ServerErrors") or []
    if info.code == 0 and not errors:
        return None
    said = hide_secrets(info.err.strip().splitlines()[-1] if info.err.strip() else " ".join(errors), settings).rstrip(
        "."
    )
    if info.code == TOO_LATE:
        return wrong("docker", f"the Docker daemon gives {said}", "Restart it: sudo systemctl restart docker")
    if "permission denied" in said.lower():
        return wrong(
            "docker",
            f"the Docker daemon is not yours to use: {said}",
            "sudo usermod -aG docker $USER, and log in again. (Who may use it is as good as root.)",
        )
    mend = "Start it: sudo systemctl start docker, or Docker Desktop; or correct DOCKER_HOST."
    return wrong("docker", f"the Docker daemon does not answer: {said}", mend)


def _compose(version: Answer) -> Finding | None:
    if version.code == TOO_LATE:
        return wrong("compose", f"Compose gives {version.err}", "Try `docker compose version` by hand.")
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", version.out)
    if version.code != 0 or found is None:
        return wrong(
            "compose",
            "Docker has no Compose plugin",
            "Install it: sudo apt install docker-compose-plugin, or as your system names it.",
        )
    if tuple(map(int, found.groups())) < OLDEST_COMPOSE:
        oldest = ".".join(map(str, OLDEST_COMPOSE))
        return wrong(
            "compose",
            f"Compose {found[0]} is too old for our files, which need {oldest}",
            "Upgrade it: sudo apt install --only-upgrade docker-compose-plugin, or as your system names it.",
        )
    return None


def _files(settings: Settings, config: Answer) -> Finding | None:
    absent = [name for name in compose_files(settings.compose_file) if not Path(name).is_file()]
    if absent:
        mend = "Run it in the project's folder, or correct COMPOSE_FILE."
        return wrong("compose", f"COMPOSE_FILE names {', '.join(absent)}, and there is no such file", mend)
    if config.code == 0:
        return None
    said = hide_secrets(config.last_line, settings)
    if needed := re.search(r"required variable (\w+) is missing a value: (.*)", said):
        hint = needed[2]
        return wrong("compose", f"{needed[1]} is not set, and the containers need it", hint[0].upper() + hint[1:] + ".")
    return wrong("compose", f"the compose files are not valid: {said}", "`docker compose config` shows where.")
