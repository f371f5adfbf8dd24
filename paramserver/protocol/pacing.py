"""How far a worker's pushes may run ahead of the averages.

An average needs the push of every worker. Where workers share a link, TCP divides it by chance: one
worker sends its whole gradient early, the averages wait for another worker's, and meanwhile the
other direction of the link is idle. So a worker keeps a few buckets under way, and sends the next
one when an average has come back: the workers that are behind get the link, and both directions are
busy.

The server does not enforce this. Where no average comes for a while (another worker still computes,
or is gone) the pacer lets everything go at once, so that the server sees which push is late. How
long that is depends on the link: one bucket of each worker may take seconds.

Pure: `now` comes in as an argument, and the pushes that may be sent come out.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

WINDOW = 4  # buckets under way
STALLED_S = 0.5  # without an average, at least
STALLED_MAX_S = 5.0
GAPS = 3  # times the longest wait for an average in the round before

T = TypeVar("T")


class Pacer(Generic[T]):
    """Holds back the pushes of one round, in their order."""

    def __init__(self, window: int = WINDOW, patience_s: float = STALLED_S) -> None:
        self.window = window
        self._patience_s = self._least_s = patience_s
        self._longest_s = 0.0  # between two averages of this round
        self._waiting: deque[tuple[int, T]] = deque()
        self._under_way: set[int] = set()
        self._moved_at = 0.0
        self._hurry = False

    def begin(self) -> list[T]:
        """A round is over: forget the pushes that still wait, and return them to be freed."""
        if self._longest_s:
            usual_s = min(GAPS * self._longest_s, STALLED_MAX_S)
            self._patience_s, self._longest_s = max(self._least_s, usual_s), 0.0
        forgotten = [push for _, push in self._waiting]
        self._waiting.clear()
        self._under_way.clear()
        self._hurry = False
        return forgotten

    def add(self, bucket: int, push: T, now: float) -> None:
        """Add a push that is complete."""
        if not self._under_way:
            self._moved_at = now
        self._waiting.append((bucket, push))

    def averaged(self, bucket: int, now: float) -> None:
        """Note that the average of a bucket has come."""
        if bucket in self._under_way:
            self._longest_s = max(self._longest_s, now - self._moved_at)
        self._under_way.discard(bucket)
        self._moved_at = now

    def hurry(self) -> None:
        """Nobody waits for these pushes to average them: let all of them go."""
        self._hurry = True

    def due(self, now: float) -> list[T]:
        """The pushes that may be sent now; from then on they count as under way."""
        if self._waiting and now - self._moved_at > self._patience_s:
            self._hurry = True
        found = []
        while self._waiting and (self._hurry or len(self._under_way) < self.window):
            bucket, push = self._waiting.popleft()
            self._under_way.add(bucket)
            found.append(push)
        return found
