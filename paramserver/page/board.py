"""What the page's process knows, for the threads that serve its viewers.

Nothing is queued for a viewer: each one remembers what it has, and takes what is newest when it is
ready. So a slow viewer misses states, and costs no memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from paramserver.output.curves import Curves, Tail, follow
from paramserver.status.chrome import Recorder
from paramserver.status.value import Status, to_json

VIEWERS = 24
_encode = msgspec.json.Encoder().encode


@dataclass
class Seen:
    """What a viewer has: the number of the state, and its places in the curves."""

    state: int = 0
    changed: int = -1
    pieces: int = -1
    """Of metrics.jsonl."""
    bins: int = 0
    evaluations: int = 0


class Board:
    """The newest state and the curves of one run; all methods may be called by any thread."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._status, self._state = b"", 0
        self._finished = False
        self._recorder = Recorder()
        self._pieces = 0
        self._curves = Curves()
        self._viewers = 0
        self._end: bytes | None = None

    # ------------------------------------------------------------------ what comes in

    def show(self, status: Status) -> None:
        """The newest state."""
        text = to_json(status)
        with self._news:
            if self._finished:
                return
            self._recorder.add(status)
            self._status = text
            self._state += 1
            self._news.notify_all()

    def finish(self, status: Status) -> None:
        """The last state: nothing comes after it."""
        self.show(status)
        self._finished = True

    def read(self, tail: Tail) -> bool:
        """Take in the next piece of metrics.jsonl; is there more?"""
        with self._news:
            more = follow(self._curves, tail)
            if more:
                self._pieces += 1
                self._news.notify_all()
            return more

    def close(self, why: str) -> None:
        """The server is gone: let the viewers know, and end their streams."""
        with self._news:
            self._end = _encode({"text": why})
            self._news.notify_all()

    # ------------------------------------------------------------------ who looks

    @contextmanager
    def viewer(self) -> Iterator[bool]:
        """One more viewer, for the block; False where there are too many."""
        with self._news:
            room = self._viewers < VIEWERS
            self._viewers += room
            self._news.notify_all()
        try:
            yield room
        finally:
            if room:
                with self._news:
                    self._viewers -= 1
                    self._news.notify_all()

    def somebody_looks(self, limit_s: float) -> bool:
        """Is there a viewer, or will there be one in this time?"""
        with self._news:
            return self._news.wait_for(lambda: self._viewers > 0 or self.closed, limit_s)

    def everybody_left(self, limit_s: float) -> bool:
        with self._news:
            return self._news.wait_for(lambda: self._viewers == 0, limit_s)

    @property
    def closed(self) -> bool:
        return self._end is not None

    # ------------------------------------------------------------------ what goes out

    def curves(self) -> dict[str, Any]:
        """All there is."""
        with self._news:
            return self._curves.part()

    def trace(self) -> dict[str, Any]:
        """The last minute, as far as it was seen, as a Chrome trace."""
        with self._news:
            return self._recorder.trace()

    def next(self, seen: Seen, limit_s: float) -> list[tuple[str, bytes]]:
        """The newest (kind, JSON) that this viewer has not seen, and note that it has; empty where
        nothing comes in time. The last one is of the kind "end"."""
        with self._news:
            self._news.wait_for(
                lambda: seen.state != self._state or seen.pieces != self._pieces or self.closed,
                limit_s,
            )
            found: list[tuple[str, bytes]] = []
            if seen.pieces != self._pieces:
                found.append(("curves", _encode(self._part(seen))))
                seen.pieces = self._pieces
            if seen.state != self._state:
                found.append(("status", self._status))
                seen.state = self._state
            if self._end is not None:
                found.append(("end", self._end))
            return found

    def _part(self, seen: Seen) -> dict[str, Any]:
        curves = self._curves
        if seen.changed != curves.changed:
            seen.bins = seen.evaluations = 0
        part = curves.part(seen.bins, seen.evaluations)
        seen.changed = curves.changed
        seen.bins = max(0, len(curves.bins) - 1)  # the last one may still grow
        seen.evaluations = max(0, len(curves.evaluations) - 1)
        return part
