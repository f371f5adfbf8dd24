"""The newest state of the log of updates, and the states from which a replica can follow."""

from __future__ import annotations

import msgspec

from paramserver.protocol.messages import Close, next_lineage


class Log:
    """Owns the name of the newest state (`step`, `lineage`) and the names of the states whose next
    updates the server still keeps. `begun`: an update follows the first state."""

    def __init__(self) -> None:
        self.step = 0
        self.lineage = ""
        self.begun = False
        self.lineages: dict[int, str] = {}  # by step

    def begin(self, step: int, lineage: str) -> None:
        """Begin at the origin's state."""
        self.step, self.lineage = step, lineage
        self.lineages = {step: lineage}

    def append(self, close: Close) -> Close:
        """Add the close of the next step, and return it with its lineage."""
        self.step, self.begun = close.step, True
        self.lineage = self.lineages[self.step] = next_lineage(self.lineage, close)
        return msgspec.structs.replace(close, lineage=self.lineage)

    def knows(self, step: int, lineage: str) -> bool:
        """Can a replica at (step, lineage) follow from there by fetching updates?"""
        return self.lineages.get(step) == lineage

    def forget_before(self, step: int) -> None:
        """Forget the states before `step`: the server no longer keeps their next updates."""
        while self.lineages and (oldest := next(iter(self.lineages))) < step:
            del self.lineages[oldest]
