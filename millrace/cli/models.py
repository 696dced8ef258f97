"""`millrace models …`, and `millrace engine-sim`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from millrace.cli.fetching import fetching
from millrace.cli.output import Json, answers, print_json, say, size
from millrace.models.demo import OWN, write_own_hf
from millrace.models.pull import pull
from millrace.models.registry import model_files
from millrace.models.tiny import make_tiny
from millrace.settings import get_settings

app = typer.Typer(help="Models: download and list them.", no_args_is_help=True)


@app.command("pull")
def pull_command(
    repo: Annotated[str, typer.Argument(metavar="OWNER/REPO", help="Repository on the Hugging Face Hub.")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="GGUF file or quantization; else Q4_K_M.")] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    as_json: Json = False,
) -> None:
    """Download a model: a GGUF file into models/gguf, a folder with safetensors into models/hf.

    Interrupt it or kill it: the same command goes on where it was. Every file is checked by its hash.
    """
    settings = get_settings()
    try:
        with fetching() as progress:
            pulled = pull(settings, repo, file, revision=revision, say=say, progress=progress)
    except KeyboardInterrupt:
        say("Interrupted: what came is kept, and the same command goes on.")
        raise typer.Exit(130) from None
    if as_json:
        print_json(pulled.as_dict())
        return
    if source := settings.models_source:
        say(f"MODELS_SOURCE={source}: the containers look there, and {pulled.path} must be copied to it.")
    say(f"{pulled.path} is there. With this line in .env, the engine serves it as {pulled.serves}:")
    answers.print(pulled.setting, markup=False)


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the models in MODELS_DIR: size, quantization, parameters, context, and what is wrong with them."""
    folder = get_settings().models_dir
    found = model_files(folder)
    if as_json:
        print_json({"files": [file.as_dict() for file in found]})
        return
    if not found:
        answers.print(f"There are no models in {folder / 'gguf'} and {folder / 'hf'}.", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "format", "size", "quantization", "parameters", "context", "path"):
        table.add_column(title, overflow="fold")
    for file in found:
        known = [file.quantization, _count(file.parameters), str(file.context or "")]
        cells = [file.name, file.format, size(file.bytes), *known, file.path]
        table.add_row(*map(escape, cells))
    answers.print(table)
    for file in found:
        if file.problem:
            answers.print(f"broken: {file.problem}", markup=False)


def _count(parameters: int | None) -> str:
    """Return a number of parameters as people write it: 7.6B, 494M."""
    if parameters is None:
        return ""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{name}" if parameters < 100 * unit else f"{parameters / unit:.0f}{name}"
    return str(parameters)


@app.command("make-tiny")
def make_tiny_command(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    context: Annotated[int, typer.Option(min=256, help="Context, tokens.")] = 4096,
    as_json: Json = False,
) -> None:
    """Make a model of a few million random weights, as GGUF and as an HF folder; its answers are noise."""
    made = make_tiny(folder, seed=seed, context=context)
    if as_json:
        print_json({"gguf": str(made.gguf), "hf": str(made.hf), "parameters": made.parameters})
        return
    answers.print(f"{made.gguf}  {size(made.gguf.stat().st_size)}, {made.parameters:,} random weights", markup=False)
    answers.print(f"{made.hf}  the same for vLLM", markup=False)


@app.command("demo-hf")
def demo_hf_command(
    folder: Annotated[Path | None, typer.Argument(help="Where to write it; else millrace-demo in models/hf.")] = None,
    as_json: Json = False,
) -> None:
    """Write Millrace's own demo model, which lies in models/gguf, as an HF folder for vLLM."""
    settings = get_settings()
    target = folder or settings.models_dir / "hf" / OWN
    write_own_hf(settings, target)
    if as_json:
        print_json({"hf": str(target)})
    else:
        answers.print(f"{target}  the weights of {OWN}.gguf", markup=False)


def engine_sim(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Off loopback only with an api_key in the script.")] = "127.0.0.1",
    script: Annotated[Path | None, typer.Option(help="JSON: slots, speed, faults; see docs/engine-sim.md.")] = None,
    dialect: Annotated[str | None, typer.Option(help="llamacpp, vllm or openai.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Requests worked on at once.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(min=0, help="Of each slot; 0 = no delay.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens that fit one request.")] = None,
    log: Annotated[Path | None, typer.Option(help="Write every request to this JSONL file.")] = None,
) -> None:
    """Run the scripted engine: OpenAI's routes with chosen slots, speed, faults and a request log."""
    from millrace.engine.scripted import read_script, read_script_file, run

    chosen: dict[str, Any] = {
        "dialect": dialect,
        "slots": slots,
        "tokens_per_second": tokens_per_second,
        "context": context,
        "log_path": str(log) if log else None,
    }
    given = read_script_file(script) if script else {}
    run(read_script(given | {key: value for key, value in chosen.items() if value is not None}), host, port)
