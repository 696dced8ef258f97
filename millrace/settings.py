"""Settings: from the environment and `.env` to one validated object.

Precedence, highest first: a running embedded stack of the same DATA_DIR (for the parts it started
itself, because nothing else answered there), the process environment, `.env` in the current folder,
a file named by `<SECRET>_FILE`, the default. Nothing else in Millrace reads `os.environ`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from millrace.dotenv_file import refuse_misread
from millrace.errors import SettingsError
from millrace.settings_sources import SecretFileSource, StackSource

#: Engines that have a compose override, docker-compose.<name>.yml.
ENGINES: tuple[Literal["llamacpp"], Literal["vllm"]] = ("llamacpp", "vllm")


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must start with http:// or https:// and name a host")
    if parts.username or parts.password or parts.query:
        raise ValueError("must hold no login and no query; LLM_API_KEY takes the key")
    return value.rstrip("/")


def _redis_url(value: SecretStr | None) -> SecretStr | None:
    if value is not None and urlsplit(value.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must start with redis://, rediss:// or unix://")
    return value


def _database_url(value: SecretStr | None) -> SecretStr | None:
    if value is not None and not value.get_secret_value().startswith(("sqlite:///", "postgresql")):
        raise ValueError("must start with sqlite:/// or postgresql+psycopg://")
    return value


def compose_files(compose_file: str) -> list[str]:
    """Return the files that COMPOSE_FILE names, whatever COMPOSE_PATH_SEPARATOR is."""
    return [name for name in re.split("[:;,]", compose_file) if name]


def engine_override(compose_file: str, *, refuse: bool = False) -> Literal["llamacpp", "vllm"] | None:
    """Return the engine that COMPOSE_FILE chooses; None where it names neither.

    Compose merges two of them without a word, into vLLM with llama.cpp's variables.

    Raises:
        ValueError: It names both, and that is to be refused.
    """
    names = [Path(name).name for name in compose_files(compose_file)]
    found = [engine for engine in ENGINES if f"docker-compose.{engine}.yml" in names]
    if len(found) > 1 and refuse:
        raise ValueError(
            "COMPOSE_FILE names both docker-compose.llamacpp.yml and docker-compose.vllm.yml; "
            "there is one llm-server: take one of them out"
        )
    return found[0] if found else None


HttpUrl = Annotated[str, AfterValidator(_http_url)]


class Settings(BaseSettings):
    """Every variable Millrace reads; field names are the variables' names in lower case."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    # Redis: the broker and the short-lived results.
    redis_url: Annotated[SecretStr | None, AfterValidator(_redis_url)] = Field(
        None, description="Redis as one URL; wins over the REDIS_HOST family"
    )
    redis_host: str = Field("localhost", description="Redis host", min_length=1)
    redis_port: int = Field(6379, description="Redis port", ge=1, le=65535)
    redis_db: int = Field(0, description="Redis database number", ge=0, le=65535)
    redis_password: SecretStr | None = Field(None, description="Redis password; a container needs one")

    # The engine: a llama.cpp server, vLLM, or any OpenAI-compatible server.
    compose_file: str = Field(
        "", description="Compose files, with : between them; the engine's override among them chooses the engine"
    )
    llm_backend: Literal["llamacpp", "vllm", "external"] = Field(
        default_factory=lambda before: engine_override(before.get("compose_file", "")) or "llamacpp",
        description="Kind of engine; external = any OpenAI-compatible server; empty = the one in COMPOSE_FILE",
    )
    llm_port: int = Field(8000, description="Port of the engine's container, on loopback", ge=1, le=65535)
    llm_server_url: HttpUrl = Field(
        default_factory=lambda before: f"http://localhost:{before.get('llm_port', 8000)}",
        description="Engine URL, with or without /v1; empty = LLM_PORT on this machine",
    )
    llm_api_key: SecretStr | None = Field(None, description="Engine API key; a container needs one")
    llm_model: str = Field("", description="Default model; empty = the first one the engine serves")
    llm_timeout: float = Field(
        120, description="Longest wait of an interactive request for the engine's answer, s", gt=0, le=86400
    )

    # llama.cpp.
    model_path: str = Field(
        "",
        description="GGUF file; /models/x.gguf means models/gguf/x.gguf; empty = the demo's; in a container, yours",
    )
    n_ctx: int = Field(4096, description="Context of each slot, tokens", ge=128, le=10_000_000)
    n_parallel: int = Field(8, description="Slots: requests the llama.cpp server works on at once", ge=1, le=1024)
    n_threads: int = Field(0, description="Threads of the llama.cpp server; 0 = half the processors", ge=0, le=1024)
    n_gpu_layers: int = Field(0, description="Layers on the GPU; 0 = CPU only, -1 = all", ge=-1, le=10_000)

    # vLLM.
    model_name: str = Field(
        "", description="HF folder that vLLM loads; /models/x means models/hf/x; or a name on the Hub"
    )
    tensor_parallel_size: int = Field(1, description="GPUs that share one vLLM model", ge=1, le=64)
    gpu_memory_utilization: float = Field(0.9, description="Share of GPU memory vLLM takes", gt=0, le=1)
    max_model_len: int = Field(4096, description="vLLM's context, tokens", ge=128, le=10_000_000)
    max_num_queued_reqs: int = Field(
        1024, description="Requests vLLM holds, running ones too; more get 503", ge=1, le=1_000_000
    )

    # Containers. Compose reads these; so does the doctor.
    models_source: str = Field(
        "", description="Folder or volume with the engine's models; empty = models/gguf or models/hf"
    )
    llamacpp_server: Literal["native", "python"] = Field(
        "native", description="llama.cpp's own server, or llama-cpp-python's, which answers one request at a time"
    )
    llamacpp_image: str = Field(
        "compiled",
        description="llama.cpp image to use, such as ghcr.io/ggml-org/llama.cpp:server; compiled = made here",
    )
    vllm_image: str = Field(
        "vllm/vllm-openai:v0.33.0",
        description="vLLM image to use; vllm/vllm-openai-cpu:v0.33.0-x86_64 needs no GPU",
    )
    llamacpp_args: str = Field("", description="Further options of llama.cpp's server, as on its command line")
    vllm_enable_cuda_compatibility: bool = Field(
        False, description="vLLM's image runs on an older driver, on data-centre GPUs alone"
    )
    vllm_args: str = Field("", description="Further options of vllm serve, as on its command line")
    redis_image: str = Field("redis:7-alpine", description="Redis image")
    gpu_ids: str = Field(
        "all", description="GPUs of the engine with docker-compose.gpu.yml, by number or UUID, with commas"
    )
    llm_cpus: float = Field(0, description="Processors the engine's container may use; 0 = all", ge=0, le=4096)
    llm_memory: str = Field(
        "0", description="Memory the engine's container may use, such as 8g; 0 = all", pattern=r"^[0-9]+[bkmgBKMG]?$"
    )
    worker_user: str = Field(
        "1000:1000",
        description="User and group that worker containers run as; they must be able to write DATA_DIR",
        pattern=r"^[0-9]+:[0-9]+$",
    )
    worker_replicas: int = Field(1, description="Worker containers; each has a port for its metrics", ge=0, le=4)

    # Watching.
    metrics_port: int = Field(
        9809, description="Port of the worker's Prometheus metrics, on loopback; 0 = none", ge=0, le=65535
    )
    flower_port: int = Field(5555, description="Port of Flower, on loopback", ge=1, le=65535)
    flower_basic_auth: SecretStr | None = Field(None, description="Flower's login, as user:password")
    flower_read_only: bool = Field(True, description="Flower only shows; false lets it end tasks and workers")
    prometheus_port: int = Field(9090, description="Port of Prometheus, on loopback", ge=1, le=65535)
    grafana_port: int = Field(3000, description="Port of Grafana, on loopback", ge=1, le=65535)
    grafana_password: SecretStr | None = Field(None, description="Grafana's password of the user admin")

    # Sampling of requests that Millrace itself writes: chat, .txt, .csv and templates.
    max_tokens: int = Field(1024, description="Longest answer, tokens", ge=1, le=32_000)
    temperature: float = Field(0.7, description="Sampling temperature", ge=0, le=2)
    top_p: float = Field(0.95, description="Nucleus sampling", gt=0, le=1)
    top_k: int = Field(40, description="Top-k sampling, where the engine knows it; 0 = off", ge=0, le=100_000)

    # Interactive tasks.
    task_soft_time_limit: int = Field(
        180, description="An interactive task ends with an error after this, s", ge=1, le=86400
    )
    task_time_limit: int = Field(
        300, description="An interactive task's process is killed after this, s", ge=2, le=86400
    )
    task_max_retries: int = Field(3, description="Further tries of an interactive request", ge=0, le=100)
    task_retry_delay: float = Field(1.0, description="Base of the exponential backoff, s", ge=0, le=3600)
    result_expires: int = Field(3600, description="Interactive results stay in Redis this long, s", ge=60, le=2_592_000)
    dlq_max: int = Field(1000, description="Dead letters kept; the oldest go first", ge=1, le=100_000)
    dlq_days: int = Field(14, description="A dead letter, prompt included, is kept this long, days", ge=1, le=3650)

    # Workers.
    worker_concurrency: int = Field(4, description="Interactive requests one worker runs at once", ge=1, le=256)
    worker_prefetch_multiplier: int = Field(1, description="Messages a worker process holds ahead", ge=1, le=100)
    batch_processes: int = Field(2, description="Batch processes of one worker", ge=1, le=64)
    environment: str = Field("development", description="Name of this installation, in every log line")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Log level")
    log_format: Literal["text", "json"] = Field("text", description="Log format")
    health_check_enabled: bool = Field(True, description="`millrace worker` answers /health")
    health_check_port: int = Field(9808, description="Port of /health, on loopback", ge=1, le=65535)

    # Batches.
    data_dir: Path = Field(Path("millrace-data"), description="Folder of the ledger, inputs, segments and outputs")
    database_url: Annotated[SecretStr | None, AfterValidator(_database_url)] = Field(
        None, description="Ledger; empty = SQLite in DATA_DIR"
    )
    batch_concurrency: int = Field(
        0, description="Batch requests in flight at the engine; 0 = from what it reports", ge=0, le=100_000
    )
    batch_lease_seconds: float = Field(45, description="A shard's lease; renewed at a third, s", ge=3, le=3600)
    batch_shard_seconds: float = Field(30, description="Work in one shard, s", ge=1, le=3600)
    batch_row_timeout: float = Field(1800, description="Longest wait for one row's answer, s", gt=0, le=86400)
    batch_row_attempts: int = Field(
        5, description="Tries of a row that the engine refuses for a passing reason", ge=1, le=100
    )
    batch_sync_seconds: float = Field(0.2, description="Answers are synced to disk this often, s", ge=0.01, le=60)
    batch_max_line_bytes: int = Field(16 * 2**20, description="Longest input line, bytes", ge=1024, le=2**30)
    batch_canary_rows: int = Field(
        100, description="First rows of a batch that are watched for failing all alike", ge=1, le=100_000
    )
    batch_canary_share: float = Field(
        0.9, description="A batch is paused when so many of them fail the same way; 0 = never", ge=0, le=1
    )
    batch_keep_days: int = Field(
        0, description="Ended batches are removed with their files after this, days; 0 = never", ge=0, le=36_500
    )
    crash_at: str = Field(
        "",
        description="For tests: the crash point that ends the process, such as merge.synced",
        pattern=r"^[a-z._]*(:[0-9]+)?$",
    )

    # Models.
    models_dir: Path = Field(Path("models"), description="Folder of gguf/ and hf/")
    hf_endpoint: HttpUrl = Field("https://huggingface.co", description="Hugging Face Hub or a mirror")
    hf_token: SecretStr | None = Field(None, description="Hub token, for gated models")
    demo_model_repo: str = Field(
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF", description="Hub model of a first run and of demo --model hub: repository"
    )
    demo_model_file: str = Field("qwen2.5-0.5b-instruct-q4_k_m.gguf", description="Hub model of a first run: file")
    demo_model_revision: str = Field("main", description="Hub model of a first run: revision")
    demo_model_sha256: str = Field(
        "", description="Hub model of a first run: sha256; empty = what the Hub says", pattern=r"^([0-9a-f]{64})?$"
    )

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.task_time_limit <= self.task_soft_time_limit:
            raise ValueError(
                f"TASK_TIME_LIMIT ({self.task_time_limit} s) must be longer than TASK_SOFT_TIME_LIMIT "
                f"({self.task_soft_time_limit} s)"
            )
        return self

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        engine_override(self.compose_file, refuse=True)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources as the module's docstring says."""
        stack = StackSource(settings_cls, (env_settings, dotenv_settings))
        files = SecretFileSource(settings_cls, secret_fields())
        return (init_settings, stack, env_settings, dotenv_settings, files)

    # What is derived, so that no one else derives it differently.

    @property
    def redis_dsn(self) -> str:
        """The Redis URL with its password, URL-encoded."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        password = self.redis_password
        login = f":{quote(password.get_secret_value(), safe='')}@" if password else ""
        return f"redis://{login}{self.redis_host}:{self.redis_port}/{self.redis_db}"

    @property
    def redis_address(self) -> str:
        """The Redis URL without its password, for people to read."""
        return hide_password(self.redis_dsn)

    @property
    def sampling(self) -> dict[str, float]:
        """The sampling parameters of the requests that Millrace itself writes."""
        params: dict[str, float] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        # Not OpenAI's: a server we do not know may refuse it.
        if self.top_k and self.llm_backend != "external":
            params["top_k"] = self.top_k
        return params

    @property
    def engine_root(self) -> str:
        """The engine's URL without `/v1`."""
        return self.llm_server_url.removesuffix("/v1")

    @property
    def engine_api_key(self) -> str | None:
        """The engine's key, in the clear."""
        return self.llm_api_key.get_secret_value() if self.llm_api_key else None

    @property
    def ledger_url(self) -> str:
        """The SQLAlchemy URL of the ledger."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{(self.data_dir / 'ledger.db').absolute()}"


def hide_password(url: str) -> str:
    """Return `url` with its password replaced by ***."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


class _Only(Settings):
    """Settings of the values given and of nothing else on this machine."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def only(values: Mapping[str, Any]) -> Settings:
    """Return settings of these values, by field name, whatever this machine's environment and `.env` say."""
    return _Only(**values)


def environment(**values: Any) -> dict[str, str]:
    """Return the environment for a process of ours with these settings and no others, by field name."""
    names = variables()
    kept = {name: value for name, value in os.environ.items() if name.upper() not in names}
    return kept | {name.upper(): str(value) for name, value in values.items()}


def variables() -> list[str]:
    """Return the names of the variables that settings are read from."""
    return [name.upper() for name in Settings.model_fields] + [f"{name.upper()}_FILE" for name in secret_fields()]


def secret_fields() -> list[str]:
    """Return the names of the fields whose values are never shown."""
    return [name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)]


def hide_secrets(text: str, settings: Settings) -> str:
    """Return what another program said with our secrets replaced by ***."""
    secrets: set[str] = set()
    for name in secret_fields():
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            secret = value.get_secret_value()
            secrets.add(secret)
            password = urlsplit(secret).password if "://" in secret else secret.partition(":")[2]
            secrets |= {password or "", unquote(password or "")}
    # The longest first: one may be a part of another.
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


@dataclass(frozen=True)
class Loaded:
    """Settings, and where each of them came from."""

    settings: Settings
    #: Field name -> a source in words; absent where the default holds.
    origins: dict[str, str]


def load() -> Loaded:
    """Read the settings afresh.

    Raises:
        SettingsError: A value is wrong; the message names every wrong variable and its source.
    """
    refuse_misread(secret_fields())
    origins = _origins()
    try:
        return Loaded(Settings(), origins)  # type: ignore[call-arg]  # the mypy plugin is not used
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            if problem["type"] == "default_factory_not_called":  # it follows from another, which is named
                continue
            field = str(problem["loc"][0]) if problem["loc"] else ""
            reason = problem["msg"].removeprefix("Value error, ")
            if not field:
                lines.append(reason)
                continue
            hidden = field in secret_fields() or "@" in str(problem["input"])  # a URL with a login
            shown = "" if hidden else f", not {problem['input']!r}"
            lines.append(f"{field.upper()} (from {origins.get(field, 'the default')}): {reason}{shown}")
        raise SettingsError(
            "Wrong settings: " + "; ".join(lines) + ".",
            "Correct the variable; .env.sample describes each of them.",
        ) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f".env is not UTF-8: {error}.", "Save it as UTF-8.") from None


def _origins() -> dict[str, str]:
    env = EnvSettingsSource(Settings, env_ignore_empty=True)
    try:
        dotenv = DotEnvSettingsSource(Settings, env_file=".env", env_ignore_empty=True)
        named = {"environment": env(), ".env": dotenv()}
    except (OSError, UnicodeError) as error:
        raise SettingsError(f".env cannot be read: {error}.", "Save it as UTF-8, readable for you.") from error
    stack, files = StackSource(Settings, (env, dotenv)), SecretFileSource(Settings, secret_fields())
    origins: dict[str, str] = {}
    for name, values in [(stack.name, stack()), *named.items(), (files.name, files())]:
        for field in values:
            origins.setdefault(field, name)
    return {field: name for field, name in origins.items() if field in Settings.model_fields}


@functools.cache
def get_settings() -> Settings:
    """Return this process's settings, read at the first call.

    Raises:
        SettingsError: See `load`.
    """
    return load().settings
