"""The newest updates of the log, for replicas that fell behind."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

Frames = list[Any]
"""A message as it is sent: its header, then its buffers."""

FETCH_BYTES = 4 * 2**20
"""Bytes in the answer to one `Fetch`, at most; a larger update is sent alone."""


class Update(msgspec.Struct):
    """One update of the log as it is sent: its averages, then its close."""

    step: int
    messages: list[Frames]
    bytes: int
    stamp: int
    """The stamp of its first block in the ring, if it has one."""


class History:
    """The newest updates, at least one, at most `limit` bytes; an answer has at most `answer`."""

    def __init__(self, limit: int, answer: int = FETCH_BYTES) -> None:
        self._limit = limit
        self._answer = answer
        self._updates: deque[Update] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._updates)

    def add(self, update: Update) -> None:
        self._updates.append(update)
        self._bytes += update.bytes
        while self._bytes > self._limit and len(self._updates) > 1:
            self._bytes -= self._updates.popleft().bytes

    def forget_before(self, stamp: int) -> None:
        """Forget updates whose blocks in the ring, with a lower stamp, were written over."""
        while self._updates and self._updates[0].stamp < stamp:
            self._bytes -= self._updates.popleft().bytes

    @property
    def reaches_back_to(self) -> int | None:
        """The step from which a replica can follow; None while there is no update."""
        return self._updates[0].step - 1 if self._updates else None

    def after(self, step: int) -> list[Update]:
        """The updates after `step`, up to the size of one answer."""
        chosen: list[Update] = []
        size = 0
        for update in self._updates:
            if update.step > step:
                if chosen and size + update.bytes > self._answer:
                    break
                chosen.append(update)
                size += update.bytes
        return chosen
