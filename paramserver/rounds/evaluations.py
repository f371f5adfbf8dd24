"""Workers that evaluate, and for whom the others wait meanwhile.

A worker whose gradients are in the log may say that it evaluates. Until it says that it is done, no
round opens and the open one waits for it, without a deadline: this time counts nowhere. It is
bounded. Between two of its gradients in the log the run waits for a worker no longer than
`EVALUATION_SHARE` of the idle timeout; after that it waits as for any other.
"""

from __future__ import annotations

from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Peer
from paramserver.rounds.round import Round
from paramserver.rounds.rules import Rules

EVALUATION_SHARE = 0.5


class Evaluations:
    """Owns who evaluates, and since when somebody does."""

    def __init__(self, rules: Rules, out: Outcome) -> None:
        self.active: dict[str, Peer] = {}  # by session
        self._limit_s = EVALUATION_SHARE * rules.idle_timeout
        self._since = 0.0  # somebody evaluates
        self._out = out

    def begins(self, peer: Peer, now: float) -> None:
        """This worker evaluates from now on. One that nothing in the log is of, or that has used up
        its time, is not waited for."""
        if peer.session in self.active or not peer.proven or peer.evaluated_s >= self._limit_s:
            return
        if not self.active:
            self._since = now
        peer.evaluates_since = now
        self.active[peer.session] = peer

    def ends(self, peer: Peer, current: Round | None, now: float) -> bool:
        """It is done, or gone. Did it evaluate?"""
        if self.active.pop(peer.session, None) is None:
            return False
        peer.evaluated_s += self._taken_s(peer, now)
        peer.evaluates_since = None
        if not self.active and current is not None:
            current.paused(self._since, now)
        return True

    def overdue(self, now: float) -> list[Peer]:
        """Those whose time is used up: nobody waits for them any more."""
        found = [
            p
            for p in self.active.values()
            if p.evaluated_s + self._taken_s(p, now) >= self._limit_s
        ]
        for peer in found:
            self._out.warn(
                f"{peer.name} has evaluated for {self._limit_s:.0f} s: the others go on", peer
            )
        return found

    def _taken_s(self, peer: Peer, now: float) -> float:
        """Seconds that it has evaluated by now."""
        return 0.0 if peer.evaluates_since is None else now - peer.evaluates_since

    def hold(self, current: Round | None) -> bool:
        """Does the open round wait for somebody who evaluates?"""
        if not self.active or current is None:
            return False
        return any(m.session in self.active for m in current.expected())

    def sentence(self) -> str:
        """Who evaluates; empty where nobody does."""
        names = ", ".join(p.name for p in self.active.values())
        does = "evaluates" if len(self.active) == 1 else "evaluate"
        return f"{names} {does}, the others wait" if names else ""
