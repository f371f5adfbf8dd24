"""Are the replicas equal? Digests of their weights, at equal steps, among equal kinds.

Replicas of one kind round alike: same device, capabilities of the processor, and version of torch.
Replicas of two kinds may differ in the last bits, and are not compared.
"""

from __future__ import annotations

from collections.abc import Collection

KEPT = 4  # steps whose reports are not complete: a replica that is behind may still send its own


class Digests:
    """The digests that replicas reported, until they are compared."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, str], dict[int, str]] = {}  # by step and kind, then by id

    def report(
        self, step: int, kind: str, id: int, digest: str, expected: Collection[int]
    ) -> list[int]:
        """Note a report; returns the ids that are now found to differ, in order.

        `expected` are the ids that report this step: their digests are compared when all are here,
        or when reports of later steps need the room. The majority is right; of groups of equal size
        the one with the observer (its id is 0), else the one with the lowest id.
        """
        reports = self._reports.setdefault((step, kind), {})
        reports[id] = digest
        wrong: set[int] = set()
        if reports.keys() >= set(expected):
            del self._reports[step, kind]
            wrong |= _odd_ones_out(reports)
        if len(self._reports) > KEPT:
            wrong |= _odd_ones_out(self._reports.pop(min(self._reports)))
        return sorted(wrong)


def _odd_ones_out(reports: dict[int, str]) -> set[int]:
    by_digest: dict[str, list[int]] = {}
    for id, digest in reports.items():
        by_digest.setdefault(digest, []).append(id)
    right = max(by_digest.values(), key=lambda ids: (len(ids), -min(ids)))
    return reports.keys() - set(right)
