"""Which parts are killed when: a schedule that a seed decides, by the rows answered and not by the clock."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What is killed (SIGKILL, always)."""

    #: A process that runs tasks; Celery starts another one.
    CHILD = "worker child"
    #: A Celery process; its child goes with it, and the worker starts both again.
    MAIN = "worker main"
    #: Both at the same moment.
    BOTH = "worker main and child"
    #: `millrace worker` alone, as by a person who is tired of it: what it started ends by itself.
    PARENT = "worker parent"
    #: All of its processes at once, as by the end of a container.
    WORKER = "whole worker"
    REDIS = "Redis"
    ENGINE = "engine"


#: Drawn without putting back, so that ten kills have nearly all of them.
_BAG = (
    *(Part.CHILD,) * 3,
    *(Part.MAIN,) * 2,
    *(Part.ENGINE,) * 2,
    Part.BOTH,
    Part.WORKER,
    Part.PARENT,
    Part.REDIS,
    Part.REDIS,
)

#: The share of rows before the first kill and after the last one.
_EDGE = 0.05
_LONGEST_OUTAGE = 2.0  # seconds


@dataclass(frozen=True)
class Kill:
    """One kill of a schedule."""

    #: It happens once so many rows have been answered.
    at: int
    part: Part
    #: Which of several processes: a number from 0 to 1.
    which: float
    #: Seconds until Redis or the engine is started again.
    outage: float


def schedule(kills: int, seed: int, rows: int) -> list[Kill]:
    """Return the kills of a seed, in their order."""
    chance = random.Random(seed)
    first, last = int(rows * _EDGE), int(rows * (1 - 2 * _EDGE))
    moments = sorted(chance.randint(first, last) for _ in range(kills))
    bag: list[Part] = []
    planned = []
    for at in moments:
        if not bag:
            bag = list(_BAG)
            chance.shuffle(bag)
        planned.append(Kill(at, bag.pop(), chance.random(), chance.uniform(0.2, _LONGEST_OUTAGE)))
    return planned
