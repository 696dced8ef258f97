"""The doctor without Docker: each trouble is made for real, and he names it with what mends it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis, RedisError

from millrace.cli.doctor.sockets import Process, holder, listeners
from millrace.embedded import find_redis
from tests.cli import Cli, redis_answers
from tests.doctor import checks_with, examine, found
from tests.scripted_engine import scripted_engine
from tests.services import ROOT, free_port, until

GIB = 2**30


# Redis


@contextlib.contextmanager
def redis_with(folder: Path, *arguments: str, signals: bool = True) -> Iterator[tuple[Redis, int, int]]:
    """Run a Redis of its own and yield a client, its port and its pid."""
    folder.mkdir()
    port = free_port()
    process = subprocess.Popen(
        [find_redis(), "--port", str(port), "--dir", str(folder), "--save", "", *arguments],
        stdout=subprocess.DEVNULL,
        restore_signals=signals,
    )
    try:
        until(lambda: redis_answers(f"redis://127.0.0.1:{port}/0"), "Redis")
        with contextlib.closing(Redis(port=port)) as client:
            yield client, port, process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def own_redis(cli: Cli, tmp_path: Path) -> Iterator[Redis]:
    with redis_with(tmp_path / "redis", "--bind", "127.0.0.1", "--appendonly", "yes") as (client, port, _):
        cli.environment["REDIS_URL"] = f"redis://127.0.0.1:{port}/0"
        yield client


def test_redis_that_is_well(cli: Cli, own_redis: Redis) -> None:
    what = found(examine(cli, 0), "redis", "ok")["what"]
    assert "PONG" in what
    assert "append-only file on" in what


def test_redis_without_append_only_file(cli: Cli, own_redis: Redis) -> None:
    own_redis.config_set("appendonly", "no")
    finding = found(examine(cli, 0), "redis", "note")
    assert "append-only file is off" in finding["what"]
    assert "CONFIG SET appendonly yes" in finding["mend"]


def test_redis_that_is_full(cli: Cli, own_redis: Redis) -> None:
    own_redis.config_set("maxmemory", "1mb")
    own_redis.config_set("maxmemory-policy", "noeviction")
    finding = found(examine(cli, 3), "redis")
    assert "of its maxmemory of 1.0 MiB" in finding["what"]
    assert "CONFIG SET maxmemory" in finding["mend"]


def test_redis_that_evicts_and_is_full(cli: Cli, own_redis: Redis) -> None:
    own_redis.config_set("maxmemory", "1mb")
    own_redis.config_set("maxmemory-policy", "volatile-ttl")
    findings = [finding for finding in examine(cli, 3) if finding["check"] == "redis"]
    assert [finding["verdict"] for finding in findings] == ["wrong", "wrong"]
    assert "volatile-ttl" in findings[0]["what"]


def test_redis_that_cannot_write_its_file(cli: Cli, tmp_path: Path) -> None:
    # Its parent ignores SIGXFSZ, as Python does, so a file that may not grow is an error of write(2).
    arguments = ("--bind", "127.0.0.1", "--appendonly", "yes")
    with redis_with(tmp_path / "redis", *arguments, signals=False) as (client, port, pid):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))

        def refused() -> bool:
            with contextlib.suppress(RedisError):
                client.set("key", "x" * 8192)
            return client.info("persistence")["aof_last_write_status"] == "err"

        until(refused, "an append-only file that cannot grow")
        cli.environment["REDIS_URL"] = f"redis://127.0.0.1:{port}/0"
        assert "cannot write its append-only file" in found(examine(cli, 3), "redis")["what"]


def test_redis_whose_snapshot_failed(cli: Cli, own_redis: Redis, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "redis")
    own_redis.bgsave()
    until(lambda: own_redis.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed snapshot")
    assert "last snapshot failed" in found(examine(cli, 3), "redis")["what"]


def test_redis_that_is_open_to_all(cli: Cli, tmp_path: Path) -> None:
    arguments = ("--bind", "0.0.0.0", "--protected-mode", "no", "--appendonly", "yes")
    with redis_with(tmp_path / "redis", *arguments) as (client, port, _):
        cli.environment["REDIS_URL"] = f"redis://127.0.0.1:{port}/0"
        finding = found(examine(cli, 3), "redis")
        assert f"whoever reaches 0.0.0.0, port {port} gets in without a password" in finding["what"]
        assert "requirepass" in finding["mend"]
        client.config_set("requirepass", "s3cret")
        assert "refuses the password" in found(examine(cli, 3), "redis")["what"]
        cli.environment["REDIS_URL"] = f"redis://:s3cret@127.0.0.1:{port}/0"
        found(examine(cli, 0), "redis", "ok")


class _OldRedis(socketserver.StreamRequestHandler):
    """Says that it is Redis 5: no such thing is to be had here."""

    def handle(self) -> None:
        while count := self.rfile.readline():
            words = [self._word() for _ in range(int(count[1:]))]
            info = b"redis_version:5.0.14\r\naof_enabled:1\r\nmaxmemory_policy:noeviction\r\n"
            if words[0] == b"INFO":
                self.wfile.write(b"$%d\r\n%b\r\n" % (len(info), info))
            elif words[0] == b"HELLO":
                self.wfile.write(b"-ERR unknown command `HELLO`\r\n")
            else:
                self.wfile.write(b"+OK\r\n")

    def _word(self) -> bytes:
        return self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2].upper()


def test_redis_that_is_too_old(cli: Cli) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _OldRedis) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cli.environment["REDIS_URL"] = f"redis://127.0.0.1:{server.server_address[1]}/0?protocol=2"
        assert "5.0.14 is too old" in found(examine(cli, 3), "redis")["what"]
        server.shutdown()


# Settings


def test_setting_that_is_none(cli: Cli) -> None:
    cli.write(".env", "N_PARALEL=3\n")
    finding = found(examine(cli, 0), "settings", "note")
    assert "N_PARALEL in .env is no setting" in finding["what"]
    assert finding["mend"] == "Write N_PARALLEL."


# The engine


def test_engine_that_loads_its_model(cli: Cli) -> None:
    with scripted_engine(load_seconds=600) as engine:
        cli.environment["LLM_SERVER_URL"] = engine.url
        assert "is loading its model" in found(examine(cli, 0), "engine", "note")["what"]


def test_engine_that_refuses_the_key(cli: Cli) -> None:
    with scripted_engine(api_key="right") as engine:
        cli.environment |= {"LLM_SERVER_URL": engine.url, "LLM_API_KEY": "wrong-key"}
        finding = found(examine(cli, 3), "engine")
        assert "LLM_API_KEY" in finding["mend"]
        assert "wrong-key" not in str(finding)


def test_engine_that_hangs(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        cli.environment |= {"LLM_BACKEND": "vllm", "LLM_SERVER_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        assert "does not answer" in found(examine(cli, 3), "engine")["what"]


def test_something_else_at_the_engines_port(cli: Cli) -> None:
    with web_server() as (port, _):
        cli.environment["LLM_SERVER_URL"] = f"http://127.0.0.1:{port}"
        assert "is no OpenAI-compatible engine" in found(examine(cli, 3), "engine")["what"]


def test_another_engine_than_the_settings_say(cli: Cli) -> None:
    with scripted_engine(dialect="vllm") as engine:
        cli.environment["LLM_SERVER_URL"] = engine.url
        assert "it is vLLM, and LLM_BACKEND is llamacpp" in found(examine(cli, 0), "engine", "note")["what"]


# Ports


@contextlib.contextmanager
def web_server(wrap: tuple[str, ...] = (), host: str = "127.0.0.1") -> Iterator[tuple[int, int]]:
    """Run somebody's web server, and yield its port and pid."""
    port = free_port()
    command = [*wrap, sys.executable, "-m", "http.server", str(port), "--bind", host, "--directory", "/usr/share"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    try:
        until(lambda: _listens(port), "a web server")
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.parametrize("setting", ["METRICS_PORT", "HEALTH_CHECK_PORT"])
def test_port_that_is_taken(cli: Cli, setting: str) -> None:
    cli.environment["HEALTH_CHECK_ENABLED"] = "true"
    cli.environment["HEALTH_CHECK_PORT"] = str(free_port())
    with web_server() as (port, pid):
        cli.environment[setting] = str(port)
        finding = found(examine(cli, 3), "ports")
        assert f"{port} ({setting}) is taken by" in finding["what"]
        assert "http.server" in finding["what"]
        assert f"(pid {pid})" in finding["what"]
        assert f"set {setting}=" in finding["mend"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv")
def test_port_that_another_user_holds(cli: Cli) -> None:
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    # -S and the system's: nobody may not read a virtual environment below /root.
    program = "/usr/bin/python3"
    if not Path(program).exists():
        pytest.skip(f"there is no {program}")
    port = free_port()
    with subprocess.Popen(
        [*as_nobody, program, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            until(lambda: _listens(port), "a web server")
            cli.environment["METRICS_PORT"] = str(port)
            like_a_user = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-sys_ptrace")
            assert "another user's process" in found(examine(cli, 3, like_a_user), "ports")["what"]
        finally:
            process.kill()


def test_port_of_our_own_worker(cli: Cli, own_redis: Redis) -> None:
    port = free_port()
    cli.environment |= {"HEALTH_CHECK_ENABLED": "true", "HEALTH_CHECK_PORT": str(port)}
    with cli.start("worker") as running:
        running.until(lambda: _listens(port), "a worker's port")
        assert found(examine(cli, 0), "ports", "ok")["what"] == f"{port} is ours"
        running.send(signal.SIGTERM)
        running.wait()


def test_process_with_a_long_command_line_is_known_and_shown_short() -> None:
    folder = f"/home/{'a-long-name/' * 20}.venv/bin"
    worker = Process(7, f"{folder}/python3 {folder}/millrace worker")
    assert worker.millrace
    assert len(str(worker)) < 100
    assert str(worker).endswith("… (pid 7)")


def test_worker_with_a_long_path_is_known_by_its_port(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    script = folder / "serve.py"
    script.write_text(
        "import socket, sys, time\nserver = socket.create_server(('127.0.0.1', int(sys.argv[1])))\ntime.sleep(600)\n"
    )
    port = free_port()
    with subprocess.Popen([sys.executable, script, str(port), "millrace", "worker"]) as process:
        try:
            until(lambda: _listens(port), "a program that listens")
            assert [holder(listener).millrace for listener in listeners(port)] == [True]
        finally:
            process.kill()


# The model


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"ggml\x01\0\0\0", "is not a GGUF file"),
        (b"GGUF\x01\0\0\0", "GGUF version 1"),
        (b"GGUF\0\0\0\x03", "GGUF version 50331648"),
    ],
    ids=["empty", "lfs", "html", "ggml", "old", "big-endian"],
)
def test_file_that_is_no_model(cli: Cli, content: bytes, words: str) -> None:
    cli.environment["MODEL_PATH"] = str(cli.write("model.gguf", content))
    assert words in found(examine(cli, 3), "model")["what"]


def test_model_of_which_a_part_is_missing(cli: Cli) -> None:
    cli.write("big-00001-of-00003.gguf", b"GGUF\x03\0\0\0")
    cli.write("big-00003-of-00003.gguf", b"GGUF\x03\0\0\0")
    cli.environment["MODEL_PATH"] = "big-00001-of-00003.gguf"
    assert "big-00002-of-00003.gguf is not there" in found(examine(cli, 3), "model")["what"]


def test_model_that_may_not_be_read(cli: Cli, unprivileged: tuple[str, ...]) -> None:
    cli.write("model.gguf", b"GGUF\x03\0\0\0").chmod(0)
    cli.environment["MODEL_PATH"] = "model.gguf"
    finding = found(examine(cli, 3, unprivileged), "model")
    assert "cannot be read: Permission denied" in finding["what"]
    assert "chmod" in finding["mend"]


SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
WHOLE = {"config.json": b"{}", "model.safetensors": SAFETENSORS, "tokenizer.json": b"{}"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "there is no folder"),
        (WHOLE | {"config.json": None}, "has no config.json"),
        (WHOLE | {"model.safetensors": None, "pytorch_model.bin": b"PK"}, "vLLM loads safetensors here"),
        (WHOLE | {"model.safetensors": None}, "has no .safetensors"),
        (WHOLE | {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
        (WHOLE | {"model.safetensors.index.json": INDEX, "model-1.safetensors": SAFETENSORS}, "model-2.safetensors"),
        (WHOLE | {"model.safetensors.index.json": b"{"}, "is damaged"),
        (WHOLE | {"tokenizer.json": None}, "has no tokenizer"),
    ],
    ids=["no-folder", "no-config", "pickled", "no-weights", "lfs", "part", "index", "tokenizer"],
)
def test_folder_that_vllm_does_not_load(cli: Cli, files: dict[str, bytes | None] | None, words: str) -> None:
    folder = cli.folder / "models" / "hf" / "small"
    for name, content in (files or {}).items():
        folder.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    with scripted_engine(dialect="vllm") as engine:
        cli.environment |= {"LLM_BACKEND": "vllm", "LLM_SERVER_URL": engine.url, "MODEL_NAME": "/models/small"}
        findings = examine(cli, 3)
        assert words in found(findings, "model")["what"]
        assert checks_with(findings, "wrong") == ["model"]
        for name, content in WHOLE.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        assert "small" in found(examine(cli, 0), "model", "ok")["what"]


def test_tokenizer_that_is_elsewhere(cli: Cli) -> None:
    folder = cli.folder / "models" / "hf" / "small"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(WHOLE[name])
    with scripted_engine(dialect="vllm") as engine:
        cli.environment |= {"LLM_BACKEND": "vllm", "LLM_SERVER_URL": engine.url, "MODEL_NAME": "/models/small"}
        cli.environment["VLLM_ARGS"] = "--tokenizer org/name"
        assert "small" in found(examine(cli, 0), "model", "ok")["what"]


def test_model_of_the_hub(cli: Cli) -> None:
    with scripted_engine(dialect="vllm") as engine:
        cli.environment |= {"LLM_BACKEND": "vllm", "LLM_SERVER_URL": engine.url, "MODEL_NAME": "Qwen/Qwen3-4B"}
        assert "which vLLM fetches from" in found(examine(cli, 0), "model", "note")["what"]
        cli.environment["MODEL_NAME"] = "Qwen/qwen3-4b-q4.gguf"
        assert "is a GGUF file" in found(examine(cli, 3), "model")["what"]


# The machine


def test_model_that_is_larger_than_memory(cli: Cli) -> None:
    large = cli.write("large.gguf", b"GGUF\x03\0\0\0")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    os.truncate(large, 2 * pages)  # a hole, which takes no room
    cli.environment["MODEL_PATH"] = str(large)
    finding = found(examine(cli, 3), "memory")
    assert "large.gguf will take some" in finding["what"]
    assert "quantization" in finding["mend"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root can mount a disk")
def test_disk_that_is_full(cli: Cli) -> None:
    cli.data.mkdir()
    mounted = 'mount -t tmpfs -o size=4m none millrace-data && exec "$@"'
    wrap = ("unshare", "--mount", "sh", "-c", mounted, "sh")
    if subprocess.run([*wrap, "true"], cwd=cli.folder, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    finding = found(examine(cli, 3, wrap), "disk")
    assert "4.0 MiB are free" in finding["what"]
    assert "move DATA_DIR" in finding["mend"]


def test_data_dir_that_is_not_ours(cli: Cli, unprivileged: tuple[str, ...]) -> None:
    cli.data.mkdir(0o500)
    assert "is not yours to write" in found(examine(cli, 3, unprivileged), "disk")["what"]


def test_every_check_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    checks = "settings redis ledger engine model mount docker compose containers gpu ports disk memory"
    assert not [check for check in checks.split() if f"`{check}`" not in page]
