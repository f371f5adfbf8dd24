"""Problems that did not end the run, as sentences for summary.json."""

from __future__ import annotations

KEPT = 50
CHARS = 1000


class Problems:
    """The first sentences of a run, each once, and the number of further ones."""

    def __init__(self) -> None:
        self._told: dict[str, None] = {}
        self._more = 0

    def note(self, text: str) -> bool:
        """Keep a sentence; False where it is known already."""
        text = text[:CHARS]
        if text in self._told:
            return False
        if len(self._told) < KEPT:
            self._told[text] = None
        else:
            self._more += 1
        return True

    def all(self) -> list[str]:
        """The sentences in their order."""
        more = [f"and {self._more} more: the server's output has them"] if self._more else []
        return [*self._told, *more]
