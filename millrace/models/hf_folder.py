"""What a model folder in Hugging Face's layout says of itself: config.json and the headers of its safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from millrace.errors import InputError

_MAX_HEADER = 100 << 20  # bytes; the format's own limit
#: Written by transformers over the years; a model of several parts has them in one of the inner objects.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class HfModel:
    """What a folder says."""

    #: Such as LlamaForCausalLM; empty where the folder does not say.
    architecture: str
    #: The method, such as awq or fp8, else the type of the numbers, such as bfloat16; empty where neither is said.
    quantization: str
    #: None for quantized weights: several of them are packed into one number there.
    parameters: int | None
    #: The longest context the model was made for, in tokens.
    context: int | None
    #: Whether it brings a chat template.
    chat_template: bool


def read_folder(folder: Path) -> HfModel:
    """Read what a folder says of itself, and check that its weights are all there.

    Raises:
        InputError: `model_format`, when a file is missing, cut off or damaged.
        OSError: A file cannot be read.
    """
    config = _object(folder / "config.json")
    text = config.get("text_config")
    layers = (config, text if isinstance(text, dict) else {})
    method = (config.get("quantization_config") or {}) if isinstance(config.get("quantization_config"), dict) else {}
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise _wrong(folder, "it has no .safetensors file")
    for index in folder.glob("*.safetensors.index.json"):
        weights = _object(index).get("weight_map")
        missing = set(map(str, weights.values())) - set(names) if isinstance(weights, dict) else set()
        if missing:
            raise _wrong(folder, f"{min(missing)} is missing")
    parameters = sum(_parameters(folder / name) for name in names)
    kind = next((layer[key] for layer in layers for key in ("torch_dtype", "dtype") if layer.get(key)), "")
    context = next((layer[key] for layer in layers for key in _CONTEXT if isinstance(layer.get(key), int)), None)
    architectures = config.get("architectures")
    return HfModel(
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        quantization=str(method.get("quant_method") or kind),
        parameters=None if method else parameters,
        context=context,
        chat_template=_has_template(folder),
    )


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    tokenizer = folder / "tokenizer_config.json"
    return tokenizer.is_file() and bool(_object(tokenizer).get("chat_template"))


def _parameters(path: Path) -> int:
    """Return the numbers in a safetensors file, whose header names the end of each tensor."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
        if length > _MAX_HEADER:
            raise _wrong(path, "it does not begin as a safetensors file")
        header = _decoded(path, file.read(length))
    tensors = list(_tensors(path, header))
    needed = 8 + length + max((end for _, end in tensors), default=0)
    if (found := path.stat().st_size) < needed:
        raise _wrong(path, f"it has {found} of {needed} bytes")
    return sum(numbers for numbers, _ in tensors)


def _tensors(path: Path, header: dict[str, Any]) -> Iterator[tuple[int, int]]:
    for name, tensor in header.items():
        if name != "__metadata__":
            try:
                yield prod(map(int, tensor["shape"])), int(tensor["data_offsets"][1])
            except (TypeError, ValueError, KeyError, IndexError):
                raise _wrong(path, f"its tensor {name} is not described") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        return _decoded(path, path.read_bytes())
    except FileNotFoundError:
        raise _wrong(path.parent, f"it has no {path.name}") from None


def _decoded(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _wrong(path, "it holds no JSON object")
    return value


def _wrong(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not whole: {why}.", "Fetch it again.", code="model_format")
