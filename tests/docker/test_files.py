"""The compose files themselves: every combination is valid, and says what it should."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

from millrace.settings import Settings, secret_fields
from tests.docker.project import Project
from tests.services import ROOT

ENGINES = ("llamacpp", "vllm")
EXTRAS = ("gpu", "worker", "monitoring")
LOGINS = {"FLOWER_BASIC_AUTH": "me:secret", "GRAFANA_PASSWORD": "secret"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("extras", [c for n in range(4) for c in itertools.combinations(EXTRAS, n)])
def test_every_combination_is_valid(
    project: Callable[..., Project], engine: str, extras: tuple[str, ...]
) -> None:  # K1
    project(**LOGINS).config(engine, *extras)


def test_both_engines_are_refused(project: Callable[..., Project]) -> None:  # K6
    both = project("llamacpp", "vllm")
    done = both.compose("config", "-q", check=False)
    assert done.returncode != 0
    assert "only-one-engine-in-COMPOSE_FILE" in done.stderr
    for command in ("start", "switch"):
        told = both.cli.run("backend", command, *(["vllm"] if command == "switch" else []), "--json")
        assert (told.code, told.error["code"]) == (2, "invalid_setting")
        assert "take one of them out" in told.error["message"]


@pytest.mark.parametrize("name", ["REDIS_PASSWORD", "LLM_API_KEY"])
def test_a_missing_secret_is_one_clear_error(project: Callable[..., Project], name: str) -> None:
    without = project("llamacpp")
    without.set(**{name: None})
    done = without.compose("up", "-d", check=False)
    assert done.returncode != 0
    assert f"required variable {name} is missing a value" in done.stderr
    assert "set it in .env" in done.stderr
    told = without.cli.run("backend", "start", "--json")
    assert (told.code, told.error["code"]) == (2, "missing_setting")
    assert told.error["message"].startswith(name)


def test_the_gpu_comes_with_its_file_alone(project: Callable[..., Project]) -> None:  # X5, X16
    one = project(GPU_IDS="0,1")
    for engine in ENGINES:
        assert "nvidia" not in str(one.config(engine))
        [device] = one.config(engine, "gpu")["services"]["llm-server"]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": ["0,1"], "capabilities": ["gpu"]}
    text = "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
    assert not re.search(r"^\s*(gpus|runtime|start_interval|version):", text, re.M)


def test_the_port_changes_and_is_not_added(project: Callable[..., Project]) -> None:  # K12, X6
    config = project(LLM_PORT=8123, REDIS_PORT=6390).config("llamacpp")["services"]
    assert [(port["host_ip"], port["published"]) for port in config["llm-server"]["ports"]] == [("127.0.0.1", "8123")]
    assert [(port["host_ip"], port["published"]) for port in config["redis"]["ports"]] == [("127.0.0.1", "6390")]


def services(project: Callable[..., Project]) -> dict[str, dict[str, Any]]:
    one = project(**LOGINS)
    found = {}
    for engine in ENGINES:
        for name, service in one.config(engine, "worker", "monitoring")["services"].items():
            found[f"{name} with {engine}"] = service
    return found


def test_workers_may_have_an_engine_elsewhere(project: Callable[..., Project]) -> None:
    one = project(LLM_SERVER_URL="http://gpu.lan:8000", GRAFANA_PASSWORD="not for workers")
    worker = one.config("worker")["services"]["worker"]["environment"]
    assert worker["LLM_SERVER_URL"] == "http://gpu.lan:8000"
    assert worker["REDIS_PASSWORD"] == one.variables["REDIS_PASSWORD"]
    assert worker["GRAFANA_PASSWORD"] == ""
    ours = project().config("llamacpp", "worker")["services"]["worker"]["environment"]
    assert ours["LLM_SERVER_URL"] == "http://llm-server:8000"


def test_every_service_is_hardened_and_on_loopback(project: Callable[..., Project]) -> None:
    for name, service in services(project).items():
        assert [one.upper() for one in service["cap_drop"]] == ["ALL"], name
        assert [one.replace("=", ":") for one in service["security_opt"]] == ["no-new-privileges:true"], name
        assert service["pids_limit"] > 0, name
        assert service["restart"] == "unless-stopped", name
        assert service["init"] is True, name
        assert service["stop_grace_period"], name
        assert service["healthcheck"]["test"], name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}, name
        assert "mem_limit" in service or name.startswith("llm-server"), name  # LLM_MEMORY, 0 by default
        assert not service["image"].endswith(":latest"), name
        # Ours have no registry; the others are pinned.
        assert service["image"].startswith("localhost/") or ":" in service["image"], name
        assert service.get("network_mode") == "host" or all(
            port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])
        ), name


def test_variables_of_the_files_are_settings_with_the_same_defaults() -> None:  # K20
    text = "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
    used = re.findall(r"(?<!\$)\$\{([A-Z_]+)(:[-?])?([^}]*)\}", text)
    fields = Settings.model_fields
    assert {name for name, _, _ in used} - {name.upper() for name in fields} == set()
    defaults = Settings(_env_file=None)
    own = {
        "models_source": {"./models/gguf", "./models/hf"},
        "data_dir": {"millrace-data"},
        "llm_server_url": {"http://llm-server:8000"},
    }
    for name, kind, default in used:
        field = name.lower()
        if kind == ":-" and field not in secret_fields():
            value = getattr(defaults, field)
            shown = {
                str(value).lower()
                if isinstance(value, bool)
                else f"{value:g}"
                if isinstance(value, float)
                else str(value)
            }
            assert default in own.get(field, shown), (
                f"{name} is {default!r} in a compose file and {value!r} in Settings"
            )
        else:
            assert kind == ":?" or field in secret_fields(), f"{name} has no default"
