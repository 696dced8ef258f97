r"""A real model that is made on the spot: small enough for tests, demos and a first run without a network.

The weights are random, so the answers are noise. They are arranged noise, because a model of plain random
weights writes broken UTF-8 and stops wherever chance puts the end token:

- The first `_FLAGS` hidden dimensions are flags that token embeddings set and that no layer writes to (their
  rows of every output projection are zero). The output matrix reads them as a bias on each token: bytes
  that are no text are out of reach, syllables ("ka", " lo") and full stops are not.
- The end token can follow a full stop alone, and that full stop is the token ".\n", which no prompt turns
  into. So an answer is never empty, and most end by themselves after some tens of tokens.
- All other dimensions are an ordinary random llama, so an answer depends on its whole prompt: two prompts
  give two answers, and the same prompt gives the same answer at temperature 0.

The same weights are written twice, as a GGUF for llama.cpp and as a Hugging Face folder for vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from millrace.models.llama_files import (
    END,
    SPECIAL,
    Llama,
    Shape,
    Vocabulary,
    byte_alphabet,
    extras,
    replace_folder,
    scratch,
    storage_errors,
    write_gguf,
    write_hf,
)

if TYPE_CHECKING:
    from millrace.models.llama_files import Weights

_SHAPE = Shape(layers=4, hidden=256, heads=4, kv_heads=2, feed_forward=512)
_HIDDEN, _FEED_FORWARD = _SHAPE.hidden, _SHAPE.feed_forward

# What the flag dimensions say of the last token.
_ALWAYS = 0  # every token: the constant that biases are made of
_STOPPED = 1  # a full stop: an answer may end here
_LINE_START = 2  # nothing of this line was written yet: no space, no full stop
_FLAGS = 3
_FLAG_HEIGHT = 4.0  # in an embedding, where the other dimensions have a standard deviation of 1
_FLAG_NORM = 1 / 16  # keeps the flags, the same for every text, out of the vectors of /v1/embeddings

# Root mean square of a token's vector before the final norm: measured, and good for the gains in `_weights`.
_RESIDUAL_RMS = 6.3

# Biases in logits; the random part of a logit has a standard deviation of `_LOGIT_SPREAD`.
_LOGIT_SPREAD = 1.2
_STOP_BIAS = 0.6  # ".\n"
_END_BIAS = 2.5  # the end token, after ".\n"
_QUOTE_BIAS = 0.5  # '"': likely enough that the strings of a JSON schema come to an end
_UNLIKELY = -24.0  # printable ASCII: never by itself, but there when a grammar asks for it
_NEVER = -48.0

_STOP = ".\n"
_CONSONANTS = "dklmnprstv"
_VOWELS = "aeiou"


@dataclass(frozen=True)
class TinyModel:
    """Where a tiny model lies on disk."""

    #: The file for llama.cpp.
    gguf: Path
    #: The folder for vLLM and transformers.
    hf: Path
    #: Number of weights.
    parameters: int


def make_tiny(folder: Path, *, seed: int = 0, context: int = 4096, name: str = "millrace-tiny") -> TinyModel:
    """Write a llama model of some 2.6 million random weights as `<name>.gguf` and as `<name>-hf/`.

    The same arguments give the same bytes. Files that are there already are replaced one by one, each
    atomically, so an engine that has them open keeps what it has. Takes some 0.2 s and 10 MB of disk.

    Args:
        folder: Where to write; made if it is not there.
        seed: Seed of the weights; the vocabulary is the same for every seed.
        context: The longest prompt plus answer that the files declare, in tokens.
        name: Stem of both names.

    Raises:
        MillraceError: `extra_missing`, when the extra `embedded` is not installed.
        StorageError: When the files cannot be written.
    """
    numpy, _, _ = extras()
    spelled = _spelled()
    llama = Llama(_SHAPE, spelled.vocabulary, _weights(numpy, spelled, seed), context)
    gguf_path = folder / f"{name}.gguf"
    hf_path = folder / f"{name}-hf"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with scratch(folder, name) as half:
            write_gguf(llama, half / gguf_path.name, name)
            hf = half / hf_path.name
            hf.mkdir()
            write_hf(llama, hf)
            (half / gguf_path.name).replace(gguf_path)
            replace_folder(hf, hf_path)
    return TinyModel(gguf_path, hf_path, sum(tensor.size for tensor in llama.weights.values()))


# ---- vocabulary ---------------------------------------------------------------------------------


class _Spelled(NamedTuple):
    vocabulary: Vocabulary
    #: What each token stands for; a special token stands for its own name.
    text: list[bytes]

    def id(self, text: str) -> int:
        return self.text.index(text.encode())


def _spelled() -> _Spelled:
    alphabet = byte_alphabet()
    space = alphabet[ord(" ")]
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    merges = [(syllable[0], syllable[1]) for syllable in syllables]
    # Joined after the syllables, so that " ka" is made of " " and "ka", as in both engines' BPE.
    merges += [(space, syllable) for syllable in syllables]
    tokens = alphabet + [left + right for left, right in merges]
    # No merge leads to it, so it is written but never read.
    tokens.append("".join(alphabet[byte] for byte in _STOP.encode()))
    byte_of = {letter: byte for byte, letter in enumerate(alphabet)}
    text = [bytes(byte_of[letter] for letter in token) for token in tokens]
    vocabulary = Vocabulary([*tokens, *SPECIAL], merges)
    return _Spelled(vocabulary, [*text, *(token.encode() for token in SPECIAL)])


# ---- weights ------------------------------------------------------------------------------------


def _weights(numpy: Any, spelled: _Spelled, seed: int) -> Weights:
    """Draw the weights, under Hugging Face's names and in its layout; matrices are (outputs, inputs)."""
    random = numpy.random.default_rng(seed)
    kv_width = _SHAPE.kv_heads * _SHAPE.head

    def matrix(outputs: int, inputs: int, gain: float) -> Any:
        # With inputs of variance 1, outputs have the standard deviation `gain`.
        return random.standard_normal((outputs, inputs)) * (gain / inputs**0.5)

    def onto_residual(inputs: int, gain: float) -> Any:
        drawn = matrix(_HIDDEN, inputs, gain)
        drawn[:_FLAGS] = 0
        return drawn

    ones = numpy.ones(_HIDDEN)
    drawn: dict[str, Any] = {"model.embed_tokens.weight": _embeddings(random, spelled)}
    for layer in range(_SHAPE.layers):
        prefix = f"model.layers.{layer}."
        # Gains well above 1: without them attention averages all tokens alike, answers hardly depend on the
        # prompt and greedy ones run into short loops.
        drawn |= {
            prefix + "input_layernorm.weight": ones,
            prefix + "self_attn.q_proj.weight": matrix(_HIDDEN, _HIDDEN, 3.0),
            prefix + "self_attn.k_proj.weight": matrix(kv_width, _HIDDEN, 3.0),
            prefix + "self_attn.v_proj.weight": matrix(kv_width, _HIDDEN, 1.0),
            prefix + "self_attn.o_proj.weight": onto_residual(_HIDDEN, 3.0),
            prefix + "post_attention_layernorm.weight": ones,
            prefix + "mlp.gate_proj.weight": matrix(_FEED_FORWARD, _HIDDEN, 1.0),
            prefix + "mlp.up_proj.weight": matrix(_FEED_FORWARD, _HIDDEN, 1.0),
            prefix + "mlp.down_proj.weight": onto_residual(_FEED_FORWARD, 3.0),
        }
    norm = ones.copy()
    norm[:_FLAGS] = _FLAG_NORM
    drawn["model.norm.weight"] = norm
    # The final norm divides a flag by the size of the whole vector; the output matrix takes that back.
    unit = _RESIDUAL_RMS / (_FLAG_HEIGHT * _FLAG_NORM)
    drawn["lm_head.weight"] = _output(random, spelled, unit=unit)
    return {name: tensor.astype(numpy.float16) for name, tensor in drawn.items()}


def _embeddings(random: Any, spelled: _Spelled) -> Any:
    table = random.standard_normal((len(spelled.text), _HIDDEN))
    table[:, :_FLAGS] = 0
    table[:, _ALWAYS] = _FLAG_HEIGHT
    table[spelled.id(_STOP), _STOPPED] = _FLAG_HEIGHT
    for text in ("\n", _STOP, *SPECIAL):
        table[spelled.id(text), _LINE_START] = _FLAG_HEIGHT
    return table


def _output(random: Any, spelled: _Spelled, *, unit: float) -> Any:
    """Draw the output matrix; a weight of `unit` on a raised flag adds about 1 to the logit."""
    table = random.standard_normal((len(spelled.text), _HIDDEN)) * (_LOGIT_SPREAD / _HIDDEN**0.5)
    table[:, :_FLAGS] = 0
    for token, text in enumerate(spelled.text):
        table[token, _ALWAYS] = unit * _bias(text)
        if text.startswith(b" ") or text == _STOP.encode():
            table[token, _LINE_START] = unit * _NEVER
    end = spelled.id(END)
    table[end, _STOPPED] = unit * (_END_BIAS - _NEVER)
    return table


def _bias(text: bytes) -> float:
    """Return how a token fares wherever it stands, in logits."""
    word = text.removeprefix(b" ")
    if len(word) == 2 and word.isalpha():
        return 0.0
    if text == _STOP.encode():
        return _STOP_BIAS
    if text == b'"':
        return _QUOTE_BIAS
    if len(text) == 1 and (b" " <= text <= b"~" or text == b"\n"):
        return _UNLIKELY
    return _NEVER
