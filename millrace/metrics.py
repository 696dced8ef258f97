"""What a worker counts, and the page that Prometheus reads.

A worker is several processes that come and go. What they count lies in one table, an unnamed file that all of
them map: a process that is killed takes nothing with it, and a new one counts on where it stopped.

    record   value · pid and process group of its owner · series, such as millrace_retries_total{kind="batch",…}

A record has one writer, so counting takes no lock and no system call: 0.4 µs a series. A new record is taken
under the file's lock: first one of the same series whose owner is gone, so the table does not grow with
the processes there have ever been (prometheus_client's multiprocess mode keeps files for each of them, and
Celery replaces a process after 200 tasks). Gauges of owners that are gone do not count.

No series names a batch or a request: there would be no end of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from millrace import processes
from millrace.engine import retry

_VALUE = struct.Struct("=d")
_OWNER = struct.Struct("=ii")
_SERIES = 16  # bytes before the series' text in a record
_RECORD = 256  # bytes
_RECORDS = 2048
_ROOM = 1536  # records that models may use; later models count as "other"
_MODEL = re.compile(r'model="(?:[^"\\]|\\.)*"')
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.002  # a metric is not worth a longer wait

#: Upper bounds of the interactive requests' durations, seconds.
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
KINDS = ("batch", "interactive")
STATUSES = ("completed", "failed")
TOKEN_TYPES = ("prompt", "completion")
#: What an engine may be; see `worker.exporter`.
ENGINE_STATES = ("serving", "loading", "unreachable", "timeout", "key_refused", "failing")


@dataclass(frozen=True)
class Metric:
    """One metric; `known` are label values that are shown as 0 before anything happened.

    Without them the first error after a start would be invisible: a rate needs a value before it.
    """

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()

    def series(self, *values: str) -> str:
        """Return the series with these label values, in the order of `labels`."""
        return _series(self.name, self.labels, values)


@lru_cache(maxsize=1024)
def _series(name: str, labels: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not labels:
        return name
    pairs = ",".join(f'{label}="{_escape(value)}"' for label, value in zip(labels, values, strict=True))
    return f"{name}{{{pairs}}}"


def _escape(value: str) -> str:
    # A NUL would end the series in its record.
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").replace("\0", "")


_FAILURES = [
    error for error in vars(retry).values() if isinstance(error, type) and issubclass(error, retry.EngineError)
]
_KNOWN_ERRORS = tuple((kind, error.code) for kind in KINDS for error in _FAILURES)
_KNOWN_RETRIES = tuple(
    (kind, error.code)
    for kind in KINDS
    for error in _FAILURES
    if error.retryable or (kind == "batch" and error is retry.KeyRefused)
)

# Counted by the processes of this worker.
ROWS = Metric("millrace_batch_requests_total", "counter", "Rows of batches that have ended.", ("model", "status"))
REQUESTS = Metric("millrace_interactive_requests_total", "counter", "Interactive tasks ended.", ("model", "status"))
TOKENS = Metric(
    "millrace_tokens_total", "counter", "Tokens of answers and of their prompts.", ("model", "type", "kind")
)
ERRORS = Metric(
    "millrace_errors_total", "counter", "Rows and tasks that failed for good.", ("kind", "code"), _KNOWN_ERRORS
)
RETRIES = Metric(
    "millrace_retries_total", "counter", "Tries that failed and are made again.", ("kind", "reason"), _KNOWN_RETRIES
)
SECONDS = Metric(
    "millrace_interactive_request_seconds", "histogram", "From a task's start to its end, retries included."
)
INFLIGHT = Metric("millrace_inflight", "gauge", "Requests that the engine has of us.", ("kind", "model"))
LIMIT = Metric("millrace_concurrency_limit", "gauge", "Batch requests that this worker may have in flight.")

# Asked when Prometheus asks; the same from every worker of an installation.
UP = Metric("millrace_up", "gauge", "Whether a part answers.", ("part",))
BUILD = Metric("millrace_build_info", "gauge", "Always 1.", ("version",))
DEPTH = Metric("millrace_queue_depth", "gauge", "Messages in Redis; batch's are tickets.", ("queue", "priority"))
OLDEST = Metric(
    "millrace_queue_oldest_age_seconds", "gauge", "How long a queue's oldest message has waited; 0 = none.", ("queue",)
)
DEAD_LETTERS = Metric("millrace_dead_letters", "gauge", "Messages in the list of dead letters.")
WORKERS = Metric("millrace_workers", "gauge", "Celery workers that serve a queue, on all machines.", ("queue",))
TROUBLE = Metric("millrace_trouble", "gauge", "1 while rows wait, by why.", ("code",))
REDIS_MEMORY = Metric("millrace_redis_memory_bytes", "gauge", "Memory Redis uses.")
REDIS_LIMIT = Metric("millrace_redis_memory_limit_bytes", "gauge", "Redis's maxmemory; 0 = none.")
BATCHES = Metric("millrace_batches", "gauge", "Batches that have not ended.", ("status",))
BATCH_AGE = Metric("millrace_batch_oldest_age_seconds", "gauge", "Age of the oldest batch not ended; 0 = none.")
SHARDS = Metric("millrace_shards", "gauge", "Shards of those batches.", ("state",))
BATCH_ROWS = Metric("millrace_batch_rows", "gauge", "Rows of those batches.", ("state",))
ENGINE_STATE = Metric("millrace_engine_state", "gauge", "1 for the state the engine is in.", ("state",))
ENGINE = Metric("millrace_engine_info", "gauge", "1 while it answers: what it is.", ("engine", "version"))
SLOTS = Metric("millrace_engine_slots", "gauge", "Requests the engine works on at once, where it says.")
MODEL_STATE = Metric("millrace_model_state", "gauge", "1 for each model that is served.", ("model", "state"))
DISK_FREE = Metric("millrace_data_dir_free_bytes", "gauge", "Free space where DATA_DIR lies.")
DISK_SIZE = Metric("millrace_data_dir_size_bytes", "gauge", "Size of the disk where DATA_DIR lies.")

METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class Table:
    """The counters and gauges of one worker, shared by its processes.

    Args:
        descriptor: Of the file; a process that is started hands it on, one that is forked has it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, _RECORDS * _RECORD)
        self.forked()

    @classmethod
    def create(cls) -> Table:
        """Return an empty table; its file has no name, so nothing is left of it when its processes are gone."""
        descriptor, path = tempfile.mkstemp(prefix="millrace-metrics-")
        os.unlink(path)  # noqa: PTH108  # mkstemp gives a str
        os.ftruncate(descriptor, _RECORDS * _RECORD)
        return cls(descriptor)

    def close(self) -> None:
        """Give the file back, for this process."""
        self._map.close()
        os.close(self.descriptor)

    def forked(self) -> None:
        """Begin as a process of its own: records of the parent are the parent's."""
        self._offsets: dict[str, int] = {}
        self._lock = threading.Lock()  # of a worker whose tasks are threads
        self._owner = (os.getpid(), os.getpgid(0))

    def add(self, amounts: Mapping[str, float]) -> None:
        """Add to series of counters."""
        with self._lock:
            for series, amount in amounts.items():
                offset = self._offsets.get(series)
                if offset is None and (offset := self._take(series)) is None:
                    continue
                _VALUE.pack_into(self._map, offset, _VALUE.unpack_from(self._map, offset)[0] + amount)

    def set(self, values: Mapping[str, float]) -> None:
        """Set series of gauges, for this process; over all processes they are summed."""
        with self._lock:
            for series, value in values.items():
                offset = self._offsets.get(series)
                if offset is not None or (offset := self._take(series)) is not None:
                    _VALUE.pack_into(self._map, offset, value)

    def read(self) -> dict[str, float]:
        """Return every series with its value."""
        values: dict[str, float] = {}
        for offset in range(0, len(self._map), _RECORD):
            series = self._series(offset)
            if not series:
                break
            if series.startswith(_GAUGES) and not _alive(self._map, offset):
                continue
            values[series] = values.get(series, 0.0) + _VALUE.unpack_from(self._map, offset)[0]
        return values

    def _series(self, offset: int) -> str:
        return self._map[offset + _SERIES : offset + _RECORD].rstrip(b"\0").decode(errors="replace")

    def _take(self, series: str) -> int | None:
        """Make a record of `series` ours and return its offset; None where that would take long."""
        for number in range(_LOCK_TRIES):
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                offset = self._locked_take(series)
            except OSError:
                if number < _LOCK_TRIES - 1:
                    time.sleep(_LOCK_PAUSE)
            else:
                if offset is not None:
                    self._offsets[series] = offset
                return offset
            finally:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self.descriptor, fcntl.LOCK_UN)
        return None

    def _locked_take(self, series: str) -> int | None:
        text = series.encode()
        free = None
        for offset in range(0, len(self._map), _RECORD):
            there = self._map[offset + _SERIES : offset + _RECORD].rstrip(b"\0")
            if not there:
                free = offset
                break
            if there == text and (self._owned(offset) or not _alive(self._map, offset)):
                if series.startswith(_GAUGES):
                    _VALUE.pack_into(self._map, offset, 0.0)
                _OWNER.pack_into(self._map, offset + 8, *self._owner)
                return offset
        crowded = free is None or free >= _ROOM * _RECORD or len(text) > _RECORD - _SERIES
        if crowded and (other := _MODEL.sub('model="other"', series)) != series:
            return self._locked_take(other)
        if free is None or len(text) > _RECORD - _SERIES:
            return None
        _OWNER.pack_into(self._map, free + 8, *self._owner)
        # The first byte last: whoever reads meanwhile sees no half of a name.
        self._map[free + _SERIES + 1 : free + _SERIES + len(text)] = text[1:]
        self._map[free + _SERIES] = text[0]
        return free

    def _owned(self, offset: int) -> bool:
        return bool(_OWNER.unpack_from(self._map, offset + 8) == self._owner)


_GAUGES = tuple(metric.name for metric in METRICS if metric.kind == "gauge")


def _alive(table: mmap.mmap, offset: int) -> bool:
    """Whether a record's owner lives; its process group tells it from another process with its number."""
    pid, group = _OWNER.unpack_from(table, offset + 8)
    try:
        return bool(os.getpgid(pid) == group) and processes.alive(pid)
    except (ProcessLookupError, PermissionError):
        return False


# This process's table. Outside of a worker there is none, and counting does nothing.

_table: Table | None = None


def use(table: Table | None) -> None:
    """Count in `table` from now on, in this process and those it forks."""
    global _table  # noqa: PLW0603  # what is counted anywhere in a process belongs to its worker
    _table = table


def _after_fork() -> None:
    if _table is not None:
        _table.forked()


os.register_at_fork(after_in_child=_after_fork)


def count(series: str, amount: float = 1.0) -> None:
    """Add to one series of a counter."""
    if _table is not None:
        _table.add({series: amount})


def show(values: Mapping[str, float]) -> None:
    """Set gauges of this process."""
    if _table is not None:
        _table.set(values)


def batch_answers(
    model: str, completed: int, failed: int, prompt_tokens: int, completion_tokens: int, errors: Iterable[str]
) -> None:
    """Count rows of a batch, and the codes of those that failed."""
    if _table is None:
        return
    amounts = {
        ROWS.series(model, "completed"): float(completed),
        ROWS.series(model, "failed"): float(failed),
        TOKENS.series(model, "prompt", "batch"): float(prompt_tokens),
        TOKENS.series(model, "completion", "batch"): float(completion_tokens),
    }
    for code in errors:
        series = ERRORS.series("batch", code)
        amounts[series] = amounts.get(series, 0.0) + 1
    _table.add(amounts)


def interactive_answer(model: str, seconds: float, prompt_tokens: int, completion_tokens: int, error: str = "") -> None:
    """Count an interactive task that has ended; `error` is the code of its failure."""
    amounts = {
        REQUESTS.series(model, "failed" if error else "completed"): 1.0,
        TOKENS.series(model, "prompt", "interactive"): float(prompt_tokens),
        TOKENS.series(model, "completion", "interactive"): float(completion_tokens),
        f"{SECONDS.name}_sum": seconds,
        f"{SECONDS.name}_count": 1.0,
        bucket(float("inf")): 1.0,
    }
    if error:
        amounts[ERRORS.series("interactive", error)] = 1.0
    amounts |= {bucket(bound): 1.0 for bound in BUCKETS if seconds <= bound}
    if _table is not None:
        _table.add(amounts)


def bucket(bound: float) -> str:
    """Return the series that counts interactive tasks of up to `bound` seconds."""
    return _series(f"{SECONDS.name}_bucket", ("le",), ("+Inf" if bound == float("inf") else f"{bound:g}",))


def zeros(models: Iterable[str]) -> dict[str, float]:
    """Return the series that are shown before anything happened, each with 0."""
    values = {metric.series(*labels): 0.0 for metric in METRICS for labels in metric.known}
    values |= {bucket(bound): 0.0 for bound in (*BUCKETS, float("inf"))}
    values |= {f"{SECONDS.name}_sum": 0.0, f"{SECONDS.name}_count": 0.0, LIMIT.name: 0.0}
    for model in models:
        values |= {metric.series(model, status): 0.0 for metric in (ROWS, REQUESTS) for status in STATUSES}
        values |= {TOKENS.series(model, which, kind): 0.0 for which in TOKEN_TYPES for kind in KINDS}
        values |= {INFLIGHT.series(kind, model): 0.0 for kind in KINDS}
    return values


def render(values: Mapping[str, float]) -> str:
    """Return series and their values in Prometheus's text format, version 0.0.4."""
    lines: list[str] = []
    for metric in METRICS:
        parts = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names = [metric.name + part for part in parts]
        found = [series for series in values if series.partition("{")[0] in names]
        if found:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
            lines += [f"{series} {values[series]:.17g}" for series in found]
    return "\n".join(lines) + "\n"
