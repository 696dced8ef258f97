"""Tell how many answers two engines have in common: `python models/demo/agree.py one.jsonl other.jsonl`.

The files are outputs of `millrace demo -o`, or of any batch over the same rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def answers(path: str) -> dict[str, str]:
    """Return the text of every answer by custom_id."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}


def main() -> None:
    """Compare."""
    one, other = map(answers, sys.argv[1:3])
    differ = [name for name in one if one[name] != other.get(name)]
    for name in differ:
        print(f"{name}\n  {one[name]}\n  {other.get(name)}")
    print(f"{len(one) - len(differ)} of {len(one)} answers are the same ({1 - len(differ) / len(one):.1%})")


if __name__ == "__main__":
    main()
