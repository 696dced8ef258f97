"""The flight journal, the groups of suspects, and the turns at the engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.batch.folder import BatchFolder
from millrace.batch.suspects import (
    LONE_DEATHS,
    Accused,
    Deaths,
    Doing,
    Flight,
    Suspect,
    discard_flights,
    level_of,
    next_group,
    read_flights,
)
from millrace.batch.turns import Turn
from millrace.errors import StorageError

ROWS = 100
UNSEEN = Deaths()


@pytest.fixture
def folder(tmp_path: Path) -> BatchFolder:
    found = BatchFolder(tmp_path / "batch")
    found.segments.mkdir(parents=True)
    return found


def killed(folder: BatchFolder, epoch: int, act: Callable[[Flight], object]) -> None:
    """Have another process own a journal, and kill it in the middle."""
    child = os.fork()
    if not child:
        try:
            act(Flight(folder.flight(0, epoch), epoch, ROWS))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def asked(*rows: int) -> Callable[[Flight], object]:
    def act(flight: Flight) -> None:
        flight.prepared()
        for row in rows:
            flight.start(row)

    return act


def suspected(doing: Doing, *rows: int, deaths: Deaths = UNSEEN, level: int | None = 3) -> Callable[[Flight], object]:
    def act(flight: Flight) -> None:
        flight.prepared()
        for row in rows:
            flight.mark(Suspect(row, b"", flight.start(row), deaths, level), doing)

    return act


# The journal


def test_rows_in_flight_at_a_kill_are_suspects_and_no_others(folder: BatchFolder) -> None:
    def act(flight: Flight) -> None:
        flight.prepared()
        slots = [flight.start(row) for row in (0, 7, 8, 99)]
        flight.end(slots[1])
        flight.end(flight.start(50))

    killed(folder, 1, act)
    assert read_flights(folder, 0, 2) == Accused({0: (Deaths(), 1), 8: (Deaths(), 1), 99: (Deaths(), 1)}, 0)
    assert read_flights(folder, 1, 2) == Accused()
    discard_flights(folder, 0, 2)
    assert list(folder.segments.iterdir()) == []


def test_only_a_row_alone_is_charged_with_the_workers_death(folder: BatchFolder) -> None:
    seen = Deaths(engine=1, worker=1)
    killed(folder, 1, suspected(Doing.ALONE, 5, deaths=seen, level=0))
    assert read_flights(folder, 0, 2).rows == {5: (Deaths(1, 2), 0)}
    killed(folder, 1, suspected(Doing.TESTED, 5, 6, 7, 8, deaths=seen))
    assert read_flights(folder, 0, 2).rows == dict.fromkeys((5, 6, 7, 8), (seen, 1))
    killed(folder, 1, suspected(Doing.WAITING, 5, deaths=seen))
    assert read_flights(folder, 0, 2).rows == {5: (seen, 3)}


def test_what_was_seen_adds_up_over_owners(folder: BatchFolder) -> None:
    """The newest journal has what the ones before it said; one that was not removed in time says no more."""
    killed(folder, 1, asked(1, 2, 3))
    killed(folder, 2, suspected(Doing.ALONE, 2, deaths=Deaths(worker=1), level=0))
    killed(folder, 3, lambda flight: None)
    found = read_flights(folder, 0, 4)
    assert found.rows == {1: (Deaths(), 1), 2: (Deaths(worker=2), 0), 3: (Deaths(), 1)}
    assert found.preparations == 1


def test_a_journal_whose_owner_lives_accuses_nobody(folder: BatchFolder) -> None:
    flight = Flight(folder.flight(0, 1), 1, ROWS)
    assert read_flights(folder, 0, 2) == Accused()
    asked(3, 4)(flight)
    assert read_flights(folder, 0, 2) == Accused()
    # …and takes nothing back from what it had heard itself.
    suspected(Doing.ALONE, 9, deaths=Deaths(worker=1), level=0)(flight)
    assert read_flights(folder, 0, 2).rows == {9: (Deaths(worker=1), 0)}
    discard_flights(folder, 0, 2)
    flight.start(5)  # it goes on, in a file that has no name any more
    flight.close()
    assert read_flights(folder, 0, 2) == Accused()


def test_a_journal_stays_only_for_suspects(folder: BatchFolder) -> None:
    flight = Flight(folder.flight(0, 1), 1, ROWS)
    suspected(Doing.WAITING, 4)(flight)
    flight.close(keep=True)
    assert read_flights(folder, 0, 2).rows == {4: (Deaths(), 3)}
    Flight(folder.flight(0, 1), 1, ROWS).close()
    assert list(folder.segments.iterdir()) == []


def test_a_full_journal_has_room_for_every_row_of_the_shard(folder: BatchFolder) -> None:
    flight = Flight(folder.flight(0, 1), 1, ROWS)
    for _ in range(3):
        for slot in [flight.start(row) for row in range(ROWS)]:
            flight.end(slot)
    flight.close()


def test_a_journal_of_a_batch_that_is_not_here_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Flight(BatchFolder(tmp_path / "elsewhere").flight(0, 1), 1, ROWS)
    assert not (tmp_path / "elsewhere").exists()


@given(
    st.one_of(st.binary(max_size=200), st.integers(0, 120), st.tuples(st.integers(0, 8 * 12 - 1), st.integers(0, 7)))
)
def test_a_damaged_journal_condemns_nobody(folder: BatchFolder, damage: bytes | int | tuple[int, int]) -> None:
    path = folder.flight(0, 1)
    flight = Flight(path, 1, 10)
    suspected(Doing.WAITING, 1, 2, 3, deaths=Deaths(engine=1))(flight)
    flight.close(keep=True)
    raw = bytearray(path.read_bytes())
    match damage:
        case bytes():
            raw = bytearray(damage)
        case int():
            raw = raw[:damage]
        case (at, bit):
            raw[at] ^= 1 << bit
    path.write_bytes(raw)
    found = read_flights(folder, 0, 2)
    assert set(found.rows) <= {1, 2, 3}
    assert all(deaths == Deaths(engine=1) for deaths, _ in found.rows.values())


# Groups


@given(st.integers(1, 300), st.data())
def test_a_guilty_row_is_found_among_many_and_nobody_else_is(count: int, data: st.DataObject) -> None:
    guilty = data.draw(st.none() | st.integers(0, count - 1))
    suspects = [Suspect(row, b"", row) for row in range(count)]
    groups = died = 0
    while suspects:
        group = next_group(suspects, 64)
        assert len(group) <= 64
        groups += 1
        if guilty is not None and any(suspect.row == guilty for suspect in group):
            died += 1
            for suspect in group:
                suspect.level = None
            if len(group) == 1:
                (alone,) = group
                alone.level, alone.deaths = 0, Deaths(engine=alone.deaths.engine + 1)
            if not suspects[0].guilty and not any(suspect.guilty for suspect in suspects):
                continue
            group = [suspect for suspect in suspects if suspect.guilty]
            assert [suspect.row for suspect in group] == [guilty]
        suspects = [suspect for suspect in suspects if suspect not in group]
    if guilty is None:
        assert groups <= 2 + count // 32
    else:
        assert LONE_DEATHS <= died <= LONE_DEATHS + (min(count, 64) - 1).bit_length()


def test_half_of_those_that_died_together_are_tried_next() -> None:
    assert [2 ** level_of(dead) for dead in (1, 2, 3, 4, 5, 8, 9, 64, 65)] == [1, 1, 2, 2, 4, 4, 8, 32, 64]


# Turns


def test_who_waits_for_the_engine_gets_it_alone_and_lets_nobody_new_in(tmp_path: Path) -> None:
    one, two, three = (Turn(tmp_path) for _ in range(3))
    assert one.join()
    assert two.join()
    assert not one.wanted()
    three_has = three.take()
    assert not three_has
    assert one.wanted()
    assert two.wanted()
    one.leave()
    assert not one.join()
    assert not three.take()
    two.leave()
    assert three.take()
    assert not one.join()
    assert not one.take()
    three.leave()
    assert one.join()
    for turn in (one, two, three):
        turn.close()


def test_a_turn_ends_with_its_process(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        turn = Turn(tmp_path)
        os._exit(0 if turn.take() else 1)
    assert os.waitpid(child, 0)[1] == 0
    turn = Turn(tmp_path)
    assert turn.join()
    turn.close()


def test_who_gives_no_sign_of_life_keeps_nobody_away(tmp_path: Path) -> None:
    stopped, other = Turn(tmp_path), Turn(tmp_path)
    assert stopped.take()
    assert not other.join()
    long_ago = time.time() - 100
    os.utime(tmp_path / "run" / "turnstile.lock", (long_ago, long_ago))
    assert other.join()
    assert not other.wanted()
    stopped.live()
    assert other.wanted()
    stopped.close()
    other.close()
