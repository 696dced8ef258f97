"""Suspects: rows that were in flight when a worker or the engine died, and how the guilty one is found.

A runner keeps a journal beside each segment, `segments/<shard>.<epoch>.flight`, of which rows are in flight now:

    header   magic · epoch and stage
    slot     row + 1 · what it is doing, and its level · lone deaths · check         8 bytes, 0 when it is free

It is a mapped file, so noting a row is a store into memory and no system call (0.4 µs a row), and the
kernel keeps what a killed process had stored. It is never synced: after a power cut nobody is suspected.
The next owner of the shard reads it. Rows in flight without an answer are **suspects**.

Suspects are tried again in groups of half of those that died together, with nothing else in flight (see
`millrace.batch.turns`), so that of 64 rows one guilty row is alone after six deaths and 64 innocent ones take
two rounds. Only a death of a row that ran alone counts, a **lone death**; LONE_DEATHS of them end the row.

The owner of a journal holds a lock on it. A journal whose owner lives, stopped or slow, accuses nobody.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from millrace.batch.folder import BatchFolder, storage_errors

log = logging.getLogger(__name__)

#: Deaths of a row that ran alone after which it ends in the errors file.
LONE_DEATHS = 3
#: Workers that may die one after the other before the shard's first row is asked.
MOST_PREPARATIONS = 10

_MAGIC = int.from_bytes(b"MILLFLY1", "little")
_HEADER = 2  # words of 8 bytes
_MIX = 0x9E3779B97F4A7C15  # spreads the bits of a slot over its check
_MOST_DEATHS = 15  # that fit in a slot, of each kind
_MOST_LEVEL = 31


class Doing(IntEnum):
    """What a row in a journal is doing."""

    #: In flight among all others.
    IN_FLIGHT = 1
    #: A suspect that waits for its turn.
    WAITING = 2
    #: A suspect in flight among suspects alone.
    TESTED = 3
    #: A suspect in flight, and nothing else.
    ALONE = 4


_KNOWN = frozenset(int(doing) for doing in Doing)


@dataclass(frozen=True, slots=True)
class Deaths:
    """What died how often while a row ran alone."""

    engine: int = 0
    worker: int = 0

    @property
    def total(self) -> int:
        """Deaths of both kinds."""
        return self.engine + self.worker

    @property
    def what(self) -> str:
        """What died, in words."""
        if self.engine and self.worker:
            return "the engine or the worker process"
        return "the engine" if self.engine else "the worker process"


@dataclass(eq=False, slots=True)
class Suspect:
    """A row that was in flight at a death. It is tried again in a group of up to 2 ** level; None: not known yet."""

    row: int
    line: bytes
    #: Its place in the journal of the shard's present owner.
    slot: int
    deaths: Deaths = field(default_factory=Deaths)
    level: int | None = None

    @property
    def guilty(self) -> bool:
        """Whether it is not to be asked again."""
        return self.deaths.total >= LONE_DEATHS


def level_of(dead: int) -> int:
    """Return the level of each of `dead` rows that died together: the largest power of two below their number."""
    return min(_MOST_LEVEL, max(0, (dead - 1).bit_length() - 1))


def set_levels(suspects: Collection[Suspect]) -> None:
    """Give suspects that have no level theirs: they died together."""
    fresh = [suspect for suspect in suspects if suspect.level is None]
    for suspect in fresh:
        suspect.level = level_of(len(fresh))


def next_group(suspects: Collection[Suspect], most: int) -> list[Suspect]:
    """Return the suspects to try next, together: up to `most`, the smallest groups first."""
    set_levels(suspects)
    level = min(suspect.level or 0 for suspect in suspects)
    return [suspect for suspect in suspects if suspect.level == level][: min(most, 2**level)]


class Flight:
    """The journal of one owner of a shard.

    Args:
        path: Where; what an earlier owner of the same epoch left there (before a restore) is replaced.
        epoch: Of the owner.
        rows: Of the shard; so many may be in it.

    Raises:
        StorageError: The file cannot be made, or the disk is full.
    """

    def __init__(self, path: Path, epoch: int, rows: int) -> None:
        self.path = path
        size = 8 * (_HEADER + rows)
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                _hold(self._descriptor)
                # Written and not just made so long: a store into a hole of a full disk would kill the process.
                view = memoryview(bytes(size))
                while view:
                    view = view[os.write(self._descriptor, view) :]
                self._map = mmap.mmap(self._descriptor, size)
            except BaseException:
                os.close(self._descriptor)
                path.unlink(missing_ok=True)
                raise
        self._words = memoryview(self._map).cast("Q")
        self._free = list(range(size // 8 - 1, _HEADER - 1, -1))
        self._words[1] = epoch << 1
        self._words[0] = _MAGIC

    def prepared(self) -> None:
        """Note that rows may be asked from now on; until then, a death is one of the preparation."""
        self._words[1] |= 1

    def start(self, row: int) -> int:
        """Note that a row is in flight, among others; return its slot."""
        slot = self._free.pop()
        low = (row + 1) | (Doing.IN_FLIGHT << 32)
        self._words[slot] = low | ((low * _MIX >> 48 & 0xFFFF) << 48)
        return slot

    def mark(self, suspect: Suspect, doing: Doing) -> None:
        """Note what a suspect is doing."""
        deaths, level = suspect.deaths, suspect.level if suspect.level is not None else _MOST_LEVEL
        low = (suspect.row + 1) | (doing | level << 3) << 32
        low |= (min(deaths.engine, _MOST_DEATHS) | min(deaths.worker, _MOST_DEATHS) << 4) << 40
        self._words[suspect.slot] = low | ((low * _MIX >> 48 & 0xFFFF) << 48)

    def end(self, slot: int) -> None:
        """Note that the row of a slot is not in flight, and no suspect."""
        self._words[slot] = 0
        self._free.append(slot)

    def close(self, *, keep: bool = False) -> None:
        """End the journal; `keep` it for the shard's next owner where suspects are left in it."""
        self._words.release()
        if not keep:
            self._map[:8] = bytes(8)  # should the file stay, it accuses nobody
        self._map.close()
        if not keep:
            _remove(self.path)
        os.close(self._descriptor)


@dataclass
class Accused:
    """What the journals of earlier owners say: rows with their lone deaths and level, and deaths before any row."""

    rows: dict[int, tuple[Deaths, int]] = field(default_factory=dict)
    preparations: int = 0


def read_flights(folder: BatchFolder, shard: int, epoch: int) -> Accused:
    """Read the journals of a shard's owners before `epoch`. What makes no sense in them accuses nobody."""
    accused = Accused()
    for older in range(1, epoch):
        path = folder.flight(shard, older)
        try:
            with path.open("rb") as file:
                lives = not _hold(file.fileno())
                raw = file.read()
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("%s cannot be read, so nobody is suspected by it: %s.", path, error.strerror or error)
            continue
        _read(raw, older, lives, accused)
    return accused


def discard_flights(folder: BatchFolder, shard: int, epoch: int) -> None:
    """Remove the journals of a shard's owners before `epoch`; a new one has what they say."""
    for older in range(1, epoch):
        with storage_errors(folder.segments):
            folder.flight(shard, older).unlink(missing_ok=True)


def discard_all_flights(folder: BatchFolder) -> None:
    """Remove the journals of a batch whose shards have all ended: owners that were killed leave theirs."""
    for path in folder.segments.glob("*.flight"):
        _remove(path)


def _read(raw: bytes, epoch: int, lives: bool, accused: Accused) -> None:
    words = [word for (word,) in struct.iter_unpack("=Q", raw[: len(raw) // 8 * 8])]
    if len(words) < _HEADER or words[0] != _MAGIC or words[1] >> 1 != epoch:
        return
    if not words[1] & 1:
        accused.preparations += not lives
        return
    slots = list(_slots(words[_HEADER:]))
    together = {doing: sum(slot[1] is doing for slot in slots) for doing in Doing}
    for row, doing, level, deaths in slots:
        if not lives:
            if doing is Doing.ALONE:
                deaths = Deaths(deaths.engine, deaths.worker + 1)  # noqa: PLW2901
            if doing is not Doing.WAITING:
                level = level_of(together[doing])  # noqa: PLW2901
        elif doing is Doing.IN_FLIGHT:
            continue
        before = accused.rows.get(row)
        if before is None or before[0].total <= deaths.total:
            accused.rows[row] = (deaths, level)


def _slots(words: list[int]) -> Iterator[tuple[int, Doing, int, Deaths]]:
    for word in words:
        low = word & 0xFFFF_FFFF_FFFF
        doing, deaths = word >> 32 & 7, word >> 40 & 0xFF
        if low and word >> 48 == low * _MIX >> 48 & 0xFFFF and doing in _KNOWN:
            yield (low & 0xFFFF_FFFF) - 1, Doing(doing), word >> 35 & 31, Deaths(deaths & 15, deaths >> 4)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed, and goes with its batch: %s.", path, error.strerror or error)


def _hold(descriptor: int) -> bool:
    """Whether the lock on a journal is ours now; where files have no locks, it is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("No lock on a journal: %s.", error)
    return True
