"""Batches for tests: planned, recorded and run without an engine, by the library's own parts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa

from millrace.batch.folder import BatchFolder
from millrace.batch.lease import Counts, Lease, Leases
from millrace.batch.ledger import Ledger, ShardPlan, new_id
from millrace.batch.life import FileRecord
from millrace.batch.lines import answer_line, failure_line
from millrace.batch.planner import PlanOptions, plan, read_rows
from millrace.batch.schema import Priority, shards
from millrace.batch.segments import SegmentWriter, recover
from millrace.settings import Settings

TTL = 60.0


def request(custom_id: str, model: str = "m", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": custom_id}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "messages": messages, **body},
    }


def planned(settings: Settings, ledger: Ledger, rows: Iterable[dict[str, Any]], *, rate: float = 1000.0) -> str:
    """Plan rows as a file and record the batch; a rate of 0.001 gives every row a shard of its own."""
    batch_id = new_id("batch")
    folder = BatchFolder.of(settings.data_dir, batch_id)
    raw = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    result = plan(io.BytesIO(raw), folder, PlanOptions(rate=rate), name="input.jsonl")
    record = FileRecord(
        id=new_id("file"),
        purpose="batch",
        filename="input.jsonl",
        path=str(folder.input.relative_to(settings.data_dir)),
        bytes=result.bytes,
        sha256=result.sha256,
        rows=result.rows,
    )
    ledger.create_batch(
        batch_id=batch_id,
        input_file=record,
        plan=result.shards,
        endpoint=result.endpoint,
        priority=Priority.NORMAL,
    )
    return batch_id


def recorded(
    ledger: Ledger, shard_rows: list[int], *, models: list[str] | None = None, priority: Priority = Priority.NORMAL
) -> str:
    """Record a batch of shards of so many rows; it has no files."""
    batch_id, cuts, first = new_id("batch"), [], 0
    for number, rows in enumerate(shard_rows):
        cuts.append(ShardPlan(number, models[number] if models else "m", first, rows))
        first += rows
    record = FileRecord(new_id("file"), "batch", "x.jsonl", f"batches/{batch_id}/input.jsonl", 1, "0" * 64, first)
    ledger.create_batch(
        batch_id=batch_id, input_file=record, plan=cuts, endpoint="/v1/chat/completions", priority=priority
    )
    return batch_id


def answer(batch_id: str, row: int, custom_id: str, text: str) -> bytes:
    body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    return answer_line(batch_id, row, custom_id, 200, "req", body)


def failure(batch_id: str, row: int, custom_id: str, text: str) -> bytes:
    return failure_line(batch_id, row, custom_id, "some_code", text)


def run_shard(
    settings: Settings, leases: Leases, lease: Lease, failed: Callable[[int], bool] = lambda row: False
) -> None:
    """Answer what is left of a claimed shard and finish it."""
    folder = BatchFolder.of(settings.data_dir, lease.batch_id)
    older = recover(folder, lease.number, lease.epoch, lease.sealed)
    assert leases.seal(lease, older.sealed, older.counts)
    writer = SegmentWriter(folder.segment(lease.number, lease.epoch), lease.epoch)
    for row, line in read_rows(folder, lease.first, lease.rows):
        if row in older.rows:
            continue
        custom_id = json.loads(line)["custom_id"]
        make = failure if failed(row) else answer
        writer.append(row, not failed(row), 2, 3, make(lease.batch_id, row, custom_id, f"epoch {lease.epoch}"))
        if failed(row):
            older.counts.failed += 1
        else:
            older.counts.completed += 1
    writer.flush()
    writer.sync()
    writer.close()
    assert leases.finish(lease, [*older.sealed, writer.sealed()], older.counts, 1.0)


def run_all(settings: Settings, ledger: Ledger, failed: Callable[[int], bool] = lambda row: False) -> None:
    """Run every shard there is."""
    leases = Leases(ledger, "test", TTL)
    while lease := leases.claim():
        run_shard(settings, leases, lease, failed)


def expire(ledger: Ledger, *shard_ids: int) -> None:
    """Let leases run out."""
    with ledger.write() as connection:
        connection.execute(shards.update().where(shards.c.id.in_(shard_ids)).values(lease_until=1.0))


def shard_row(ledger: Ledger, shard_id: int) -> sa.Row[Any]:
    with ledger.read() as connection:
        return connection.execute(sa.select(shards).where(shards.c.id == shard_id)).one()


def counts(completed: int = 0, failed: int = 0) -> Counts:
    return Counts(completed, failed, 2 * completed, 3 * completed)
