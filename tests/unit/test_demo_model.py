"""The demo model: its files, the tickets it is asked, and how its answers are judged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from millrace.cli.demo import Score, score
from millrace.errors import InputError, Unreachable
from millrace.models.demo import ensure_model, own_gguf, write_own_hf
from millrace.models.gguf_header import read_header
from millrace.models.hf_folder import read_folder
from millrace.models.llama_files import Llama, read_gguf, write_gguf
from millrace.settings import Settings
from tests.hub import hub_server
from tests.services import ROOT

OWN = ROOT / "models" / "gguf" / "millrace-demo.gguf"
EXAMPLES = ROOT / "examples"
NO_HUB = "http://127.0.0.1:9"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(_: str) -> None:
    pass


# ---- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Llama:
    return read_gguf(OWN)


def test_the_model_is_small_and_says_what_it_is(own: Llama) -> None:
    assert OWN.stat().st_size <= 2_500_000
    assert sum(tensor.size for tensor in own.weights.values()) == 2_066_112
    assert own.context == 4096
    assert all(np.isfinite(tensor).all() for tensor in own.weights.values())
    header = read_header(OWN)
    assert (header.architecture, header.quantization, header.chat_template) == ("llama", "Q8_0", True)


def test_the_folder_for_vllm_holds_the_same_weights(own: Llama, tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "millrace-demo"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"an older one")
    write_own_hf(Settings(models_dir=ROOT / "models"), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["millrace-demo"]
    ours, theirs = own.weights, load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert read_folder(folder).parameters == 2_066_112


def test_what_is_written_is_read_back_but_for_its_rounding(own: Llama, tmp_path: Path) -> None:
    for quantization in ("F16", "Q8_0"):
        path = tmp_path / f"{quantization}.gguf"
        write_gguf(own, path, "again", quantization)
        assert read_header(path).quantization == quantization
        again = read_gguf(path)
        assert (again.shape, again.vocabulary, set(again.weights)) == (own.shape, own.vocabulary, set(own.weights))
        for name, weights in own.weights.items():
            exact = quantization == "F16" or weights.ndim == 1
            # 32 weights share a scale, of which each is a whole multiple; the scale has eleven bits.
            largest = np.abs(weights.astype("float32").reshape(-1, 32)).max(axis=1, keepdims=True)
            off = np.abs((again.weights[name].astype("float32") - weights).reshape(-1, 32))
            assert (off <= (0 if exact else largest * (0.5 / 127 + 2**-10))).all()


# ---- which model serves ---------------------------------------------------------------------------


def test_the_demo_takes_its_own_model_without_a_look_at_the_hub(tmp_path: Path) -> None:
    with hub_server() as hub:
        choice = ensure_model(Settings(models_dir=tmp_path, hf_endpoint=hub.url), say=quiet, wanted="own")
        assert not hub.logins
    assert (choice.path, choice.name, choice.caution) == (OWN, "millrace-demo", "")


def test_a_model_that_was_chosen_comes_before_the_demo_s(tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"GGUF")
    assert ensure_model(Settings(model_path=str(mine)), say=quiet, wanted="own").path == mine


def test_without_a_hub_the_demo_s_model_serves_with_a_caution(tmp_path: Path) -> None:
    said: list[str] = []
    choice = ensure_model(Settings(models_dir=tmp_path, hf_endpoint=NO_HUB), say=said.append)
    assert choice.path == OWN
    assert "can only sort support tickets" in choice.caution
    assert said == [f"{NO_HUB} is not reachable: using Millrace's own demo model."]


def test_a_context_that_the_demo_s_model_does_not_have_is_served_with_noise(tmp_path: Path) -> None:
    choice = ensure_model(Settings(models_dir=tmp_path, hf_endpoint=NO_HUB, n_ctx=8192), say=quiet)
    assert choice.name == "millrace-tiny"
    assert "noise" in choice.caution


def test_the_hub_s_model_is_fetched_when_it_is_wanted_and_nothing_else_will_do(tmp_path: Path) -> None:
    with hub_server() as hub:
        hub.add("mill/small-GGUF", {"small.gguf": OWN.read_bytes()})
        wanted = Settings(
            models_dir=tmp_path,
            hf_endpoint=hub.url,
            demo_model_repo="mill/small-GGUF",
            demo_model_file="small.gguf",
            model_path="/nowhere.gguf",
        )
        for _ in range(2):
            assert ensure_model(wanted, say=quiet, wanted="hub").path == tmp_path / "gguf" / "small.gguf"
        assert len(hub.transfers) == 1
    with pytest.raises(Unreachable):
        ensure_model(Settings(models_dir=tmp_path, hf_endpoint=NO_HUB), say=quiet, wanted="hub")


def test_what_is_no_clone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path / "site-packages" / "millrace")
    assert own_gguf(Settings(models_dir=tmp_path)) is None
    with pytest.raises(InputError) as caught:
        write_own_hf(Settings(models_dir=tmp_path), tmp_path / "hf")
    assert caught.value.code == "model_missing"


# ---- tickets --------------------------------------------------------------------------------------


def test_the_examples_are_what_the_generator_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "models" / "demo" / "examples.py", tmp_path], check=True, timeout=60)
    for name in ("support-tickets.jsonl", "support-tickets.expected.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()


def test_every_ticket_has_an_expected_answer() -> None:
    asked, expected = lines(EXAMPLES / "support-tickets.jsonl"), lines(EXAMPLES / "support-tickets.expected.jsonl")
    assert [line["custom_id"] for line in asked] == [line["custom_id"] for line in expected]
    assert Counter(line["source"] for line in expected) == {"held-out": 150, "hand-written": 50}


PHRASES = ROOT / "models" / "demo" / "phrases"
WORDS = dict(line.split(": ", 1) for line in (PHRASES / "words.txt").read_text().splitlines()[1:])


def templates(*names: str) -> list[str]:
    found = [line for name in names for line in (PHRASES / name).read_text().splitlines() if line]
    return [line.strip("> ") for line in found if not line.startswith(("== ", "# "))]


def expanded(template: str) -> Iterator[str]:
    """Yield every sentence that a template makes, with the first of the words that fill it in."""
    parts = [part.split("|") for part in re.split(r"[\[\]]", template)]
    for chosen in product(*parts):
        line = re.sub(r"\{(\w+)\}", lambda word: WORDS.get(word[1], "XX").split(" | ")[0], "".join(chosen))
        yield " ".join(line.split())


def pattern(template: str) -> re.Pattern[str]:
    """Return what matches every sentence that a template makes."""
    words = re.sub(r"\{(\w+)\}", lambda word: f"[{WORDS.get(word[1], 'XX').replace(' | ', '|')}]", template)
    return re.compile("".join({"[": "(?:", "|": "|", "]": ")", " ": " *"}.get(c, re.escape(c)) for c in words))


def test_no_sentence_for_training_is_one_of_the_held_out() -> None:
    said = {sentence for template in templates("test.txt", "test-around.txt") for sentence in expanded(template)}
    assert len(said) > 400
    trained = [pattern(template) for template in templates("train.txt", "train-around.txt") if template != "{name}"]
    assert len(trained) > 5000
    assert not [sentence for sentence in said for known in trained if known.fullmatch(sentence)]
    whole = [str(row["text"]).lower() for row in lines(PHRASES / "train-whole.jsonl")]
    assert len(whole) > 700
    long = [sentence for sentence in said if len(sentence.split()) > 4]
    assert not [(sentence, text) for sentence in long for text in whole if sentence in text]


def test_answers_are_judged_by_where_the_tickets_come_from(tmp_path: Path) -> None:
    right = {"category": "bug", "urgency": "low", "product": None, "summary": "Lost data."}
    said = {
        "a": json.dumps(right),
        "b": json.dumps(right | {"summary": "Other."}),
        "c": json.dumps(right | {"urgency": "high"}),
        "d": "po vi memi",
        "e": "[]",
    }
    expected = [{"custom_id": name, "source": "x" if name < "d" else "y", "answer": right} for name in "abcdef"]
    answers = [
        {"custom_id": name, "response": {"body": {"choices": [{"message": {"content": text}}]}}}
        for name, text in said.items()  # f was not answered
    ]
    for name, rows in (("expected", expected), ("output", answers)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score(tmp_path / "expected", tmp_path / "output") == {"x": Score(3, 1, 2), "y": Score(3, 0, 0)}
