"""The origin: whose state the run begins with, or goes on with after the server was restarted.

The first state is the observer's where there is one, else that of whoever joined first. Until an
update follows it, it may be lost with all who hold it; then there is another. A server that was
started again in the middle of a run waits for its replicas instead, see `recovery`: the most
advanced one is the origin.
"""

from __future__ import annotations

from collections.abc import Callable

from paramserver.protocol.messages import Join, Layout, Reject
from paramserver.rounds.recovery import Recovery
from paramserver.rounds.roster import Peer, Roster
from paramserver.rounds.rules import Rules
from paramserver.rounds.states import GREETED, WAITING


class Origin:
    """Owns what the origin brought: the `layout` of what is exchanged, the number of its `buckets`
    (by `count_buckets`), and the `recipe` from an average to weights. Others must have the same.

    With `noted` the server waits for those who hold the run's state: it is the newest step that
    anybody may hold. `deserted`: the wait is over, and nobody came back.
    """

    def __init__(
        self,
        rules: Rules,
        now: float,
        count_buckets: Callable[[Layout], int],
        noted: str | None,
    ) -> None:
        self.layout: Layout | None = None
        self.buckets = 0
        self.recipe = ""
        self.deserted = False
        self._with_observer = rules.observer
        self._count_buckets = count_buckets
        self._recovery: Recovery | None = None
        if noted is not None:
            self._recovery = Recovery(
                noted,
                now,
                timeout_s=rules.heartbeat_timeout,
                limit_s=rules.idle_timeout,
                most=rules.max_workers + 1,
            )

    # ------------------------------------------------------------------ after a restart

    def alive(self, nonce: str, now: float) -> None:
        """Note that a process of this run beats, but has not greeted this server."""
        if self._recovery is not None:
            self._recovery.beats(nonce, now)

    def greeted(self, nonce: str) -> None:
        """Note that this process has greeted."""
        if self._recovery is not None:
            self._recovery.greeted(nonce)

    def awaits(self, now: float) -> bool:
        """After a restart: may a process of this run be there that has not greeted yet?"""
        return self._recovery is not None and self._recovery.awaits(now)

    def returned(self, roster: Roster, now: float) -> Peer | None:
        """Who has the newest state, when all who may hold it are back; None until then, and where
        nobody is waited for."""
        if self._recovery is None:
            return None
        back = {
            p.id: (p, p.join) for p in roster.in_state(WAITING) if p.returns and p.join is not None
        }
        joining = any(p.returns for p in roster.in_state(GREETED))
        if not self._recovery.over({join.lineage for _, join in back.values()}, joining, now):
            return None
        if not back:
            self.deserted = True
            return None
        noted = self._recovery.noted
        newest = max(back, key=lambda id: (back[id][1].lineage == noted, back[id][1].step, -id))
        return back[newest][0]

    # ------------------------------------------------------------------ the first state

    def candidates(self, roster: Roster) -> list[Peer]:
        """Whose state may be the first, in this order."""
        return [
            p for p in roster.in_state(WAITING) if p.role == "observer" or not self._with_observer
        ]

    def refuses(self, join: Join) -> Reject | None:
        """Why no run can begin with this state; None where one can."""
        problem = join.layout.problem()
        if problem is not None:
            return Reject(f"the model cannot be trained: {problem}")
        if join.step < 0:
            return Reject(f"there is no step {join.step} to begin at")
        return None

    def becomes(self, join: Join) -> None:
        """The run begins, or goes on, with this state."""
        self.layout, self.buckets = join.layout, self._count_buckets(join.layout)
        self.recipe = join.recipe

    def differs(self, peer: Peer) -> Reject | None:
        """Why this peer cannot follow the run, since it has another model or another way from an
        average to weights; None where it can."""
        assert self.layout is not None and peer.join is not None
        difference = self.layout.difference(peer.join.layout)
        if difference is not None:
            return Reject(
                f"{peer.name} has another model: {difference}",
                "start it with the same model and code as the server",
            )
        if peer.join.recipe != self.recipe:
            return Reject(
                f"{peer.name} goes another way from gradient to weights: {peer.join.recipe}; "
                f"the run has {self.recipe}",
                "give attach() the same optimizer, schedule, clip_norm and before_step "
                "everywhere (and observer=false where the built-in observer has others)",
            )
        return None
