"""Write what train.py learned as a GGUF: `python models/demo/export.py FOLDER models/gguf/millrace-demo.gguf`.

Needs Millrace with its extra `embedded`, and no PyTorch. `millrace models demo-hf` writes the same weights for vLLM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import safetensors.numpy

from millrace.models.llama_files import SPECIAL, Llama, Shape, Vocabulary, write_gguf

#: What the files declare. Trained were 40 to 250 tokens; RoPE and llama.cpp take more, with worse answers.
CONTEXT = 4096


def main() -> None:
    """Export."""
    folder, target = map(Path, sys.argv[1:3])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))) or tuple(tokens[-len(SPECIAL) :]) != SPECIAL:
        raise SystemExit("The vocabulary has gaps, or does not end with the special tokens.")
    merges = [tuple(pair) for pair in tokenizer["model"]["merges"]]
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    shape = Shape(**json.loads((folder / "shape.json").read_text()))
    write_gguf(Llama(shape, Vocabulary(tokens, merges), weights, CONTEXT), target, target.stem, "Q8_0")
    print(f"{target}: {target.stat().st_size:,} bytes, {sum(tensor.size for tensor in weights.values()):,} weights")


if __name__ == "__main__":
    main()
