"""How far a worker's pushes may run ahead of the averages.

An average needs everybody's push of its bucket. Where workers share a link, TCP gives each what it
can get: one sends its whole gradient early, and the averages wait for another's, while nothing
comes down. So a worker has a few buckets under way, and sends the next one when an average has come
back: those who are behind get the link, and both directions are busy.

This is manners, not a rule. Where no average comes for a while (somebody else computes, or is gone)
everything is sent at once, so that the server sees what is late and what is not.

No socket and no clock in here: `now` comes in, and what may be sent comes out.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

WINDOW = 4  # buckets under way
STALLED_S = 0.5  # without an average

T = TypeVar("T")


class Pace(Generic[T]):
    """The pushes of one round that wait to be sent, in their order."""

    def __init__(self, window: int = WINDOW, patience_s: float = STALLED_S) -> None:
        self._window = window
        self._patience_s = patience_s
        self._waiting: deque[tuple[int, T]] = deque()
        self._under_way: set[int] = set()
        self._moved_at = 0.0
        self._hurry = False

    def begin(self) -> list[T]:
        """A round is over; what still waits is forgotten, and comes back to be freed."""
        forgotten = [push for _, push in self._waiting]
        self._waiting.clear()
        self._under_way.clear()
        self._hurry = False
        return forgotten

    def add(self, bucket: int, push: T, now: float) -> None:
        """A push that is complete."""
        if not self._under_way:
            self._moved_at = now
        self._waiting.append((bucket, push))

    def averaged(self, bucket: int, now: float) -> None:
        """The average of a bucket has come."""
        self._under_way.discard(bucket)
        self._moved_at = now

    def due(self, now: float) -> list[T]:
        """The pushes that may be sent now; they are under way then."""
        if self._waiting and now - self._moved_at > self._patience_s:
            self._hurry = True
        found = []
        while self._waiting and (self._hurry or len(self._under_way) < self._window):
            bucket, push = self._waiting.popleft()
            self._under_way.add(bucket)
            found.append(push)
        return found
