"""`millrace demo`: 200 support tickets through everything, with nothing set up, and how many answers are right."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from millrace.batch.ledger import Ledger
from millrace.batch.submit import Order, open_input
from millrace.batch.verify import verify
from millrace.cli.batch import run_batch
from millrace.cli.output import Json, console, print_json, say
from millrace.cli.stack import running_stack
from millrace.errors import InputError
from millrace.models.demo import Wanted

EXAMPLE = "support-tickets.jsonl"
EXPECTED = "support-tickets.expected.jsonl"
SHOWN = (0, 1, -1)  # answers: of held-out tickets, and of one that was written by hand


@dataclass
class Score:
    """How many answers to the tickets of one source are right."""

    rows: int = 0
    #: Category, urgency, product and summary are the expected ones, letter by letter.
    all_right: int = 0
    category_and_urgency: int = 0


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the answers go.")] = Path("output.jsonl"),
    model: Annotated[
        Wanted,
        typer.Option(help="own: Millrace's small one, if MODEL_PATH names no other; hub: the DEMO_MODEL_REPO's."),
    ] = "own",
    as_json: Json = False,
) -> None:
    """Answer 200 support tickets with a real llama.cpp server, through Redis, Celery and the ledger."""
    raise typer.Exit(asyncio.run(_demo(output, model, as_json=as_json)))


async def _demo(output: Path, model: Wanted, *, as_json: bool) -> int:
    source, expected = _example(EXAMPLE), _example(EXPECTED)
    async with running_stack(always_own_workers=False, demo=model) as stack:
        if model == "hub" and "llama.cpp server" not in stack.ours:
            raise InputError(
                f"The engine at {stack.settings.llm_server_url} answers, and its model would be asked.",
                "Leave out --model, or stop that engine.",
                code="engine_in_use",
            )
        if stack.caution:
            say(stack.caution)
        with open_input(str(source)) as stream:
            batch, code = await run_batch(stack, stream, Order(filename=EXAMPLE, name="demo"), output)
        if code == 130:
            return code
        report = verify(Ledger.open(stack.settings), stack.settings.data_dir, batch["id"])
    scores = score(expected, output)
    if as_json:
        print_json(batch | {"verified": report.ok, "right": {name: asdict(count) for name, count in scores.items()}})
    else:
        _show_answers(source, output)
        _show_table(batch, scores)
        verdict = "verified: every row has exactly one line, in order" if report.ok else report.findings[0]
        say(f"{report.rows} rows in, {report.output_lines} answers out, {report.error_lines} failed; {verdict}.")
    return code if report.ok else 1


def score(expected: Path, output: Path) -> dict[str, Score]:
    """Compare answers with the expected ones, by where the tickets come from."""
    answered = {line["custom_id"]: _answer(line) for line in _lines(output)}
    scores: dict[str, Score] = {}
    for line in _lines(expected):
        right = line["answer"]
        said = _object(answered.get(line["custom_id"], ""))
        count = scores.setdefault(line["source"], Score())
        count.rows += 1
        count.all_right += said == right
        count.category_and_urgency += all(said.get(name) == right[name] for name in ("category", "urgency"))
    return scores


def _show_answers(source: Path, output: Path) -> None:
    asked = {line["custom_id"]: line["body"]["messages"][-1]["content"] for line in _lines(source)}
    lines = _lines(output)
    for line in [lines[number] for number in SHOWN] if len(lines) >= len(SHOWN) else lines:
        console.print(f"[bold]{line['custom_id']}[/]", end=" ")
        console.print(_short(asked[line["custom_id"]], 67), markup=False, soft_wrap=True)
        console.print(f"  → {_short(_answer(line), 160)}", markup=False)


def _show_table(batch: dict[str, Any], scores: dict[str, Score]) -> None:
    more, rows = batch["millrace"], batch["request_counts"]["total"]
    seconds = max(more["ended"] - more["created"], 1e-3)
    table = Table(box=None, pad_edge=False)
    table.add_column("tickets")
    for title in ("rows", "all right", "category and urgency right"):
        table.add_column(title, justify="right")
    for name, count in scores.items():
        table.add_row(
            name,
            str(count.rows),
            _share(count.all_right, count.rows),
            _share(count.category_and_urgency, count.rows),
        )
    console.print()
    console.print(table)
    tokens = batch["usage"]["output_tokens"]
    say(f"\n{rows} rows, {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s.")


def _share(part: int, whole: int) -> str:
    return f"{part}  {part / whole:6.1%}"


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _answer(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object of an answer; an empty one for what is none."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as lines:
        return [msgspec.json.decode(line) for line in lines]


def _example(name: str) -> Path:
    here = Path("examples") / name
    if here.is_file():
        return here
    packaged = Path(str(resources.files("millrace"))).parent / "examples" / name
    if packaged.is_file():
        return packaged
    raise InputError(f"There is no {here}.", "Run the demo in a clone of the repository.", code="no_such_file")
