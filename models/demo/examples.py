"""Write the demo's tickets and their right answers: `python models/demo/examples.py examples`.

150 held-out tickets of tickets.py, then the 50 of handwritten.jsonl. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tickets import SYSTEM, Ticket, Tickets

HELD_OUT, SEED = 150, 2026


def hand_written() -> Iterator[Ticket]:
    """Yield the tickets that people wrote, with the answer that their labels make."""
    intents = Tickets("test").intents
    for line in (Path(__file__).parent / "handwritten.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield intents[row["intent"]].ticket(row["text"], row["urgency"], row["product"])


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1])
    held_out = list(islice(Tickets("test").endless(SEED), HELD_OUT))
    rows = [("held-out", ticket) for ticket in held_out] + [("hand-written", ticket) for ticket in hand_written()]
    asked, expected = [], []
    for number, (source, ticket) in enumerate(rows, 1):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ticket.text}]
        body = {"messages": messages, "max_tokens": 96, "temperature": 0}
        name = f"ticket-{number:04}"
        asked.append({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})
        expected.append({"custom_id": name, "source": source, "answer": ticket.answer})
    for name, lines in (("support-tickets.jsonl", asked), ("support-tickets.expected.jsonl", expected)):
        text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
