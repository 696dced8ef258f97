"""A Compose project in a folder of its own: our files, a tiny model, a .env, and names and ports nobody else has."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

import redis

from millrace.models.tiny import make_tiny
from tests.cli import Cli
from tests.services import ROOT, free_port

FILES = ("Dockerfile", "Dockerfile.llamacpp", "Dockerfile.vllm", ".dockerignore", ".env.sample")
#: What a worker's image is made of.
SOURCES = (
    "millrace",
    "worker",
    "tasks",
    "celery_app.py",
    "pyproject.toml",
    "requirements.lock",
    "README.md",
    "LICENSE",
)
MODEL = "tiny"

# Of this process, and of no earlier one with its number.
_RUN = f"{os.getpid()}-{secrets.token_hex(3)}"
_numbers = itertools.count()


def docker(
    *arguments: str, seconds: float = 60, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run docker and return how it ended."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=seconds, check=False, **options
    )
    if check:
        assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done


class Project:
    """`compose` and `millrace` in a folder that has our compose files and nothing of this machine."""

    def __init__(self, folder: Path, *overrides: str, **variables: object) -> None:
        self.folder = folder
        self.name = f"millrace-test-{_RUN}-{next(_numbers)}"
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*ROOT.glob("docker-compose*.yml"), *(ROOT / name for name in FILES)]:
            shutil.copy(path, folder)
        # Some may run here already, of somebody else.
        worker = folder / "docker-compose.worker.yml"
        worker.write_text(worker.read_text().replace("127.0.0.1:9810-9813:", "127.0.0.1::"))
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder)
        shutil.copytree(ROOT / "docker", folder / "docker")
        self.variables: dict[str, str] = {}
        self.cli = Cli(folder, {})
        # The lock of starting engines is among our own projects alone.
        self.cli.environment["TMPDIR"] = str(folder.parent)
        # Celery's result backend calls what redis-py 8 has renamed.
        self.cli.environment["PYTHONWARNINGS"] += ",ignore:Call to deprecated setex"
        own = {
            "COMPOSE_FILE": ":".join(["docker-compose.yml", *(f"docker-compose.{name}.yml" for name in overrides)]),
            "COMPOSE_PROJECT_NAME": self.name,
            "REDIS_PASSWORD": "a secret of the tests",
            "REDIS_PORT": free_port(),
            "LLM_API_KEY": "a-key-of-the-tests",
            "LLM_PORT": free_port(),
            "LLM_MODEL": MODEL,
            "N_THREADS": 1,
            "HEALTH_CHECK_PORT": free_port(),
            "METRICS_PORT": 0,
            "WORKER_USER": f"{os.getuid()}:{os.getgid()}",
        }
        self.set(**(own | variables))

    def set(self, **variables: object) -> None:
        """Set variables of .env; None takes one out."""
        for name, value in variables.items():
            if value is None:
                self.variables.pop(name, None)
            else:
                self.variables[name] = str(value)
        lines = [
            f"{name}='{value}'" if " " in value or "$" in value else f"{name}={value}"
            for name, value in self.variables.items()
        ]
        (self.folder / ".env").write_text("\n".join(lines) + "\n")

    def add_models(self) -> None:
        """Put the tiny model where both engines look for theirs."""
        made = make_tiny(self.folder / "made", context=2048)
        (self.folder / "models/gguf").mkdir(parents=True)
        (self.folder / "models/hf").mkdir(parents=True)
        made.gguf.rename(self.folder / "models/gguf/tiny.gguf")
        made.hf.rename(self.folder / "models/hf/tiny")
        for path in [self.folder / "models", *(self.folder / "models").rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)  # the containers run as another user
        # pytest's own folders are closed to others.
        for parent in (self.folder, *self.folder.parents):
            if parent.owner() == self.folder.owner() and parent.stat().st_mode & 0o777 == 0o700:
                parent.chmod(0o711)

    def compose(self, *arguments: str, seconds: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker compose`, as a person in this folder would."""
        return docker("compose", *arguments, seconds=seconds, check=check, cwd=self.folder, env=self.cli.environment)

    def config(self, *overrides: str) -> dict[str, Any]:
        """Return what Compose makes of these files together."""
        files = ["docker-compose.yml", *(f"docker-compose.{name}.yml" for name in overrides)]
        done = self.compose(*(word for name in files for word in ("-f", name)), "config", "--format", "json")
        return dict(json.loads(done.stdout))

    def container(self, service: str, index: int = 1) -> dict[str, Any]:
        """Return what Docker says of a service's container."""
        ids = self.compose("ps", "--all", "--quiet", service).stdout.split()
        assert len(ids) >= index, f"{service} has no container {index}"
        return dict(json.loads(docker("inspect", ids[index - 1]).stdout)[0])

    def redis(self) -> redis.Redis:
        """Return a client of the project's Redis."""
        return redis.Redis(
            port=int(self.variables["REDIS_PORT"]), password=self.variables["REDIS_PASSWORD"], decode_responses=True
        )

    def logs(self, service: str) -> str:
        """Return what a service has said."""
        return self.compose("logs", "--no-color", "--no-log-prefix", service).stdout

    def close(self) -> None:
        """Remove everything that carries our name."""
        label = f"label=com.docker.compose.project={self.name}"
        for kind, remove in (
            ("container", ("rm", "-f", "-v")),
            ("network", ("network", "rm")),
            ("volume", ("volume", "rm")),
        ):
            listed = {"container": ("ps", "-aq"), "network": ("network", "ls", "-q"), "volume": ("volume", "ls", "-q")}[
                kind
            ]
            if found := docker(*listed, "--filter", label).stdout.split():
                docker(*remove, *found)
        self.cli.kill_all()
