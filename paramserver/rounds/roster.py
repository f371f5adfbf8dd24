"""Who is here: the peers of a run, their ids and sessions, and what is known of each.

A `Peer` is a worker or the observer while it is known to the server. The `Roster` says who may have
which id, who holds the run's state, who is ready, and who has fallen silent; what follows from that
is for `coordinator` to decide.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from paramserver.protocol.messages import Join, Lease, Ready
from paramserver.rounds.events import Greeted
from paramserver.rounds.states import GREETED, PEER, REPLICA, TAKEN_OUT, after

if TYPE_CHECKING:
    from paramserver.rounds.late import Carried

PUSH_TIMES_KEPT = 64
DEAF_STEPS = 20  # who fetches at more than this share of them gets nothing of what is published
DEAF_SHARE = 0.7


class Peer:
    """A worker or the observer, from its Hello to its end."""

    def __init__(self, session: str, role: str, id: int, nonce: str, host: str, pid: int) -> None:
        self.session = session
        self.role = role
        self.id = id
        self.nonce = nonce
        self.host = host
        self.pid = pid
        self.state = GREETED
        self.join: Join | None = None
        self.ready: Ready | None = None
        self.leases: list[Lease] = []
        self.under_way: Lease | None = None  # over several rounds, and was in all so far
        self.left_with: Lease | None = None  # the lease that it computed when it left its loop
        self.late_with: Lease | None = None  # of a round that is over, and it may still compute it
        self.late_at = 0.0  # since when a round went on without it, the last time
        self.carried: Carried | None = None  # what it computes, or has pushed, for a later round
        self.last_seen = 0.0
        self.push_time_p95: float | None = None
        """Seconds from a round's opening to the end of this worker's push, in most of the last."""
        self.push_time_median: float | None = None
        """The same, in half of the last."""
        self._push_times: deque[float] = deque(maxlen=PUSH_TIMES_KEPT)
        self.failed_gives = 0
        self.failed_by: dict[int, int] = {}  # by id of a giver: snapshots that this one did not get
        self.missed = 0  # in a row that it did not get, see `wire.Admit`
        self.waits_since: float | None = None  # for givers whose loops are elsewhere
        self.replica_since = 0  # the step at which it became one
        self.returns = False  # it was part of this run before this server was
        self.trained = False  # it has finished an earlier run of this server
        self.wrong = False  # its weights are not the run's: only a snapshot helps
        self.found_wrong = 0  # how often
        self.proven = False  # it was the origin, or a whole gradient of it is in the log
        self.owes = False  # it took a snapshot, and has contributed nothing since
        self.adopted_at = 0.0  # when it took its last snapshot
        self.given_by = ""  # session of whoever gave its last snapshot
        self.fetches = 0  # since it was last looked at, one for each step of the log
        self.fetched_at = -1  # the log's step
        self.slow_rounds = 0  # in a row that had nothing to wait for but its push
        self.said_slow = False
        self.stands_at: int | None = None
        self.kept_at: int | None = None  # the step of which it has kept what is to stay
        self.evaluates_since: float | None = None  # where it evaluates, see `evaluations`
        self.evaluated_s = 0.0  # while the others waited, since its last whole gradient in the log

    @property
    def name(self) -> str:
        return f"worker {self.id} ({self.host})" if self.role == "worker" else "the observer"

    @property
    def has_shown(self) -> bool:
        """Has it shown that it belongs to the run? Something of it is in the log, or it is the
        observer, which has shown its key. A greeting proves nothing."""
        return self.role == "observer" or self.proven

    @property
    def believed(self) -> bool:
        """Does its word about its weights count?"""
        return self.state == REPLICA and self.has_shown

    @property
    def is_elsewhere(self) -> bool:
        """Is it a worker outside its loop over batches, as far as it has told?"""
        return self.role == "worker" and (self.ready is None or self.evaluates_since is not None)

    def turn(self, cause: str) -> None:
        """Go on to the state that follows, see `states`."""
        self.state = after(PEER, self.state, cause)

    def took(self, seconds: float) -> None:
        """Note the seconds from a round's opening until its push was whole, or was given up."""
        self._push_times.append(seconds)
        times = sorted(self._push_times)
        self.push_time_p95 = times[min(len(times) - 1, math.ceil(0.95 * len(times)))]
        self.push_time_median = times[(len(times) - 1) // 2]


class Roster:
    """Owns the peers by session, and the sessions that need messages on their links: `deaf` are
    those of peers that seem to get nothing of what is published, `prompted` those for which rounds
    wait. `digests`, by id: name, step and digest that a replica reported when it left."""

    def __init__(self, max_workers: int) -> None:
        self.peers: dict[str, Peer] = {}
        self.deaf: set[str] = set()
        self.prompted: set[str] = set()
        self.digests: dict[int, tuple[str, int, str]] = {}
        self.ready_since: float | None = None  # the first worker is ready
        self._max_workers = max_workers

    # ------------------------------------------------------------------ ids

    def declines(
        self, greeting: Greeted, now: float, reachable: Callable[[str], bool]
    ) -> str | None:
        """Why this greeting cannot have its id; None where it can, see `Rounds.declines`."""
        number = self._number_of(greeting)
        if greeting.role == "worker" and not 1 <= number <= self._max_workers:
            why = f"worker id {number} is out of range: ids run from 1 to {self._max_workers}"
            return f"{why} (max_workers)"
        holder = self.by_id(number)
        if holder is None or holder.nonce == greeting.nonce or not reachable(holder.session):
            return None
        return (
            f"worker id {number} is taken by pid {holder.pid} on {holder.host} "
            f"(last seen {now - holder.last_seen:.1f} s ago)"
        )

    def holder(self, greeting: Greeted) -> Peer | None:
        """The peer that has the id of this greeting now."""
        return self.by_id(self._number_of(greeting))

    def enter(self, greeting: Greeted, before: Peer | None, now: float) -> Peer:
        """Add a peer; `before` had its id. If that is the same process, the snapshots that it
        missed still count."""
        peer = Peer(
            greeting.session,
            greeting.role,
            self._number_of(greeting),
            greeting.nonce,
            greeting.host,
            greeting.pid,
        )
        peer.last_seen = now
        peer.returns, peer.trained = greeting.returns, greeting.trained
        if before is not None and before.nonce == peer.nonce:
            peer.missed, peer.failed_by = before.missed, before.failed_by
            peer.waits_since = before.waits_since
        self.peers[peer.session] = peer
        return peer

    def by_id(self, number: int) -> Peer | None:
        return next((p for p in self.peers.values() if p.id == number), None)

    def _number_of(self, greeting: Greeted) -> int:
        if greeting.role == "observer":
            return 0
        if greeting.id is not None:
            return greeting.id
        taken = {p.id for p in self.peers.values()}
        return next(i for i in range(1, len(taken) + 2) if i not in taken)

    # ------------------------------------------------------------------ who is what

    @property
    def observer(self) -> Peer | None:
        """The observer, if it is here."""
        return next((p for p in self.peers.values() if p.role == "observer"), None)

    @property
    def has_workers(self) -> bool:
        return any(p.role == "worker" for p in self.peers.values())

    def count_joined(self) -> int:
        """The workers that have joined, or are about to."""
        return sum(p.role == "worker" for p in self.peers.values())

    @property
    def has_replica(self) -> bool:
        """Does anybody here hold the run's state?"""
        return any(p.state == REPLICA for p in self.peers.values())

    def in_state(self, state: str) -> list[Peer]:
        return [p for p in self.peers.values() if p.state == state]

    def workers_ready(self) -> list[Peer]:
        """The replicas that wait for samples, by id."""
        return sorted(
            (p for p in self.peers.values() if p.ready is not None and p.state == REPLICA),
            key=lambda p: p.id,
        )

    def silent(self, now: float, timeout_s: float) -> list[Peer]:
        """The peers that have given no sign of life for `timeout_s`."""
        return [p for p in self.peers.values() if now - p.last_seen > timeout_s]

    # ------------------------------------------------------------------ what changes

    def becomes_replica(self, peer: Peer, cause: str, step: int) -> None:
        """Note that this peer holds the run's state, which is that of `step`."""
        peer.turn(cause)
        peer.replica_since = step

    def is_ready(self, peer: Peer, ready: Ready, now: float) -> None:
        """Note that this worker waits for samples."""
        peer.ready = ready
        if self.ready_since is None:
            self.ready_since = now

    def not_ready(self, peer: Peer, *, started: bool) -> None:
        """Note that this peer takes no more samples. Before the first round, the wait for others
        begins anew when nobody is ready."""
        peer.ready = peer.late_with = None
        if not started and not any(p.ready for p in self.peers.values()):
            self.ready_since = None

    def fetched(self, peer: Peer, step: int) -> None:
        """Count that this peer asked for updates that were published, once for each `step` of the
        log: a peer that is far behind asks several times at one step."""
        if peer.fetched_at != step:
            peer.fetched_at = step
            peer.fetches += 1

    def find_deaf(self, step: int) -> list[Peer]:
        """Find peers that fetch nearly every update. They are `deaf` from now on."""
        if step % DEAF_STEPS:
            return []
        found = [
            p
            for p in self.peers.values()
            if p.fetches > DEAF_SHARE * DEAF_STEPS and p.session not in self.deaf
        ]
        self.deaf.update(p.session for p in found)
        for peer in self.peers.values():
            peer.fetches = 0
        return found

    def take_out(self, peer: Peer) -> None:
        """Note that this peer does not hold the run's state any more."""
        self.deaf.discard(peer.session)
        self.prompted.discard(peer.session)
        peer.turn(TAKEN_OUT)

    def remove(self, peer: Peer) -> None:
        """Forget a peer."""
        del self.peers[peer.session]
