"""How long rounds wait for whom, and what it costs a worker that they wait for it in vain.

A round waits after its quorum (`Waits.wait_s`), and before it as long as nobody could go on without
those it waits for (`Waits.given_up`). A worker that brings nothing to several rounds in a row is
left out of the next ones. What follows from that for the open round is for `coordinator` to decide.
"""

from __future__ import annotations

import math

import msgspec
from msgspec import UNSET

from paramserver.protocol.messages import Close
from paramserver.rounds.ending import Ending
from paramserver.rounds.late import WAIT_MIN_S, WAIT_TIMES
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Peer, Roster
from paramserver.rounds.round import Member, Round
from paramserver.rounds.rules import MAX_WAIT_TIMEOUTS, Rules
from paramserver.rounds.states import REPLICA, WAITING

EMPTY_ROUNDS = 3  # that a worker may bring nothing to, though they waited as long as they do
REST_TIMES_MAX = 10  # as long as they waited in all it is left out then, at most
OVERDUE_DOUBLINGS = 5  # of the wait before a round is void, as long as nothing is closed
SLOW_ROUNDS = 20  # in a row that wait longer for one than for all others, before it is said
SLOW_S = 0.1
DERIVED_TIMEOUT_MIN_S = 1.0
FIRST_WAIT_TIMES = 3  # as long as its quorum took, a round waits for a worker of unknown speed
FIRST_WAIT_MIN_S = 0.3
REPLACED_TIMES = 3  # as long as they take, a round waits for those whom only slow ones replace
LOCAL_WAIT_TIMES = 10  # as long as its quorum took, a round of local steps may wait for the rest


class Vain(msgspec.Struct):
    """What rounds have waited in vain for one worker since it last brought something, whatever
    process it was: a new greeting is no new beginning."""

    rounds: int = 0  # in a row, each of which waited as long as rounds do
    waited_s: float = 0.0  # since it was left out the last time
    left_out: int = 0  # how often
    until: float = -math.inf  # from then on it gets leases again


class Waits:
    """Owns what rounds have waited in vain, by worker id and in all. `overdue_rounds` is the number
    of those that were void since they waited in vain, since the last close."""

    def __init__(self, rules: Rules, roster: Roster, out: Outcome, ending: Ending) -> None:
        self.overdue_rounds = 0
        self.vain: dict[int, Vain] = {}
        self._rules = rules
        self._roster = roster
        self._out = out
        self._ending = ending
        self._said_overdue = 0  # the round of which it was said for whom it waits
        self._said_late: frozenset[int] = frozenset()

    # ------------------------------------------------------------------ after the quorum

    def deadline(self, current: Round | None) -> float | None:
        """When the open round closes without the rest, if its quorum has pushed."""
        if current is None or current.quorum_at is None:
            return None
        return current.quorum_at + self.wait_s(current)

    def wait_s(self, current: Round) -> float:
        """How long a round waits after its quorum: the setting, or from measured push times.

        Derived: three times the slowest member's 95th percentile, so that a steady but slow machine
        takes part and a sudden straggler does not. A late push counts as taking until it was given
        up, so the wait grows until it covers a machine that became slow, or reaches its limit. That
        is a few heartbeat timeouts, or for a round of local steps, which may take minutes, a
        multiple of the time in which its quorum was done. Where samples are divided by speed, a
        worker of unknown speed is waited for no longer than a multiple of that either: it finishes
        what it computes, while rounds go on without it (`takers`), and gets fewer samples then.

        Where late work is carried over, a round lasts little longer than the workers' pushes
        usually take.
        """
        if self._rules.timeout is not None:
            return self._rules.timeout
        if self._rules.deterministic:
            return math.inf
        peers = self._roster.peers
        times = [
            peers[m.session].push_time_p95 for m in current.members.values() if m.session in peers
        ]
        known = [t for t in times if t is not None]
        if self._rules.max_staleness and current.quorum_at is not None:
            usual = self._usual_s(current)
            if usual is not None:
                until = current.opened_at + WAIT_TIMES * usual
                return max(WAIT_MIN_S, until - current.quorum_at)
        most = self._most_s(current)
        if len(known) < len(times) or not known:
            if self._by_speed and current.quorum_at is not None:
                took_s = current.quorum_at - current.opened_at
                return min(max(FIRST_WAIT_MIN_S, FIRST_WAIT_TIMES * took_s), most)
            return most
        return min(max(DERIVED_TIMEOUT_MIN_S, 3 * max(known)), most)

    def _most_s(self, current: Round) -> float:
        """The longest that a derived wait of this round may be."""
        most = MAX_WAIT_TIMEOUTS * self._rules.heartbeat_timeout
        if current.local_steps > 1 and current.quorum_at is not None:
            took_s = current.quorum_at - current.opened_at
            longest = self._rules.longest_wait_s(current.local_steps)
            most = max(most, min(LOCAL_WAIT_TIMES * took_s, longest))
        return most

    def _usual_s(self, current: Round) -> float | None:
        """The median of the members' median push times; None where none is known."""
        peers = (self._roster.peers.get(m.session) for m in current.members.values())
        known = [p.push_time_median for p in peers if p and p.push_time_median is not None]
        return sorted(known)[(len(known) - 1) // 2] if known else None

    @property
    def _by_speed(self) -> bool:
        """Are the samples of a synchronous step divided by speed?"""
        rules = self._rules
        return rules.shares == "speed" and not rules.deterministic and rules.local_steps == 1

    def late(self, current: Round, now: float) -> list[Member]:
        """The members that are late: something of them is missing after quorum and timeout."""
        deadline = self.deadline(current)
        if deadline is None or now < deadline:
            return []
        wait_s = self.wait_s(current)
        patient = self._rules.timeout is not None or wait_s >= self._most_s(current)
        late = current.expected()
        for member in late:
            member.timed_out, member.waited_s = patient, wait_s
            if (peer := self._roster.peers.get(member.session)) is not None:
                peer.late_at = now
        return late

    def lateness(self, current: Round, member: Member, now: float) -> str:
        """The sentence about a member that is late. Note that its push takes at least this long."""
        peer = self._roster.peers[member.session]
        p95 = peer.push_time_p95
        usual = "" if p95 is None else f"usually within {p95:.2f} s, "
        peer.took(now - current.opened_at)
        return f"late ({usual}last seen {now - peer.last_seen:.1f} s ago)"

    # ------------------------------------------------------------------ before the quorum

    def given_up(
        self, current: Round, others: list[Peer], now: float, *, replaced: bool
    ) -> list[Member]:
        """The members for whom a round without a quorum waits no longer; empty while it waits.

        A round has no deadline before its quorum is there, and with `deterministic` none after it.
        While nobody could go on without those it waits for, they have their time: a first batch may
        compile for minutes. Where `others` could take part, it waits no longer than any round, and
        longer each time that it was in vain, up to half of what is left until the run is given up:
        however many hang, others get their turn before that. Where it would change the bits, or
        only those could go on who have pushed everything, it waits as long as that at once. If none
        of the others can replace those it waits for (`replaced`), since they are so much slower
        that they got no samples, it waits several times as long as those usually take."""
        if not self.is_long(current, now):
            return []
        waited = now - current.opened_at
        longest = self._longest_s(current, now)
        limit, most = math.inf, max(longest, self.left_s(current.opened_at) / 2)
        if others and not self._rules.deterministic:
            doublings = min(max(0, self.overdue_rounds - 1), OVERDUE_DOUBLINGS)
            patience = (
                longest if replaced else max(longest, REPLACED_TIMES * self._takes_s(current))
            )
            limit = min(patience * 2**doublings, most)
        elif others or current.someone_is_whole:
            limit = most
        if waited < min(limit, self._rules.idle_timeout):
            if self._said_overdue != current.number:
                self._said_overdue = current.number
                self._out.warn(self.awaited(current, now))
            return []
        awaited = current.expected()
        for member in awaited:
            member.timed_out, member.waited_s = True, waited
        return awaited

    def _takes_s(self, current: Round) -> float:
        """What the slowest of those that a round waits for usually takes for its push, as far as is
        known."""
        peers = (self._roster.peers.get(m.session) for m in current.expected())
        return max((p.push_time_p95 or 0.0 for p in peers if p is not None), default=0.0)

    def could_take_part(self, current: Round, snapshot: bool) -> list[Peer]:
        """Workers that are here and have no part in this round: they wait for a lease, or for a
        `snapshot` that could be given now."""
        return [
            p
            for p in self._roster.peers.values()
            if p.role == "worker"
            and ((member := current.member_of(p)) is None or member.out is not None)
            and (p.ready is not None or (p.state == WAITING and snapshot))
            and p.carried is None  # it computes
        ]

    def is_long(self, current: Round, now: float) -> bool:
        """Has a round without a deadline waited as long as any round may, where others could go
        on?"""
        if (self.deadline(current) or math.inf) < math.inf:
            return False
        longest = self._longest_s(current, now)
        return now - current.opened_at >= longest and bool(current.expected())

    def _longest_s(self, current: Round, now: float) -> float:
        """As long as any round may wait, where others could go on. Who is left out, and in it only
        since nobody else was here, had the time for several local steps before."""
        if all(self._is_left_out(m, now) for m in current.expected()):
            return self._rules.longest_wait_s()
        most = max(self._rules.longest_wait_s(), self.left_s(current.opened_at) / 2)
        return min(self._rules.longest_wait_s(current.local_steps), most)

    def left_s(self, moment: float) -> float:
        """How long after this moment the run is given up, if nothing happens."""
        return self._rules.idle_timeout - (moment - self._ending.busy_at)

    def awaited(self, current: Round, now: float) -> str:
        """For whom the open round waits, as a sentence."""
        names = [
            f"{m.name} (last seen {now - self._roster.peers[m.session].last_seen:.1f} s ago)"
            for m in current.expected()
        ]
        waited = now - current.opened_at
        return f"round {current.number} has waited {waited:.0f} s for {', '.join(names)}"

    # ------------------------------------------------------------------ who is left out

    def takers(self, now: float) -> list[Peer]:
        """The workers that get leases: those that are ready, but for those that are left out, or
        busy with the lease of a round that is over. If too few remain, as many of the latter as are
        needed, in the order in which their rest ends; but not while one who has just taken a
        snapshot is about to be ready: it would find a round that waits for the others in vain."""
        ready = self._roster.workers_ready()
        takers = [p for p in ready if now >= self._vain_of(p).until and not self._is_busy(p, now)]
        missing = max(1, self._rules.min_workers) - len(takers)
        if missing > 0:
            resting = [p for p in ready if p not in takers]
            if self._one_comes(now):
                resting = [p for p in resting if now >= self._vain_of(p).until]
            takers += sorted(resting, key=lambda p: self._vain_of(p).until)[:missing]
        return sorted(takers, key=lambda p: p.id)

    def _one_comes(self, now: float) -> bool:
        """Has a worker just taken a snapshot, and is not ready yet?"""
        soon = [p for p in self._roster.peers.values() if p.state == REPLICA and p.ready is None]
        return any(p.owes and now < p.adopted_at + self._rules.heartbeat_timeout for p in soon)

    def _is_busy(self, peer: Peer, now: float) -> bool:
        """Does it compute the lease of a round that is over? Where samples are divided by speed,
        it gets the next one when it is done: of the right size, and nobody waits meanwhile. So it
        is where late work is carried over. A carried gradient that is complete enters by itself."""
        if peer.carried is not None:
            return not peer.carried.is_complete
        by_speed = self._by_speed or self._rules.max_staleness > 0
        if not by_speed or peer.late_with is None:
            return False
        return now < peer.late_at + self._rules.longest_wait_s()

    def judge(self, peer: Peer, member: Member, now: float, *, at_once: bool) -> bool:
        """Note what a member brought to a round that is over. Is its worker left out from now on?
        With `at_once` it is after this round already, if it brought nothing."""
        if member.got:
            self.vain.pop(peer.id, None)
            return False
        if not member.timed_out:
            return False
        vain = self.vain.setdefault(peer.id, Vain())
        vain.rounds += 1
        vain.waited_s += member.waited_s
        due = vain.rounds >= EMPTY_ROUNDS and vain.waited_s >= self._rules.longest_wait_s()
        return (due or at_once) and self._leave_out(peer, vain, now)

    def _is_left_out(self, member: Member, now: float) -> bool:
        peer = self._roster.peers.get(member.session)
        return peer is not None and now < self._vain_of(peer).until

    def _vain_of(self, peer: Peer) -> Vain:
        return self.vain.get(peer.id) or Vain()

    def _leave_out(self, peer: Peer, vain: Vain, now: float) -> bool:
        """Leave a worker out that brings nothing although rounds wait for it: for as long as they
        waited, twice as long the next time, and so on. A worker that never pushes costs a tenth of
        the time in the end, however short the rounds of the others are. Before that it has the time
        to catch up, as a worker whose cable was out must: while rounds wait for it, the log grows
        slowly."""
        if len(self._roster.workers_ready()) < 2:
            return False
        rounds = f"{vain.rounds} rounds in a row" if vain.rounds > 1 else "a round"
        rest_s = vain.waited_s * min(2**vain.left_out, REST_TIMES_MAX)
        self._out.warn(
            f"{peer.name} brought nothing to {rounds}, which waited "
            f"{vain.waited_s:.0f} s for it: rounds go on without it for {rest_s:.0f} s",
            peer,
        )
        vain.left_out, vain.waited_s, vain.until = vain.left_out + 1, 0.0, now + rest_s
        return True

    # ------------------------------------------------------------------ what is said of it

    def look_for_the_slow(self, current: Round, now: float) -> None:
        """Log, once for each worker, that most of the time of every round is spent waiting for
        it."""
        ends = sorted((m.whole_at, w) for w, m in current.members.items() if m.whole_at is not None)
        if len(ends) < 2 or len(ends) < len(current.members):
            return
        (before, _), (last, slowest) = ends[-2:]
        for worker, member in current.members.items():
            peer = self._roster.peers.get(member.session)
            if peer is None:
                continue
            held_s = last - before
            holds_up = worker == slowest and held_s > max(SLOW_S, (now - current.opened_at) / 2)
            peer.slow_rounds = peer.slow_rounds + 1 if holds_up else 0
            if peer.slow_rounds == SLOW_ROUNDS:
                self._roster.prompted.add(peer.session)
                if not peer.said_slow:
                    peer.said_slow = True
                    self._out.warn(
                        f"every round waits {held_s:.2f} s for {peer.name}: the others are done "
                        f"after {before - current.opened_at:.2f} s",
                        peer,
                    )

    def say_late(self, close: Close) -> None:
        """Log who is late when that changes, and not at every step. A worker that is left out
        counts as late."""
        if not (close.late or self._said_late or self.vain):
            return
        carried = () if close.carried is UNSET else close.carried
        late = frozenset(close.late).difference(carried)
        ready = self._roster.workers_ready()
        late |= {p.id for p in ready if self._vain_of(p).rounds >= EMPTY_ROUNDS}
        if late != self._said_late:
            changed = min(late ^ self._said_late)  # its sentences are limited
            if self._out.sentences.may(changed, f"worker {changed}"):
                if close.reason:
                    self._out.warn(close.reason)
                elif not late:
                    back = [p.name for p in ready if p.id in self._said_late]
                    if back:  # else who was late is gone
                        self._out.say(f"round {close.round} closed with {' and '.join(back)} again")
        self._said_late = late
