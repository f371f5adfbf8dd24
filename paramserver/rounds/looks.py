"""What the server knows of the run's data set, and how it compares those of the workers by a few
samples. It cannot know which one is right: before the first round that of most workers is the
run's, and a server that is started again is told which one it was (`DataSet`).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from paramserver.protocol.messages import Look
from paramserver.words import printable

TOLERANCE = 0.05  # of the root of the mean square


class DataSet(msgspec.Struct, frozen=True):
    """What all workers' data sets have in common beside their length, see `Ready`. It is in no
    state of a replica: the server notes it for the one that follows it."""

    whose: str
    """Who told it, for people."""
    weighs: bool
    draws: str
    looks: tuple[Look, ...]


class Looks:
    """One worker's report of its samples, for comparison with the others'."""

    def __init__(self) -> None:
        self.whose = ""
        self.told: set[int] = set()  # workers whose differing numbers were logged
        self._first: dict[tuple[int, str], Look] = {}

    def first(self, whose: str, looks: Iterable[Look]) -> None:
        """Take these as the run's from now on, instead of any before."""
        self.whose = whose
        self._first = {(look.index, look.leaf): look for look in looks}

    def difference(self, looks: Iterable[Look]) -> tuple[Look, Look, bool] | None:
        """The first difference to the run's samples: this look, the run's, and whether they must be
        equal (labels, words) rather than similar. None where there is none."""
        rough: tuple[Look, Look, bool] | None = None
        for look in looks:
            ours = self._first.get((look.index, look.leaf))
            if ours is None:
                continue
            if look.exact != ours.exact:
                return look, ours, True
            if rough is None and not _alike(look.rough, ours.rough):
                rough = look, ours, False
        return rough


def _alike(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    if len(a) != len(b):
        return False
    scale = max(map(abs, (*a[1:2], *b[1:2])), default=0.0)
    return all(abs(x - y) <= TOLERANCE * scale for x, y in zip(a, b, strict=True))


def shown(look: Look) -> str:
    """A look in short, for people."""
    if look.exact:
        return printable(look.exact)
    return f"about {look.rough[0]:.4g} on average" if look.rough else "nothing"


def part(look: Look) -> str:
    """The part of the sample, if it has parts."""
    return f" (in {printable(look.leaf)})" if look.leaf else ""
