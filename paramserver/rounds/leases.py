"""Leases: which worker gets which samples, and what becomes of those that it does not finish.

`Leases` stands between the workers and the `ledger`. It checks that all workers bring the same data
set, leases ranges of it in equal sizes or by speed (`shares`), holds back what may have killed the
worker that left it, and names what is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paramserver.protocol.messages import OWN, CarriedOver, Lease, Push, Ready, Reject
from paramserver.rounds.effects import Discard
from paramserver.rounds.late import Carried
from paramserver.rounds.ledger import (
    AGAIN,
    DONE,
    DROPPED,
    KILLED,
    PARTLY,
    RETURNED,
    SKIPPED,
    UNREAD,
    Ledger,
    OwnLedger,
    Places,
)
from paramserver.rounds.local_steps import LocalSteps
from paramserver.rounds.looks import DataSet, Looks, part, shown
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Peer, Roster
from paramserver.rounds.round import Member, Round
from paramserver.rounds.rules import Rules
from paramserver.rounds.shares import SHARE_TIMES_MAX, TRY_AGAIN_ROUNDS, Limits, Shares

BELIEVED = 1000  # times as fast as its pushes come, a worker may say that it computes
LEASES_HELD = 2  # one being computed, one whose data loads meanwhile
SILENT_KEPT = 64
HOLD_S = 1.0  # between leaving a loop and a goodbye that says why; more than a worker needs
WORKERS_TO_SPARE = 2  # others that are left, to look for the sample that kills
LOST = {
    KILLED: "workers died of it",
    AGAIN: "workers died of it in an earlier epoch",
    UNREAD: "it cannot be read",
    DROPPED: "the short rest of an epoch (drop_last)",
}


class Leases:
    """Owns the run's ledger, once a worker or the origin has brought one, and who holds what of it.

    `name_samples` says which samples, of a set of so many, a range of an epoch's order is, `places`
    where they lie in the order of another epoch. `known`: what the data set is, where that was
    noted before this server was started.
    """

    def __init__(
        self,
        rules: Rules,
        roster: Roster,
        out: Outcome,
        *,
        name_samples: Callable[[int, Lease], str] | None,
        places: Places | None,
        known: DataSet | None = None,
    ) -> None:
        self.ledger: Ledger | None = None
        self.name_samples = name_samples
        self.data_set = known
        self._rules = rules
        self._roster = roster
        self._out = out
        self._places = places
        self._looks = Looks()
        if known is not None:
            self._looks.first(known.whose, known.looks)
        self._given = False  # the ledger came with the first state
        self._as_whom = ""  # who has the run's data set
        self._shares: Shares | None = None  # where samples are divided by speed
        if rules.shares == "speed" and not rules.deterministic:
            self._shares = Shares()
        self._local = LocalSteps(rules.local_steps, rules.local_warmup_steps, rules.overlap)
        self.local_steps = 1
        """Those of the round whose leases were handed out last."""
        self._shared: dict[int, int] = {}  # samples of a round by worker, as last handed out
        self._measured: dict[int, str] = {}  # by worker: the process whose speed is known
        self._without: set[int] = set()  # workers that get nothing, and were named
        self._unread_by: dict[int, int] = {}  # by worker: samples that it could not read
        self._used_of: set[int] = set()  # workers of which a whole lease was used
        self._round_s = 0.0  # of the last one
        self._held: dict[Lease, tuple[str, float]] = {}  # left by a session; until when
        self._silent: dict[str, Lease] = {}  # by process: what it computed when it fell silent

    @property
    def own(self) -> bool:
        """Do the workers bring samples of their own?"""
        return isinstance(self.ledger, OwnLedger)

    @property
    def finished(self) -> bool:
        """Are all epochs done?"""
        return self.ledger is not None and self.ledger.finished

    @property
    def exhausted(self) -> bool:
        """Is all leased that there is?"""
        return self.ledger is not None and self.ledger.exhausted

    # ------------------------------------------------------------------ the data set

    def begin(self, step: int, state: dict[str, Any] | None) -> Reject | None:
        """A run begins at this step, with the ledger of this state where there is one. What is
        known of samples that kill stays. Returns why it cannot begin so."""
        ledger = self.ledger
        if ledger is None or not ledger.remembers or step:
            ledger = None
        self._given = state is not None
        if state is not None:
            try:
                ledger = Ledger.from_state(state, self._rules.epochs)
            except ValueError as e:
                return Reject(f"the checkpoint's ledger cannot be right: {e}")
            ledger.places = None if self._draws else self._places
            ledger.barrier = self._rules.epoch_barrier
        self.ledger = ledger
        self._held.clear()
        return None

    def admits(self, peer: Peer, ready: Ready, *, started: bool) -> bool:
        """Does this worker bring the data set that the others have? Before the first round all are
        admitted whose set may be that of the ledger, if there is one, see `agree`. A worker with
        another one gets a Reject that says why."""
        if not ready.own and (ready.samples < 1 or ready.batch_size < 1):
            self._out.send(
                peer, Reject("a data set without samples", "give batches() a longer one")
            )
            return False
        if not started:
            return not self._given or self._is_set(peer, ready, None)
        others = [p for p in self._roster.workers_ready() if p is not peer]
        if self.ledger is None or (self.ledger.untouched and not others and not self._given):
            self._becomes_the_runs(peer, ready)
        return self._agrees(peer, ready)

    def agree(self, ready: list[Peer]) -> list[Peer]:
        """The first round is about to open for these workers: the data set that most of them bring
        is the run's; of equally many, that of the lowest. Returns those with another one, which
        are told so."""
        told = [(p, p.ready) for p in ready if p.ready is not None]
        alike = _most(told, lambda r: (r.own, 0 if r.own else r.samples))
        alike = _most(alike, lambda r: frozenset((k.index, k.leaf, k.exact) for k in r.looks))
        alike = _most(alike, lambda r: (r.weighs, r.draws))
        if not alike:
            return []
        self._becomes_the_runs(*alike[0])
        if len(alike) > 1:
            self._as_whom += f" and {len(alike) - 1} more"
        return [p for p, its in told if not self._agrees(p, its)]

    def _becomes_the_runs(self, peer: Peer, ready: Ready) -> None:
        self._as_whom = peer.name
        if not self._given:
            self.ledger = OwnLedger() if ready.own else Ledger(ready.samples, self._rules.epochs)
            self.ledger.barrier = self._rules.epoch_barrier
        self._is(peer, ready)

    def _is(self, peer: Peer, ready: Ready) -> None:
        """The run's data set is this one."""
        assert self.ledger is not None
        self.data_set = DataSet(peer.name, ready.weighs, ready.draws, ready.looks)
        self._looks.first(peer.name, ready.looks)
        # Which samples are drawn, this server cannot know.
        self.ledger.places = None if ready.draws else self._places

    @property
    def _draws(self) -> str:
        """What is drawn of the set; empty: each sample once."""
        return "" if self.data_set is None else self.data_set.draws

    def _agrees(self, peer: Peer, ready: Ready) -> bool:
        """Is its data set the run's? If not, it is told so."""
        if self.data_set is None:  # the run is older than this server, which was told nothing
            self._is(peer, ready)
        return self._is_set(peer, ready, self.data_set) and self._looks_alike(peer, ready)

    def _is_set(self, peer: Peer, ready: Ready, known: DataSet | None) -> bool:
        """May its data set be that of the ledger and, as far as that is `known`, the run's? If not,
        it is told so."""
        reject = self._other_set(peer, ready, known)
        if reject is not None:
            self._out.send(peer, reject)
        return reject is None

    def _other_set(self, peer: Peer, ready: Ready, known: DataSet | None) -> Reject | None:
        assert self.ledger is not None
        samples = 0 if ready.own else ready.samples
        whose = f", as {self._as_whom}" if self._as_whom else ""
        if ready.own != self.own:
            brings, has = "samples of its own", "one set that all share"
            if not ready.own:
                brings, has = has, brings
            return Reject(
                f"{peer.name} brings {brings}, the run has {has}{whose}",
                "use own_batches() in every worker, or in none",
            )
        if known is not None and bool(ready.draws) != bool(known.draws):
            draws, draw = "draws its samples by weights", "draw each once"
            if known.draws:
                draws, draw = "draws each sample once", "draw by weights"
            return Reject(
                f"{peer.name} {draws}, the others {draw}{whose}",
                "give batches() the same weights= in every worker, or in none",
            )
        if samples != self.ledger.samples:
            theirs, ours = f"a data set of {samples} samples", f"one of {self.ledger.samples}"
            if known is not None and known.draws:
                theirs, ours = f"{samples} draws in an epoch", f"{self.ledger.samples}"
            return Reject(
                f"{peer.name} has {theirs}, the run has {ours}{whose}",
                "every worker needs the same training set in the same order",
            )
        if known is not None and ready.draws != known.draws:
            return Reject(
                f"{peer.name} draws its samples by other weights than the run{whose}",
                "give batches() the same weights= in every worker",
            )
        if known is not None and ready.weighs != known.weighs:
            says, others_say = "says", "do not"
            if known.weighs:
                says, others_say = "does not say", "do"
            return Reject(
                f"{peer.name} {says} what its batches weigh (samples=), the others "
                f"{others_say}{whose}",
                "give batches() the same function samples= in every worker, or in none",
            )
        return None

    def _looks_alike(self, peer: Peer, ready: Ready) -> bool:
        """Compare a few samples: data sets of the same length may differ. Other labels are refused.
        Other numbers are only logged: libraries round in different ways, and transforms draw."""
        found = self._looks.difference(ready.looks)
        if found is None:
            return True
        theirs, ours, exact = found
        whose = self._looks.whose if self._looks.whose != peer.name else "it told before"
        what = (
            f"sample {theirs.index} of {peer.name} is {shown(theirs)}{part(theirs)}, "
            f"that of {whose} is {shown(ours)}"
        )
        hint = (
            "every worker needs the same training set in the same order: sort lists of files, give "
            "random_split a generator with a seed"
        )
        if not exact:
            if peer.id not in self._looks.told:
                self._looks.told.add(peer.id)
                self._out.warn(f"{what}: {hint}, unless a transform draws", peer)
            return True
        self._out.send(peer, Reject(what, hint))
        self._out.warn(f"refused: {what}", peer)
        return False

    # ------------------------------------------------------------------ who gets how much

    def hand_out(self, takers: list[Peer], step: int) -> None:
        """Fill all these up to two leases: first what is due now for all, in the round that follows
        this `step` of the log, then what comes after."""
        if self.ledger is None:
            return
        sizes = self._sizes(takers, step)
        for count in range(1, LEASES_HELD + 1):
            for peer in takers:
                size, ready = sizes[peer.id], peer.ready
                if size and len(peer.leases) < count and ready is not None:
                    joined = self._shares is not None or self._local.used
                    lease = self.ledger.lease(
                        size,
                        ready.least,
                        ready.drop_last,
                        short=ready.batch_size,
                        joined=joined,
                    )
                    if lease is None:
                        return
                    peer.leases.append(lease)

    def _sizes(self, takers: list[Peer], step: int) -> dict[int, int]:
        """The samples of the next rounds by worker: what it asked for, for each local step, or its
        share."""
        asked = {p.id: p.ready.batch_size for p in takers if p.ready is not None}
        self.local_steps = self._next_local_steps(step)
        if self._shares is not None and not self.own:
            sizes = self._sizes_by_speed(self._shares, asked, takers)
        else:
            sizes = {w: n * self.local_steps for w, n in asked.items()}
        if sizes != self._shared and (self._shares is not None or self._local.used):
            for p in takers:
                if sizes[p.id] != self._shared.get(p.id):
                    self.take_back(p, None)  # those of a round to come: of another size
                self._say_share(p, sizes[p.id])
            self._without &= {p.id for p in takers}
            self._shared = sizes
        return sizes

    def _sizes_by_speed(
        self, shares: Shares, asked: dict[int, int], takers: list[Peer]
    ) -> dict[int, int]:
        for p in takers:
            if self._measured.get(p.id) != p.nonce:
                self._measured[p.id] = p.nonce
                shares.forget(p.id)
        if self.local_steps > 1:
            costs = {w: cost for w in asked if (cost := shares.cost(w)) is not None}
            steps = self._local.by_speed(self.local_steps, asked, costs)
            sizes = {w: n * asked[w] for w, n in steps.items()}
            return shares.trying(sizes, {w: Limits(n) for w, n in asked.items()})
        limits = {
            p.id: Limits(p.ready.least, max(p.ready.least, SHARE_TIMES_MAX * p.ready.batch_size))
            for p in takers
            if p.ready is not None
        }
        return shares.sizes(asked, limits)

    def _next_local_steps(self, step: int) -> int:
        """The local steps of the round that follows this step of the log."""
        if not self._local.used or self.ledger is None:
            return 1
        local = self.ledger.steps is not None
        steps = self._local.of_next(self.optimizer_steps(step), local=local)
        if steps > 1:
            self.ledger.begin_steps(step)
        return steps

    def optimizer_steps(self, step: int) -> int:
        """The optimizer steps in the newest state, at this step of the log."""
        return step if self.ledger is None else self.ledger.optimizer_steps(step)

    def share_of(self, worker: int) -> int | None:
        """A worker's samples of a round, where they follow its speed."""
        return self._shared.get(worker)

    def _say_share(self, peer: Peer, size: int) -> None:
        """Log that a worker gets no samples, or gets some again."""
        if not size and peer.id not in self._without:
            self._without.add(peer.id)
            self._out.say(
                f"{peer.name} gets no samples: the others are sooner done without it. It follows, "
                f"and is tried again in {TRY_AGAIN_ROUNDS} rounds",
                peer,
            )
        elif peer.id in self._without and peer.ready is not None and size > peer.ready.least:
            self._without.discard(peer.id)
            self._out.say(f"{peer.name} gets samples again", peer)

    def computed(self, worker: int, samples: int, told_s: float | None, waited_s: float) -> None:
        """Note that a worker's push is whole, `waited_s` after the round's opening. It says that it
        computed these samples in `told_s`."""
        if self._shares is not None and told_s is not None:
            if self._rules.overlap:  # it may have begun in the round before
                waited_s += self._round_s
            seconds = min(max(told_s, waited_s / BELIEVED), waited_s)
            self._shares.took(worker, samples, seconds)

    def computed_late(self, peer: Peer, lease: Lease | None, push: Push, now: float) -> None:
        """A push of a round that went on without this worker says how long it really computed its
        `lease`."""
        if self._shares is None or push.compute_s is None or lease is None:
            return
        _, start, stop = lease
        if 0 < push.samples <= stop - start:
            seconds = min(push.compute_s, now - peer.late_at + self._rules.longest_wait_s())
            self._shares.took(peer.id, push.samples, seconds)

    def count_steps(self, current: Round, now: float) -> None:
        """The round closes: count its optimizer steps, and look whether another number of local
        steps suits the machines better."""
        assert self.ledger is not None
        made = max((m.steps for m in current.members.values() if m.got), default=0)
        self.ledger.count_steps(current.batch, made)
        times = [m.compute_s for m in current.members.values() if m.compute_s is not None]
        self._round_s = seconds = now - current.opened_at
        if times and self._local.took(current.local_steps, seconds, max(times)):
            self._out.say(f"the number of local steps changes: {self._local.why}")

    def computes_still(self, worker: int, samples: int, waited_s: float) -> None:
        """Note that a worker has not pushed these samples, `waited_s` after the round's opening."""
        if self._shares is not None:
            self._shares.took(worker, samples, waited_s)

    # ------------------------------------------------------------------ what comes back

    def stops_sooner(self, peer: Peer, member: Member, worked_off: int) -> None:
        """A worker pushes fewer local steps than it had samples for: the others of its lease come
        back, and are leased again."""
        assert self.ledger is not None
        lease, member.lease = member.lease, self.ledger.split(member.lease, worked_off)
        peer.leases = [member.lease if one == lease else one for one in peer.leases]

    def take_back(self, peer: Peer, current: Round | None) -> None:
        """Take this worker's leases back, but for that of the open round, which is settled at its
        end."""
        self.drop_late(peer)
        self.take_back_new(peer, current)

    def take_back_new(self, peer: Peer, current: Round | None = None) -> None:
        """The same, but for that of what it brings late."""
        held = None
        if current is not None and (member := current.member_of(peer)):
            held = member.lease
        for lease in peer.leases:
            if lease != held and lease not in self._held and self.ledger is not None:
                self.ledger.settle(lease, RETURNED)
        peer.leases = []
        if peer.under_way not in (None, held):
            self.ends_early(peer)
        peer.under_way = None

    def ends_early(self, peer: Peer) -> None:
        """The lease that this worker has under way is in no more rounds; others of it may be."""
        assert self.ledger is not None and peer.under_way is not None
        self.ledger.finish(peer.under_way, PARTLY)
        peer.under_way = None

    def go_on(self, current: Round, worker: int) -> bool:
        """Where leases last over several rounds, and this worker was in the whole of this one: let
        its lease go on. False where it holds the lease no more."""
        member = current.members[worker]
        peer = self._roster.peers.get(member.session)
        if peer is None or self.ledger is None:
            return False
        if not member.goes_on and peer.leases:  # else they were taken back meanwhile
            peer.under_way = member.lease
            del peer.leases[0]
            self.ledger.begin(member.lease, member.unread)
        return peer.under_way == member.lease

    def settle(self, current: Round, worker: int, how: str) -> None:
        """Settle this worker's lease at the end of its round. `how` is in the ledger's words."""
        member = current.members[worker]
        peer = self._roster.peers.get(member.session)
        if peer is not None and peer.under_way == member.lease:
            peer.under_way = None
        if self.ledger is not None:
            if member.goes_on:
                self.ledger.finish(member.lease, how)
            elif how != RETURNED:
                self.ledger.settle(member.lease, how, member.unread)
            elif member.lease not in self._held:
                self.ledger.settle(member.lease, RETURNED)
        if how == DONE:
            self._used_of.add(worker)
        if how != RETURNED and member.unread:
            self._unread_by[worker] = self._unread_by.get(worker, 0) + len(member.unread)
        if peer is not None:
            if member.lease in peer.leases:
                peer.leases.remove(member.lease)
            if not current.whole(member) and member.bad is None:
                self._may_compute_still(peer, member.lease)

    # ------------------------------------------------------------------ what comes late

    def carry(self, current: Round, peer: Peer, now: float) -> None:
        """The round of this worker's lease is over without it, and its gradient may enter a later
        one: it keeps the lease, and no other."""
        member = current.members[peer.id]
        if member.lease in peer.leases:
            peer.leases.remove(member.lease)
        self.take_back_new(peer)
        part = Member(peer, member.lease)
        peer.carried = Carried(current.number, current.step, member.lease, part, current.buckets)
        peer.late_at = now
        self._may_compute_still(peer, member.lease)

    def drop_late(self, peer: Peer) -> None:
        """What this worker brings late comes too late, or is not awaited any more: its lease comes
        back, if nothing of it was bad."""
        carried, peer.carried = peer.carried, None
        if carried is None:
            return
        member = carried.member
        if self.ledger is not None and member.bad is not None:
            self.ledger.settle(member.lease, SKIPPED, member.unread)
        elif self.ledger is not None and member.lease not in self._held:
            self.ledger.settle(member.lease, RETURNED)
        was_complete = carried.is_complete
        for bucket in carried.empty():
            self._out.effects.append(Discard(peer.id, bucket))
        if not was_complete:
            self._may_compute_still(peer, carried.lease)

    def drop_old(self, step: int) -> None:
        """Drop what would be older than it may be in the round that leads to this `step`."""
        most = self._rules.max_staleness
        if not most:
            return
        for peer in self._roster.peers.values():
            if peer.carried is not None and step - peer.carried.step > most:
                self._out.warn(
                    f"the gradient of {peer.name} for round {peer.carried.round} would be more "
                    f"than {most} updates late: its samples are computed again",
                    peer,
                )
                self.drop_late(peer)

    def carried(self) -> dict[int, CarriedOver]:
        """What is carried over now, by worker."""
        if not self._rules.max_staleness:
            return {}
        return {
            peer.id: CarriedOver(peer.carried.round, peer.carried.lease)
            for peer in sorted(self._roster.peers.values(), key=lambda p: p.id)
            if peer.carried is not None
        }

    def _may_compute_still(self, peer: Peer, lease: Lease) -> None:
        """Note that this worker may still compute a lease whose round is over."""
        if lease != OWN and peer.ready is not None and peer.late_with is None:
            peer.late_with = lease

    def hold(self, peer: Peer, now: float) -> None:
        """Hold back what this worker left unfinished. It may have killed the worker: nobody else
        gets it before this is clear."""
        if peer.left_with is not None:
            self._held[peer.left_with] = peer.session, now + HOLD_S

    def release(self, current: Round | None, now: float, session: str | None = None) -> None:
        """Return what was held back of this session, or all whose time is over."""
        for lease, (holder, until) in list(self._held.items()):
            if holder == session or (session is None and now >= until):
                del self._held[lease]
                members = current.members.values() if current is not None else ()
                if self.ledger is not None and all(m.lease != lease for m in members):
                    self.ledger.settle(lease, RETURNED)

    # ------------------------------------------------------------------ what kills

    def computed_by(self, peer: Peer, current: Round | None) -> Lease | None:
        """The lease that this worker computes, of which nothing has come yet: that of the open
        round or, where it has pushed and goes on during the exchange, the next one."""
        if (carried := peer.carried) is not None:
            begun = carried.pushes or carried.is_complete
            return None if begun or carried.lease == OWN else carried.lease
        if current is None or (member := current.member_of(peer)) is None:
            return None
        if member.got and self._rules.overlap and current.local_steps > 1:
            ahead = (lease for lease in peer.leases if lease not in (member.lease, OWN))
            return next(ahead, None)
        return current.computed_by(peer)

    def dies(self, peer: Peer, failed: str | None, current: Round | None) -> bool:
        """Count that this worker died of what it computed: `failed` names the phase of its error,
        or is "" where it fell silent, or None where it did not die, since the same process is back.
        Did it compute something?

        Before its silence is noticed, rounds may close and give it more leases. The one that counts
        is the first that it did not finish."""
        lease = self.computed_by(peer, current)
        if failed:
            lease = lease or peer.left_with
        elif peer.late_with is not None:
            lease = peer.late_with
        if lease is None or failed is None or self.ledger is None:
            return False
        if not failed:
            while len(self._silent) >= SILENT_KEPT:
                del self._silent[next(iter(self._silent))]
            self._silent[peer.nonce] = lease
        others = [p for p in self._roster.workers_ready() if p is not peer]
        spare = len(others) >= WORKERS_TO_SPARE
        self.ledger.died(lease, error=bool(failed), spare=spare, believed=peer.proven)
        return True

    def lives(self, nonce: str) -> None:
        """Note that this process greets again: it did not die of what it computed."""
        lease = self._silent.pop(nonce, None)
        if lease is not None and self.ledger is not None:
            self.ledger.lived(lease)

    # ------------------------------------------------------------------ what is lost

    def say_lost(self) -> None:
        """Log the names of samples that are skipped since the last call."""
        if self.ledger is None:
            return
        for lost in self.ledger.take_news():
            self._out.warn(f"skipped: {self._name_of(lost.lease)}: {LOST[lost.why]}")

    def hopeless(self) -> str | None:
        """Why it makes no sense to go on. What could not be read counts only if most workers could
        not: one worker alone may have a broken copy. Where samples were trained on, the word of one
        that has not contributed does not count (see `cannot_read`)."""
        if self.ledger is None:
            return None
        why = self.ledger.hopeless
        if why is None:
            return None
        ready = self._roster.workers_ready()
        agree = [
            p for p in ready if p.id in self._unread_by and (self._counts(p) or not self._trained)
        ]
        theirs = sum(self._unread_by[p.id] for p in agree)
        most, few = self.ledger.most_lost, 2 * len(agree) <= len(ready)
        if self.ledger.too_many_unread and (few or theirs <= most):
            return None
        return f"{why}: {self._first_lost(self.ledger)}"

    @property
    def _trained(self) -> bool:
        """Has anybody trained on samples of this set?"""
        return self.ledger is not None and self.ledger.done + self.ledger.partly > 0

    def _counts(self, peer: Peer) -> bool:
        """Has this worker contributed, in this greeting or an earlier one, or before this server
        was?"""
        return peer.proven or peer.returns or peer.id in self._used_of

    def cannot_read(self, peer: Peer, member: Member) -> str | None:
        """Why this worker's data set cannot be the run's, after a round: of a set that others have
        trained on, it could not read more samples than may be broken, and it has contributed
        nothing. None where it may go on. The next process by its id begins anew."""
        if self.ledger is None or not member.unread or self._counts(peer) or not self._trained:
            return None
        if self._unread_by.get(peer.id, 0) <= self.ledger.most_lost:
            return None
        count = self._unread_by.pop(peer.id)
        return f"{peer.name} could not read {count} samples of the training set, others could"

    def verdict(self) -> tuple[str, bool]:
        """Why the run ends when all epochs are done, and whether that is an error."""
        assert self.ledger is not None
        if self.ledger.skipped and not self._trained:
            skipped = self.ledger.skipped
            return f"no sample could be trained on, all {skipped} were skipped", True
        return "all epochs are done", False

    def lost_by_name(self) -> list[str]:
        """The first ranges that were skipped since they killed, could not be read or were dropped:
        which samples, and why."""
        if self.ledger is None:
            return []
        return [f"{self._name_of(r.lease)}: {LOST[r.why]}" for r in self.ledger.lost]

    def _name_of(self, lease: Lease) -> str:
        epoch, start, stop = lease
        where = f"place {start}" if stop - start == 1 else f"places {start} to {stop - 1}"
        what = f"{where} of epoch {epoch}'s {'draws' if self._draws else 'order'}"
        if self.name_samples is None or self.ledger is None or self._draws:
            return what
        return f"{self.name_samples(self.ledger.samples, lease)} ({what})"

    def _first_lost(self, ledger: Ledger) -> str:
        names = [
            self.name_samples(ledger.samples, lost.lease)
            if self.name_samples is not None and not self._draws
            else f"{lost.lease[1]} to {lost.lease[2] - 1} of epoch {lost.lease[0]}"
            for lost in ledger.lost[:4]
        ]
        return f"first {'; '.join(names)}"


Told = list[tuple[Peer, Ready]]


def _most(told: Told, key: Callable[[Ready], Any]) -> Told:
    """Those whose report has the key that most have; of equally many, the lowest's."""
    groups: dict[Any, Told] = {}
    for peer, ready in told:
        groups.setdefault(key(ready), []).append((peer, ready))
    return max(groups.values(), key=lambda g: (len(g), -g[0][0].id), default=[])
