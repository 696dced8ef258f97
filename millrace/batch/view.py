"""A batch as people and programs see it: OpenAI's batch object, and more under `millrace`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from millrace.batch.schema import Priority, ShardState, Status

_STAMPS = (
    "created_at",
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "expires_at",
    "cancelling_at",
    "cancelled_at",
)


def batch_object(row: sa.RowMapping, counts: sa.RowMapping) -> dict[str, Any]:
    """Return the object of a batch's row, `counts` being the sums and states of its shards."""
    status = row["status"]
    prompt, completion = int(counts["prompt_tokens"]), int(counts["completion_tokens"])
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": {"object": "list", "data": row["errors"]} if row["errors"] else None,
        "input_file_id": row["input_file_id"],
        "completion_window": row["completion_window"],
        # OpenAI's clients do not know `paused`; people see it under millrace.status.
        "status": Status.IN_PROGRESS.value if status == Status.PAUSED else status,
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        **{name: int(row[name]) if row[name] is not None else None for name in _STAMPS},
        "request_counts": {
            "total": row["total"],
            "completed": int(counts["completed"]),
            "failed": int(counts["failed"]),
        },
        "usage": {
            # OpenAI's client requires the details. We add up totals only; what an engine says of its cache
            # stands in each answer.
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        },
        "metadata": row["metadata"],
        "millrace": {
            "status": status,
            "name": row["name"],
            "priority": Priority(row["priority"]).name.lower(),
            "filename": row["filename"],
            "shards": {state.value: counts[state] for state in ShardState},
            "claims": int(counts["attempts"]),
            "created": row["created_at"],
            # While an expired batch is being merged, its stamp is there already.
            "ended": row[f"{status}_at"] if Status(status).final else None,
            "reason": row["reason"],
            "expires": row["expires_at"],
            "idempotency_key": row["idempotency_key"],
        },
    }
