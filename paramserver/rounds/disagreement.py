"""Names the worker whose gradients are not like those of the others, round after round.

Where averages are robust (`aggregate`), what a broken machine sends does not spoil the run, so that
nobody would notice it. The server compares the pushes of each round while it averages them
(`Comparison`); here follows what that says about a worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

import msgspec

from paramserver.typed import typed

KEPT = 10  # rounds that are looked at
NAMED = 9  # of these: who disagrees in so many is named
AGAIN = 5  # of these: who disagrees in no more may be named again
CHECK = f"Its memory, or its data? {typed('doctor')} checks both on that machine"


class Comparison(msgspec.Struct, frozen=True):
    """One worker's gradient of a round, compared with the others'."""

    cut: float
    """The share of it that the rule does not let through, 0 to 1: of its numbers, those that are
    the lowest or the highest of all; where gradients are clipped, what is cut off its length."""
    agrees: float
    """The scalar product of its gradient with the average: below 0 it points the other way. On a
    sample of the numbers, so only the sign means something."""
    same: bool = False
    """Is it, on that sample, the one that it sent in the round before?"""


class Disagreement:
    """For each worker, whether its gradient disagreed, in the newest rounds."""

    def __init__(self) -> None:
        self._newest: dict[int, deque[bool]] = {}
        self._named: set[int] = set()

    def note(self, compared: Mapping[int, Comparison]) -> list[int]:
        """Note a round; returns the workers that are to be named now.

        A gradient disagrees if much more of it is cut than of the others', if it does not point
        their way; or if it is the one of the round before. Where half of the gradients or more do
        the one or the other, none of them is the odd one.
        """
        odd = _unless_most({w for w in compared if _is_odd(w, compared)}, len(compared))
        odd |= _unless_most({w for w, c in compared.items() if c.same}, len(compared))
        found = []
        for worker in compared:
            newest = self._newest.setdefault(worker, deque(maxlen=KEPT))
            newest.append(worker in odd)
            count = sum(newest)
            if count <= AGAIN:
                self._named.discard(worker)
            if len(newest) == KEPT and count >= NAMED and worker not in self._named:
                self._named.add(worker)
                found.append(worker)
        return found

    def how_often(self, worker: int) -> str:
        """In how many of the newest rounds it disagreed, as words."""
        newest = self._newest.get(worker, ())
        return f"{sum(newest)} of {len(newest)} rounds"

    def trouble(self, worker: int) -> str:
        """A named worker's trouble, as words; empty for the others."""
        return f"disagrees in {self.how_often(worker)}" if worker in self._named else ""


def _is_odd(worker: int, compared: Mapping[int, Comparison]) -> bool:
    others = [c.cut for w, c in compared.items() if w != worker]
    if not others:
        return False
    own, usual = compared[worker], median(others)
    return own.cut > (1.0 + usual) / 2 or own.agrees <= 0.0


def _unless_most(odd: set[int], workers: int) -> set[int]:
    """These of so many, or none where they are half of them or more."""
    return set() if 2 * len(odd) >= workers > 2 or len(odd) == workers else odd
