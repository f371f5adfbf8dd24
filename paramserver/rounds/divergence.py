"""Are the replicas equal? Digests of their weights, at equal steps, among equal kinds.

Replicas of one kind round alike: same device, capabilities of the processor, and version of torch.
Replicas of two kinds may differ in the last bits, and are not compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import UNSET

from paramserver.protocol.messages import Digest
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Peer, Roster
from paramserver.words import printable

SNAPSHOTS_FOR_WRONG = 3  # that a replica takes because its weights are not those of the others
WEIGHTS, BUFFERS = "weights", "buffers"  # of the parts of a state; the others are groups' values
Parts = Mapping[str, str]
KEPT = 4  # steps whose reports are not complete: a replica that is behind may still send its own


class Digests:
    """The digests that replicas reported, until they are compared."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, str], dict[int, str]] = {}  # by step and kind, then by id
        self._parts: dict[tuple[int, str], dict[int, Parts]] = {}
        self.causes: dict[int, str] = {}
        """The likely cause, of those that were found to differ last."""

    def report(
        self,
        step: int,
        kind: str,
        id: int,
        digest: str,
        expected: Collection[int],
        parts: Parts | None = None,
    ) -> list[int]:
        """Note a report; returns the ids that are now found to differ, in order.

        `expected` are the ids that report this step: their digests are compared when all are here,
        or when reports of later steps need the room. The majority is right; of groups of equal size
        the one with the observer (its id is 0), else the one with the lowest id.
        """
        reports = self._reports.setdefault((step, kind), {})
        reports[id] = digest
        self._parts.setdefault((step, kind), {})[id] = parts or {}
        self.causes = {}
        wrong: set[int] = set()
        if reports.keys() >= set(expected):
            wrong |= self._judge((step, kind))
        if len(self._reports) > KEPT:
            wrong |= self._judge(min(self._reports))
        return sorted(wrong)

    def _judge(self, of: tuple[int, str]) -> set[int]:
        reports, parts = self._reports.pop(of), self._parts.pop(of)
        wrong = _odd_ones_out(reports)
        right = min(reports.keys() - wrong)
        self.causes |= {id: cause(parts[id], parts[right]) for id in wrong}
        return wrong


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
        parts = None if message.parts is UNSET else message.parts
        for id in self.digests.report(step, kind, peer.id, message.digest, alike, parts):
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

    def cause(self, peer: Peer) -> str:
        """Why the weights of this peer, which was found to differ last, may have come to differ; as
        words in parentheses, or nothing."""
        why = self.digests.causes.get(peer.id, "")
        return f" ({why})" if why else ""


def cause(wrong: Parts, right: Parts) -> str:
    """The likely cause of a difference, by the digests of the parts of two states; empty where they
    tell nothing."""
    differ = {name for name in wrong.keys() & right.keys() if wrong[name] != right[name]}
    values = sorted(differ - {WEIGHTS, BUFFERS})
    if values:
        names = printable(", ".join(values[:4]))
        return f"its optimizer has another {names}: a loop should set that from cluster.step"
    if differ == {BUFFERS}:
        return "its buffers alone differ: they are written outside of forward, perhaps"
    if WEIGHTS in differ:
        return (
            "its optimizer's values are the same: something in the step is random or differs from "
            "worker to worker, in before_step or after_step perhaps, or a loop writes to weights"
        )
    return ""


def _odd_ones_out(reports: dict[int, str]) -> set[int]:
    by_digest: dict[str, list[int]] = {}
    for id, digest in reports.items():
        by_digest.setdefault(digest, []).append(id)
    right = max(by_digest.values(), key=lambda ids: (len(ids), -min(ids)))
    return reports.keys() - set(right)
