"""Which replicas a server waits for that was started again in the middle of a run.

The log lives in the replicas, and each one reports the step at which it stands. A server notes the
lineage of a step before it publishes the step, so a replica at the noted lineage holds the whole
log. (It notes the lineage and not the number, because a log that was lost may come to the same
number again.) Where no replica stands there, the server waits for the others: a process of the run
that beats but has not greeted still computes, and may be the only one that holds the newest step.
"""

from __future__ import annotations

from collections.abc import Collection

NOTHING, UNKNOWN = "-", "?"


class Recovery:
    """`noted` names the newest step that the killed server had noted: `NOTHING` where it had closed
    none, `UNKNOWN` where that is not known. `timeout_s` limits the time until the first sign of a
    process, and its silence after that. No process is waited for longer than `limit_s`; at most
    `most` processes are remembered.

    `limit_s` is long on purpose. A process computes its batch before it greets again, and a first
    batch compiles for minutes; before it has greeted it cannot prove that it belongs to the run. A
    stranger that beats with the run's name and never greets can use up the limit, but only while no
    replica stands at the noted step: as soon as one does, the wait is over."""

    def __init__(
        self, noted: str, now: float, *, timeout_s: float, limit_s: float, most: int
    ) -> None:
        self.noted = noted
        self._began = now
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._most = most
        self._beating: dict[str, float] = {}  # process nonce -> time of its last beat

    def beats(self, nonce: str, now: float) -> None:
        """A process of this run is alive, and has not greeted this server yet; the server answers
        each of its beats with Greet. Where `most` are remembered, silent ones are forgotten."""
        if nonce not in self._beating and len(self._beating) >= self._most:
            heard = self._beating.items()
            self._beating = {n: at for n, at in heard if now - at <= self._timeout_s}
        if nonce in self._beating or len(self._beating) < self._most:
            self._beating[nonce] = now

    def greeted(self, nonce: str) -> None:
        """This process has greeted: do not wait for it any more."""
        self._beating.pop(nonce, None)

    def stood_still(self, seconds: float) -> None:
        """Do not count the seconds in which the server heard nobody."""
        self._began += seconds
        self._beating = {nonce: at + seconds for nonce, at in self._beating.items()}

    def over(self, back: Collection[str], joining: bool, now: float) -> bool:
        """Is the wait over for replicas that may be ahead of those at the lineages `back`?

        `joining`: a peer has greeted and not reported yet where it stands.
        """
        if self.noted in back or (back and self.noted == NOTHING):
            return True
        return now - self._began >= self._limit_s or not (joining or self.awaits(now))

    def awaits(self, now: float) -> bool:
        """May a process of this run be there that has not greeted yet?"""
        if now - self._began < self._timeout_s:
            return True
        return any(now - heard <= self._timeout_s for heard in self._beating.values())
