"""How many requests to have in flight at an engine.

Too few starve it, too many make it thrash: llama-server with 8 slots on 2 cores gave 1,978, 5,022,
5,426, 4,890 and 4,699 tokens/s at 1, 8, 16, 64 and 256 in flight. The limit is seeded from what the
engine reports and shared among the processes that hold leases.
"""

from __future__ import annotations

import math

from millrace.engine.probes import EngineState

PER_SLOT = 2  # one worked on, one ready to follow it: a slot never waits for our round trip
UNKNOWN_LIMIT = {"vllm": 128, "openai": 32}  # engines that do not say how much they take


def limit_of(state: EngineState, chosen: int = 0) -> int:
    """Return the number of requests to have in flight; `chosen` (BATCH_CONCURRENCY) wins when set."""
    if chosen:
        return chosen
    if state.kind == "llama-cpp-python":
        return 1  # a second one would only wait for a lock
    if state.slots:
        return PER_SLOT * state.slots
    return UNKNOWN_LIMIT.get(state.kind, UNKNOWN_LIMIT["openai"])


def share_of(limit: int, processes: int) -> int:
    """Return one process's part of the limit; every process may have at least one request in flight."""
    return max(1, math.ceil(limit / max(1, processes)))
