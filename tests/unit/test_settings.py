"""Settings: rows K16 to K20 of the systems' reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import redis

from millrace.dotenv_file import unknown_variables
from millrace.embedded import only_one
from millrace.errors import SettingsError
from millrace.settings import Settings, hide_password, load, secret_fields, variables
from millrace.settings_sources import read_stack, stack_file

DATA = Path("millrace-data")
REPOSITORY = Path(__file__).parents[2]
SECRET = "hunter2-do-not-show"


def dotenv(**variables: object) -> None:
    Path(".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))


def write_stack(data_dir: Path = DATA, **settings: Any) -> None:
    stack_file(data_dir).parent.mkdir(parents=True)
    stack_file(data_dir).write_text(json.dumps({"settings": settings}))


def refused(**environment: str) -> SettingsError:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsError) as caught:
            load()
    return caught.value


# K16, K17: the keys of both styles, and their defaults


def test_the_defaults_are_the_documented_ones() -> None:
    got = Settings()
    assert (got.redis_host, got.redis_port, got.redis_db) == ("localhost", 6379, 0)
    assert (got.llm_backend, got.llm_server_url, got.llm_timeout) == ("llamacpp", "http://localhost:8000", 120)
    assert (got.max_tokens, got.temperature, got.top_p, got.top_k) == (1024, 0.7, 0.95, 40)
    assert (got.task_soft_time_limit, got.task_time_limit, got.task_max_retries) == (180, 300, 3)
    assert (got.worker_concurrency, got.worker_prefetch_multiplier) == (4, 1)
    assert (got.n_ctx, got.n_gpu_layers, got.max_model_len) == (4096, 0, 4096)
    assert got.redis_dsn == "redis://localhost:6379/0"
    assert load().origins == {}


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("REDIS_HOST", "redis.lan", "redis_host", "redis.lan"),
        ("REDIS_PORT", "7000", "redis_port", 7000),
        ("REDIS_DB", "3", "redis_db", 3),
        ("LLM_BACKEND", "vllm", "llm_backend", "vllm"),
        ("LLM_TIMEOUT", "2.5", "llm_timeout", 2.5),
        ("MODEL_PATH", "/models/x.gguf", "model_path", "/models/x.gguf"),
        ("N_CTX", "8192", "n_ctx", 8192),
        ("N_GPU_LAYERS", "-1", "n_gpu_layers", -1),
        ("MODEL_NAME", "org/name", "model_name", "org/name"),
        ("TENSOR_PARALLEL_SIZE", "2", "tensor_parallel_size", 2),
        ("GPU_MEMORY_UTILIZATION", "0.5", "gpu_memory_utilization", 0.5),
        ("LLM_MODEL", "qwen", "llm_model", "qwen"),
        ("HEALTH_CHECK_ENABLED", "false", "health_check_enabled", False),
        ("LOG_FORMAT", "json", "log_format", "json"),
        ("DATA_DIR", "/srv/data", "data_dir", Path("/srv/data")),
    ],
)
def test_a_variable_is_read_from_the_environment_and_from_dotenv(
    name: str, value: str, field: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    dotenv(**{name: value})
    assert getattr(load().settings, field) == expected
    assert load().origins == {field: ".env"}
    Path(".env").unlink()
    monkeypatch.setenv(name, value)
    assert getattr(load().settings, field) == expected
    assert load().origins == {field: "environment"}


# K18: precedence and validation


def test_the_environment_wins_over_dotenv_and_dotenv_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv(N_CTX=2048, TOP_K=7)
    monkeypatch.setenv("N_CTX", "512")
    got = load()
    assert (got.settings.n_ctx, got.settings.top_k, got.settings.max_tokens) == (512, 7, 1024)
    assert got.origins == {"n_ctx": "environment", "top_k": ".env"}


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv(N_CTX=2048, REDIS_PASSWORD="")
    monkeypatch.setenv("N_CTX", "")
    assert load().settings.n_ctx == 2048
    assert load().settings.redis_password is None


def test_a_secret_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for field in secret_fields():
        value = {"redis_url": "redis://r:1/2", "database_url": "sqlite:////x.db"}.get(field, f"the {field}")
        path = tmp_path / field
        path.write_text(value + "\n")
        monkeypatch.setenv(f"{field.upper()}_FILE", str(path))
    got = load()
    assert got.settings.redis_dsn == "redis://r:1/2"
    assert got.settings.ledger_url == "sqlite:////x.db"
    assert got.settings.engine_api_key == "the llm_api_key"
    assert got.settings.hf_token is not None
    assert got.settings.hf_token.get_secret_value() == "the hf_token"
    assert set(got.origins.values()) == {"*_FILE"}


def test_a_secret_itself_wins_over_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from the file")
    monkeypatch.setenv("LLM_API_KEY_FILE", str(tmp_path / "key"))
    dotenv(LLM_API_KEY="from dotenv")
    assert load().settings.engine_api_key == "from dotenv"
    monkeypatch.setenv("LLM_API_KEY", "from the environment")
    assert load().settings.engine_api_key == "from the environment"


def test_a_secret_file_may_be_named_in_dotenv(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from the file\n")
    dotenv(LLM_API_KEY_FILE=tmp_path / "key")
    assert load().settings.engine_api_key == "from the file"
    assert load().origins == {"llm_api_key": "*_FILE"}


def test_a_secret_file_that_cannot_be_read_is_named() -> None:
    error = refused(REDIS_PASSWORD_FILE="/nowhere/at/all")
    assert "REDIS_PASSWORD_FILE names /nowhere/at/all" in error.message
    assert error.exit_code == 2


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_the_engine_url_is_taken_with_and_without_v1_and_slash(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_SERVER_URL", f"https://engine.lan:8443/base{tail}")
    assert load().settings.engine_root == "https://engine.lan:8443/base"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LLM_SERVER_URL", "localhost:8000", "http://"),
        ("LLM_SERVER_URL", "ftp://host", "http://"),
        ("LLM_SERVER_URL", "http://", "host"),
        ("HF_ENDPOINT", "huggingface.co", "http://"),
        ("LLM_BACKEND", "ollama", "'llamacpp'"),
        ("REDIS_PORT", "65536", "65535"),
        ("REDIS_PORT", "six", "integer"),
        ("MAX_TOKENS", "32001", "32000"),
        ("MAX_TOKENS", "0", "1"),
        ("TEMPERATURE", "2.1", "2"),
        ("TOP_P", "0", "0"),
        ("GPU_MEMORY_UTILIZATION", "1.5", "1"),
        ("LOG_FORMAT", "xml", "'json'"),
        ("HEALTH_CHECK_ENABLED", "maybe", "boolean"),
        ("DEMO_MODEL_SHA256", "abc", "pattern"),
    ],
)
def test_a_wrong_value_is_one_readable_error(name: str, value: str, said: str) -> None:
    error = refused(**{name: value})
    assert f"{name} (from environment)" in error.message
    assert said in error.message
    assert repr(value) in error.message
    assert error.exit_code == 2
    assert ".env.sample" in error.hint
    assert "pydantic" not in str(error)


def test_all_wrong_values_are_named_with_where_each_came_from() -> None:
    dotenv(TOP_K="many")
    error = refused(N_CTX="few", LLM_SERVER_URL="nowhere")
    for part in ("N_CTX (from environment)", "LLM_SERVER_URL (from environment)", "TOP_K (from .env)"):
        assert part in error.message


@pytest.mark.parametrize("value", ["99999", "abc"])
def test_what_is_derived_from_a_wrong_value_is_not_named_as_well(value: str) -> None:
    message = refused(LLM_PORT=value).message
    assert message.startswith("Wrong settings: LLM_PORT (from environment): ")
    assert "LLM_SERVER_URL" not in message
    assert "default factory" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", f"http://:{SECRET}@host"),
        ("DATABASE_URL", f"mysql://me:{SECRET}@host/db"),
    ],
)
def test_a_wrong_secret_is_named_but_not_shown(name: str, value: str, tmp_path: Path) -> None:
    error = refused(**{name: value})
    assert f"{name} (from environment)" in error.message
    assert "must start with" in error.message
    assert SECRET not in json.dumps(error.as_dict())
    assert error.__cause__ is None  # a traceback would show what the validation was given
    (tmp_path / "secret").write_text(value)
    from_file = refused(**{f"{name}_FILE": str(tmp_path / "secret")})
    assert f"{name} (from *_FILE)" in from_file.message
    assert SECRET not in str(from_file)


def test_no_secret_shows_in_a_settings_repr() -> None:
    dotenv(
        REDIS_PASSWORD=SECRET, LLM_API_KEY=SECRET, HF_TOKEN=SECRET, DATABASE_URL=f"postgresql+psycopg://u:{SECRET}@h/d"
    )
    got = load().settings
    assert SECRET not in repr(got) + str(got) + got.model_dump_json() + got.redis_address
    assert got.redis_dsn == f"redis://:{SECRET}@localhost:6379/0"


@pytest.mark.parametrize(("soft", "hard"), [("300", "300"), ("301", "300"), ("180", "2")])
def test_the_hard_time_limit_must_be_longer_than_the_soft_one(soft: str, hard: str) -> None:
    error = refused(TASK_SOFT_TIME_LIMIT=soft, TASK_TIME_LIMIT=hard)
    assert "TASK_TIME_LIMIT" in error.message
    assert "TASK_SOFT_TIME_LIMIT" in error.message
    assert hard in error.message


def test_a_dotenv_that_is_not_utf8_is_one_readable_error() -> None:
    Path(".env").write_bytes(b"LLM_MODEL=caf\xe9\n")
    with pytest.raises(SettingsError, match=r"\.env .*UTF-8|UTF-8"):
        load()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (rf"REDIS_PASSWORD='{SECRET}\\x'", "REDIS_PASSWORD in .env has two backslashes together"),
        (rf"export LLM_API_KEY = '\\{SECRET}' # mine", "LLM_API_KEY in .env has two backslashes together"),
        (f"REDIS_PASSWORD={SECRET}$x", "REDIS_PASSWORD in .env has a $"),
        (f'REDIS_PASSWORD="{SECRET}$x"', "REDIS_PASSWORD in .env has a $"),
    ],
)
def test_a_secret_that_compose_reads_otherwise_is_refused(line: str, said: str) -> None:
    Path(".env").write_text(f"COMPOSE_FILE=docker-compose.yml\n{line}\n")
    with pytest.raises(SettingsError) as caught:
        load()
    assert said in caught.value.message
    assert caught.value.hint
    assert SECRET not in str(caught.value.as_dict())


@pytest.mark.parametrize(
    ("line", "password"),
    [
        (r"REDIS_PASSWORD='a\b$c'", r"a\b$c"),
        (r"REDIS_PASSWORD=a\\b", r"a\\b"),
        (r'REDIS_PASSWORD="a\\b"', r"a\b"),
        (r"REDIS_PASSWORD='a' # not C:\\b", "a"),
    ],
)
def test_a_secret_that_compose_reads_alike_is_taken(line: str, password: str) -> None:
    Path(".env").write_text(f"COMPOSE_FILE=docker-compose.yml\n{line}\n")
    got = load().settings.redis_password
    assert got is not None
    assert got.get_secret_value() == password


# K19: both styles of Redis keys


def test_redis_url_wins_over_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv(REDIS_HOST="parts.lan", REDIS_PORT=1, REDIS_DB=2, REDIS_PASSWORD="p")
    assert load().settings.redis_dsn == "redis://:p@parts.lan:1/2"
    monkeypatch.setenv("REDIS_URL", "rediss://url.lan:9/4")
    assert load().settings.redis_dsn == "rediss://url.lan:9/4"


@pytest.mark.parametrize("password", ["p@ss/word", "a:b", "50%", "#?&", "p ß", "plain"])
def test_a_password_from_the_parts_arrives_at_redis_as_it_is(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", password)
    monkeypatch.setenv("REDIS_HOST", "redis.lan")
    got = load().settings
    if password == "p@ss/word":
        assert got.redis_dsn == "redis://:p%40ss%2Fword@redis.lan:6379/0"
    client = redis.Redis.from_url(got.redis_dsn)
    arrived = client.connection_pool.connection_kwargs
    assert (arrived["password"], arrived["host"], arrived["port"]) == (password, "redis.lan", 6379)
    assert got.redis_address == "redis://:***@redis.lan:6379/0"
    client.close()


def test_hide_password_leaves_the_rest() -> None:
    assert hide_password("redis://u:p%40@h:1/2?x=y") == "redis://u:***@h:1/2?x=y"
    assert hide_password("redis://h:1/2") == "redis://h:1/2"


# The running stack


def test_a_running_stack_wins_over_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    write_stack(llm_server_url="http://127.0.0.1:4711", redis_url="unix:///run/redis.sock")
    monkeypatch.setenv("LLM_SERVER_URL", "http://elsewhere")
    monkeypatch.setenv("N_CTX", "512")
    with only_one(DATA):
        got = load()
    assert got.settings.engine_root == "http://127.0.0.1:4711"
    assert got.settings.redis_dsn == "unix:///run/redis.sock"
    assert got.settings.n_ctx == 512
    assert got.origins["llm_server_url"] == "the running embedded stack"
    assert got.origins["n_ctx"] == "environment"


def test_the_stack_is_looked_for_in_the_data_dir_of_the_settings(tmp_path: Path) -> None:
    write_stack(tmp_path / "elsewhere", llm_server_url="http://127.0.0.1:4711")
    with only_one(tmp_path / "elsewhere"):
        assert load().settings.engine_root == "http://localhost:8000"
        dotenv(DATA_DIR=tmp_path / "elsewhere")
        assert load().settings.engine_root == "http://127.0.0.1:4711"


def test_a_dead_stack_is_ignored() -> None:
    # Its file is left, and perhaps another process has its id by now; its lock is free.
    write_stack(llm_server_url="http://127.0.0.1:4711")
    with only_one(DATA):
        pass
    assert read_stack(DATA) == {}
    assert load().settings.engine_root == "http://localhost:8000"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"\xff", b"{}", b'{"pid": "x"}', b'{"pid": null}'])
def test_a_broken_stack_file_is_ignored(content: bytes) -> None:
    write_stack()
    stack_file(DATA).write_bytes(content)
    with only_one(DATA):
        assert load().settings.engine_root == "http://localhost:8000"


# Names nobody reads


def test_unknown_variables_are_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    dotenv(
        REDIS_PASWORD="x",
        LLM_SERVER_ULR="y",
        SOMETHING_ELSE="z",
        N_CTX=1024,
        LLM_API_KEY_FILE=tmp_path / "key",
        n_parallel=4,
        COMPOSE_PROJECT_NAME="mine",
        DOCKER_HOST="x",
    )
    assert unknown_variables(variables()) == [
        ("REDIS_PASWORD", "REDIS_PASSWORD"),
        ("LLM_SERVER_ULR", "LLM_SERVER_URL"),
        ("SOMETHING_ELSE", ""),
    ]
    load()  # they are no error


def test_without_a_dotenv_no_variable_is_unknown() -> None:
    assert unknown_variables(variables()) == []


# One line of .env chooses the engine


@pytest.mark.parametrize(
    ("compose_file", "backend"),
    [
        ("docker-compose.yml:docker-compose.llamacpp.yml", "llamacpp"),
        ("docker-compose.yml:docker-compose.vllm.yml:docker-compose.gpu.yml", "vllm"),
        ("docker-compose.yml", "llamacpp"),
    ],
)
def test_the_engine_follows_from_compose_file(compose_file: str, backend: str) -> None:
    dotenv(COMPOSE_FILE=compose_file)
    assert load().settings.llm_backend == backend
    assert unknown_variables(variables()) == []


def test_llm_backend_wins_over_compose_file() -> None:
    dotenv(COMPOSE_FILE="docker-compose.yml:docker-compose.llamacpp.yml", LLM_BACKEND="external")
    assert load().settings.llm_backend == "external"


def test_the_engines_url_follows_its_port() -> None:
    dotenv(LLM_PORT="8123")
    assert load().settings.llm_server_url == "http://localhost:8123"


def test_both_engines_in_compose_file_are_refused() -> None:  # K6
    dotenv(COMPOSE_FILE="docker-compose.yml:docker-compose.llamacpp.yml:docker-compose.vllm.yml")
    assert "take one of them out" in refused().message


@pytest.mark.parametrize("line", ["REDIS_PASSWORD=p$a#b", 'LLM_API_KEY="a$b"', "export HF_TOKEN = a$b"])
def test_a_secret_that_compose_would_change_is_refused(line: str) -> None:
    Path(".env").write_text(f"COMPOSE_FILE=docker-compose.yml\n{line}\n")
    error = refused()
    assert "single quotes" in error.hint
    assert "a$b" not in error.message
    Path(".env").write_text(f"{line}\n")  # nobody but us reads it
    load()
    Path(".env").write_text("COMPOSE_FILE=docker-compose.yml\nREDIS_PASSWORD='p$a#b'\n")
    assert load().settings.redis_password is not None


# K20: .env.sample


def sample_variables() -> dict[str, str]:
    lines = (REPOSITORY / ".env.sample").read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := re.match(r"^#? ?([A-Z][A-Z0-9_]*)=(.*)$", line))]
    names = [match[1] for match in found]
    assert len(names) == len(set(names)), "a variable stands there twice"
    return {match[1]: match[2] for match in found}


def test_the_sample_has_every_variable_and_no_other() -> None:
    assert set(sample_variables()) == {field.upper() for field in Settings.model_fields}


def test_the_values_of_the_sample_are_the_defaults() -> None:
    dotenv(**sample_variables())
    assert unknown_variables(variables()) == []
    assert load().settings == Settings(_env_file=None)


def test_every_field_has_a_description() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
