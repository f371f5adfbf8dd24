"""A server that was started again: whom it waits for before its run goes on.

The log lives in the replicas, and each tells the step it stands at. Before a server tells anybody
of a step it notes its name (lineage: a log that was lost may come to steps of the same number), so
whoever stands there has all there is. Where nobody does, those who have not told yet have their
time: a process of the run that beats but has not greeted computes still, and may hold what nobody
else does.
"""

from __future__ import annotations

from collections.abc import Collection

NOTHING, UNKNOWN = "-", "?"


class Comeback:
    """`noted` names the newest step that the killed server had noted: `NOTHING` where it had closed
    none, `UNKNOWN` where that is not known. `timeout_s`: how long the first sign of a process may
    take, and silence until it is given up. Nobody is waited for longer than `limit_s`; no more than
    `most` processes are remembered.

    That limit is long on purpose. A process computes its batch before it greets again, and a first
    batch compiles for minutes; it cannot show that it is not lying before it has greeted. Whoever
    beats with the run's name and never greets uses that limit up only where the noted step is not
    here: as soon as somebody stands there, nobody is waited for."""

    def __init__(
        self, noted: str, now: float, *, timeout_s: float, limit_s: float, most: int
    ) -> None:
        self.noted = noted
        self._began = now
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._most = most
        self._beating: dict[str, float] = {}  # process nonce -> last heard

    def beats(self, nonce: str, now: float) -> None:
        """A process of this run is alive, and has not greeted this server yet. Each beat of it is
        answered with Greet. Where too many are remembered, those that fell silent are forgotten."""
        if nonce not in self._beating and len(self._beating) >= self._most:
            heard = self._beating.items()
            self._beating = {n: at for n, at in heard if now - at <= self._timeout_s}
        if nonce in self._beating or len(self._beating) < self._most:
            self._beating[nonce] = now

    def greeted(self, nonce: str) -> None:
        """It is here."""
        self._beating.pop(nonce, None)

    def over(self, back: Collection[str], joining: bool, now: float) -> bool:
        """Is nobody awaited any more who may stand further than those who are `back`, by lineage?

        `joining`: somebody has greeted and not told yet where it stands.
        """
        if self.noted in back or (back and self.noted == NOTHING):
            return True
        waited = now - self._began
        alive = joining or any(now - heard <= self._timeout_s for heard in self._beating.values())
        return waited >= self._limit_s or (waited >= self._timeout_s and not alive)
