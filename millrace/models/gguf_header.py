"""What a GGUF file says of itself, from its header alone.

The header is keys with values, then a line for each tensor. Its bulk is the vocabulary, hundreds of thousands of
strings, which nobody here asks for: they are stepped over, so a header takes 0.1 s and not the 6 to 26 s of
`gguf.GGUFReader`.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from millrace.errors import InputError

_MAX_HEADER = 64 << 20  # bytes; the largest vocabularies take 20 MB, and damage shall not have us read 40 GB
_DEPTH = 4  # arrays in arrays; no writer makes any
_MAX_TEXT = 1 << 16  # bytes of a value that is kept

#: Codes of struct by GGUF's value type; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

#: Tensor types: name, numbers in a block, bytes of a block.
_TENSORS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

#: general.file_type: the mixtures that a file may be of.
_FILE_TYPES = dict(
    enumerate(
        [
            "F32",
            "F16",
            "Q4_0",
            "Q4_1",
            "-",
            "-",
            "-",
            "Q8_0",
            "Q5_0",
            "Q5_1",
            "Q2_K",
            "Q3_K_S",
            "Q3_K_M",
            "Q3_K_L",
            "Q4_K_S",
            "Q4_K_M",
            "Q5_K_S",
            "Q5_K_M",
            "Q6_K",
            "IQ2_XXS",
            "IQ2_XS",
            "Q2_K_S",
            "IQ3_XS",
            "IQ3_XXS",
            "IQ1_S",
            "IQ4_NL",
            "IQ3_S",
            "IQ3_M",
            "IQ2_S",
            "IQ2_M",
            "IQ4_XS",
            "IQ1_M",
            "BF16",
            "-",
            "-",
            "-",
            "TQ1_0",
            "TQ2_0",
            "MXFP4_MOE",
            "NVFP4",
            "Q1_0",
        ]
    )
)

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class GgufHeader:
    """What the header of one file says; of a model in parts, the first part has the keys."""

    #: Such as llama or qwen3; empty where the file does not say.
    architecture: str
    #: Such as Q4_K_M; empty where there are neither a file type nor tensors.
    quantization: str
    #: Numbers in the tensors of this file.
    parameters: int
    #: The longest context the model was made for, in tokens.
    context: int | None
    #: Whether it brings a chat template.
    chat_template: bool
    #: Bytes that the file must have for its tensors; 0 where a tensor's type is not known here.
    bytes_needed: int


def part_of(name: str) -> tuple[str, int, int] | None:
    """Return stem, number and count of a file that is one part of several, such as x-00001-of-00003.gguf."""
    found = _PART.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else None


def part_names(name: str) -> list[str]:
    """Return the names of all files of the model that `name` belongs to, in order; itself where it is whole."""
    if (part := part_of(name)) is None:
        return [name]
    stem, _, count = part
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        InputError: `model_format`, when it is no GGUF file, or one that ends too early.
        OSError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            if not length:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), min(length, _MAX_HEADER), access=mmap.ACCESS_READ) as data:
                header = _Reader(data).header()
    except (struct.error, IndexError, OverflowError):
        raise _wrong(path, "its header ends too early") from None
    except ValueError as error:
        raise _wrong(path, str(error)) from None
    if length < header.bytes_needed:
        raise _wrong(path, f"it has {length} of {header.bytes_needed} bytes")
    return header


def _wrong(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a whole GGUF file: {why}.", "Fetch it again.", code="model_format")


class _Reader:
    """Steps through a header; damage is a ValueError, struct.error, IndexError or OverflowError."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError(f"it begins with {self._data[:8]!r}")
        self._at = 4
        version = self._take("I")
        if version not in (2, 3):
            big = " (it is for big-endian machines)" if version > 0xFFFF else ""
            raise ValueError(f"its version is {version}{big}, and llama.cpp loads 2 and 3")
        tensors, keys = self._take("Q"), self._take("Q")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            values[key] = self._value(self._take("I"))
        return self._described(values, *self._tensors(tensors, values))

    def _described(self, values: dict[str, Any], types: Counter[int], needed: int) -> GgufHeader:
        architecture = values.get("general.architecture")
        architecture = architecture if isinstance(architecture, str) else ""
        context = values.get(f"{architecture}.context_length")
        named = values.get("general.file_type")
        quantization = _FILE_TYPES.get(named, "-") if isinstance(named, int) else "-"
        if quantization == "-":
            # Norms are few numbers: most numbers are in tensors of the type that the file goes by.
            most = types.most_common(1)
            quantization = _TENSORS.get(most[0][0], (f"type {most[0][0]}", 1, 1))[0] if most else ""
        return GgufHeader(
            architecture,
            quantization,
            parameters=types.total(),
            context=context if isinstance(context, int) and context > 0 else None,
            chat_template=bool(values.get("tokenizer.chat_template")),
            bytes_needed=needed,
        )

    def _tensors(self, count: int, values: dict[str, Any]) -> tuple[Counter[int], int]:
        """Return the numbers in tensors of each type, and the bytes that the file must have for them."""
        types: Counter[int] = Counter()
        end, known = 0, True
        for _ in range(count):
            self._text()
            dimensions = self._take("I")
            if dimensions > 8:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            numbers = prod(self._take("Q") for _ in range(dimensions))
            if numbers >> 63:
                raise ValueError(f"a tensor has {numbers} numbers")
            kind, offset = self._take("I"), self._take("Q")
            types[kind] += numbers
            if kind in _TENSORS:
                _, block, size = _TENSORS[kind]
                end = max(end, offset + numbers // block * size)
            else:
                known = False
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return types, (start + end if known and count else 0)

    def _value(self, kind: int, depth: int = 0) -> Any:
        """Return a value; None for an array, which is stepped over."""
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY or depth > _DEPTH:
            raise ValueError(f"a value has the type {kind}")
        self._skip_array(self._take("I"), self._take("Q"), depth)
        return None

    def _skip_array(self, kind: int, count: int, depth: int) -> None:
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            # The one loop that takes time: a vocabulary and its merges.
            data, at, unpack = self._data, self._at, struct.Struct("<Q").unpack_from
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
            self._at = at
            self._skip(0)
        else:
            for _ in range(count):
                self._value(kind, depth + 1)

    def _text(self) -> str:
        length = self._take("Q")
        start = self._at
        self._skip(length)
        return self._data[start : start + min(length, _MAX_TEXT)].decode("utf-8", "replace")

    def _take(self, code: str) -> Any:
        shape = struct.Struct(f"<{code}")
        (value,) = shape.unpack_from(self._data, self._at)
        self._at += shape.size
        return value

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise IndexError
