"""Limits the number of sentences about one worker, so that no worker fills the log."""

from __future__ import annotations

AT_ONCE = 100
ANOTHER_AFTER_S = 30.0


class Sentences:
    """Allows `AT_ONCE` sentences about each worker, and one more every `ANOTHER_AFTER_S`. It counts
    the others, and reports their number when a sentence is allowed again. It keeps a few numbers
    for each worker id."""

    def __init__(self) -> None:
        self._told: dict[int, int] = {}
        self._left_out: dict[int, tuple[int, str]] = {}
        self._since: float | None = None

    def may(self, id: int, name: str) -> bool:
        """Is one more sentence about this worker allowed? If so, it is counted."""
        if self._told.get(id, 0) >= AT_ONCE:
            self._left_out[id] = (self._left_out.get(id, (0, ""))[0] + 1, name)
            return False
        self._told[id] = self._told.get(id, 0) + 1
        return True

    def left_out(self, now: float) -> list[str]:
        """Sentences with the number of those that were left out, when they are due."""
        if self._since is None:
            self._since = now
        if now - self._since < ANOTHER_AFTER_S:
            return []
        self._since = now
        self._told = {id: count - 1 for id, count in self._told.items() if count > 1}
        told = []
        for id, (count, name) in sorted(self._left_out.items()):
            told.append(f"{name}: {count} more lines about it are left out")
            self._told[id] = AT_ONCE
        self._left_out.clear()
        return told
