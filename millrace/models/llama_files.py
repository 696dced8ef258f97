"""The weights of a small llama as a GGUF for llama.cpp and as a Hugging Face folder for vLLM, and back from a GGUF.

The two disagree on the order of rows in the query and key matrices; see `_to_gguf_rope`. The tokenizer is GPT-2's
byte-level BPE in both, the chat template ChatML.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from millrace.errors import MillraceError, StorageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Weights = dict[str, NDArray[np.float16]]

BOS, PAD, START, END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIAL = (BOS, PAD, START, END)

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes that both formats declare."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5

    @property
    def head(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads


class Vocabulary(NamedTuple):
    """A byte-level BPE."""

    #: In GPT-2's alphabet; a token's place is its id, and the last are `SPECIAL`.
    tokens: list[str]
    #: Pairs to join, the first to be joined first.
    merges: list[tuple[str, str]]

    def id(self, token: str) -> int:
        """Return the id of a token, written in GPT-2's alphabet."""
        return self.tokens.index(token)


@dataclass(frozen=True)
class Llama:
    """A model in memory."""

    shape: Shape
    vocabulary: Vocabulary
    #: Under Hugging Face's names and in its layout; without lm_head.weight the embeddings are the output matrix.
    weights: Weights
    #: The longest prompt plus answer that the files declare, in tokens.
    context: int


def byte_alphabet() -> list[str]:
    """Return GPT-2's printable stand-in for each of the 256 bytes."""
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in itself else chr(next(others)) for byte in range(256)]


def extras() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Return the modules numpy, gguf and safetensors.numpy.

    Raises:
        MillraceError: `extra_missing`, when the extra `embedded` is not installed.
    """
    try:
        import gguf
        import numpy as np
        import safetensors.numpy
    except ImportError as error:
        raise MillraceError(
            f"The model needs the package {error.name}, which is not installed.",
            "Run: pip install 'millrace[embedded]'",
            code="extra_missing",
        ) from error
    return np, gguf, safetensors.numpy


# ---- GGUF ---------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return _GGUF_NAMES[module] + ".weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


def _to_gguf_rope(tensor: NDArray[np.float16], heads: int) -> NDArray[np.float16]:
    """Reorder the rows of a query or key matrix from Hugging Face's RoPE to llama.cpp's.

    Hugging Face rotates dimension i of a head with i + half a head, llama.cpp rotates 2i with 2i + 1.
    """
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(llama: Llama, path: Path, name: str, quantization: Literal["F16", "Q8_0"] = "F16") -> None:
    """Write a GGUF file that calls itself `name`; with Q8_0, rows of matrices have to be multiples of 32.

    Raises:
        MillraceError: `extra_missing`.
        OSError: It cannot be written.
    """
    _, gguf, _ = extras()
    shape, vocabulary = llama.shape, llama.vocabulary
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantization}"])
    writer.add_context_length(llama.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(len(vocabulary.tokens))

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    plain = len(vocabulary.tokens) - len(SPECIAL)
    writer.add_token_types([gguf.TokenType.NORMAL] * plain + [gguf.TokenType.CONTROL] * len(SPECIAL))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_bos_token_id(vocabulary.id(BOS))
    writer.add_eos_token_id(vocabulary.id(END))
    writer.add_pad_token_id(vocabulary.id(PAD))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    for source, tensor in llama.weights.items():
        if ".q_proj." in source:
            laid_out: NDArray[Any] = _to_gguf_rope(tensor, shape.heads)
        elif ".k_proj." in source:
            laid_out = _to_gguf_rope(tensor, shape.kv_heads)
        else:
            laid_out = tensor
        # llama.cpp's kernels want norms in float32; the numbers stay what they are.
        kind = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else quantization]
        writer.add_tensor(_gguf_name(source), gguf.quants.quantize(laid_out.astype("float32"), kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _sync(path)


def read_gguf(path: Path) -> Llama:
    """Read back what `write_gguf` wrote.

    Raises:
        MillraceError: `extra_missing`.
        OSError: It cannot be read.
    """
    _, gguf, _ = extras()
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    shape = Shape(
        layers=field("llama.block_count"),
        hidden=field("llama.embedding_length"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        feed_forward=field("llama.feed_forward_length"),
        rope_base=field("llama.rope.freq_base"),
        # A float32 in the file: 1e-05, not 9.999999747378752e-06.
        norm_epsilon=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
    )
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    weights = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float16")
        if ".q_proj." in name:
            data = _from_gguf_rope(data, shape.heads)
        elif ".k_proj." in name:
            data = _from_gguf_rope(data, shape.kv_heads)
        weights[name] = data
    return Llama(shape, Vocabulary(field("tokenizer.ggml.tokens"), merges), weights, field("llama.context_length"))


def _hf_name(name: str) -> str:
    names = {theirs: ours for ours, theirs in _GGUF_NAMES.items()}
    part = name.removesuffix(".weight")
    if not part.startswith("blk."):
        return names[part] + ".weight"
    _, layer, part = part.split(".")
    return f"model.layers.{layer}.{names[part]}.weight"


def _from_gguf_rope(tensor: NDArray[np.float16], heads: int) -> NDArray[np.float16]:
    """Undo `_to_gguf_rope`."""
    rows, columns = tensor.shape
    pairs = tensor.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


# ---- Hugging Face folder ------------------------------------------------------------------------


def write_hf(llama: Llama, folder: Path) -> None:
    """Write a folder that vLLM and transformers load; it has to be there.

    Raises:
        MillraceError: `extra_missing`.
        OSError: It cannot be written.
    """
    _, _, safetensors = extras()
    shape, vocabulary, weights = llama.shape, llama.vocabulary, llama.weights
    bos, pad, end = vocabulary.id(BOS), vocabulary.id(PAD), vocabulary.id(END)
    special = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
    documents: dict[str, Any] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": end,
            "head_dim": shape.head,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": shape.feed_forward,
            "max_position_embeddings": llama.context,
            "mlp_bias": False,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "pad_token_id": pad,
            "pretraining_tp": 1,
            "rms_norm_eps": shape.norm_epsilon,
            "rope_scaling": None,
            "rope_theta": shape.rope_base,
            "tie_word_embeddings": "lm_head.weight" not in weights,
            "torch_dtype": "float16",
            "use_cache": True,
            "vocab_size": len(vocabulary.tokens),
        },
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": pad},
        "special_tokens_map.json": {**special, "additional_special_tokens": [START]},
        "tokenizer_config.json": {
            **special,
            "additional_special_tokens": [START],
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {str(vocabulary.id(token)): _added_token(token) for token in SPECIAL},
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": llama.context,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "tokenizer.json": _tokenizer(vocabulary),
    }
    (folder / "model.safetensors").write_bytes(safetensors.save(weights, metadata={"format": "pt"}))
    for file, document in documents.items():
        (folder / file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)


def _added_token(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return `tokenizer.json`: GPT-2's byte-level BPE, with the first token that llama.cpp adds too."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": number}} for number, which in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary.id(token), **_added_token(token)} for token in SPECIAL],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {BOS: {"id": BOS, "ids": [vocabulary.id(BOS)], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
            "merges": [list(pair) for pair in vocabulary.merges],
        },
    }


# ---- files --------------------------------------------------------------------------------------


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the folder."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The model cannot be written to {folder}: {error.strerror or error}.",
            "Free some disk space or choose a folder that you may write to.",
        ) from error


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """Make a folder beside the target, on the same file system, and remove it afterwards.

    Not `tempfile.mkdtemp`: its mode 0700 would stay on the model folder, and an engine in a container is
    another user.
    """
    scratch = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Put a folder in the place of another; files that only the other has stay."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        # A folder that has files cannot be renamed over; its files can.
        for path in sorted(source.iterdir()):
            path.replace(target / path.name)


def _sync(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
