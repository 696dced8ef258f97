"""What model files say of themselves: true headers, cut ones, and noise."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import InputError, NotFound
from millrace.models import gguf_header
from millrace.models.choose import choose_gguf, choose_hf
from millrace.models.gguf_header import GgufHeader, part_names, read_header
from millrace.models.hf_folder import read_folder
from millrace.models.hub import RemoteFile, Repository
from millrace.models.registry import ModelFile, model_files
from millrace.models.tiny import TinyModel, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(tmp_path_factory.mktemp("tiny"), context=2048)


# GGUF headers


def test_a_header(tiny: TinyModel) -> None:
    header = read_header(tiny.gguf)
    assert header == GgufHeader(
        architecture="llama",
        quantization="F16",
        parameters=tiny.parameters,
        context=2048,
        chat_template=True,
        bytes_needed=tiny.gguf.stat().st_size,
    )


def write(path: Path, kind: gguf.GGMLQuantizationType, *, file_type: int | None = None, **values: Any) -> Path:
    """Write a file with one large tensor of a type, one small one of floats, and keys of every kind."""
    writer = gguf.GGUFWriter(path, "qwen3")
    for add, value in (
        (writer.add_uint8, 1),
        (writer.add_int8, -1),
        (writer.add_uint16, 1),
        (writer.add_int16, -1),
        (writer.add_int32, -1),
        (writer.add_float32, 0.5),
        (writer.add_bool, True),
        (writer.add_uint64, 1),
        (writer.add_int64, -1),
        (writer.add_float64, 0.5),
        (writer.add_string, "ü"),
        (writer.add_array, ["a", "ü", ""]),
        (writer.add_array, [1.5, 2.5]),
        (writer.add_array, [True, False]),
    ):
        add(f"some.{add.__name__}{type(value).__name__}{value}", value)
    if file_type is not None:
        writer.add_file_type(file_type)
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((8, 1024 // block * size), np.uint8)
    writer.add_tensor("weights", raw, raw_dtype=kind)
    writer.add_tensor("norm", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", sorted(gguf_header._TENSORS))
def test_types_of_tensors_are_those_of_the_gguf_package(kind: int, tmp_path: Path) -> None:
    known = gguf.GGMLQuantizationType(kind)
    name, block, size = gguf_header._TENSORS[kind]
    assert (name, (block, size)) == (known.name, gguf.GGML_QUANT_SIZES[known])
    header = read_header(write(tmp_path / "a.gguf", known, qwen3__context_length=40960))
    assert (header.quantization, header.parameters, header.context) == (known.name, 8 * 1024 + 64, 40960)
    assert header.bytes_needed <= (tmp_path / "a.gguf").stat().st_size


def test_file_types_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    for known in gguf.LlamaFileType:
        name = known.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        header = read_header(write(tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q4_K, file_type=known.value))
        assert header.quantization == (name if name != "GUESSED" else "Q4_K")


def test_a_large_vocabulary_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted, not timed: nothing but the lengths of the strings is looked at.
    taken = []
    take = gguf_header._Reader._take
    monkeypatch.setattr(gguf_header._Reader, "_take", lambda self, code: taken.append(code) or take(self, code))
    words = b"".join(struct.pack("<Q", 5) + b"%05d" % number for number in range(20_000))
    keys = text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 20_000) + words
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + keys)
    assert read_header(path) == GgufHeader("", "", 0, None, chat_template=False, bytes_needed=0)
    assert len(taken) < 20


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ENDLESS = 2**63
DAMAGED = {
    "empty": b"",
    "short": b"GG",
    "a web page": b"<!doctype html><html>",
    "no version": b"GGUF",
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "endless keys": b"GGUF" + struct.pack("<IQQ", 3, 0, ENDLESS),
    "endless tensors": b"GGUF" + struct.pack("<IQQ", 3, ENDLESS, 0),
    "an endless key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, ENDLESS),
    "a value of no type": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 99),
    "an endless array": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 10, ENDLESS),
    "endless strings": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQQ", 9, 8, 9, ENDLESS),
    "arrays in arrays": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + text("a")
    + struct.pack("<I", 9)
    + struct.pack("<IQ", 9, 1) * 9,
    "endless dimensions": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("a") + struct.pack("<I", ENDLESS >> 40),
    "a tensor without end": b"GGUF"
    + struct.pack("<IQQ", 3, 1, 0)
    + text("a")
    + struct.pack("<IQQIQ", 2, ENDLESS, 9, 0, 0),
    "no alignment": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("general.alignment") + struct.pack("<II", 4, 0),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a whole GGUF file") as caught:
        read_header(path)
    assert caught.value.code == "model_format"


@given(st.data())
def test_a_file_that_was_cut_is_an_error(tiny: TinyModel, tmp_path: Path, data: st.DataObject) -> None:
    whole = tiny.gguf.read_bytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(InputError, match="not a whole GGUF file"):
        read_header(path)


@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_give_a_header_or_an_error(
    tiny: TinyModel, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(tiny.gguf.read_bytes())
    for at, value in changes:
        content[at] = value
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        json.dumps(asdict(read_header(path)))


@given(st.binary(max_size=300))
def test_noise_behind_the_magic_gives_a_header_or_an_error(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + noise)
    with contextlib.suppress(InputError):
        read_header(path)


# The folder of models


def test_parts_are_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    names = part_names("a-00002-of-00003.gguf")
    assert names == ["a-00001-of-00003.gguf", "a-00002-of-00003.gguf", "a-00003-of-00003.gguf"]
    for name in names:
        write(folder / name, gguf.GGMLQuantizationType.Q4_K, file_type=15)
    (model,) = model_files(tmp_path)
    assert (model.name, model.parts, model.parameters) == ("a-00001-of-00003", 3, 3 * (8 * 1024 + 64))
    assert (model.quantization, model.problem) == ("Q4_K_M", "")
    assert model.bytes == sum((folder / name).stat().st_size for name in names)
    (folder / names[1]).unlink()
    (model,) = model_files(tmp_path)
    assert model.problem.endswith("a-00002-of-00003.gguf is missing.")


def test_what_is_no_model_is_none(tmp_path: Path) -> None:
    for name in (
        "gguf/.hidden.gguf",
        "gguf/a.gguf.part",
        "hf/.incomplete/a/config.json",
        "hf/.a/config.json",
        "hf/b/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert model_files(tmp_path) == []
    (tmp_path / "gguf" / "a-00001-of-00000.gguf").touch()
    assert [model.name for model in model_files(tmp_path)] == ["a-00001-of-00000"]


def test_a_folder(tiny: TinyModel) -> None:
    model = read_folder(tiny.hf)
    assert (model.architecture, model.quantization) == ("LlamaForCausalLM", "float16")
    assert (model.parameters, model.context, model.chat_template) == (tiny.parameters, 2048, True)


@pytest.fixture
def folder(tiny: TinyModel, tmp_path: Path) -> Path:
    made = make_tiny(tmp_path, context=2048).hf
    target = tmp_path / "hf" / "a"
    target.parent.mkdir()
    return made.rename(target)


def test_a_quantized_folder_of_several_parts(folder: Path) -> None:
    text_config = {"dtype": "bfloat16", "max_position_embeddings": 9}
    config = {"text_config": text_config, "architectures": ["X"], "quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").unlink()
    model = read_folder(folder)
    assert (model.quantization, model.parameters, model.context) == ("awq", None, 9)
    assert not model.chat_template
    (folder / "chat_template.jinja").touch()
    assert read_folder(folder).chat_template
    (folder / "config.json").write_text(json.dumps({"text_config": text_config}))
    assert read_folder(folder).quantization == "bfloat16"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", b"{", "no JSON object"),
        ("config.json", b"\xff\xfe", "no JSON object"),
        ("config.json", b"[" * 100_000, "no JSON object"),
        ("tokenizer_config.json", b"7", "no JSON object"),
        ("model.safetensors", b"", "does not begin"),
        ("model.safetensors", b"<!doctype html>", "does not begin"),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", "no JSON object"),
        ("model.safetensors", struct.pack("<Q", 9) + b'{"a":7}  ', "tensor a is not described"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
    ],
)
def test_a_damaged_folder_is_listed_as_such(folder: Path, name: str, content: bytes, problem: str) -> None:
    (folder / name).write_bytes(content)
    (model,) = model_files(folder.parent.parent)
    assert problem in model.problem
    assert (model.name, model.parameters) == ("a", None)


def test_weights_that_were_cut_or_are_not_there(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "bytes" in model_files(folder.parent.parent)[0].problem
    weights.unlink()
    assert "no .safetensors" in model_files(folder.parent.parent)[0].problem


def test_a_model_is_a_json_object() -> None:
    assert json.loads(json.dumps(ModelFile("a", "gguf", "a.gguf", 1).as_dict()))["problem"] == ""


# The choice


def repository(*names: str) -> Repository:
    return Repository("o/r", "c", {name: RemoteFile(name, size=1, sha256="0" * 64) for name in names})


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (["a.gguf"], "", "a.gguf"),
        (["a.GGUF", "x.bin"], "", "a.GGUF"),
        (["a.Q4_K_M.gguf", "a.Q4_K_S.gguf", "a.Q4_0.gguf"], "", "a.Q4_K_M.gguf"),
        (["a-q4_k_m.gguf", "a-iq4_k_m_x.gguf"], "", "a-q4_k_m.gguf"),
        (["a-q4_0.gguf", "a-q8_0.gguf"], "Q8_0", "a-q8_0.gguf"),
        (["x/a.gguf", "y/b.gguf"], "b.gguf", "y/b.gguf"),
        (["a.gguf", "x/a.gguf"], "a.gguf", "a.gguf"),
        (
            ["Q4_K_M/a-00001-of-00002.gguf", "Q4_K_M/a-00002-of-00002.gguf", "b.gguf"],
            "",
            "Q4_K_M/a-00001-of-00002.gguf",
        ),
        (["a-00001-of-00001.gguf"], "", "a-00001-of-00001.gguf"),
    ],
)
def test_the_choice_of_a_gguf_model(names: list[str], wanted: str, chosen: str) -> None:
    assert choose_gguf(repository(*names), wanted).path == chosen


@pytest.mark.parametrize(
    ("names", "wanted", "code"),
    [
        ([], "", "not_found"),
        (["a-00001-of-00002.gguf"], "", "not_found"),
        (["a-00001-of-00000.gguf"], "", "not_found"),
        (["a-00002-of-00002.gguf"], "a-00002-of-00002.gguf", "not_found"),
        (["a.gguf"], "b.gguf", "not_found"),
        (["a.gguf", "b.gguf"], "", "choice_needed"),
        (["x/a.gguf", "y/a.gguf"], "a.gguf", "choice_needed"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "q8_0", "choice_needed"),
    ],
)
def test_no_choice_of_a_gguf_model(names: list[str], wanted: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        choose_gguf(repository(*names), wanted)
    assert caught.value.code == code
    assert isinstance(caught.value, NotFound) == (code == "not_found")


def test_weights_of_other_names_are_taken_where_there_are_no_standard_ones() -> None:
    one = choose_hf(repository("config.json", "consolidated.safetensors"))
    assert set(one) == {"config.json", "consolidated.safetensors"}
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "2_Dense/model.safetensors"]
    two = choose_hf(repository("config.json", "consolidated.safetensors", "a/b/c.json", "onnx/model.json", *parts))
    assert set(two) == {"config.json", *parts}
