"""Docker Compose, as far as the engine's container needs it: start it, wait until it is well, hear why it is not.

A container that has ended says why within a second here, not after the time that its health check allows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from millrace.errors import MillraceError, SettingsError, Unreachable
from millrace.settings import Settings, compose_files, hide_secrets
from millrace.symptoms import telling

SERVICE = "llm-server"
LOOK = 0.5  # seconds between looks at a container
LAST_WORDS = 8  # lines of a log in an error
_TAIL = 60  # lines of output that are kept to find a reason in

#: What Compose starts is all or nothing.
_WITHOUT = "A service that cannot be had keeps all from starting: take its file out of COMPOSE_FILE to do without."

#: What Compose and the daemon say of troubles that have a cure of their own: pattern, code, message, hint.
_TROUBLES = (
    (
        r"required variable (\w+) is missing a value",
        "missing_setting",
        r"\1 is not set, and the containers need it.",
        "Set it in .env to a secret of your own; `millrace config init` makes a whole new .env.",
    ),
    (
        r"only-one-engine-in-COMPOSE_FILE",
        "two_engines",
        "COMPOSE_FILE names both docker-compose.llamacpp.yml and docker-compose.vllm.yml.",
        "There is one llm-server: take one of them out.",
    ),
    (
        r"[Bb]ind for [\d.]+:(\d+) failed: port is already allocated|listen tcp\d? [\d.]+:(\d+): bind: address already|"
        r"failed to bind host port (?:for )?[\d.]+:(\d+)|ports are not available: exposing port TCP [\d.]+:(\d+)",
        "port_taken",
        r"Port \1\2\3\4 of this machine is taken.",
        "`millrace doctor` says by whom; end that, or set LLM_PORT or REDIS_PORT in .env.",
    ),
    (
        r"could not select device driver|nvidia-container-cli|unresolvable CDI devices",
        "gpu_missing",
        "Docker has no NVIDIA GPU to give to a container here.",
        "Install the driver and the NVIDIA Container Toolkit, or take docker-compose.gpu.yml out of COMPOSE_FILE.",
    ),
    (
        r"[Pp]ermission denied.*(?:docker\.sock|docker API)",
        "docker_unreachable",
        "You may not use the Docker daemon.",
        "sudo usermod -aG docker $USER, and log in again. (Who may use it is as good as root.)",
    ),
    (
        r"Cannot connect to the Docker daemon|[Ii]s the docker daemon running|failed to connect to the docker API",
        "docker_unreachable",
        "The Docker daemon does not answer.",
        "Start it: sudo systemctl start docker, or Docker Desktop. Without it, `millrace up` has an engine of its own.",
    ),
    (
        r"is not a docker command|unknown (?:shorthand )?flag: '[fp]'",
        "compose_missing",
        "This Docker has no Compose v2.",
        "Install the package docker-compose-plugin (the old docker-compose does not do).",
    ),
    (
        r"open ([^\n:]*\.ya?ml): no such file",
        "compose_file_missing",
        r"COMPOSE_FILE names \1, and there is no such file.",
        "Correct COMPOSE_FILE, and be in the repository's folder.",
    ),
    (
        r"failed to do request: Head \"https?://(\S+?)/v2/(\S+?)/manifests/([^\s\"]+)\"",
        "image_missing",
        r"The image \1/\2:\3 is not here and cannot be fetched.",
        "Check its name and the network; `docker pull` says more. " + _WITHOUT,
    ),
    (
        r"(\S+) (?:Error|Warning) +(?:Get|Head) \"https?://[^/]+/|"
        r"pull access denied for ([^\s,]+)|manifest for (\S+) not found",
        "image_missing",
        r"The image of \1\2\3 is not here and cannot be fetched.",
        "Check its name and the network; `docker compose pull` says more. " + _WITHOUT,
    ),
    (
        r"bind source path does not exist: (\S+)",
        "folder_missing",
        r"There is no folder \1, which a container needs.",
        "Make it with mkdir -p, as the user that WORKER_USER names; or correct DATA_DIR.",
    ),
)
_KILLED = 137  # exit code of SIGKILL
#: A paused container is there, and answers nobody.
_ENDED = ("exited", "dead", "restarting", "paused")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # Compose prints them into pipes too
_WRONG = ("missing_setting", "two_engines", "compose_file_missing")


class Compose:
    """The project of the current folder, with these compose files. What is shown of their words has no secrets.

    Every method raises:
        SettingsError: A setting that the files need is missing, or the files contradict each other.
        Unreachable: Docker or Compose is not there or refuses, by code: docker_missing, docker_unreachable,
            compose_missing, compose_failed, port_taken, gpu_missing, image_missing.
    """

    def __init__(self, settings: Settings, compose_file: str = "") -> None:
        self._settings = settings
        names = compose_files(compose_file or settings.compose_file)
        self._files = [word for name in names for word in ("-f", name)]

    def check(self) -> None:
        """Check that the files are valid together."""
        self._run("config", "-q")

    def config(self) -> dict[str, Any]:
        """Return what Compose makes of the files together."""
        return dict(json.loads(self._ask("compose", *self._files, "config", "--format", "json")))

    def build(self, told: Callable[[str], None]) -> None:
        """Make the engine's image, or find that nothing of it has changed; `told` hears the output."""
        self._run("build", SERVICE, told=told)

    def up(self, told: Callable[[str], None] = lambda line: None) -> None:
        """Create and start what is not as the files say, without waiting for its health."""
        self._run("up", "--detach", "--remove-orphans", told=told)

    def stop(self, service: str) -> None:
        """Stop a service's containers."""
        self._run("stop", service)

    def services(self) -> list[str]:
        """Return the services of the files, the engine first."""
        found = self._ask("compose", *self._files, "config", "--services").split()
        return sorted(found, key=lambda name: name != SERVICE)

    def wait(self, service: str, looking: Callable[[float], None] = lambda seconds: None) -> None:
        """Return once a service's containers are healthy; `looking` is told how long it has been, now and then.

        Raises:
            Unreachable: One has ended, or is unhealthy; the message has its last words (engine_failed, or
                container_failed).
        """
        for container in self._ask("compose", *self._files, "ps", "--all", "--quiet", service).split():
            self._wait(service, container, looking)

    def _wait(self, service: str, container: str, looking: Callable[[float], None]) -> None:
        started = time.monotonic()
        restarts: int | None = None
        while True:
            entry = dict(json.loads(self._ask("inspect", container))[0])
            state, count = entry["State"], int(entry["RestartCount"])
            restarts = count if restarts is None else restarts
            health = state.get("Health", {}).get("Status")
            if state["Status"] in _ENDED or count > restarts or health == "unhealthy":
                self._failed(service, state)
            if state["Status"] == "running" and health == "healthy":
                return
            looking(time.monotonic() - started)
            time.sleep(LOOK)

    def last_words(self, service: str) -> list[str]:
        """Return the last lines of a service's log that say something, each once."""
        options = ("--no-color", "--no-log-prefix", "--tail", str(_TAIL))
        text = hide_secrets(self._ask("compose", *self._files, "logs", *options, service), self._settings)
        lines = (_ESCAPE.sub("", line).strip() for line in text.splitlines())
        return list(dict.fromkeys(line for line in lines if line and "/health" not in line))

    def _failed(self, service: str, state: dict[str, Any]) -> NoReturn:
        what, code = ("The engine", "engine_failed") if service == SERVICE else (service, "container_failed")
        words = self.last_words(service)
        for line in reversed(words):
            if line.startswith("millrace: "):  # our own script has looked, and knows
                said = line.removeprefix("millrace: ")
                raise Unreachable(f"{what} did not start. {said}", "Correct that, then try again.", code=code)
        _, mend = telling(words)
        if state["Status"] in ("running", "paused"):
            how = "is unhealthy" if state["Status"] == "running" else "is paused"
        else:
            how = f"ended with {state.get('ExitCode', '?')}"
        if state.get("OOMKilled"):
            how += ", killed at its memory limit"
            mend = "Use a smaller model, N_CTX or MAX_MODEL_LEN, or raise LLM_MEMORY."
        elif state.get("ExitCode") == _KILLED:  # at a limit, too: Docker may miss which it was
            how += ", killed"
            mend = "If nobody did that, use a smaller model, N_CTX or MAX_MODEL_LEN, or raise LLM_MEMORY."
        last = "\n  ".join(words[-LAST_WORDS:]) or "(its log is empty)"
        raise Unreachable(
            f"{what} {how}; its last words:\n  {last}",
            mend or f"`docker compose logs {service}` has all of them.",
            code=code,
        )

    def _ask(self, *arguments: str) -> str:
        """Return what docker prints, without the warnings beside it."""
        with subprocess.Popen(
            [_docker(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            try:
                output, errors = process.communicate()
            except BaseException:
                process.kill()
                process.wait()  # after a Ctrl-C `with` does not, and leaves a zombie and a warning
                raise
        if process.returncode:
            raise self._explain(errors)
        return output

    def _run(self, *arguments: str, told: Callable[[str], None] = lambda line: None) -> None:
        """Let Compose do something that takes its time; `told` hears what it says."""
        last: deque[str] = deque(maxlen=_TAIL)
        with subprocess.Popen(
            [_docker(), "compose", *self._files, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A Ctrl-C at the terminal is ours: we end things in order.
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    told(hide_secrets(line.rstrip(), self._settings))
                    last.append(line)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # `docker` and its plugin, which older ones leave behind
                process.wait()
                raise
        if process.returncode:
            raise self._explain("".join(last))

    def _explain(self, output: str) -> MillraceError:
        """Return the error that the output of a failed command stands for."""
        output = hide_secrets(output, self._settings)
        for pattern, code, message, hint in _TROUBLES:
            if match := re.search(pattern, output):
                kind = SettingsError if code in _WRONG else Unreachable
                # As people write images of the default registry.
                said = re.sub(r"registry-1\.docker\.io/(library/)?", "", match.expand(message))
                return kind(said, hint, code=code)
        last = "\n  ".join(line for line in output.splitlines()[-LAST_WORDS:] if line.strip())
        return Unreachable(
            f"Docker Compose failed:\n  {last}", "`millrace doctor` may know why.", code="compose_failed"
        )


def _docker() -> str:
    path = shutil.which("docker")
    if path is None:
        raise Unreachable(
            "There is no Docker here.",
            "Install Docker Engine with the Compose plugin; without Docker, `millrace up` runs an engine of its own.",
            code="docker_missing",
        )
    return path
