"""Are the replicas equal? Digests of their weights, at equal steps, among equal kinds.

Replicas of one kind round alike: same device, capabilities of the processor, and version of torch.
Replicas of two kinds may differ in the last bits, and are not compared.
"""

from __future__ import annotations

from collections.abc import Collection

from paramserver.protocol.messages import Digest
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Peer, Roster

SNAPSHOTS_FOR_WRONG = 3  # that a replica takes because its weights are not those of the others
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


class Divergence:
    """Finds the replicas whose weights are not those of the others. It counts only what a peer
    reports that is believed (`Peer.believed`), of steps since it became a replica."""

    def __init__(self, roster: Roster, out: Outcome) -> None:
        self.digests = Digests()
        self._roster = roster
        self._out = out

    def told(self, peer: Peer, message: Digest, newest: int) -> list[Peer]:
        """A replica reports its digest, of a step up to the `newest`. Returns the replicas that
        need a snapshot, since most others of their kind have other weights. One that is found wrong
        again and again would take snapshots for ever, perhaps because another one lies: it gets no
        more of them."""
        assert peer.join is not None
        step, kind = message.step, peer.join.kind
        if not peer.has_shown or not peer.replica_since < step <= newest:
            return []
        alike = {
            p.id: p
            for p in self._roster.peers.values()
            if p.believed and p.join and p.join.kind == kind and p.replica_since < step
        }
        need = []
        for id in self.digests.report(step, kind, peer.id, message.digest, alike):
            wrong = alike.get(id)
            if wrong is None:
                continue
            wrong.found_wrong += 1
            if wrong.found_wrong <= SNAPSHOTS_FOR_WRONG:
                need.append(wrong)
            elif wrong.found_wrong == SNAPSHOTS_FOR_WRONG + 1:
                others = ", ".join(p.name for p in alike.values() if p is not wrong)
                self._out.warn(
                    f"{wrong.name} and {others} have other weights again, after "
                    f"{SNAPSHOTS_FOR_WRONG} snapshots: one of them is broken; stop that one"
                )
        return need


def _odd_ones_out(reports: dict[int, str]) -> set[int]:
    by_digest: dict[str, list[int]] = {}
    for id, digest in reports.items():
        by_digest.setdefault(digest, []).append(id)
    right = max(by_digest.values(), key=lambda ids: (len(ids), -min(ids)))
    return reports.keys() - set(right)
