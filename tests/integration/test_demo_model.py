"""The demo model in a real llama.cpp server: what a request asks for is what its answer has."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from millrace.engine.llama_process import Launch
from tests.services import ROOT

pytest.importorskip("xllamacpp")

MODEL = ROOT / "models" / "gguf" / "millrace-demo.gguf"
TICKETS = [json.loads(line) for line in (ROOT / "examples" / "support-tickets.jsonl").read_text().splitlines()]
EXPECTED = [
    json.loads(line) for line in (ROOT / "examples" / "support-tickets.expected.jsonl").read_text().splitlines()
]
SYSTEM = TICKETS[0]["body"]["messages"][0]
CATEGORIES = ("delivery", "item", "return", "billing", "account", "bug", "question", "feedback", "cancel")
open_url = build_opener(ProxyHandler({})).open


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    launch = Launch(str(MODEL), "demo", slots=4, context=512, threads=1)
    with subprocess.Popen(
        [sys.executable, "-m", "millrace.engine.llama_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(launch.to_json() + "\n")
        process.stdin.flush()
        yield json.loads(process.stdout.readline())["url"]
        process.stdin.close()


def post(engine: str, path: str, **body: Any) -> Any:
    request = Request(engine + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with open_url(request, timeout=60) as response:
        return json.load(response)


def ask(engine: str, text: str, **body: Any) -> dict[str, Any]:
    """Return the choice that answers a ticket."""
    messages = [SYSTEM, {"role": "user", "content": text}]
    answer = post(engine, "/v1/chat/completions", **{"messages": messages, "max_tokens": 96, "temperature": 0} | body)
    choice = answer["choices"][0]
    return {**choice, "text": choice["message"]["content"]}


LATE = "My kettle has not arrived yet, I ordered it a week ago. This is urgent!"


def test_held_out_tickets_are_read_right(engine: str) -> None:
    some = range(0, 150, 5)
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda number: ask(engine, TICKETS[number]["body"]["messages"][1]["content"]), some))
    assert all(choice["finish_reason"] == "stop" for choice in said)
    answers = [json.loads(choice["text"]) for choice in said]
    pairs = [(answer, EXPECTED[number]["answer"]) for answer, number in zip(answers, some, strict=True)]
    assert sum(answer["category"] == right["category"] for answer, right in pairs) >= 0.9 * len(some)
    assert sum(answer == right for answer, right in pairs) >= 0.9 * len(some)


def test_an_answer_depends_on_what_the_ticket_says(engine: str) -> None:
    said = json.loads(ask(engine, LATE)["text"])
    assert (said["category"], said["urgency"], said["product"]) == ("delivery", "high", "kettle")
    other = json.loads(ask(engine, "I want to return the blue lamp, no rush.")["text"])
    assert (other["category"], other["urgency"], other["product"]) == ("return", "low", "blue lamp")


def test_a_json_schema_chooses_among_what_the_model_means(engine: str) -> None:
    # The schema has no field "category" and other words; the most that a model can do is choose the nearest.
    schema = {
        "type": "object",
        "properties": {"category": {"enum": list(CATEGORIES)}, "urgency": {"enum": ["high", "low"]}},
        "required": ["category", "urgency"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": schema}}
    choice = ask(engine, LATE, response_format=form)
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["text"]) == {"category": "delivery", "urgency": "high"}


def test_json_mode_gives_an_object(engine: str) -> None:
    said = json.loads(ask(engine, LATE, response_format={"type": "json_object"})["text"])
    assert isinstance(said, dict) and said


def test_a_grammar_binds_the_answer(engine: str) -> None:
    grammar = 'root ::= "{\\"category\\":\\"" ("' + '" | "'.join(CATEGORIES) + '") "\\"}"'
    assert json.loads(ask(engine, LATE, grammar=grammar)["text"]) == {"category": "delivery"}


def test_stop_ends_the_answer_before_its_words(engine: str) -> None:
    whole, cut = ask(engine, LATE), ask(engine, LATE, stop=[',"product"'])
    assert cut["text"] == whole["text"].partition(',"product"')[0]
    assert cut["finish_reason"] == "stop"
    assert ask(engine, LATE, max_tokens=5)["finish_reason"] == "length"


def test_a_seed_decides_what_is_drawn(engine: str) -> None:
    flat = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 24, "cache_prompt": False}

    def draw(seed: int) -> str:
        return str(ask(engine, LATE, seed=seed, **flat)["text"])

    drawn = [draw(seed) for seed in range(4)]
    assert len(set(drawn)) == 4
    assert [draw(seed) for seed in range(4)] == drawn


def test_logprobs_tell_how_sure_it_is(engine: str) -> None:
    tokens = ask(engine, LATE, logprobs=True, top_logprobs=3)["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).startswith('{"category":"delivery"')
    for token in tokens:
        ranked = [other["logprob"] for other in token["top_logprobs"]]
        assert ranked == sorted(ranked, reverse=True)
        assert token["logprob"] == pytest.approx(ranked[0], abs=1e-3)  # greedy took the likeliest
        assert sum(map(math.exp, ranked)) <= 1.001
    category = next(token for token in tokens if token["token"] == "delivery")
    assert math.exp(category["logprob"]) > 0.9


def test_a_prompt_longer_than_the_context_is_refused(engine: str) -> None:
    with pytest.raises(HTTPError) as caught:
        ask(engine, "My kettle has not arrived. " * 200)
    answer = json.load(caught.value)["error"]
    assert (caught.value.code, answer["type"], answer["n_ctx"]) == (400, "exceed_context_size_error", 512)
    assert answer["n_prompt_tokens"] > 512


def test_embeddings_put_tickets_of_one_kind_together(engine: str) -> None:
    texts = ["my order has not arrived yet", "the parcel is late", "i cannot log in", "my password is rejected"]
    answer = post(engine, "/v1/embeddings", input=texts)
    vectors = [item["embedding"] for item in answer["data"]]

    def cosine(left: int, right: int) -> float:
        return sum(a * b for a, b in zip(vectors[left], vectors[right], strict=True))

    assert cosine(0, 1) > cosine(0, 2)
    assert cosine(2, 3) > cosine(1, 3)


def test_every_text_comes_back_from_the_tokenizer(engine: str) -> None:
    for text in (TICKETS[150]["body"]["messages"][1]["content"], "Grüße, 世界! 🌊\r\n\tend", "BC-448120"):
        tokens = post(engine, "/tokenize", content=text)["tokens"]
        assert post(engine, "/detokenize", tokens=tokens)["content"] == text
    # Digits stay single: no price or order number is a word to be learned.
    assert len(post(engine, "/tokenize", content="448120")["tokens"]) == 6
