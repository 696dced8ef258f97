"""Average what train.py has written at several ends of its way: `python models/demo/average.py OUT FOLDER=SHARE ...`.

Weights between the ends of one training read better than any of them (stochastic weight averaging, arXiv:1803.05407).
OUT gets them as train.py writes them, for export.py.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from train import Llama, save


def main() -> None:
    """Average."""
    out = Path(sys.argv[1])
    ends = [(Path(folder), float(share)) for folder, _, share in (end.partition("=") for end in sys.argv[2:])]
    weights = [(torch.load(folder / "checkpoint.pt")["model"], share) for folder, share in ends]
    model = Llama()
    model.load_state_dict({name: sum(share * end[name] for end, share in weights) for name in weights[0][0]})
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(ends[0][0] / "tokenizer.json", out)
    save(model, out)


if __name__ == "__main__":
    main()
