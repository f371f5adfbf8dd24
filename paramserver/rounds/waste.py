"""How long rounds go on before the next snapshot, after snapshots that brought no contributor."""

from __future__ import annotations

WASTED_SNAPSHOTS = 3  # in a row that brought nobody who contributes: the next one waits
WAIT_DOUBLINGS = 5


class Waste:
    """Owns the count of snapshots in a row whose joiners contributed nothing, in all and by worker
    id, and the time at which the next one may begin (`next_at`), or, while no round comes to
    anything, `next_in_vain_at`. `timeout_s`: the shortest wait."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self.in_a_row = 0
        self.by: dict[int, int] = {}
        self.next_at = self.next_in_vain_at = now  # not before, as long as rounds can go on
        self._timeout_s = timeout_s

    def wasted(self, id: int, now: float) -> float | None:
        """Count a snapshot whose joiner contributed nothing. After some of these in a row the next
        one waits, so that a worker that joins again and again, under any id, does not stop the
        training: returns for how many seconds, None where it need not wait."""
        self.in_a_row += 1
        self.by[id] = self.by.get(id, 0) + 1
        beyond = min(self.in_a_row - WASTED_SNAPSHOTS, WAIT_DOUBLINGS)
        if beyond <= 0:
            return None
        wait_s = self._timeout_s * 2.0 ** (beyond - 1)
        self.next_at, self.next_in_vain_at = now + wait_s, now + self._timeout_s
        return wait_s

    def useful(self, id: int) -> None:
        """Note that this worker contributes after its snapshot."""
        self.in_a_row = 0
        self.by.pop(id, None)
