"""Support tickets with their right answers, made from the sentences in phrases/.

A ticket is one or two sentences of one intent ("late", "hacked", ...), with a greeting, a filler, an order number,
a word on urgency and a name around them, and typos in it as people make them; of those for training, some were
written as a whole. Sentences for training and held-out ones lie in files of their own and share no line; nor do the
two share a product of two words ("oak table").
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PHRASES = Path(__file__).parent / "phrases"
SYSTEM = "Sort this support ticket. Answer in one line of JSON: category, urgency, product, summary."
#: What a caller may say instead; a model that has only ever seen one system prompt fails on the next.
OTHER_SYSTEMS = ("", "You sort support tickets.", "Read the ticket and answer with JSON.", "Triage this ticket.")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_QUESTION = re.compile(
    r"(where|when|how|what|which|who|why|is|are|do|does|can|could|may|will|has|have you)\b", re.IGNORECASE
)
_WORD = re.compile(r"\{(\w+)\}")
_NEGATIONS = ("no", "not", "never", "nothing", "without")
_WHOLE = 0.25  # of the tickets for training: written as a whole
_HELD_OUT_PRODUCTS = 8  # one product of two words in so many is kept for the held-out tickets


@dataclass(frozen=True)
class Ticket:
    """A ticket and its right answer."""

    text: str
    intent: str
    category: str
    urgency: str
    product: str | None
    summary: str

    @property
    def answer(self) -> dict[str, str | None]:
        """What a model should say."""
        return {
            "category": self.category,
            "urgency": self.urgency,
            "product": self.product,
            "summary": self.summary,
        }

    @property
    def line(self) -> str:
        """The answer as one line of JSON."""
        return json.dumps(self.answer, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Intent:
    """What a ticket can be about."""

    name: str
    category: str
    urgency: str  # where the text says nothing of it
    names: str  # goods, app or none: what {p} stands for
    summary: str
    summary_without: str

    def ticket(self, text: str, urgency: str, product: str | None) -> Ticket:
        """Return a ticket with the answer that follows from what is known of it."""
        summary = self.summary_without
        if product and self.names != "none":
            summary = self.summary.replace("{p}", product)
        return Ticket(text, self.name, self.category, urgency, product, f"{summary}.")


class Tickets:
    """Makes tickets: `which` is train or test."""

    def __init__(self, which: str) -> None:
        self.held_out = which == "test"
        self.intents = {intent.name: intent for intent in _intents()}
        self._sentences = _sections(PHRASES / f"{which}.txt")
        self._around = _sections(PHRASES / f"{which}-around.txt")
        self._words = _lists(PHRASES / "words.txt", "|")
        self._products = _lists(PHRASES / "products.txt", "|")
        self._whole = {} if self.held_out else _whole(PHRASES / "train-whole.jsonl")
        if set(self._sentences) != set(self.intents):
            raise ValueError(f"{which}.txt and intents.txt differ: {set(self._sentences) ^ set(self.intents)}")

    def endless(self, seed: int) -> Iterator[Ticket]:
        """Yield tickets, every intent as often as any other."""
        rng = random.Random(seed)
        names = sorted(self.intents)
        while True:
            rng.shuffle(names)
            for name in names:
                yield self.ticket(rng, self.intents[name])

    def ticket(self, rng: random.Random, intent: Intent) -> Ticket:
        """Return one ticket of this intent."""
        if self._whole and rng.random() < _WHOLE:
            return self._varied(rng, intent)
        lines = self._sentences[intent.name]
        cores = [line for line in lines if not line.startswith(">")]
        more = [line[1:].strip() for line in lines if line.startswith(">")]
        product = self._product(rng, intent.names)
        main = [self._fill(rng, rng.choice(cores), product)]
        wanted = min(len(more), rng.choice((0, 0, 1, 1, 2)))
        main += [self._fill(rng, line, product) for line in rng.sample(more, wanted)]
        if not self.held_out and rng.random() < 0.12:  # says it twice, in other words
            main.insert(1, self._fill(rng, rng.choice(cores), product))
        thinned = not self.held_out and rng.random() < 0.5
        if thinned:
            main = [_thinned(rng, part) for part in main]
        urgency = self._urgency(rng, intent)
        if urgency[1]:
            main.insert(rng.randrange(len(main) + 1), self._line(rng, urgency[1], product))
        if intent.names == "goods" and intent.category not in ("question", "feedback") and rng.random() < 0.4:
            order = f"BC-{rng.randrange(100000, 999999)}" if rng.random() < 0.7 else f"#{rng.randrange(10000, 99999)}"
            main.insert(rng.choice((1, len(main))), self._line(rng, "order", product).replace("{order}", order))
        for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 1, 1, 2, 2))):
            main.insert(rng.choice((0, 0, rng.randrange(len(main) + 1), len(main))), self._line(rng, "filler", product))
        named = any("\x01" in part for part in main)
        text = self._join(rng, main, product)
        text = text if thinned else _mistyped(rng, text)
        return intent.ticket(text.replace("\x01", product or ""), urgency[0], product if named else None)

    def _varied(self, rng: random.Random, intent: Intent) -> Ticket:
        """Return a ticket that was written as a whole, with other typos, capitals and words left out each time."""
        row = rng.choice(self._whole[intent.name])
        product = row["product"]
        text = row["text"].replace(product, "\x01") if product else row["text"]
        text = _mistyped(rng, text) if rng.random() < 0.3 else _thinned(rng, text)
        if rng.random() < 0.3:
            text = text.lower()
        return intent.ticket(text.replace("\x01", product or ""), row["urgency"], product)

    def _urgency(self, rng: random.Random, intent: Intent) -> tuple[str, str]:
        """Return the urgency, and which words tell it ("" for none)."""
        chance = rng.random()
        if intent.name == "praise":
            return "low", ""
        if intent.urgency == "high":
            return "high", "high" if chance < 0.4 else ""
        if intent.urgency == "low":
            if chance < 0.15 and intent.name != "wish":
                return "high", "high"
            return "low", "low" if chance > 0.75 else ""
        if chance < 0.33:
            return "high", "high"
        return ("low", "low") if chance < 0.6 else ("medium", "")

    @property
    def product_words(self) -> list[str]:
        """What a product may begin with, and what it may be called."""
        return [word for kind in self._products.values() for word in kind]

    def _product(self, rng: random.Random, kind: str) -> str | None:
        if kind == "none":
            return None
        if kind == "app":
            return rng.choice(self._products["app"])
        while True:
            last = rng.choice(self._products["goods-last"])
            if rng.random() < 0.35:
                return last
            product = f"{rng.choice(self._products['goods-first'])} {last}"
            if (zlib.crc32(product.encode()) % _HELD_OUT_PRODUCTS == 0) == self.held_out:
                return product

    def _line(self, rng: random.Random, section: str, product: str | None) -> str:
        return self._fill(rng, rng.choice(self._around[section]), product)

    def _fill(self, rng: random.Random, line: str, product: str | None) -> str:
        r"""Choose among [a|b], inner ones first, then fill in {words}; a product becomes \x01, for later."""
        while (choice := _CHOICE.search(line)) is not None:
            line = line[: choice.start()] + rng.choice(choice[1].split("|")) + line[choice.end() :]

        def word(found: re.Match[str]) -> str:
            if found[1] == "p":
                if product is None:
                    raise ValueError(f"{line!r} names a product, and its intent has none")
                return "\x01"
            return found[0] if found[1] == "order" else self._fill(rng, rng.choice(self._words[found[1]]), product)

        line = _WORD.sub(word, line)
        return re.sub(r" +([,.?!]|$)", r"\1", re.sub(r" +", " ", line)).strip()

    def _join(self, rng: random.Random, parts: list[str], product: str | None) -> str:
        """Return sentences as people write them: with capitals and full stops, or without."""
        lazy = rng.random() < 0.3
        text = ""
        for number, part in enumerate(parts):
            sentence = part if lazy else part[:1].upper() + part[1:]
            if not lazy:
                sentence = re.sub(r"\bi\b", "I", sentence)
                sentence = re.sub(r"([.?!] )([a-z])", lambda found: found[1] + found[2].upper(), sentence)
            question = _QUESTION.match(part)
            if lazy:
                end = rng.choice(("", ".", ",", "...", "!", " -", "?" if question else "."))
            else:
                end = rng.choice("????!") if question else rng.choice((".", ".", ".", ".", "!", "!!", "..."))
            if part.startswith("("):
                text, end = text.rstrip(".,!?- \n"), "."
            elif lazy and number == len(parts) - 1 and end in (",", " -"):
                end = ""
            text += (" " if text and not text.endswith("\n") else "") + sentence + end
            if rng.random() < 0.06:
                text += "\n"
        text = text.strip()
        if rng.random() < 0.35:
            greeting = self._line(rng, "greeting", product)
            greeting = greeting if lazy else greeting[:1].upper() + greeting[1:]
            text = greeting + rng.choice((", ", ", ", "! ", ",\n", ".\n", " ", "\n\n")) + text
        if rng.random() < 0.35:
            signoff = self._line(rng, "signoff", product)
            signoff = signoff if lazy else signoff[:1].upper() + signoff[1:]
            text += rng.choice((" ", "\n", "\n\n")) + signoff
        if rng.random() < 0.25:
            text = text.lower()
        elif rng.random() < 0.03:
            text = text.upper()
        return text


def _mistyped(rng: random.Random, text: str) -> str:
    r"""Mistype letters of some words; what an answer has to copy (\x01) stays whole."""
    level = rng.choice((0.0, 0.0, 0.0, 0.02, 0.05))
    pieces = re.split(r"(\s+)", text)
    long = (len(one) > 3 and one.isalpha() for one in pieces)
    return "".join(
        _mistype(rng, one) if may and rng.random() < level else one for one, may in zip(pieces, long, strict=True)
    )


def _thinned(rng: random.Random, text: str) -> str:
    """Leave out words, so that a model does not come to hang on a single one of each sentence."""
    level = rng.choice((0.03, 0.08, 0.12))
    pieces = re.split(r"(\s+)", text)
    kept = ("" if one.isalpha() and one.lower() not in _NEGATIONS and rng.random() < level else one for one in pieces)
    return re.sub(r" {2,}", " ", "".join(kept)).strip()


def _mistype(rng: random.Random, word: str) -> str:
    at = rng.randrange(1, len(word))
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at] + word[at:]
    if kind == 2 and at + 1 < len(word):
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + rng.choice("aeionrst") + word[at + 1 :]


def _intents() -> Iterator[Intent]:
    for line in (PHRASES / "intents.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            yield Intent(*(part.strip() for part in line.split("|")))


def _whole(path: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["intent"], []).append(row)
    return found


def _sections(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("== "):
            lines = found.setdefault(line[3:].strip(), [])
        elif line and not line.startswith("# "):
            lines.append(line)
    return found


def _lists(path: Path, separator: str) -> dict[str, list[str]]:
    found = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, values = line.partition(":")
            found[name] = [value.strip() for value in values.split(separator)]
    return found
