"""The batch path on a real vLLM: the same file, the same commands, another engine.

Runs where VLLM_PYTHON names the Python of an environment with vLLM in it (see .ci/run).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.models.tiny import make_tiny
from tests.services import environment, free_port, until

VLLM = Path(os.environ.get("VLLM_PYTHON", "/nowhere")).with_name("vllm")
pytestmark = [
    pytest.mark.skipif(not VLLM.exists(), reason="VLLM_PYTHON names no environment with vLLM"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    model = make_tiny(folder)
    port = free_port()
    arguments = ["--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "1024", "--enforce-eager"]
    offline = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log_path = folder / "vllm.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [VLLM, "serve", model.hf, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            env=environment() | offline,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _healthy(url), "a healthy vLLM", 300)
        assert process.poll() is None, log_path.read_text()[-3000:]
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_file_runs_on_vllm(vllm: str, tmp_path: Path) -> None:
    def row(number: int, prompt: str) -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 16}
        line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(line)

    rows = [row(number, f"What is {number}?") for number in range(60)]
    rows[30] = row(30, "far too long " * 2000)
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "llm_server_url": vllm,
        "llm_backend": "vllm",
        "redis_port": free_port(),
        "health_check_enabled": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "millrace", "batch", "run", "in.jsonl", "-o", "out.jsonl", "--json"],
        cwd=tmp_path,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
    )
    batch = json.loads(done.stdout)
    assert (done.returncode, batch["request_counts"]) == (1, {"total": 60, "completed": 59, "failed": 1})
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"row-{number}" for number in range(60) if number != 30]
    (failure,) = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert (failure["custom_id"], failure["error"]["code"]) == ("row-30", "context_length_exceeded")
    assert failure["response"]["status_code"] == 400
    verified = subprocess.run(
        [sys.executable, "-m", "millrace", "batch", "verify", batch["id"]],
        cwd=tmp_path,
        env=environment(**settings),
        check=False,
    )
    assert verified.returncode == 0
