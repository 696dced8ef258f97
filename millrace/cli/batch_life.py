"""`millrace batch cancel`, `pause`, `resume`, `retry`, `priority` and `delete`: what becomes of a batch."""

from __future__ import annotations

from typing import Annotated

import typer

from millrace.batch import again, prune
from millrace.batch.ledger import Ledger
from millrace.batch.schema import Priority, Status
from millrace.cli.batch_look import BatchId, opened
from millrace.cli.output import Json, confirm, print_json, say
from millrace.errors import InputError, Unreachable
from millrace.settings import get_settings


def cancel(batch_id: BatchId, as_json: Json = False) -> None:
    """Cancel a batch; the rows that are answered are kept."""
    ledger = opened(get_settings())
    status = ledger.cancel(batch_id)
    if status is Status.CANCELLING:
        _send_merge(batch_id)
    _tell(ledger, batch_id, f"{batch_id} is {status}.", as_json=as_json)


def pause(batch_id: BatchId, as_json: Json = False) -> None:
    """Run no more rows of a batch until it is resumed; those in flight come to their end."""
    ledger = opened(get_settings())
    status = ledger.pause(batch_id)
    if status is not Status.PAUSED:
        raise _over(batch_id, status, "paused")
    _tell(ledger, batch_id, f"{batch_id} is paused. `millrace batch resume {batch_id}` goes on.", as_json=as_json)


def resume(batch_id: BatchId, as_json: Json = False) -> None:
    """Go on with a batch that is paused, or was cancelled, expired or failed: run the rows that have no line."""
    settings = get_settings()
    ledger = opened(settings)
    before = ledger.status(batch_id)
    status = again.resume(ledger, settings.data_dir, batch_id)
    if status is Status.FINALIZING:
        _send_merge(batch_id)
    send_tickets()
    if status is before:
        said = f"{batch_id} runs already: it is {status}."
    else:
        counts = ledger.batch(batch_id)["request_counts"]
        left = counts["total"] - counts["completed"] - counts["failed"]
        said = f"{batch_id} was {before} and goes on: {left} of {counts['total']} rows are still to be run."
    _tell(ledger, batch_id, said, as_json=as_json)


def retry(batch_id: BatchId, as_json: Json = False) -> None:
    """Run the failed rows of a completed batch again, as part of it."""
    settings = get_settings()
    ledger = opened(settings)
    rows = again.retry(ledger, settings.data_dir, batch_id)
    send_tickets()
    said = f"{batch_id} goes on: {rows} failed {'row is' if rows == 1 else 'rows are'} run again."
    _tell(ledger, batch_id, said, as_json=as_json)


def priority(
    batch_id: BatchId,
    name: Annotated[str, typer.Argument(metavar="PRIORITY", help="urgent, high, normal, low or idle.")],
    as_json: Json = False,
) -> None:
    """Change a batch's priority, also while it runs: it holds from the next shard on."""
    wanted = Priority.parse(name)
    ledger = opened(get_settings())
    status = ledger.set_priority(batch_id, wanted)
    if status.final:
        raise _over(batch_id, status, "given another priority")
    _tell(ledger, batch_id, f"{batch_id} has the priority {wanted.name.lower()}.", as_json=as_json)


def delete(
    batch_id: BatchId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove an ended batch and its files for good."""
    settings = get_settings()
    ledger = opened(settings)
    if ledger.status(batch_id).final:
        confirm(
            f"Remove {batch_id} and its answers? No command brings them back.",
            f"{batch_id} and its answers would be removed for good, and nobody is there to be asked.",
            yes=yes,
        )
    prune.delete(ledger, settings.data_dir, batch_id)
    if as_json:
        print_json({"id": batch_id, "object": "batch", "deleted": True})
    else:
        say(f"{batch_id} is deleted.")


def send_tickets() -> None:
    """Tell the workers that shards wait.

    Raises:
        Unreachable: Redis does not answer; what the ledger has stays.
    """
    from kombu.exceptions import OperationalError

    from tasks.batch import send_tickets as send

    try:
        send()
    except OperationalError as error:
        raise Unreachable(
            f"It is recorded, but Redis did not take the tickets: {str(error).rstrip('.')}.",
            "Workers find it once there is a Redis, which `millrace up` brings; nothing needs to be said again.",
            code="redis_unreachable",
        ) from error


def _send_merge(batch_id: str) -> None:
    from tasks.batch import send_merge

    send_merge(batch_id)  # without it the reaper does it, a few seconds later


def _over(batch_id: str, status: Status, what: str) -> InputError:
    return InputError(f"{batch_id} is {status} and cannot be {what}.", code="batch_ended")


def _tell(ledger: Ledger, batch_id: str, sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json(ledger.batch(batch_id))
    else:
        say(sentence)
