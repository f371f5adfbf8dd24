"""A server that was started again: whom it waits for before its run goes on.

The log lives in the replicas. Each tells the step it stands at, and whose gradients are in the
update that led there: those may stand there, too. A process of the run that beats but has not
greeted yet computes still, and may hold what nobody else does.
"""

from __future__ import annotations

from collections.abc import Mapping

from paramserver.wire import Join


class Comeback:
    """`noted` is the newest step that the killed server had noted. `timeout_s`: how long the first
    sign of a process may take, and silence until it is given up. Nobody is waited for longer than
    `limit_s`; no more than `most` processes are remembered."""

    def __init__(
        self, noted: int, now: float, *, timeout_s: float, limit_s: float, most: int
    ) -> None:
        self._noted = noted
        self._began = now
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._most = most
        self._beating: dict[str, float] = {}  # process nonce -> last heard

    def beats(self, nonce: str, now: float) -> None:
        """A process of this run is alive, and has not greeted this server yet."""
        if nonce in self._beating or len(self._beating) < self._most:
            self._beating[nonce] = now

    def greeted(self, nonce: str) -> None:
        """It is here."""
        self._beating.pop(nonce, None)

    def over(self, back: Mapping[int, Join], joining: bool, now: float) -> bool:
        """Is nobody awaited any more who may hold a newer state than those who are `back`?

        That is so when all contributors of the newest update are back, and none newer is known of,
        or when all have had their time. `joining`: somebody has greeted and not told yet where it
        stands.
        """
        waited = now - self._began
        newest = max(back.values(), key=lambda join: join.step, default=None)
        if newest is not None and newest.step >= self._noted:
            awaited = set(newest.contributors)
            if awaited and back.keys() >= awaited:
                return True
        alive = joining or any(now - heard <= self._timeout_s for heard in self._beating.values())
        return waited >= self._limit_s or (waited >= self._timeout_s and not alive)
