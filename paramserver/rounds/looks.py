"""Is the data set of one worker that of another? What a few of its samples look like tells.

Which one is right nobody can know: the first that was told is the run's.
"""

from __future__ import annotations

from collections.abc import Iterable

from paramserver.protocol.messages import Look
from paramserver.words import printable

TOLERANCE = 0.05  # of the root of the mean square


class Looks:
    """What the first worker told of its samples, to compare what others tell."""

    def __init__(self) -> None:
        self.whose = ""
        self.told: set[int] = set()  # workers whose other numbers were told
        self._first: dict[tuple[int, str], Look] = {}

    def first(self, whose: str, looks: Iterable[Look]) -> None:
        """From now on these are the run's, and nothing before."""
        self.whose = whose
        self._first = {(look.index, look.leaf): look for look in looks}

    def difference(self, looks: Iterable[Look]) -> tuple[Look, Look, bool] | None:
        """A sample that looks another way than the run's: its look, the run's, and whether it must
        be the same (labels, words), rather than nearly. None where there is none."""
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
    """In short, for people."""
    if look.exact:
        return printable(look.exact)
    return f"about {look.rough[0]:.4g} on average" if look.rough else "nothing"


def part(look: Look) -> str:
    """Where in the sample, if it has parts."""
    return f" (in {printable(look.leaf)})" if look.leaf else ""
