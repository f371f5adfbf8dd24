"""Snapshots in vain: how long rounds go on before another one stops them."""

from __future__ import annotations

WASTED_SNAPSHOTS = 3  # in a row that brought nobody who contributes: the next one waits
WAIT_DOUBLINGS = 5


class Waste:
    """Owns how many snapshots brought nobody who then took part, in all and by worker id, and when
    the next one may begin. `timeout_s`: how long the first one has to wait."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self.in_a_row = 0
        self.by: dict[int, int] = {}
        self.next_at = now  # not before, as long as rounds can go on
        self._timeout_s = timeout_s

    def wasted(self, id: int, now: float) -> float | None:
        """Nobody who contributes came of one: after some of these in a row the next ones wait, so
        that who joins again and again, by whatever name, does not stop the training. How many
        seconds?"""
        self.in_a_row += 1
        self.by[id] = self.by.get(id, 0) + 1
        beyond = min(self.in_a_row - WASTED_SNAPSHOTS, WAIT_DOUBLINGS)
        if beyond <= 0:
            return None
        wait_s = self._timeout_s * 2.0 ** (beyond - 1)
        self.next_at = now + wait_s
        return wait_s

    def useful(self, id: int) -> None:
        """This worker contributes."""
        self.in_a_row = 0
        self.by.pop(id, None)
