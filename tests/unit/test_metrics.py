"""The table that processes count in, and the page it becomes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from millrace import metrics
from millrace.metrics import ERRORS, INFLIGHT, ROWS, TOKENS, Table
from tests.metrics import values
from tests.services import ROOT, until

A = ROWS.series("a", "completed")


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table.create()
    metrics.use(made)
    yield made
    metrics.use(None)
    made.close()


def forked(work: Callable[[], object], *, then_wait: bool = False) -> int:
    """Run `work` in a child of its own; return its pid once the work is done."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            work()
            os.write(writer, b"x")
            if then_wait:
                signal.pause()
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    if not then_wait:
        os.waitpid(pid, 0)
    return pid


def used(table: Table) -> int:
    """Return how many records are taken."""
    return sum(table._map[offset + 16] != 0 for offset in range(0, len(table._map), 256))


def test_what_processes_count_adds_up(table: Table) -> None:
    metrics.batch_answers("a", 2, 0, 10, 20, [])
    for _ in range(3):
        forked(lambda: metrics.batch_answers("a", 1, 1, 5, 7, ["engine_timeout"]))
    found = table.read()
    assert found[A] == 5
    assert found[ROWS.series("a", "failed")] == 3
    assert found[TOKENS.series("a", "prompt", "batch")] == 25
    assert found[TOKENS.series("a", "completion", "batch")] == 41
    assert found[ERRORS.series("batch", "engine_timeout")] == 3


def test_a_killed_process_loses_nothing_and_its_records_are_used_again(table: Table) -> None:
    for number in range(20):
        pid = forked(lambda: metrics.count(A), then_wait=True)
        assert table.read()[A] == number + 1
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert table.read()[A] == number + 1
    assert used(table) == 1


def test_gauges_are_those_of_living_processes(table: Table) -> None:
    series = INFLIGHT.series("batch", "a")
    metrics.show({series: 3})
    pid = forked(lambda: metrics.show({series: 4}), then_wait=True)
    assert table.read()[series] == 7
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert table.read()[series] == 3  # though nobody has asked for its exit code
    os.waitpid(pid, 0)
    assert table.read()[series] == 3
    # Its record is taken over, and its value is not.
    other = INFLIGHT.series("batch", "b")
    pid = forked(lambda: (metrics.count(A), metrics.show({series: 0.0, other: 1.0})), then_wait=True)
    assert table.read()[series] == 3
    assert used(table) == 4
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_process_with_the_number_of_one_that_is_gone_is_another(table: Table) -> None:
    """A number comes back, in another group: a gauge of the old one is not the new one's."""
    series = INFLIGHT.series("batch", "a")

    def leave() -> None:
        os.setsid()
        table.forked()
        metrics.show({series: 9})

    pid = forked(leave, then_wait=True)
    assert table.read()[series] == 9
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    metrics._OWNER.pack_into(table._map, 8, os.getpid(), pid)  # our number, its group
    assert series not in table.read()


def test_processes_that_take_records_at_once(table: Table) -> None:
    """Each of them gets its own; none is lost."""
    children = []
    for _ in range(8):
        if (pid := os.fork()) == 0:
            try:
                for number in range(40):
                    until(lambda number=number: _counted(table, f"m{number}"), "a record")
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    found = table.read()
    assert {series: value for series, value in found.items() if value != 8} == {}
    assert len(found) == 40


def _counted(table: Table, model: str) -> bool:
    series = ROWS.series(model, "completed")
    metrics.count(series)
    return series in table._offsets


def test_more_models_than_there_is_room_for_are_others(table: Table) -> None:
    for number in range(500):
        metrics.batch_answers(f"model-{number}", 1, 0, 1, 1, [])
    found = table.read()
    assert sum(value for series, value in found.items() if series.startswith(ROWS.name)) == 500
    assert found[ROWS.series("other", "completed")] > 100
    assert len(found) < 1600


def test_a_model_whose_name_is_too_long_is_another(table: Table) -> None:
    metrics.count(ROWS.series("m" * 300, "completed"))
    assert table.read() == {ROWS.series("other", "completed"): 1.0}


def test_outside_of_a_worker_nothing_is_counted() -> None:
    metrics.count(A)
    metrics.show({INFLIGHT.series("batch", "a"): 1.0})
    metrics.batch_answers("a", 1, 0, 1, 1, [])
    metrics.interactive_answer("a", 1.0, 1, 1)


def test_durations_are_counted_in_every_bucket_they_fit(table: Table) -> None:
    for seconds in (0.2, 3.0, 1000.0):
        metrics.interactive_answer("a", seconds, 1, 2)
    found = metrics.zeros([]) | table.read()
    counts = [found[metrics.bucket(bound)] for bound in (0.1, 0.25, 2.5, 5.0, 300.0, float("inf"))]
    assert counts == [0, 1, 1, 2, 2, 3]
    assert found["millrace_interactive_request_seconds_count"] == 3
    assert found["millrace_interactive_request_seconds_sum"] == pytest.approx(1003.2)


def test_the_page(table: Table) -> None:
    odd = 'a "b"\\\nc\0'
    metrics.batch_answers(odd, 1, 0, 0, 0, [])
    text = metrics.render(metrics.zeros(["m"]) | table.read())
    assert 'millrace_batch_requests_total{model="a \\"b\\"\\\\\\nc",status="completed"} 1\n' in text
    assert 'millrace_errors_total{kind="batch",code="context_length_exceeded"} 0\n' in text
    assert 'millrace_batch_requests_total{model="m",status="failed"} 0\n' in text
    assert text.count("# TYPE millrace_batch_requests_total counter\n") == 1
    assert len(values(text)) == len(metrics.zeros(["m"])) + 4
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "check", "metrics"], input=text.encode(), capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_names_and_labels() -> None:
    for metric in metrics.METRICS:
        assert metric.name.startswith("millrace_") and metric.help.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not {"batch", "batch_id", "request", "request_id", "custom_id"} & set(metric.labels)


def test_each_is_described() -> None:
    described = (ROOT / "docs" / "monitoring.md").read_text()
    for metric in metrics.METRICS:
        assert f"`{metric.name}`" in described
