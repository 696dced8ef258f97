"""A batch while its parts are killed: what was done to it, how long it took to go on, and what it came to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from millrace.batch.folder import BatchFolder
from millrace.batch.ledger import Ledger
from millrace.batch.schema import ShardState, Status, shards
from millrace.batch.verify import verify
from millrace.errors import Unreachable
from millrace.processes import alive
from millrace.selftest import oracle
from millrace.selftest.kills import Kill, Part
from millrace.selftest.parts import LEASE, Project, Worker, kill

LOOK = 0.05  # seconds between looks at the batch
STUCK = 120.0  # seconds without an answer after which nobody needs to wait any longer

_OF_WORKERS = frozenset({Part.CHILD, Part.MAIN, Part.BOTH, Part.WORKER, Part.PARENT})


@dataclass
class Blow:
    """A kill that was done."""

    number: int
    part: Part
    #: Rows answered by then, requests in flight, and seconds since the batch began.
    rows: int
    in_flight: int
    seconds: float
    pids: list[int]


@dataclass
class Outcome:
    """What a run came to; `ok` is the verdict."""

    seed: int
    batch_id: str
    rows: int
    kills: int
    seconds: float
    status: str
    verdict: oracle.Verdict
    #: What `millrace batch verify` finds.
    findings: list[str]
    #: The longest times from the death of a worker (the return of Redis, of the engine) to the next answer of
    #: what it held, seconds.
    recovery: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost or doubled, and nothing run again without a cause."""
        return self.status == Status.COMPLETED and self.verdict.ok and not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"ok": self.ok, **asdict(self), "verdict": self.verdict.as_dict()}


class _Progress:
    """Follows the engine's request log: which rows are answered, and how many requests are in flight."""

    def __init__(self, project: Project) -> None:
        self._path = project.log
        self._offset = 0
        self._running: set[int] = set()
        self._answered: set[str] = set()
        #: Answers over all, and when the last one was seen.
        self.answers = 0
        self.at = time.monotonic()

    @property
    def rows(self) -> int:
        return len(self._answered)

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def look(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for event in map(oracle.decode_event, whole.splitlines()):
            if event.event == "start":
                if event.n == 1:
                    self._running.clear()
                self._running.add(event.n)
                continue
            self._running.discard(event.n)
            if event.status == 200:
                self._answered.add(event.sha256)
                self.answers += 1
                self.at = event.t


@dataclass
class _Waiting:
    """Something that is to go on: a shard of a killed worker, or all of a part that came back."""

    what: str
    since: float
    back: Callable[[], bool]


class Run:
    """Runs a batch of a started project to its end, with the kills of a schedule.

    Args:
        project: With Redis, engine and one worker running.
        batch_id: A batch that was just submitted.
        told: Told of each kill.
    """

    def __init__(self, project: Project, batch_id: str, told: Callable[[Blow], None] = lambda blow: None) -> None:
        self._project = project
        self._batch_id = batch_id
        self._told = told
        self._progress = _Progress(project)
        self._waiting: list[_Waiting] = []
        self._started = time.monotonic()
        self._restarts: list[tuple[float, Part]] = []
        self.recovery: dict[str, float] = {}
        self.blows: list[Blow] = []
        #: When each kill was done, on the monotonic clock.
        self.moments: list[float] = []

    def until_end(self, planned: list[Kill]) -> str:
        """Do the kills, wait for the end of the batch, and return its status.

        Raises:
            Unreachable: Nothing is answered any more (stuck).
        """
        left = list(planned)
        with self._project.ledger() as ledger:
            while (batch := ledger.batch(self._batch_id)["millrace"])["ended"] is None:
                self._progress.look()
                self._restart()
                self._note_recoveries()
                if left and self._progress.rows >= left[0].at and not self._in_the_way(left[0].part):
                    self._do(left.pop(0), ledger)
                elif time.monotonic() - max(self._progress.at, *self.moments, self._started) > STUCK:
                    raise Unreachable(
                        f"Nothing was answered for {STUCK:g} s, {self._progress.rows} rows were before.",
                        "Run it again with --keep to look at its logs.",
                        code="stuck",
                    )
                time.sleep(LOOK)
            self._note_recoveries(ended=True)
        return str(batch["status"])

    def _in_the_way(self, part: Part) -> bool:
        """Return whether a part that is away must be back first: itself, or the Redis that a worker starts with."""
        away = {one for _, one in self._restarts}
        return part in away or (part in (Part.WORKER, Part.PARENT) and Part.REDIS in away)

    def _do(self, planned: Kill, ledger: Ledger) -> None:
        worker = self._project.workers[-1]
        before = self._progress.in_flight
        pids: list[int] = []
        if planned.part is Part.REDIS:
            self._project.kill_redis()
        elif planned.part is Part.ENGINE:
            self._project.kill_engine()
        else:
            pids = self._kill_worker(planned, worker, ledger)
        now = time.monotonic()
        self.moments.append(now)
        for one in self._waiting:  # counted from the last thing that died
            one.since = now
        if planned.part not in _OF_WORKERS:
            self._restarts.append((now + planned.outage, planned.part))
        seconds = now - self._started
        blow = Blow(len(self.blows) + 1, planned.part, self._progress.rows, before, seconds, pids)
        self.blows.append(blow)
        self._told(blow)

    def _kill_worker(self, planned: Kill, worker: Worker, ledger: Ledger) -> list[int]:
        """Kill what is planned of a worker; return the pids of those that were to run tasks and are gone."""
        mains, pool = worker.mains(), worker.pool()
        # Those that run batches, twice: what they hold is what must not be lost.
        mains += [main for main in mains if "batch" in main.command.split("--queues ")[-1].split()[0]]
        held: list[int] = []
        if planned.part in (Part.WORKER, Part.PARENT) or not mains:
            held = [child.pid for child in pool] if planned.part is Part.WORKER else []
            self._expect(held, ledger)
            if planned.part is Part.PARENT:
                worker.kill_parent()
            else:
                worker.kill()
            self._project.start_worker()
            return [worker.process.pid]
        main = mains[int(planned.which * len(mains))]
        children = [child.pid for child in pool if child.parent == main.pid]
        self._expect(children, ledger)
        victims = children if planned.part is Part.CHILD else [main.pid]
        if planned.part is Part.BOTH:
            victims = [main.pid, *children]
        for pid in victims:
            kill(pid)
        if planned.part is Part.MAIN:
            # Its child works on until the worker has seen to it: only then is it dead.
            deadline = time.monotonic() + LEASE
            while any(map(alive, children)) and time.monotonic() < deadline:
                time.sleep(LOOK / 5)
        return victims

    def _expect(self, pids: list[int], ledger: Ledger) -> None:
        """Note the shards that these processes hold: from now on they wait for another owner."""
        folder, now = BatchFolder.of(self._project.data_dir, self._batch_id), time.monotonic()
        with ledger.read() as connection:
            rows = connection.execute(sa.select(shards).where(shards.c.state == ShardState.LEASED)).all()
        for row in rows:
            if any(str(row.owner).endswith(f":{pid}") for pid in pids):

                def back(number: int = row.number, epoch: int = row.epoch) -> bool:
                    newest = folder.newest_epochs().get(number, 0)
                    return newest > epoch and folder.segment(number, newest).stat().st_size > 0

                self._waiting.append(_Waiting("worker", now, back))

    def _restart(self) -> None:
        for due in [one for one in self._restarts if one[0] <= time.monotonic()]:
            self._restarts.remove(due)
            if due[1] is Part.REDIS:
                self._project.start_redis()
            else:
                self._project.start_engine()
            what = "Redis" if due[1] is Part.REDIS else "engine"
            self._waiting.append(_Waiting(what, time.monotonic(), self._answers_after(self._progress.answers)))

    def _answers_after(self, before: int) -> Callable[[], bool]:
        return lambda: self._progress.answers > before

    def _note_recoveries(self, *, ended: bool = False) -> None:
        for one in list(self._waiting):
            if ended or one.back():
                self._waiting.remove(one)
                # At the end of a batch whatever had all of its answers before has nothing to wait for.
                if not ended:
                    took = time.monotonic() - one.since
                    self.recovery[one.what] = round(max(self.recovery.get(one.what, 0.0), took), 2)

    def outcome(self, seed: int, source: Path, status: str) -> Outcome:
        """Return what the run came to: the oracle's verdict on the files, and that of `verify`."""
        folder = BatchFolder.of(self._project.data_dir, self._batch_id)
        with self._project.ledger() as ledger:
            batch = ledger.batch(self._batch_id)
            ended = status in (Status.COMPLETED, Status.CANCELLED, Status.EXPIRED)
            findings = verify(ledger, self._project.data_dir, self._batch_id).findings if ended else []
        verdict = oracle.judge(
            source,
            folder.output,
            folder.errors,
            self._project.log,
            kills=self.moments,
            counts=batch["request_counts"],
        )
        seconds = round(time.monotonic() - self._started, 1)
        blows = len(self.blows)
        return Outcome(seed, self._batch_id, verdict.rows, blows, seconds, status, verdict, findings, self.recovery)
