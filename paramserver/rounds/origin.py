"""The origin: whose state the run begins with, or goes on with after the server was restarted.

The first state is the observer's where there is one, else that of the worker whose script says so,
at once; else that of the lowest worker that is here when `num_workers` have joined, or
`join_timeout` after the first has. In a run that follows another of the same server those come
first who were in that: a script may go on with what it has trained, and a worker that was started
again meanwhile has fresh weights. Of unlike models the one that most have is right. Until an
update follows it, the first state may be lost with all who hold it; then there is another. A server
that was started again in the middle of a run waits for its replicas instead, see `recovery`: the
most advanced one is the origin.
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
        self.name = ""
        """Who gave the first state."""
        self.was_waited_for = False
        """Fewer than `num_workers` had joined when their time was over."""
        self._rules = rules
        self._first: int | None = None  # the worker whose script says that its state is the first
        self._lost = False  # that worker has left before an update
        self._joined_at: float | None = None  # somebody waits for an origin since then
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

    def stood_still(self, seconds: float) -> None:
        """Do not count the seconds in which the server heard nobody."""
        if self._recovery is not None:
            self._recovery.stood_still(seconds)
        if self._joined_at is not None:
            self._joined_at += seconds

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

    def due_at(self, roster: Roster) -> float | None:
        """When the first state is chosen, if nobody else joins before; None while nobody waits."""
        if self._joined_at is None or not roster.in_state(WAITING):
            return None
        return self._joined_at + self._rules.join_timeout

    def candidates(self, roster: Roster, now: float) -> list[Peer]:
        """Whose state may be the first, in this order; none where others are still waited for."""
        waiting = roster.in_state(WAITING)
        if self._with_observer:
            return [p for p in waiting if p.role == "observer"]
        workers = sorted(
            (p for p in waiting if p.role == "worker"), key=lambda p: (not p.trained, p.id)
        )
        if not workers:
            self._joined_at = None
            return []
        if self._joined_at is None:
            self._joined_at = now
        says_so = [p for p in workers if p.join is not None and p.join.first]
        enough = len(workers) >= self._rules.num_workers
        if self.layout is not None:  # all who held the first state are gone
            if self._first is None:
                enough = True  # nobody new is waited for
            elif not self._lost:  # the one that was to give it has some time to come back
                self._lost, self._joined_at = True, now
            enough = enough and self._first is None
        if not (says_so or enough or now >= self._joined_at + self._rules.join_timeout):
            return []
        self.was_waited_for = not (says_so or enough)
        return [*says_so, *_most_alike(workers)]

    def refuses(self, join: Join) -> Reject | None:
        """Why no run can begin with this state; None where one can."""
        problem = join.layout.problem()
        if problem is not None:
            return Reject(f"the model cannot be trained: {problem}")
        if join.layout.pairs and self._rules.local_steps != 1:
            return Reject(
                "several models with optimizers of their own cannot make local steps",
                "start the server with local_steps=1",
            )
        if join.layout.pairs and self._rules.max_staleness:
            return Reject(
                "late work of several models with optimizers of their own cannot be carried over: "
                "a lease is for several of their steps",
                "start the server with max_staleness=0",
            )
        if join.step < 0:
            return Reject(f"there is no step {join.step} to begin at")
        return None

    def becomes(self, peer: Peer, join: Join) -> None:
        """The run begins, or goes on, with this peer's state."""
        self.name, self._first = peer.name, peer.id if join.first else None
        self._lost = False
        self.layout, self.buckets = join.layout, self._count_buckets(join.layout)
        self.recipe = join.recipe

    def is_second(self, peer: Peer, roster: Roster, *, begun: bool) -> Reject | None:
        """Why this peer, whose script says that its weights are the first ones, cannot have that,
        where others were the first; None where it can, or where the run has `begun`: then it comes
        later, or again."""
        if peer.join is None or not peer.join.first or begun:
            return None
        if self._with_observer and peer.role == "worker":
            return Reject(
                f"{peer.name} was to give the first weights, which are the observer's",
                "start the server with observer=false, or leave out attach(first=True)",
            )
        if self.layout is None or self._first == peer.id or not roster.has_replica:
            return None
        why = "whose script says the same" if self._first is not None else "which came before"
        return Reject(
            f"{peer.name} was to give the first weights, which are those of {self.name}, {why}",
            "say attach(first=True) in one worker, and start that one with the others",
        )

    def differs(self, peer: Peer) -> Reject | None:
        """Why this peer cannot follow the run, since it has another model or another way from an
        average to weights; None where it can."""
        assert self.layout is not None and peer.join is not None
        if self._with_observer and peer.join.layout.pairs and not self.layout.pairs:
            return Reject(
                f"{peer.name} has several models with optimizers of their own, the observer has "
                "one model",
                "start the server with observer=false: the loop evaluates and saves then",
            )
        difference = self.layout.difference(peer.join.layout)
        if difference is not None:
            return Reject(
                f"{peer.name} has another model than {self.name}: {difference}",
                "start it with the same model and code as the server"
                + ", or the server with observer=false for a script's own model"
                * (self._with_observer and peer.role == "worker"),
            )
        if peer.join.recipe != self.recipe:
            return Reject(
                f"{peer.name} makes its steps in another way: {peer.join.recipe}; "
                f"the run has {self.recipe}",
                "give attach() the same optimizer, schedule, clip_norm and before_step "
                "everywhere (and observer=false where the built-in observer has others)",
            )
        return None


def _most_alike(workers: list[Peer]) -> list[Peer]:
    """Those whose layout and recipe most have come first; of equally many, the lowest."""
    alike: dict[tuple[str, str], list[Peer]] = {}
    for peer in workers:
        assert peer.join is not None
        alike.setdefault((peer.join.layout.fingerprint(), peer.join.recipe), []).append(peer)
    groups = sorted(alike.values(), key=lambda peers: (-len(peers), peers[0].id))
    return [peer for peers in groups for peer in peers]
