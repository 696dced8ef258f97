"""Both engines as containers: the same file runs on each, and the queue outlives the change from one to the other."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from tests.cli import batch_file
from tests.docker.conftest import BUILD, LIMIT
from tests.docker.project import MODEL, Project, docker
from tests.services import ROOT, environment, until

pytestmark = pytest.mark.timeout(LIMIT)

START = 400.0  # seconds; vLLM compiles a little at its first start
CPU_VLLM = "--enforce-eager --dtype bfloat16"


def ask(project: Project, path: str, body: Any = None, key: str | None = None) -> tuple[int, str]:
    """Ask the engine as any program would; `key` None stands for the right one."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{project.variables['LLM_PORT']}{path}",
        data=json.dumps(body).encode() if body is not None else None,
        headers={
            "Authorization": f"Bearer {key if key is not None else project.variables['LLM_API_KEY']}",
            "Content-Type": "application/json",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat(project: Project, **more: Any) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 4,
        "temperature": 0,
    } | more
    status, text = ask(project, "/v1/chat/completions", body)
    assert status == 200, text
    return dict(json.loads(text))


def check(project: Project) -> None:
    """What holds of either engine."""
    status, text = ask(project, "/v1/models")
    assert status == 200
    assert [entry["id"] for entry in json.loads(text)["data"]] == [MODEL]
    assert ask(project, "/v1/chat/completions", {}, key="wrong")[0] == 401
    assert ask(project, "/v1/chat/completions", {}, key="")[0] == 401
    assert chat(project)["usage"]["completion_tokens"] == 4
    container = project.container("llm-server")
    assert container["Config"]["User"] == "2000:0"
    assert project.compose("exec", "-T", "llm-server", "id", "-u").stdout.strip() == "2000"
    [models] = [mount for mount in container["Mounts"] if mount["Destination"] == "/models"]
    assert models["RW"] is False
    key = project.variables["LLM_API_KEY"]
    assert key not in project.compose("exec", "-T", "llm-server", "sh", "-c", "cat /proc/[0-9]*/cmdline").stdout
    assert key not in project.logs("llm-server")


def run_batch(project: Project, rows: int = 60) -> None:
    """Run one file by the command line, with the workers of the virtual environment."""
    project.cli.write("in.jsonl", batch_file(rows))
    done = project.cli.run("batch", "run", "in.jsonl", "-o", "out.jsonl", "--json")
    assert done.code == 0, done
    assert [row["custom_id"] for row in project.cli.rows("out.jsonl")] == [f"row-{n}" for n in range(rows)]
    assert project.cli.run("batch", "verify", done.json["id"]).code == 0
    (project.folder / "out.jsonl").unlink()


def test_llamacpp(project: Callable[..., Project], llamacpp_image: str) -> None:  # K2, K4, K9, K13, K34
    one = project("llamacpp", LLM_CPUS=2, LLM_MEMORY="3g", N_PARALLEL=4, N_CTX=512)
    one.add_models()
    one.compose("up", "--detach", "--wait", seconds=START)
    check(one)
    assert ask(one, "/health")[1] == '{"status":"ok"}'
    props = json.loads(ask(one, "/props")[1])
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (4, 512)
    assert json.loads(ask(one, "/v1/embeddings", {"model": MODEL, "input": "Hello"})[1])["data"][0]["embedding"]
    assert ask(one, "/")[0] in (401, 404)  # no page for people
    limits = one.container("llm-server")["HostConfig"]
    assert (limits["NanoCpus"], limits["Memory"]) == (2_000_000_000, 3 * 2**30)
    assert limits["ReadonlyRootfs"] is True
    assert limits["DeviceRequests"] is None  # K8: nothing of a GPU on the CPU
    version = one.compose("exec", "-T", "llm-server", "llama-server", "--version")
    assert "0.3.36" in version.stdout + version.stderr
    run_batch(one)
    one.compose("stop", "llm-server")
    assert one.container("llm-server")["State"]["ExitCode"] == 0  # it ends at SIGTERM, and is not killed


def test_llama_cpp_pythons_server(project: Callable[..., Project], llamacpp_image: str) -> None:
    one = project("llamacpp", LLAMACPP_SERVER="python", N_CTX=1024)
    one.add_models()
    one.compose("up", "--detach", "--wait", seconds=START)
    check(one)
    told = one.cli.run("status", "--json")
    assert (told.json["engine"]["kind"], told.json["engine"]["slots"]) == ("llama-cpp-python", 1)
    run_batch(one, 12)


def test_a_ready_made_llamacpp_image_is_used_and_nothing_compiled(
    project: Callable[..., Project], llamacpp_image: str
) -> None:
    # Laid out as the public image is: the server in /app, its own entry point, root.
    made = f"localhost/millrace-test-{id(project)}:server"
    recipe = (
        f"FROM {llamacpp_image}\nUSER 0\nRUN cp -a /opt/llama /app && rm -rf /opt/llama /docker\n"
        'ENV PATH=/usr/local/bin:/usr/bin:/bin\nENTRYPOINT ["/app/llama-server"]\n'
    )
    docker("build", "-t", made, "-", input=recipe)
    try:
        one = project("llamacpp", LLAMACPP_IMAGE=made)
        one.add_models()
        one.compose("up", "--detach", "--wait", seconds=START)
        check(one)
        # The image that ours leaves behind is for what the files say by default.
        one.set(LLAMACPP_IMAGE=None)
        one.compose("build", "llm-server", seconds=BUILD)
    finally:
        docker("rmi", "-f", made)


def test_vllm(project: Callable[..., Project], vllm_image: str) -> None:  # K5
    one = project("vllm", VLLM_ARGS=CPU_VLLM, MAX_MODEL_LEN=1024, MAX_NUM_QUEUED_REQS=64)
    one.add_models()
    one.compose("up", "--detach", "--wait", seconds=START)
    check(one)
    assert "\nvllm:" in ask(one, "/metrics")[1]
    arguments = one.compose("exec", "-T", "llm-server", "sh", "-c", "cat /proc/[0-9]*/cmdline").stdout
    assert "--max-num-queued-reqs\x0064" in arguments
    run_batch(one)


def test_the_engine_is_switched_with_work_queued(
    project: Callable[..., Project], llamacpp_image: str, vllm_image: str
) -> None:  # K7, X9, X15
    one = project("llamacpp", VLLM_ARGS=CPU_VLLM, MAX_MODEL_LEN=2048, N_CTX=2048)
    one.add_models()
    assert one.cli.run("backend", "start", "--json", seconds=START).json["engine"]["kind"] == "llamacpp"
    one.cli.write("in.jsonl", batch_file(1500, max_tokens=64))
    send = (
        "import json\nfrom tasks.inference import chat\n"
        "sent = [chat.delay([{'role': 'user', 'content': 'Hello'}], max_tokens=8) for _ in range(10)]\n"
        "print(json.dumps([result.get(timeout=900)['model'] for result in sent]))\n"
    )
    with one.cli.start("worker"):
        batch = one.cli.run("batch", "submit", "in.jsonl", "--json").json["id"]

        def counts() -> dict[str, int]:
            return dict(one.cli.run("batch", "show", batch, "--json").json["request_counts"])

        until(lambda: counts()["completed"], "a first answer")
        switched = one.cli.start("backend", "switch", "vllm", "--json")
        with switched as running:
            running.until(lambda: "Holding the queues" in running.err, "a hold")
            # Somebody asks while the engine is being changed.
            with subprocess.Popen(
                [sys.executable, "-c", send],
                cwd=one.folder,
                env=environment(**{name.lower(): value for name, value in one.variables.items()}),
                stdout=subprocess.PIPE,
                text=True,
            ) as asking:
                done = running.wait(START)
                assert done.code == 0, done
                assert done.json["engine"]["kind"] == "vllm"
                assert counts()["total"] == 1500
                assert json.loads(asking.communicate(timeout=900)[0]) == [MODEL] * 10
        assert "docker-compose.vllm.yml" in (one.folder / ".env").read_text()
        assert len(one.compose("ps", "--all", "--quiet").stdout.split()) == 2  # no orphan
        watched = one.cli.run("batch", "watch", batch, seconds=300)
        assert watched.code == 0, watched
        assert one.cli.run("batch", "verify", batch).code == 0


def test_a_switch_that_fails_goes_back(project: Callable[..., Project], llamacpp_image: str, vllm_image: str) -> None:
    one = project("llamacpp", VLLM_ARGS="--no-such-option")
    one.add_models()
    assert one.cli.run("backend", "start", seconds=START).code == 0
    before = (one.folder / ".env").read_text()
    done = one.cli.run("backend", "switch", "vllm", "--json", seconds=START)
    assert (done.code, done.error["code"]) == (3, "engine_failed")
    assert "--no-such-option" in done.error["message"]
    assert "The old engine runs again." in done.error["message"]
    assert (one.folder / ".env").read_text() == before
    assert chat(one)["model"] == MODEL
    with one.redis() as client:
        assert client.get("millrace:hold") is None


def test_a_switch_to_a_model_that_is_not_there_changes_nothing(
    project: Callable[..., Project], llamacpp_image: str
) -> None:
    one = project("llamacpp", MODEL_NAME="/models/other")
    one.add_models()
    assert one.cli.run("backend", "start", seconds=START).code == 0
    dotenv, container = (one.folder / ".env").read_text(), one.container("llm-server")

    def refused() -> str:
        done = one.cli.run("backend", "switch", "vllm", "--json")
        assert (done.code, done.error["code"]) == (3, "engine_failed"), done
        assert done.error["hint"]
        assert "Holding the queues" not in done.err
        assert (one.folder / ".env").read_text() == dotenv
        after = one.container("llm-server")
        assert (after["Id"], after["State"]["StartedAt"]) == (container["Id"], container["State"]["StartedAt"])
        return str(done.error["message"])

    message = refused()
    assert message.startswith(f"vllm would not start: there is no folder {one.folder}/models/hf/other")
    assert message.endswith("Nothing was changed.")
    one.set(MODEL_NAME=None)
    dotenv = (one.folder / ".env").read_text()
    for weights in (one.folder / "models/hf/tiny").glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    assert "vLLM loads safetensors here" in refused()
    one.set(MODELS_SOURCE="models")
    dotenv = (one.folder / ".env").read_text()
    assert f"there is no volume {one.name}_models" in refused()
    assert chat(one)["model"] == MODEL
    with one.redis() as client:
        assert client.get("millrace:hold") is None


def test_the_demos_model_gives_way_to_one_of_yours(project: Callable[..., Project], llamacpp_image: str) -> None:
    one = project("llamacpp", LLM_MODEL=None)
    one.add_models()
    yours, aside = one.folder / "models/gguf/tiny.gguf", one.folder / "tiny.gguf"
    yours.rename(aside)
    own = one.folder / "models/gguf/millrace-demo.gguf"
    shutil.copy(ROOT / "models/gguf/millrace-demo.gguf", own)
    own.chmod(0o644)

    def served() -> list[str]:
        done = one.cli.run("backend", "start", "--json", seconds=START)
        assert done.code == 0, done
        return list(done.json["engine"]["models"])

    assert served() == ["millrace-demo"]
    one.compose("down")
    aside.rename(yours)
    assert served() == [MODEL]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_switch_that_is_ended_goes_back(
    project: Callable[..., Project], llamacpp_image: str, vllm_image: str, number: signal.Signals
) -> None:
    one = project("llamacpp", VLLM_ARGS=CPU_VLLM, MAX_MODEL_LEN=1024)
    one.add_models()
    with (one.folder / ".env").open("a") as file:
        file.write("NOTE=a$b\n")  # Compose warns of it, and that is all
    assert one.cli.run("backend", "start", seconds=START).code == 0
    before = (one.folder / ".env").read_text()
    with one.cli.start("backend", "switch", "vllm") as switching:
        switching.until(
            lambda: (
                "docker-compose.vllm.yml" in (one.folder / ".env").read_text()
                and one.container("llm-server")["Config"]["Image"] == "localhost/millrace-vllm"
            ),
            "the other engine's container",
            120,
        )
        switching.send(number)
        done = switching.wait(START)
    assert done.code == 130
    assert "The old engine runs again." in done.err
    assert (one.folder / ".env").read_text() == before
    assert chat(one)["model"] == MODEL
    with one.redis() as client:
        assert client.get("millrace:hold") is None


def test_an_engine_that_could_not_answer_the_queue_is_refused(
    project: Callable[..., Project], llamacpp_image: str, vllm_image: str
) -> None:
    one = project("llamacpp", LLM_MODEL=None)
    one.add_models()
    (one.folder / "models/hf/tiny").rename(one.folder / "models/hf/another")
    assert one.cli.run("backend", "start", seconds=START).code == 0
    one.cli.write("in.jsonl", batch_file(3))
    assert one.cli.run("batch", "submit", "in.jsonl").code == 0
    done = one.cli.run("backend", "switch", "vllm", "--json")
    assert (done.code, done.error["code"]) == (2, "model_mismatch")
    assert "3 queued rows ask for the model tiny" in done.error["message"]
    assert chat(one)["model"] == MODEL  # the old one was not touched


def test_the_key_may_come_from_a_file(project: Callable[..., Project], llamacpp_image: str) -> None:
    one = project("llamacpp")
    one.add_models()
    (one.folder / "key").write_text("of-a-file\n")
    (one.folder / "key").chmod(0o644)
    container = docker(
        *("run", "--detach", "--label", f"com.docker.compose.project={one.name}"),
        *("--publish", f"127.0.0.1:{one.variables['LLM_PORT']}:8000", "--env", "LLM_API_KEY_FILE=/run/key"),
        *("--volume", f"{one.folder}/key:/run/key:ro", "--volume", f"{one.folder}/models/gguf:/models:ro"),
        llamacpp_image,
    ).stdout.strip()
    until(
        lambda: docker("inspect", "-f", "{{.State.Health.Status}}", container).stdout.strip() == "healthy",
        lambda: docker("logs", container).stderr,
        60,
    )
    assert ask(one, "/v1/chat/completions", {}, key="another")[0] == 401
    one.set(LLM_API_KEY="of-a-file")
    assert chat(one)["usage"]["completion_tokens"] == 4


def test_engines_start_one_after_the_other(project: Callable[..., Project], llamacpp_image: str) -> None:  # C8, X17
    first, second = project("llamacpp"), project("llamacpp")
    for one in (first, second):
        one.add_models()
    with first.cli.start("backend", "start") as one:
        one.until(lambda: "Starting the containers" in one.err, "a first start")
        with second.cli.start("backend", "start") as other:
            other.until(lambda: "Waiting for another engine" in other.err, "a second one that waits")
            assert one.wait(START).code == 0
            healthy = first.container("llm-server")["State"]["Health"]["Log"]  # of five probes, no more
            assert other.wait(START).code == 0
    passed = min(probe["End"] for probe in healthy if probe["ExitCode"] == 0)
    assert datetime.fromisoformat(passed) < datetime.fromisoformat(
        second.container("llm-server")["State"]["StartedAt"].replace("Z", "+00:00")
    )


def test_workers_in_containers(project: Callable[..., Project], llamacpp_image: str, worker_image: None) -> None:  # K2
    one = project("llamacpp", "worker", WORKER_REPLICAS=2, BATCH_PROCESSES=1, WORKER_CONCURRENCY=2)
    one.add_models()
    (one.folder / "millrace-data").mkdir()
    one.compose("up", "--detach", "--wait", seconds=START)

    def hosts() -> set[str]:
        return {worker["host"] for worker in one.cli.run("status", "--json").json["workers"]}

    until(lambda: len(hosts()) == 2, "workers of two containers")
    run_batch(one)
    one.cli.write("long.jsonl", batch_file(4000, max_tokens=150))
    batch = one.cli.run("batch", "submit", "long.jsonl", "--json").json["id"]
    until(
        lambda: one.cli.run("batch", "show", batch, "--json").json["request_counts"]["completed"], "a first answer", 60
    )
    # A soft shutdown: what is in flight is answered or put back, well within the grace period.
    one.compose("stop", "worker", seconds=130)
    for index in (1, 2):
        assert one.container("worker", index)["State"]["ExitCode"] == 0, one.logs("worker")
    shown = one.cli.run("batch", "show", batch, "--json").json
    assert 0 < shown["request_counts"]["completed"] < 4000
    # So does a plain Celery worker in the same image (REMAP_SIGTERM).
    plain = one.compose("run", "--detach", "worker", "celery", "-A", "worker", "worker", "-c", "2").stdout.split()[-1]
    until(lambda: " ready." in docker("logs", plain).stderr, lambda: docker("logs", plain).stderr)
    docker("stop", "--time", "60", plain, seconds=90)
    assert docker("inspect", "-f", "{{.State.ExitCode}}", plain).stdout.strip() == "0", docker("logs", plain).stderr
    assert "soft shutdown" in docker("logs", plain).stderr.lower()
    one.compose("start", "worker")
    assert one.cli.run("batch", "watch", batch, seconds=300).code == 0
    assert one.cli.run("batch", "verify", batch).code == 0
