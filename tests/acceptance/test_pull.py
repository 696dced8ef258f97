"""`millrace models pull` and `models list`, against a Hub on loopback."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli import Cli
from tests.hub import Hub, commit_of, hub_server, sha256

GGUF, HF = "mill/stone-7B-GGUF", "mill/stone-7B"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture
def pulling(hub: Hub, tmp_path: Path, new_cli: Callable[..., Cli]) -> Cli:
    return new_cli(tmp_path / "home", HF_ENDPOINT=hub.url, MODEL_PATH=None)


@pytest.fixture(scope="session")
def content(tiny: Path) -> bytes:
    return tiny.read_bytes()


@pytest.fixture(scope="session")
def folder(tiny: Path) -> dict[str, bytes]:
    """The files of a model for vLLM."""
    return {path.name: path.read_bytes() for path in tiny.with_name(f"{tiny.stem}-hf").iterdir()}


def files(folder: Path) -> list[str]:
    """Return all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# GGUF


def test_the_only_gguf_file(hub: Hub, pulling: Cli, content: bytes) -> None:
    hub.add(GGUF, {"stone.gguf": content, "README.md": b"# Stone", "mmproj-stone.gguf": b"eyes"})
    done = pulling.run("models", "pull", GGUF)
    assert done.code == 0, done
    assert done.out == "MODEL_PATH=/models/stone.gguf\n"
    assert "serves it as stone:" in done.err
    path = pulling.folder / "models" / "gguf" / "stone.gguf"
    assert path.read_bytes() == content
    assert files(pulling.folder / "models") == ["gguf/stone.gguf"]
    assert [stat.S_IMODE(part.stat().st_mode) for part in (path, *path.parents[:2])] == [0o644, 0o755, 0o755]

    again = pulling.run("models", "pull", GGUF, "--json")
    assert "is there already, with the right sha256" in again.err
    assert again.json == {
        "repo": GGUF,
        "commit": commit_of(GGUF + "main" + "".join(map(sha256, hub.repos[GGUF]["main"].values()))),
        "format": "gguf",
        "path": "models/gguf/stone.gguf",
        "files": ["stone.gguf"],
        "bytes": len(content),
        "downloaded": False,
        "setting": "MODEL_PATH=/models/stone.gguf",
        "serves": "stone",
    }
    assert hub.asked() == ["stone.gguf"]


def test_the_pulled_model_is_the_one_that_up_then_serves(hub: Hub, pulling: Cli, content: bytes) -> None:
    hub.add(GGUF, {"stone.gguf": content})
    setting = pulling.run("models", "pull", GGUF).out.strip()
    pulling.environment.pop("LLM_SERVER_URL")
    pulling.write(".env", f"{setting}\n")
    pulling.write("prompts.txt", "one\n")
    done = pulling.run("batch", "run", "prompts.txt", "-o", "out.jsonl", seconds=100)
    pulling.kill_all()
    assert done.code == 0, done
    assert pulling.rows("out.jsonl")[0]["response"]["body"]["model"] == "stone"


def test_of_several_q4_k_m_is_taken_and_another_by_its_name(hub: Hub, pulling: Cli, content: bytes) -> None:
    names = ("stone-Q4_K_M.gguf", "stone-Q5_K_M.gguf", "stone-Q8_0.gguf", "stone-UD-Q4_K_XL.gguf", "mmproj-F16.gguf")
    hub.add(GGUF, {name: content + name.encode() for name in names})
    taken = pulling.run("models", "pull", GGUF, "--json")
    assert taken.json["files"] == ["stone-Q4_K_M.gguf"]
    assert "has 5 GGUF files: taking stone-Q4_K_M.gguf" in taken.err
    assert pulling.run("models", "pull", GGUF, "stone-Q8_0.gguf", "--json").json["serves"] == "stone-Q8_0"
    assert pulling.run("models", "pull", GGUF, "q5_k_m", "--json").json["serves"] == "stone-Q5_K_M"
    pulling.environment["LLM_MODEL"] = "mine"
    assert pulling.run("models", "pull", GGUF, "mmproj-F16.gguf", "--json").json["serves"] == "mine"
    assert hub.asked() == ["stone-Q4_K_M.gguf", "stone-Q8_0.gguf", "stone-Q5_K_M.gguf", "mmproj-F16.gguf"]


@pytest.mark.parametrize("names", [("a-Q5_K_M.gguf", "a-Q8_0.gguf"), ("a.Q4_K_M.gguf", "b.q4_k_m.gguf")])
def test_of_several_one_must_be_named(hub: Hub, pulling: Cli, names: tuple[str, ...]) -> None:
    hub.add(GGUF, dict.fromkeys(names, b"x" * 1_500_000))
    done = pulling.run("models", "pull", GGUF, "--json")
    assert (done.code, done.error["code"]) == (2, "choice_needed")
    assert done.error["hint"] == f"Choices: {names[0]} (1.5 MB), {names[1]} (1.5 MB)."
    assert not hub.transfers
    assert not (pulling.folder / "models").exists()


def test_a_model_in_parts(hub: Hub, pulling: Cli, content: bytes) -> None:
    parts = {f"Q4_K_M/stone-Q4_K_M-0000{n}-of-00003.gguf": content + bytes([n]) for n in (1, 2, 3)}
    hub.add(GGUF, parts | {"Q8_0/stone-Q8_0-00001-of-00002.gguf": b"its second part is not there"})
    hub.cuts["Q4_K_M/stone-Q4_K_M-00002-of-00003.gguf"] = 1000
    done = pulling.run("models", "pull", GGUF, "--json")
    assert done.code == 0, done
    assert done.json["setting"] == "MODEL_PATH=/models/stone-Q4_K_M-00001-of-00003.gguf"
    assert done.json["bytes"] == 3 * len(content) + 3
    assert [path.partition("-0000")[2][0] for path in hub.asked()] == ["3", "2", "2", "1"]
    for path, whole in parts.items():
        assert (pulling.folder / "models" / "gguf" / Path(path).name).read_bytes() == whole
    # Any part names the whole, and a part that was lost comes back alone.
    (pulling.folder / "models" / "gguf" / "stone-Q4_K_M-00002-of-00003.gguf").unlink()
    hub.transfers.clear()
    assert pulling.run("models", "pull", GGUF, "stone-Q4_K_M-00003-of-00003.gguf").code == 0
    assert hub.asked() == ["Q4_K_M/stone-Q4_K_M-00002-of-00003.gguf"]


def test_another_file_of_that_name_is_not_replaced(hub: Hub, pulling: Cli, content: bytes) -> None:
    hub.add(GGUF, {"stone.gguf": content})
    path = pulling.folder / "models" / "gguf" / "stone.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(content[:-1] + b"x")
    done = pulling.run("models", "pull", GGUF, "--json")
    assert (done.code, done.error["code"]) == (2, "model_exists")
    assert not hub.transfers


# Breaks


def test_a_killed_pull_goes_on_where_it_was(hub: Hub, pulling: Cli, content: bytes) -> None:
    hub.add(GGUF, {"stone.gguf": content})
    hub.stalls["stone.gguf"] = 1_000_000
    part = pulling.folder / "models" / "gguf" / "stone.gguf.part"
    with pulling.start("models", "pull", GGUF) as running:
        running.until(lambda: part.is_file() and part.stat().st_size == 1_000_000, "a million bytes")
        busy = pulling.run("models", "pull", GGUF, "--json")
        assert (busy.code, busy.error["code"]) == (3, "download_busy")
        running.send(signal.SIGKILL)
        running.process.wait(10)
    hub.release.set()
    assert not part.with_suffix("").exists()
    assert pulling.run("models", "list", "--json").json == {"files": []}
    done = pulling.run("models", "pull", GGUF)
    assert done.code == 0, done
    assert hub.transfers == [("stone.gguf", None), ("stone.gguf", "bytes=1000000-")]
    assert files(pulling.folder / "models") == ["gguf/stone.gguf"]
    assert part.with_suffix("").read_bytes() == content


def test_ctrl_c_keeps_what_came(hub: Hub, pulling: Cli, content: bytes) -> None:
    hub.add(GGUF, {"stone.gguf": content})
    hub.stalls["stone.gguf"] = 1_000_000
    part = pulling.folder / "models" / "gguf" / "stone.gguf.part"
    with pulling.start("models", "pull", GGUF) as running:
        running.until(lambda: part.is_file() and part.stat().st_size == 1_000_000, "a million bytes")
        running.send(signal.SIGINT)
        done = running.wait(10)
    assert (done.code, done.out) == (130, "")
    assert "what came is kept" in done.err
    hub.release.set()
    assert pulling.run("models", "pull", GGUF).code == 0
    assert hub.transfers[-1] == ("stone.gguf", "bytes=1000000-")


def test_a_killed_pull_of_a_folder_goes_on_where_it_was(hub: Hub, pulling: Cli, folder: dict[str, bytes]) -> None:
    hub.add(HF, folder)
    hub.stalls["model.safetensors"] = 1_000_000
    part = pulling.folder / "models" / "hf" / ".incomplete" / "stone-7B" / "model.safetensors.part"
    with pulling.start("models", "pull", HF) as running:
        running.until(lambda: part.is_file() and part.stat().st_size == 1_000_000, "a million bytes")
        busy = pulling.run("models", "pull", HF, "--json")
        assert (busy.code, busy.error["code"]) == (3, "download_busy")
        running.send(signal.SIGKILL)
        running.process.wait(10)
    hub.release.set()
    # What is incomplete is no model to anybody.
    assert not (pulling.folder / "models" / "hf" / "stone-7B").exists()
    assert pulling.run("models", "list", "--json").json == {"files": []}
    first = list(hub.transfers)
    done = pulling.run("models", "pull", HF, "--json")
    assert (done.code, done.json["downloaded"]) == (0, True), done
    assert hub.transfers[len(first) :] == [("model.safetensors", "bytes=1000000-")]
    assert files(pulling.folder / "models" / "hf") == sorted(f"stone-7B/{name}" for name in folder)


def test_a_pull_of_another_revision_takes_nothing_over(hub: Hub, pulling: Cli, folder: dict[str, bytes]) -> None:
    hub.add(HF, folder | {"old.json": b"{}"})
    hub.cuts["model.safetensors"] = 1_000
    hub.add(HF, folder | {"config.json": folder["config.json"] + b"\n"}, "v2")
    gathered = pulling.folder / "models" / "hf" / ".incomplete" / "stone-7B"
    gathered.mkdir(parents=True)
    (gathered / "old.json").write_bytes(b"{}")
    (gathered / "config.json").write_bytes(folder["config.json"])
    assert pulling.run("models", "pull", HF, "--revision", "v2").code == 0
    there = pulling.folder / "models" / "hf" / "stone-7B"
    assert files(there) == sorted(folder)
    assert (there / "config.json").read_bytes() == folder["config.json"] + b"\n"


def test_a_push_in_the_middle_changes_nothing(hub: Hub, pulling: Cli, folder: dict[str, bytes]) -> None:
    hub.add(HF, dict(folder))
    hub.listed = lambda: hub.push(HF, dict.fromkeys(folder, b"other")) if not hub.transfers else None
    assert pulling.run("models", "pull", HF).code == 0
    there = pulling.folder / "models" / "hf" / "stone-7B"
    assert {name: (there / name).read_bytes() for name in folder} == folder


# Hugging Face folders


def test_a_folder(hub: Hub, pulling: Cli, folder: dict[str, bytes]) -> None:
    others = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "tf_model.h5",
        "flax_model.msgpack",
        "training.pt",
        "onnx/model.onnx",
        "onnx/config.json",
        "original/consolidated.00.pth",
        "original/params.json",
        "picture.png",
        "README.md",
        ".gitattributes",
        "modeling_stone.py",
    ]
    beside = {"chat_template.jinja": b"{{ messages }}", "tokenizer.model": b"x", "1_Pooling/config.json": b"{}"}
    hub.add(HF, folder | beside | dict.fromkeys(others, b"not wanted"))
    done = pulling.run("models", "pull", HF)
    assert done.code == 0, done
    assert done.out == "MODEL_NAME=/models/stone-7B\n"
    there = pulling.folder / "models" / "hf" / "stone-7B"
    assert files(there) == sorted(folder | beside)
    assert {name: (there / name).read_bytes() for name in folder} == folder
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [there, *there.rglob("*")]}
    assert modes == {0o644, 0o755}
    hub.transfers.clear()
    again = pulling.run("models", "pull", HF, "--json")
    assert (again.code, again.json["downloaded"], again.json["serves"]) == (0, False, "stone-7B")
    assert not hub.transfers
    (there / "config.json").write_text("{}")
    other = pulling.run("models", "pull", HF, "--json")
    assert (other.code, other.error["code"]) == (2, "model_exists")


def test_everybody_may_read_a_folder_whatever_the_umask(hub: Hub, pulling: Cli, folder: dict[str, bytes]) -> None:
    hub.add(HF, folder)
    before = os.umask(0o077)
    try:
        assert pulling.run("models", "pull", HF).code == 0
    finally:
        os.umask(before)
    there = pulling.folder / "models" / "hf" / "stone-7B"
    assert {stat.S_IMODE(path.stat().st_mode) for path in there.iterdir()} == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (there, there.parent)} == {0o755}


def test_the_engine_decides_where_there_are_both(hub: Hub, pulling: Cli, folder: dict[str, bytes]) -> None:
    hub.add(HF, folder | {"stone.gguf": b"GGUF"})
    first = pulling.run("models", "pull", HF, "--json")
    assert first.json["format"] == "gguf"
    assert "has GGUF files and safetensors: taking GGUF" in first.err
    pulling.environment["LLM_BACKEND"] = "vllm"
    assert pulling.run("models", "pull", HF, "--json").json["format"] == "hf"
    assert pulling.run("models", "pull", HF, "stone.gguf", "--json").json["format"] == "gguf"


@pytest.mark.parametrize(
    ("names", "code", "word"),
    [
        (["config.json", "pytorch_model.bin", "original/a.safetensors"], "pickle_only", "run code"),
        (["config.json"], "no_model", "neither"),
        (["adapter_model.safetensors"], "no_model", "config.json"),
    ],
)
def test_what_is_no_model_is_refused(hub: Hub, pulling: Cli, names: list[str], code: str, word: str) -> None:
    hub.add(HF, dict.fromkeys(names, b"x"))
    done = pulling.run("models", "pull", HF, "--json")
    assert (done.code, done.error["code"]) == (2, code)
    assert word in done.error["message"]
    assert not hub.transfers
    assert not (pulling.folder / "models").exists()


# The Hub


def test_a_gated_model(hub: Hub, pulling: Cli, content: bytes) -> None:
    hub.add(GGUF, {"stone.gguf": content})
    hub.gated.add(GGUF)
    done = pulling.run("models", "pull", GGUF, "--json")
    assert (done.code, done.error["code"]) == (3, "hub_denied")
    assert "HF_TOKEN" in done.error["hint"]
    pulling.environment["HF_TOKEN"] = hub.token
    assert pulling.run("models", "pull", GGUF).code == 0
    assert {login for server, login in hub.logins if server == "cdn"} == {None}


def test_names_that_are_not_there(hub: Hub, pulling: Cli) -> None:
    hub.add(GGUF, {"stone-Q8_0.gguf": b"x"})
    hub.add("other/thing", {"thing.bin": b"x"})

    def refused(*words: str) -> str:
        done = pulling.run("models", "pull", *words, "--json")
        assert (done.code, done.error["code"]) == (2, "not_found"), done
        return f"{done.error['message']} {done.error['hint']}"

    assert "Near to it are mill/stone-7B-GGUF." in refused("mill/ston-7b-GGUF")
    assert "Near to it are mill/stone-7B-GGUF." in refused("miller/stone-7B-GGUF")
    assert "HF_TOKEN" in refused("no/body")
    assert "no such revision" in refused(GGUF, "--revision", "v3")
    assert "Near to it: stone-Q8_0.gguf" in refused(GGUF, "stone-Q8_1.gguf")
    assert "stone-Q8_0.gguf (0.0 MB)" in refused(GGUF, "x")
    assert "leave FILE out" in refused("other/thing", "thing.bin")
    done = pulling.run("models", "pull", "stone", "--json")
    assert (done.code, done.error["code"]) == (2, "invalid_input")


def test_a_hub_that_is_not_there(hub: Hub, pulling: Cli) -> None:
    hub.status = 503
    assert (pulling.run("models", "pull", GGUF, "--json")).error["code"] == "hub_unreachable"
    pulling.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = pulling.run("models", "pull", GGUF)
    assert done.code == 3
    assert "HF_ENDPOINT" in done.err


def test_a_disk_that_is_too_small(hub: Hub, pulling: Cli) -> None:
    free = os.statvfs(pulling.folder)
    hub.add(GGUF, {"stone.gguf": b"x"})
    hub.announced["stone.gguf"] = free.f_bavail * free.f_frsize * 2
    done = pulling.run("models", "pull", GGUF, "--json")
    assert (done.code, done.error["code"]) == (3, "disk_full")
    assert not hub.transfers


# The list


def test_list(hub: Hub, pulling: Cli, content: bytes, folder: dict[str, bytes]) -> None:
    hub.add(GGUF, {"stone.gguf": content})
    hub.add(HF, folder)
    assert pulling.run("models", "pull", GGUF).code == pulling.run("models", "pull", HF).code == 0
    ggufs = pulling.folder / "models" / "gguf"
    (ggufs / "cut.gguf").write_bytes(content[:-1000])
    (ggufs / "page.gguf").write_bytes(b"<!doctype html>")
    (ggufs / "part-00002-of-00002.gguf").write_bytes(content)
    (pulling.folder / "models" / "hf" / "empty").mkdir()
    (pulling.folder / "models" / "hf" / "empty" / "config.json").write_text("[]")
    listed = {file["name"]: file for file in pulling.run("models", "list", "--json").json["files"]}
    assert {name: file["problem"] for name, file in listed.items() if not file["problem"]} == {
        "stone": "",
        "stone-7B": "",
    }
    parameters = listed["stone"]["parameters"]
    assert 2_000_000 < parameters < 3_000_000
    assert listed["stone"] == {
        "name": "stone",
        "format": "gguf",
        "path": "models/gguf/stone.gguf",
        "bytes": len(content),
        "quantization": "F16",
        "architecture": "llama",
        "parameters": parameters,
        "context": 4096,
        "chat_template": True,
        "parts": 1,
        "problem": "",
    }
    assert listed["stone-7B"] | {"bytes": 0, "path": "", "format": ""} == listed["stone"] | {
        "name": "stone-7B",
        "format": "",
        "path": "",
        "bytes": 0,
        "quantization": "float16",
        "architecture": "LlamaForCausalLM",
    }
    assert "of " in listed["cut"]["problem"]
    assert "<!doctyp" in listed["page"]["problem"]
    assert "part-00001-of-00002.gguf is missing" in listed["part-00001-of-00002"]["problem"]
    assert "no JSON object" in listed["empty"]["problem"]
    shown = pulling.run("models", "list")
    assert shown.code == 0, shown
    row = next(line.split() for line in shown.out.splitlines() if line.startswith("stone "))
    assert row == [
        "stone",
        "gguf",
        f"{len(content) / 2**20:.1f}",
        "MiB",
        "F16",
        "2.5M",
        "4096",
        "models/gguf/stone.gguf",
    ]
    assert shown.out.count("broken: ") == 4
