"""A replica's position in the log: what it applies, waits for, drops and fetches again.

The worker's counterpart of `paramserver.rounds`, and as pure: messages and `now` come in, one
effect comes out of each, and nothing here knows a socket or a tensor. Three rules:

1. An average is taken in as it comes, but nothing is applied before the close of its round.
2. Only the update that leads from my step to the next one is of use: older ones are dropped, newer
   ones are a gap, and a gap is closed by fetching.
3. While fetching, SUB is not read, so that what comes from there continues where the fetch ends.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
from msgspec import UNSET

from paramserver.protocol.messages import (
    Average,
    CarriedOver,
    Close,
    Closing,
    End,
    Fetch,
    Lease,
    Open,
    Pulse,
    next_lineage,
)


class Effect(msgspec.Struct, frozen=True):
    pass


class Take(Effect, frozen=True):
    """Decode this average's numbers into the memory for them.

    `first` of its round: averages taken before belong to a void round, and must be dropped.
    """

    average: Average
    first: bool = False


class Apply(Effect, frozen=True):
    """This update is complete: apply it, then call `applied`.

    `first`: it has no averages; those taken before belong to a void round (see `Take`).
    """

    close: Close
    first: bool = False


class Drop(Effect, frozen=True):
    """Drop this message: it is old, a duplicate, or of another server."""

    why: str


class Gap(Effect, frozen=True):
    """A message is missing: fetch, and handle this one again afterwards."""


class Nothing(Effect, frozen=True):
    pass


class Diverged(Effect, frozen=True):
    """This replica's state is not one of the log: it needs a snapshot."""

    why: str


class TooLate(Effect, frozen=True):
    """The run has ended, and the updates that are missing here cannot be fetched any more."""


class Silent(Effect, frozen=True):
    """Nothing was heard from the server for this long: send a probe."""

    seconds: float


NOTHING = Nothing()


class Replica(Protocol):
    """Owns step and lineage: applying an update, or loading a state, sets them."""

    step: int
    lineage: str


class Follow:
    """Follows the log of one server (`nonce`) of a `run` for one replica."""

    def __init__(self, nonce: str, replica: Replica, now: float, run: str = "") -> None:
        self.nonce, self.run = nonce, run
        self._replica = replica
        self.open: Open | None = None
        """The newest open round known."""
        self.over = 0
        """The newest round known to be over."""
        self.phase = ""
        """The last phase of the server, as a sentence."""
        self.trains = False
        """Is a round open, by the last pulse?"""
        self.ending = False
        """The server opens no more rounds."""
        self.traffic = (0, 0)
        """Bytes sent and received by the server, by its last pulse."""
        self.end: End | None = None
        self.fetching_since: float | None = None
        self.heard_at = now
        self._round = 0  # the round whose averages are being collected
        self._got: set[int] = set()
        self._pulse_step = -1  # the step at which an earlier pulse found us behind
        self._carried: dict[int, CarriedOver] = {}  # as the newest close tells, by worker
        self._joined_at = 0  # the log's step then: what was carried over before is void

    @property
    def step(self) -> int:
        """Where the replica stands."""
        return self._replica.step

    @property
    def lineage(self) -> str:
        return self._replica.lineage

    # ------------------------------------------------------------------ messages

    def average(self, m: Average) -> Effect:
        if m.nonce != self.nonce:
            return Drop("of another server")
        if m.step <= self.step or m.round < self._round:
            return Drop("older than what I hold")
        if m.step > self.step + 1:
            return Gap()
        first = m.round > self._round  # a new round, perhaps after a void one of the same step
        if first:
            self._round = m.round
            self._got.clear()
        if m.bucket in self._got:
            return Drop("came twice")
        self._got.add(m.bucket)
        return Take(m, first)

    def wants(self, m: Average) -> bool:
        """Are its numbers needed? Those of an older update are not, nor those of a void round, nor
        those of another server's."""
        if m.nonce != self.nonce or m.step != self.step + 1 or m.round < self._round:
            return False
        return m.round > self._round or m.bucket not in self._got

    def lost(self, bucket: int) -> None:
        """The numbers of this bucket's average were written over while they were read: treat it as
        missing."""
        self._got.discard(bucket)

    def closing(self, m: Closing) -> tuple[int, ...] | None:
        """The round is closed when it is known who holds these averages: those that are missing
        here. None: the round is not the one that leads on from my step."""
        if m.nonce != self.nonce or m.step != self.step + 1 or m.round < self._round:
            return None
        if m.round > self._round:
            return m.buckets
        return tuple(b for b in m.buckets if b not in self._got)

    def close(self, m: Close) -> Effect:
        if m.nonce != self.nonce:
            return Drop("of another server")
        if m.step <= self.step:
            return Drop("older than what I hold")
        if m.step > self.step + 1:
            return Gap()
        if m.buckets and (m.round != self._round or not self._got.issuperset(m.buckets)):
            return Gap()
        if next_lineage(self.lineage, m) != m.lineage:
            return Diverged(f"update {m.step} does not continue from my step {self.step}")
        return Apply(m, first=m.round != self._round)

    def applied(self, m: Close) -> None:
        """The update is in the model now, and the replica stands at its step."""
        self.over = max(self.over, m.round)
        self._got.clear()
        carried = {} if m.carried is UNSET else m.carried
        self._carried = carried if m.step > self._joined_at else {}
        if m.open is not None:
            self._opened(m.open)

    def opened(self, m: Open) -> Effect:
        if m.nonce != self.nonce:
            return Drop("of another server")
        if m.step > self.step:
            return Gap()
        if m.step < self.step:
            return Drop("older than what I hold")
        self._opened(m)
        return NOTHING

    def pulse(self, m: Pulse, now: float) -> Effect:
        """The server lives. A pulse may overtake a close: only two pulses that find the replica
        behind are a gap."""
        if m.nonce != self.nonce:
            return Drop("of another server")
        self.phase, self.trains, self.ending = m.phase, m.trains, m.ending
        self.traffic = (m.sent_bytes, m.received_bytes)
        if m.step > self.step:
            behind_before, self._pulse_step = self._pulse_step == self.step, self.step
            return Gap() if behind_before else NOTHING
        if m.step == self.step:
            if m.open is not None:
                self._opened(m.open)
            if m.closed is not None:
                self.over = max(self.over, m.closed)
        return NOTHING

    def ended(self, m: End) -> Effect:
        """The run is over; the updates up to its last step are still wanted. Where its server was
        started again, and did not hear this replica before the end, nobody answers it any more."""
        if m.nonce != self.nonce and (not m.run or m.run != self.run):
            return Drop("of another server")
        self.end = m
        if m.nonce != self.nonce:
            return TooLate()
        return Gap() if m.step > self.step else NOTHING

    def _opened(self, m: Open) -> None:
        if self.open is None or m.round > self.open.round:
            self.open = m
            self.over = max(self.over, m.round - 1)

    # ------------------------------------------------------------------ fetching and snapshots

    def fetch(self, now: float) -> Fetch:
        """Ask for the updates after my step; until `fetched` SUB is not read."""
        self.fetching_since = now
        return Fetch(step=self.step, lineage=self.lineage)

    def fetched(self, step: int, open_: Open | None) -> Effect:
        """The answer to a fetch is complete; the server's log stands at `step`."""
        self.fetching_since = None
        if open_ is not None and open_.step == self.step:
            self._opened(open_)
        return Gap() if step > self.step else NOTHING

    def joins(self, step: int) -> None:
        """The server admits this replica, where its log stands at `step`: it awaits nothing of it
        any more."""
        self._joined_at = step
        self._carried = {}

    def adopted(self) -> None:
        """A snapshot has replaced the replica's state; no round was open meanwhile."""
        self.fetching_since = None
        self._got.clear()
        if self.open is not None:
            self.over, self.open = max(self.over, self.open.round), None

    # ------------------------------------------------------------------ waiting

    @property
    def makers(self) -> frozenset[int]:
        """The shards whose averages may still be wanted: those of the open round."""
        current = self.open
        if current is None or self.is_over(current.round):
            return frozenset()
        return frozenset(number for number, _ in current.shards)

    def heard(self, now: float) -> None:
        self.heard_at = now

    def lease(self, worker: int, after: int) -> tuple[int, Lease] | None:
        """(round, lease) of the open round that follows `after`, if this worker is in it; or of an
        earlier one that follows `after`, whose gradient may still enter another."""
        late = self._late(worker)
        if late is not None and late.round > after:
            return late.round, late.lease
        current = self.open
        if current is None or current.round <= max(after, self.over):
            return None
        if current.began not in (0, current.round):
            return None  # leases that go on are no new ones
        leases = current.leases.get(worker)
        return (current.round, leases[0]) if leases else None

    def lease_ahead(self, worker: int) -> Lease | None:
        """The lease that this worker will probably get next, so that its data can be loaded."""
        leases = self.open.leases.get(worker, ()) if self.open is not None else ()
        return leases[1] if len(leases) > 1 else None

    def may_step(self, worker: int, began: int, number: int) -> bool | None:
        """Where leases last over several rounds: may this worker, whose lease `began` in that
        round, push in round `number`? False where that round is over, or rounds go on without its
        lease; None while it is not open yet."""
        current = self.open
        if self.is_over(number):
            return False
        if current is None:
            return None
        if current.began != began or not current.leases.get(worker):
            return False
        return True if current.round == number else None

    def asks_in(self, worker: int, began: int) -> int | None:
        """In which round to ask for the lease that follows the one that `began` there: the open
        one, if that lease goes on in it."""
        current = self.open
        if current is None or current.round <= max(began, self.over):
            return None
        return current.round if self.may_step(worker, began, current.round) else None

    def is_over(self, round_: int) -> bool:
        """Is that round over, closed or void?"""
        return self.over >= round_

    def is_awaited(self, worker: int, round_: int) -> bool:
        """That round went on without this worker: may its gradient still enter a later one?"""
        late = self._late(worker)
        return late is not None and late.round == round_

    def is_settled(self, worker: int, round_: int) -> bool:
        """Is it known what became of this worker's pushes of that round?"""
        return self.is_over(round_) and not self.is_awaited(worker, round_)

    def _late(self, worker: int) -> CarriedOver | None:
        """What of this worker is carried over; not if it has got another lease since."""
        late, current = self._carried.get(worker), self.open
        if late is None or current is None or current.round <= late.round:
            return late
        return None if current.leases.get(worker) else late

    def tick(self, now: float, quiet_s: float) -> Effect:
        """Time has passed: fetch again where there was no answer, probe a silent server."""
        if now - self.heard_at > quiet_s:  # asking again and again would hide for how long it is
            return Silent(now - self.heard_at)
        if self.fetching_since is not None and now - self.fetching_since > quiet_s:
            return Gap()
        return NOTHING
