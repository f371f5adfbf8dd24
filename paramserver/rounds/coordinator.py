"""Decides which peers belong to a run, which round is open, when it closes and why.

`Rounds.handle` takes an event (`events`) and `now` (seconds, any origin). It returns the effects to
carry out, in their order (`effects`): all that follows from the event, until nothing more does.
Nothing in this package uses a socket, a clock, a thread or a log. Two rules:

1. Only `Rounds` decides what enters the log of updates. The server carries out its effects.
2. Every wait has a deadline. When it passes, a sentence says for whom the run waited, and why.

`Rounds` keeps the life of the open round, and calls the parts that own the rest. A part does not
know `Rounds`. It changes its own state and the fields of peers and members, returns what follows
from that for other parts, and adds messages and sentences to the `Outcome`:

    roster      who is here, under which id; who is ready, silent, or gets nothing
    origin      whose state the run begins with, or goes on with after a restart
    leases      who gets which samples, and what becomes of those that are not done
    round       what is expected of the members of the open round, and what has come
    late        what comes too late for its round, and enters a later one
    waits       how long rounds wait for whom, and whom they leave out
    evaluations who evaluates, while the others wait
    shards      who averages which buckets, and whether it is safe to close a round
    relays      who hands on to whom what other hosts average
    snapshots   who gives the run's state, who takes it, and what comes of it
    divergence  whose weights are not those of the others
    disagreement  whose gradients are not like the others', where averages are robust
    times       where each worker's time went
    log         the newest state, and the states from which a replica can follow
    ending      why and when the run ends
    phases      what the run does or waits for, in words

`states` holds the states of a peer and of the run, and which message counts in which of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import msgspec

from paramserver.protocol import messages as wire
from paramserver.rounds import states
from paramserver.rounds.departures import FAILED, LEFT, SILENT, Departure
from paramserver.rounds.disagreement import CHECK, Disagreement
from paramserver.rounds.divergence import Divergence
from paramserver.rounds.effects import (
    Closed,
    Declined,
    Discard,
    Dismissed,
    Effect,
    Employed,
    Ended,
    Publish,
    Remove,
    Retired,
    Start,
    Void,
)
from paramserver.rounds.ending import Ending
from paramserver.rounds.evaluations import Evaluations
from paramserver.rounds.events import (
    Alive,
    Compared,
    Dropped,
    Event,
    Failed,
    Forgotten,
    Greeted,
    Heard,
    Made,
    Offered,
    PeerEvent,
    Placed,
    Pushed,
    PushRefused,
    Relinked,
    ShardEvent,
    StoodStill,
    Stop,
    Tick,
    Told,
)
from paramserver.rounds.events import Message as Words
from paramserver.rounds.late import Carried, weight_of_late
from paramserver.rounds.leases import Leases
from paramserver.rounds.ledger import DONE, PARTLY, RETURNED, Ledger, Places
from paramserver.rounds.log import Log
from paramserver.rounds.looks import DataSet
from paramserver.rounds.origin import Origin
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.outliers import Norms
from paramserver.rounds.phases import Phases
from paramserver.rounds.roster import Peer, Roster
from paramserver.rounds.round import NEXT, Member, Round, Tally, differing, worked_off
from paramserver.rounds.rules import Rules
from paramserver.rounds.shards import SMALL_BYTES, Shards
from paramserver.rounds.snapshots import EMPTY, Off, SideMessage, Snapshot, Snapshots, Taken
from paramserver.rounds.states import GREETED, REPLICA, WAITING
from paramserver.rounds.times import Clocks
from paramserver.rounds.waits import Waits
from paramserver.words import printable


class Rounds:
    """The state of a run as its server sees it; see the module's docstring.

    `count_buckets` returns the number of buckets of a layout (`bucket.plan`). `name_samples` names
    the samples in a range of an epoch's order, for a set of that many samples; `places` says where
    they lie in the order of another epoch. `run` is the run's id. `recovery` is given where the
    server was started again in the middle of a run: it names the newest step that anybody may hold
    (`Recovery`), and the most advanced replica that comes back has the run's state; `data_set` is
    what the server before had noted of the workers' data sets. If nobody comes back, the run is
    `deserted`; if it is stopped before that, it is `put_off`. `sizes` tells the bytes of the
    buckets of a layout, and which of them only the server can average.
    """

    def __init__(
        self,
        rules: Rules,
        nonce: str,
        now: float,
        count_buckets: Callable[[wire.Layout], int],
        *,
        run: str = "",
        recovery: str | None = None,
        data_set: DataSet | None = None,
        name_samples: Callable[[int, wire.Lease], str] | None = None,
        places: Places | None = None,
        sizes: Callable[[wire.Layout], tuple[tuple[int, ...], frozenset[int]]] | None = None,
        make_shards: type[Shards] = Shards,
    ) -> None:
        self.rules = rules
        self.nonce = nonce
        self._run = run
        self.state = states.STARTING if recovery is None else states.RETURNING
        self.started = False  # the first round has opened
        self.put_off = False
        self.round: Round | None = None
        self.tallies: dict[int, Tally] = {}  # by worker
        self._rounds = 0  # that were opened
        self._began = 0  # where leases last over several: the first of those that are out
        self._sets_others: set[int] = set()  # workers that set other values by hand, and were named
        self._bad_rounds = 0  # in a row that brought only gradients that were refused
        self._to_note: tuple[Round, wire.Close, dict[int, str], float] | None = None
        self.log = Log()
        self.clocks = Clocks()
        self.norms = Norms(rules.max_norm_ratio)
        self.disagreement = Disagreement()
        self._out = out = Outcome()
        self._roster = roster = Roster(rules.max_workers)
        self._origin = Origin(rules, now, count_buckets, recovery)
        self._leases = Leases(
            rules, roster, out, name_samples=name_samples, places=places, known=data_set
        )
        self._snapshots = Snapshots(roster, out, rules.heartbeat_timeout, rules.idle_timeout, now)
        self._divergence = Divergence(roster, out)
        self._ending = Ending(rules, roster, now)
        self._waits = Waits(rules, roster, out, self._ending)
        self._evaluations = evaluations = Evaluations(rules, out)
        self.shards = make_shards(rules, roster, out)
        self._sizes = sizes
        self._before = (0, "")  # the state before the newest close
        self._holders: set[str] = set()
        """Sessions of those that said before that close that they hold what other shards made."""
        self._phases = Phases(
            rules, roster, self._leases, self._snapshots, self._ending, evaluations, self._origin
        )
        self.peers, self.digests = roster.peers, roster.digests
        self.deaf, self.prompted = roster.deaf, roster.prompted

    # ------------------------------------------------------------------ what happens

    def handle(self, event: Event, now: float) -> list[Effect]:
        """The effects of an event, and of all that follows from it."""
        if self._to_note is not None:
            self._note_closed()
        if isinstance(event, PeerEvent):
            peer = self.peers.get(event.session)
            changed = peer is not None and self._take_of(peer, event, now)
        elif isinstance(event, ShardEvent):
            changed = event.shard in self.shards.live and self._take_of_shard(event, now)
        else:
            changed = self._take(event, now)
        if changed:
            while self._advance(now):
                pass
            if type(event) is Tick:
                self._say_what_is_due(now)
        return self._out.take()

    def _take(self, event: Event, now: float) -> bool:
        """Note what happened. May more follow from it?"""
        match event:
            case Tick():
                return self._tick(now)
            case Greeted():
                return self._greet(event, now)
            case Stop():
                return self._stop(event, now)
            case Alive():
                self._origin.alive(event.nonce, now)
                return False
            case StoodStill():
                self._ending.stood_still(event.seconds)
                self._origin.stood_still(event.seconds)
                return False
            case Forgotten():
                self.log.forget_before(event.step)
                if event.own > self._before[0]:
                    self._holders.clear()  # they cannot get the close either
                return False
            case Compared():
                self._name_the_odd(event)
                return False
        raise TypeError(f"{event!r} is no event")

    def _take_of_shard(self, event: ShardEvent, now: float) -> bool:
        """The same for an event of a shard."""
        shard, current = self.shards.live[event.shard], self.round
        shard.last_seen = now
        if isinstance(event, Failed):
            self._lose_shard(event.shard, event.reason, now)
            return True
        if isinstance(event, Made) and current is not None and current.number == event.round:
            if self.shards.owner(event.bucket) == event.shard:
                current.unmade.pop(event.bucket, None)
            return not current.unmade
        return False

    def _take_of(self, peer: Peer, event: PeerEvent, now: float) -> bool:
        """The same for an event of a peer."""
        match event:
            case Pushed():
                peer.last_seen = now
                self.shards.spoke(peer.session, now)
                return self._push(peer, event, now)
            case Heard():
                peer.last_seen = now
                return False
            case PushRefused():
                peer.last_seen = now
                self.shards.spoke(peer.session, now)
                self._leases.computed_late(peer, peer.late_with, event.push, now)
                peer.late_with = None  # it is done with that
                if self._is_apart(peer, event.push):
                    self._takes_its_step(peer, event.push.pair, now)
                    return True
                self._out.send(peer, wire.Refused(round=event.push.round, reason=event.reason))
                return False
            case Told():
                self.shards.spoke(peer.session, now)
                return self._told(peer, event.message, now)
            case Placed():
                self.shards.placed(peer.session, event.address)
                return False
            case Offered():
                shard = self.shards.offered(peer, now)
                if shard is not None:
                    self._out.effects.append(Employed(shard.number, peer.session))
                    self._out.say(f"{peer.host} ({shard.host}) carries shard {shard.number}")
                elif self.shards.declines(peer):
                    self._out.effects.append(Declined(peer.session))
                return False
            case Relinked():
                self._joins_anew(peer, "was cut off", now)
                return True
            case Dropped():
                self._leaves(peer, event.reason, now, error=event.error, finished=False)
                return True
        raise TypeError(f"{event!r} is no event")

    def _told(self, peer: Peer, message: Words, now: float) -> bool:
        """Handle a message that counts in the peer's state; another one is answered or ignored."""
        heeded = states.HEEDED.get(type(message))
        if heeded is not None and not (peer.role in heeded[0] and peer.state in heeded[1]):
            if isinstance(message, wire.Ready) and (peer.role != "worker" or peer.join is None):
                self._out.send(peer, wire.Reject("ready before joining"))
            elif isinstance(message, wire.Adopted) and peer.state == GREETED:
                # Its snapshot was called off while this was on its way.
                self._out.send(peer, wire.Greet(join=True))
            return False  # a peer that lost its place sends it again when it has it back
        match message:
            case wire.Join():
                return self._join(peer, message, now)
            case wire.Ready():
                return self._ready(peer, message, now)
            case wire.Unready():
                return self._unready(peer, message, now)
            case wire.Unreadable():
                return self._unreadable(peer, message, now)
            case wire.NextLease():
                return self._next_lease(peer, message, now)
            case wire.Evaluating():
                return self._evaluates(peer, message, now)
            case wire.StopRun():
                return self._stopped_by(peer, message, now)
            case wire.Fetch():
                return self._fetch(peer, message, now)
            case wire.Digest():
                return self._digest(peer, message, now)
            case wire.Stand():
                return self._stand(peer, message, now)
            case wire.Goodbye():
                return self._goodbye(peer, message, now)
            case wire.Reached():
                return self._reached(peer, message, now)
            case wire.Holds():
                return self._says_it_holds(peer, message)
            case wire.Lacks():
                self.shards.relays.lacks(peer, now)
                return False
            case wire.HandsOn():
                self.shards.relays.hands_on(peer, message.folder)
                return False
            case wire.Listens():
                self.shards.relays.listens(peer, message.problem, now)
                return False
            case _:
                return self._snapshot_goes_on(peer, message, now)

    def _tick(self, now: float) -> bool:
        if self.ended is not None:
            self._lose_silent_shards(now)  # who waits for what they keep has to hear of it
            return False
        timeout = self.rules.heartbeat_timeout
        for peer in self._roster.silent(now, timeout):
            silent = f"silent for {now - peer.last_seen:.1f} s"
            self._out.warn(f"{peer.name} is gone: {silent}")  # so seldom that each is logged
            self._dies(peer, "", now)
            self._remove(peer, f"gone, {silent}", now)
        for peer in self._evaluations.overdue(now):
            self._evaluations.ends(peer, self.round, now)
        awaited = self._enough(self.workers_ready(), now)
        if (off := self._snapshots.overdue(now, awaited=awaited)) is not None:
            self._abort_snapshot(off, now)
        self._lose_silent_shards(now)
        self._close_if_due(now)
        self._look_for_the_overdue(now)
        self._look_for_overdue_shards(now)
        if self.ending is None and not self.coming_back:
            self.shards.look(now)
            self.shards.look_for_relays(now)
        self._leases.release(self.round, now)
        self._give_up_if_due(now)
        return True

    def _say_what_is_due(self, now: float) -> None:
        self._phases.say_pause(self._out, self.state, self.started, self.optimizer_steps, now)
        for sentence in self._out.sentences.left_out(now):
            self._out.warn(sentence)

    def _turn(self, cause: str) -> None:
        self.state = states.after(states.RUN, self.state, cause)

    # ------------------------------------------------------------------ peers come and go

    def declines(
        self, greeting: Greeted, now: float, reachable: Callable[[str], bool] = lambda session: True
    ) -> str | None:
        """Why the server declines this greeting; None where it accepts it.

        `reachable(session)` tells whether that peer's connection still stands; a peer without one
        loses its id to a new process at once.
        """
        return self._roster.declines(greeting, now, reachable)

    def _greet(self, greeting: Greeted, now: float) -> bool:
        nonce, holder = greeting.nonce, self._roster.holder(greeting)
        if holder is not None:
            self._dies(holder, None if holder.nonce == nonce else "", now)
            self._remove(holder, "greeted again", now)
        self._leases.lives(nonce)
        peer = self._roster.enter(greeting, holder, now)
        self._origin.greeted(nonce)
        if peer.role == "worker":
            self._out.say(f"{peer.name} is here", peer)
        return True

    def _join(self, peer: Peer, message: wire.Join, now: float) -> bool:
        """A replica reports where it stands. Answer Admit, now or when there is an origin."""
        self._take_out(peer, "joined again", now)
        peer.join = message
        peer.turn(states.JOINED)
        second = self._origin.is_second(peer, self._roster, begun=self.log.begun)
        if second is not None:
            self._reject(peer, second)
            return True
        if not self.knows(message.step, message.lineage) and self._choose_origin(now):
            return True  # all who waited have their answer
        if self.layout is not None and peer.state == WAITING:
            self._admit(peer)
        return True

    def _fetch(self, peer: Peer, message: wire.Fetch, now: float) -> bool:
        """A replica asks for updates that were published (see `_look_for_the_deaf`). If they are no
        longer kept, it may join again."""
        self.shards.relays.lacks(peer, now)
        if self.may_fetch(peer.session, message):
            self._roster.fetched(peer, self.step)
            return False
        if peer.join is None:
            return False
        self._take_out(peer, "fell behind the kept updates", now)
        self._out.send(peer, wire.Admit(action="behind", step=self.step, lineage=self.lineage))
        return True

    def _stand(self, peer: Peer, message: wire.Stand, now: float) -> bool:
        """The observer has applied everything up to a step, and may have kept what is to stay."""
        peer.stands_at = message.step
        if message.kept:
            peer.kept_at = message.step
        self._ending.observer_moves(now)
        return True

    def _digest(self, peer: Peer, message: wire.Digest, now: float) -> bool:
        """A replica reports the digest of its weights. Those that differ take a snapshot."""
        for wrong in self._divergence.told(peer, message, self.step):
            why = "has other weights than the rest"
            cause = self._divergence.cause(wrong)
            self._out.warn(f"{wrong.name} {why}{cause}: it takes a snapshot", wrong)
            self._snapshots.gave_wrong(wrong)
            self._joins_anew(wrong, why, now)
        return True

    def _goodbye(self, peer: Peer, message: wire.Goodbye, now: float) -> bool:
        """A peer leaves. Its digest is of weights at a step, which only a replica can know. With an
        `error` an exception or a broken rule ends its part; `failed`: it died of its lease."""
        m, step = message, message.step
        if m.failed in wire.FAILURES and m.lease == (self._computes(peer) or peer.left_with):
            self._dies(peer, m.failed, now)
        if m.digest and peer.believed and peer.replica_since <= step <= self.step:
            self.digests[peer.id] = (peer.name, step, m.digest)
        self._leaves(peer, m.reason, now, error=m.error, finished=m.is_done)
        return True

    def _dies(self, peer: Peer, failed: str | None, now: float) -> None:
        """A worker may have died of its lease (see `Leases.dies`). That counts as work: after a few
        such deaths the samples are skipped, and the run goes on."""
        if self._leases.dies(peer, failed, self.round):
            self._ending.works(now)

    def _leaves(self, peer: Peer, reason: str, now: float, *, error: bool, finished: bool) -> None:
        """A peer leaves; `finished`: its work is done. When all have finished the last one ends the
        run; where workers bring their own samples, whatever became of the others."""
        if not self.ended:
            self._out.say(f"{peer.name} left: {reason}", peer)
        how, took_part = FAILED if error else LEFT, peer.state == REPLICA or peer.proven
        for shard in self.shards.of(peer.session):
            self._retire_shard(shard.number, peer, now)
        self._remove(peer, "left", now, how=how, reason=reason, finished=finished)
        if how != LEFT or not (finished and took_part and self.started):
            return
        own, departures = self._leases.own, self._ending.departures
        done = departures.counts if own else departures.all_finished
        if done and not self._roster.has_workers:
            self._begin_end(*departures.verdict(own=own), now)

    def _becomes_replica(self, peer: Peer, cause: str) -> None:
        self._roster.becomes_replica(peer, cause, self.step)
        if peer.role == "worker":
            self._ending.departures.joined(peer.id)
            if peer.returns:  # it was part of the run before this server was
                self._ending.departures.contributes(peer.id)

    # ------------------------------------------------------------------ shards

    def _lose_shard(self, number: int, why: str, now: float) -> None:
        """A shard is gone: nothing that only it has is waited for."""
        shard = self.shards.lose(number, now)
        if shard is None:
            return
        self._out.effects.append(Dismissed(number))
        if not self.ended:
            self._out.warn(
                f"shard {number} on {shard.name} is gone: {why}; others average its part"
            )
        if self.round is not None and number in self.round.owners:
            self._void(f"shard {number} on {shard.name} is gone")

    def _lose_silent_shards(self, now: float) -> None:
        for shard in self.shards.silent(now):
            self._lose_shard(shard.number, f"silent for {now - shard.last_seen:.1f} s", now)

    def _retire_shard(self, number: int, owner: Peer, now: float) -> None:
        """A shard's worker leaves. Others may still lack what it has averaged last."""
        shard = self.shards.retire(number, now)
        self._out.effects.append(Retired(number))
        if not self.ended:
            self._out.say(f"shard {number} on {shard.name} ends with {owner.name}")
        if self.round is not None and number in self.round.owners:
            self._void(f"shard {number} on {shard.name} ends")

    def _reached(self, peer: Peer, message: wire.Reached, now: float) -> bool:
        """A peer has a channel to a shard, or none. Without one it has no part in a round in which
        that shard has."""
        if not self.shards.reached(peer, message.shard, message.problem):
            return False
        current = self.round
        member = None if current is None else current.member_of(peer)
        lost = message.problem and current is not None and message.shard in current.owners
        if member is not None and lost:
            self._out_of_round(member, f"does not reach shard {message.shard}", now)
        return True

    def _says_it_holds(self, peer: Peer, message: wire.Holds) -> bool:
        """A replica has the averages that other shards than the server made in this round."""
        current = self.round
        if current is None or current.number != message.round or current.closing_at is None:
            return False
        current.holders.add(peer.session)
        return True

    def _is_held(self, current: Round, now: float) -> bool:
        """May the complete round be closed, since its averages are held elsewhere than by the
        shards that made them? Ask who has them, once they are made."""
        if not current.made_elsewhere():
            return True
        if current.unmade:
            return False
        if current.closing_at is None:
            current.closing_at = now
            closing = self._closing()
            assert closing is not None
            self._out.effects.append(Publish(closing))
        return not self.shards.unheld(current)

    def _closing(self) -> wire.Closing | None:
        current = self.round
        if current is None or current.closing_at is None:
            return None
        return wire.Closing(
            nonce=self.nonce,
            round=current.number,
            step=current.step,
            buckets=current.made_elsewhere(),
        )

    def _look_for_overdue_shards(self, now: float) -> None:
        """Give up shards that keep a round waiting."""
        if self.round is None:
            return
        if not self._roster.has_replica:
            if self.round.closing_at is not None:
                self._void("nobody is left who could have its averages")
            return
        for shard, why in self.shards.overdue(self.round, now, self._waits.left_s(now)):
            self._lose_shard(shard.number, why, now)

    def _choose_shards(self) -> None:
        """Choose the map of the next round. What is carried over lies at the shards of the map
        before: it is dropped with that."""
        if self.shards.choose(self.workers_ready()):
            for peer in self.peers.values():
                self._leases.drop_late(peer)

    def may_fetch(self, session: str, message: wire.Fetch) -> bool:
        """Can this peer follow by fetching updates? Who holds the averages of the newest one may
        miss its close only, and can get that even if a shard is gone."""
        if self.knows(message.step, message.lineage):
            return True
        return session in self._holders and (message.step, message.lineage) == self._before

    def _take_out(self, peer: Peer, why: str, now: float) -> None:
        """Expect nothing of this peer any more, until it joins again."""
        self.shards.relays.taken_out(peer)
        self._holders.discard(peer.session)
        if self.round is not None:
            self.round.holders.discard(peer.session)
        if (off := self._snapshots.without(peer, why)) is not None:
            self._abort_snapshot(off, now)
        self._snapshots.taken_out(peer, now)
        self._evaluations.ends(peer, self.round, now)
        if self.round and (member := self.round.member_of(peer)):
            self._out_of_round(member, why, now)
        self._leases.take_back(peer, self.round)
        self._leases.release(self.round, now, peer.session)
        self._ending.taken_out(peer, why)
        self._roster.take_out(peer)
        self._roster.not_ready(peer, started=self.started)

    def _joins_anew(self, peer: Peer, why: str, now: float) -> None:
        """Take a peer out, and ask it to join again."""
        self._take_out(peer, why, now)
        self._out.send(peer, wire.Greet(join=True))

    def _remove(
        self,
        peer: Peer,
        why: str,
        now: float,
        *,
        how: str = SILENT,
        reason: str = "",
        finished: bool = False,
    ) -> None:
        """Forget a peer that is gone. `how` it went is in the words of `Departures`."""
        self._take_out(peer, why, now)
        for shard in self.shards.of(peer.session):
            self._lose_shard(shard.number, f"{peer.name} is gone", now)
        self.shards.forget(peer.session)
        self._roster.remove(peer)
        if peer.role == "worker":
            went = Departure(peer.name, how, reason, now, finished)
            self._ending.departures.went(peer.id, went)
        self._out.effects.append(Remove(peer.session))

    def _look_for_the_deaf(self) -> None:
        for peer in self._roster.find_deaf(self.step):
            self._out.warn(
                f"{peer.name} fetches nearly every update: it seems to get nothing of what is "
                "published (is the port after the server's blocked?); it gets them by its own link "
                "instead",
                peer,
            )

    # ------------------------------------------------------------------ the first state

    @property
    def coming_back(self) -> bool:
        """Is this server still waiting for those who hold its run?"""
        return self.state == states.RETURNING

    def awaits_returning(self, now: float) -> bool:
        """After a restart: may a process of this run be there that has not greeted yet?"""
        return self._origin.awaits(now)

    def _await_recovery(self, now: float) -> None:
        """Go on with the newest state, when all who may hold it are back."""
        peer = self._origin.returned(self._roster, now)
        if peer is None:
            return
        assert peer.join is not None
        if not self._become_origin(peer, peer.join):
            peer.returns = False  # it was refused: the next one may be taken
            return
        self._ending.works(now)
        self.log.begun = self.started = self._ending.departures.goes_on = self.step > 0

    def _choose_origin(self, now: float) -> bool:
        """Begin with the state of a peer that waits, if nobody here holds one, and no update would
        be lost. Was there one?"""
        if self.log.begun or self.round is not None or self.coming_back:
            return False
        if self._roster.has_replica:
            return False
        for peer in self._origin.candidates(self._roster, now):
            assert peer.join is not None
            if self._become_origin(peer, peer.join):
                return True
        return False

    def _become_origin(self, peer: Peer, message: wire.Join) -> bool:
        """Begin the run, or go on, with this peer's state. Was that possible?"""
        reject = self._origin.refuses(message)
        if reject is not None:
            self._reject(peer, reject)
            return False
        reject = self._leases.begin(message.step, message.ledger)
        if reject is not None:
            self._reject(peer, reject)
            return False
        peer.proven = True
        self._origin.becomes(peer, message)
        if self._sizes is None:
            self.shards.begin((SMALL_BYTES,) * self._origin.buckets, frozenset())
        else:
            self.shards.begin(*self._sizes(message.layout))
        self.log.begin(message.step, message.lineage)
        self._becomes_replica(peer, states.ADMITTED)
        self._out.effects.append(Start(message.layout, message.step))
        self._out.send(peer, wire.Admit(action="origin", step=self.step, lineage=self.lineage))
        if self.coming_back:
            self._out.say(
                f"the run goes on after step {self.optimizer_steps}, where {peer.name} stands"
            )
        else:
            self._out.say(f"the first state comes from {peer.name}, at step {self.optimizer_steps}")
        self._turn(states.ORIGIN)
        for other in self._roster.in_state(WAITING):
            self._admit(other)
        return True

    def _admit(self, peer: Peer) -> None:
        """Tell a peer that waits how it gets the run's state, or why it cannot take part."""
        assert peer.join is not None
        reject = self._origin.differs(peer)
        if reject is not None:
            self._reject(peer, reject)
            return
        believed = not peer.wrong and peer.id not in self._snapshots.disbelieved
        if self.knows(peer.join.step, peer.join.lineage) and believed:
            self._becomes_replica(peer, states.ADMITTED)
            action = "follow"
        else:
            action = "adopt"  # the peer waits until no round is open
        self._out.send(
            peer,
            wire.Admit(
                action=action,
                step=self.step,
                lineage=self.lineage,
                missed=peer.missed,
                first=self._origin.name,
            ),
        )

    def _reject(self, peer: Peer, why: wire.Reject) -> None:
        self._out.send(peer, why)
        peer.turn(states.REJECTED)

    # ------------------------------------------------------------------ samples

    def _ready(self, peer: Peer, message: wire.Ready, now: float) -> bool:
        """A worker waits for samples."""
        if not self._leases.admits(peer, message, started=self.started):
            return False
        peer.left_with = None
        self._leases.release(self.round, now, peer.session)
        self._roster.is_ready(peer, message, now)
        self._ending.comes_to_work(now)
        return True

    def _unready(self, peer: Peer, message: wire.Unready, now: float) -> bool:
        """A worker left its loop. It takes no part until it is ready again. What it left unfinished
        may have killed it: nobody else gets that before this is clear."""
        peer.left_with = self._computes(peer)
        if message.unfinished:
            self._leases.hold(peer, now)
        if self.round and (member := self.round.member_of(peer)):
            self._out_of_round(member, "left its loop", now)
        self._leases.take_back(peer, self.round)
        self._roster.not_ready(peer, started=self.started)
        return True

    def _unreadable(self, peer: Peer, message: wire.Unreadable, now: float) -> bool:
        """A worker cannot read any sample of its lease."""
        current = self.round
        member = None if current is None else current.member_of(peer)
        if (carried := peer.carried) is not None and carried.round == message.round:
            if carried.pushes or carried.lease == wire.OWN:
                return False
            carried.member.unread = tuple(range(carried.member.size))
            carried.refuse("no sample of its lease can be read")
            peer.late_with = None
            self._let_in(now)
            return True
        if current is None or member is None or current.number != message.round:
            return False
        if member.out is None and not member.got and member.lease != wire.OWN:
            member.unread = tuple(range(member.size))
            member.bad = "no sample of its lease can be read"
            self._out_of_round(member, member.bad, now)
        return True

    def _next_lease(self, peer: Peer, message: wire.NextLease, now: float) -> bool:
        """A worker has made all steps with its lease, which was in rounds before this one."""
        current = self.round
        member = None if current is None else current.member_of(peer)
        if current is None or member is None or current.number != message.round:
            return False
        if not member.goes_on or member.out is not None or member.got:
            return False
        if self._takes_its_step(peer, NEXT, now):
            peer.late_with = None
            current.leaves_lease(member)
            current.look_for_quorum(now)
            for bucket in range(self._origin.buckets):
                self._out.effects += current.advance(bucket, now)
        return True

    def _is_apart(self, peer: Peer, push: wire.Push) -> bool:
        """Was this push refused because its worker is in another place of its loop than others?"""
        current = self.round
        member = None if current is None else current.member_of(peer)
        if current is None or member is None or current.number != push.round:
            return False
        return member.out is None and current.apart(peer, push.pair) is not None

    def _takes_its_step(self, peer: Peer, pair: str, now: float) -> bool:
        """A worker steps a `pair` in the open round, or asks for its next lease (`NEXT`). Of two in
        unlike places of their loops the one that came later is sent away, or the one of which
        nothing is in the log. Is it still here?"""
        current = self.round
        assert current is not None
        if not current.began:
            return True
        why = current.apart(peer, pair)
        if why is not None:
            self._send_away(peer, why, now)
            return False
        before, step = current.first, current.pair
        if before is None or (peer.proven and not before.proven):
            current.first, current.pair = peer, pair
        if before is not None and step != pair and before.session in self.peers:
            self._send_away(before, current.apart(before, step or NEXT) or "", now)
        return True

    def _send_away(self, peer: Peer, why: str, now: float) -> None:
        hint = (
            "every worker's loop makes the same steps in the same order: what decides about them "
            "must be the same everywhere, as cluster.step is"
        )
        left = "it made another step than the others"
        self._reject_in_run(peer, wire.Reject(why, hint), left, now)

    def _reject_in_run(self, peer: Peer, why: wire.Reject, left: str, now: float) -> None:
        """Send a worker away that takes part; `left` is how it left, for people."""
        self._out.warn(f"{why.reason}: {peer.name} is sent away", peer)
        self._out.send(peer, why)
        self._leaves(peer, left, now, error=True, finished=False)

    def _send_away_who_cannot_read(self, members: Collection[Member], now: float) -> None:
        """The samples that a worker could not read are skipped. One that has brought nothing and
        reads next to nothing of a set that others have read would have all of it skipped."""
        for member in members:
            peer = self.peers.get(member.session)
            if peer is not None and (why := self._leases.cannot_read(peer, member)) is not None:
                hint = "look whether its copy of the training set is whole"
                left = "it could not read the training set"
                self._reject_in_run(peer, wire.Reject(why, hint), left, now)

    def _end_leases(self) -> None:
        """All members of the open round ask for their next leases: settle those that they had."""
        current = self.round
        assert current is not None
        for worker in current.members:
            self._leases.settle(current, worker, DONE)
        self.round = None
        self._turn(states.NEXT)
        self._out.effects.append(Void(current.number))

    def _going_on(self) -> list[Peer]:
        """The workers whose leases go on in the next round. If too few are left for one, their
        leases end, and others may take part."""
        if self.layout is None or not self.layout.pairs:
            return []
        found = [p for p in self.workers_ready() if p.under_way is not None]
        if len(found) >= self.rules.min_workers:
            return found
        for peer in found:
            self._leases.ends_early(peer)
        return []

    def _evaluates(self, peer: Peer, message: wire.Evaluating, now: float) -> bool:
        """A worker evaluates, or is done with it."""
        if message.on:
            self._evaluations.begins(peer, now)
            return False
        return self._evaluations.ends(peer, self.round, now)

    def _computes(self, peer: Peer) -> wire.Lease | None:
        """The lease that this worker computes, if nothing of it has come yet."""
        return self._leases.computed_by(peer, self.round)

    # ------------------------------------------------------------------ snapshots

    def _snapshot_goes_on(self, peer: Peer, message: SideMessage, now: float) -> bool:
        """One side of the running snapshot sent a part of it, refuses it, or holds it."""
        end = self._snapshots.told(peer, message, self.step, self.lineage, now)
        if isinstance(end, Off):
            self._abort_snapshot(end, now)
        elif isinstance(end, Taken):
            self._becomes_replica(peer, states.ADOPTED)
            self._turn(states.TAKEN)
            self._ending.observer_moves(now)
            self._out.say(f"{peer.name} took a snapshot of step {self.optimizer_steps}", peer)
        return end is not None

    def _may_take_snapshot(self, now: float) -> Collection[str]:
        return self._snapshots.may_take(now, in_vain=bool(self._waits.overdue_rounds))

    def _start_snapshot(self, roles: Collection[str], now: float) -> bool:
        """Begin a snapshot, if none is under way, for a peer of these roles. Is one now?"""
        if self.snapshot is None and self._snapshots.begin(roles, self.step, self.lineage, now):
            self._turn(states.GIVEN)
        return self.snapshot is not None

    def _abort_snapshot(self, off: Off, now: float) -> None:
        empty = self._snapshots.call_off(off, now, begun=self.log.begun)
        self._turn(states.OFF)
        if empty is not None:
            self._joins_anew(empty, EMPTY, now)

    # ------------------------------------------------------------------ the open round

    def _advance(self, now: float) -> bool:
        """Close a complete round; then start what can start: a snapshot, a round, the end. May more
        follow?"""
        if self.ended is not None:
            return False
        if self.ending is not None:
            under_way = self._start_snapshot(("observer",), now)
            empty = self._snapshots.disbelieved
            if not (under_way or self._ending.awaits_observer(self.log, empty, now)):
                self._end()
            return False
        if self.coming_back:
            self._await_recovery(now)
        self._choose_origin(now)
        if self.state in (states.RETURNING, states.STARTING):
            return False
        if self.round is not None and self.round.complete and self.round.is_next:
            self._end_leases()
        if self.round is not None:
            if not (self.round.complete and self._is_held(self.round, now)):
                return False
            close, before = self._settle(now), len(self._out.effects)
            hopeless = self._bad_rounds >= self.rules.max_bad_rounds
            following = None if hopeless else self._try_open(now)
            # The close goes out before what follows: the giver of a snapshot of this step needs it.
            closed = Closed(msgspec.structs.replace(close, open=following))
            self._out.effects.insert(before, closed)
            if hopeless:
                why = "rounds in a row brought nothing but gradients that had to be refused"
                self._begin_end(f"{self._bad_rounds} {why}: {close.reason}", True, now)
                return True
        elif (following := self._try_open(now)) is not None:
            self._out.effects.append(Publish(following))
        if self._let_in(now):
            return True  # nobody else may be in it
        self._leases.say_lost()
        if (broken := self._leases.hopeless()) is not None:
            self._begin_end(broken, True, now)
        elif self.round is None and self.snapshot is None and self._leases.finished:
            self._begin_end(*self._leases.verdict(), now)
        return self.ending is not None

    def _try_open(self, now: float) -> wire.Open | None:
        """Start a snapshot, or open the next round, where one can start."""
        if self.snapshot is not None or self.round is not None or self._leases.finished:
            return None
        self._choose_shards()
        if going_on := self._going_on():  # nobody else enters before their leases end
            if self._evaluations.active:
                return None
            return self._open({p.id: Member(p, p.under_way or wire.OWN) for p in going_on}, now)
        ready = self._waits.takers(now)
        may_open = self._enough(ready, now) and not self._evaluations.active
        roles = self._may_take_snapshot(now) if may_open else ("observer", "worker")
        if self._start_snapshot(roles, now):
            return None
        if not may_open:
            return None
        if not self.started and (others := self._leases.agree(ready)):
            for peer in others:
                self._roster.not_ready(peer, started=False)
            return self._try_open(now)  # if enough are left
        if not self.started and len(ready) < self.rules.num_workers:
            self._out.warn(f"starting with {len(ready)} of {self.rules.num_workers} workers")
        for peer in self.workers_ready():
            if peer not in ready:  # it may have got leases while it was needed
                self._leases.take_back_new(peer)
            elif peer.carried is not None and not peer.carried.is_complete:
                self._leases.drop_late(peer)  # too few others are here: it is needed
        enters = any(p.carried is not None for p in ready)
        members = self._hand_out([p for p in ready if p.carried is None])
        if not members and not enters and self._leases.carried():
            for peer in self.workers_ready():  # there is nothing else left to do
                self._leases.drop_late(peer)
            members = self._hand_out(ready)
        if not members and not enters:
            return None
        batch = sum(p.ready.batch_size for p in ready if p.leases and p.ready is not None)
        return self._open(members, now, batch)

    def _hand_out(self, takers: list[Peer]) -> dict[int, Member]:
        """Lease samples to these; the members of the next round."""
        self._leases.hand_out(takers, self.step)
        return {p.id: Member(p, p.leases[0]) for p in takers if p.leases}

    def _let_in(self, now: float) -> bool:
        """Let gradients of earlier rounds that are complete enter the open one, if they may. Was
        there one?"""
        current = self.round
        if not self.rules.max_staleness or current is None or not current.may_be_entered:
            return False
        found = [p for p in self.workers_ready() if p.carried is not None and p.carried.is_complete]
        entering: dict[int, tuple[Member, Sequence[wire.Push]]] = {}
        for peer in found:
            carried, peer.carried = peer.carried, None
            assert carried is not None
            carried.member.share = weight_of_late(current.step - 1 - carried.made_at)
            entering[peer.id] = carried.member, carried.pushes
        if entering:
            self._out.effects += current.let_in(entering, now)
        return bool(entering)

    def _open(self, members: dict[int, Member], now: float, batch: int = 1) -> wire.Open | None:
        """Open a round with these members. Where the layout has pairs, their leases go on, or begin
        if they are new."""
        self.started = True
        self._snapshots.round_opened()
        self._rounds += 1
        assert self.layout is not None
        goes_on = any(m.goes_on for m in members.values())
        if self.layout.pairs and not goes_on:
            self._began = self._rounds
        self.round = Round(
            self._rounds,
            self.step + 1,
            now,
            members,
            buckets=self._origin.buckets,
            tensors=len(self.layout.tensors),
            quorum=self.rules.quorum,
            in_order=self.rules.deterministic,
            local_steps=self._leases.local_steps,
            batch=batch,
            began=self._began,
            pairs=self.layout.names,
            owners=self.shards.owners,
        )
        self.norms.begin(local=self.round.local_steps > 1)
        self._turn(states.OPENED)
        return self.open_message()

    def _enough(self, ready: list[Peer], now: float) -> bool:
        """Are enough workers ready: at the start all, or those that came in time?"""
        if len(ready) < self.rules.min_workers:
            return False
        if self.started or len(ready) >= self.rules.num_workers:
            return True
        if self._origin.was_waited_for and len(ready) == self._roster.count_joined():
            return True  # the others had their time before the first weights were chosen
        return self._roster.ready_since is not None and (
            now >= self._roster.ready_since + self.rules.join_timeout
        )

    def refusal(self, session: str, push: wire.Push) -> str | None:
        """Why this push must not be used; None when its payload may be looked at."""
        peer = self.peers[session]
        if push.shard != (owner := self.shards.owner(push.bucket)):
            return f"bucket {push.bucket} goes to shard {owner}, not to shard {push.shard}"
        if owner and owner not in self.shards.live:
            return f"shard {owner} is gone"
        if (carried := peer.carried) is not None and push.round == carried.round:
            assert self.layout is not None
            return carried.refusal(push, self.step, len(self.layout.tensors))
        if self.round is None:
            return f"round {push.round} is not open; no round is"
        return self.round.refusal(peer, push)

    def is_late(self, push: wire.Push) -> bool:
        """Is this push, which `refusal` let pass, of an earlier round than the open one?"""
        return self.round is None or push.round != self.round.number

    def _push(self, peer: Peer, event: Pushed, now: float) -> bool:
        push, bad, current = event.push, event.bad, self.round
        if bad is None and event.norm is not None:
            bad = self.norms.judge(push.bucket, event.norm)
            if bad is not None:
                self._out.effects.append(Discard(peer.id, push.bucket))
        if (carried := peer.carried) is not None:
            return self._push_late(peer, carried, push, bad, now)
        assert current is not None
        peer.late_with = None  # it is done with that
        self._takes_its_step(peer, push.pair, now)
        member = current.members[peer.id]
        member.tells(push)
        if (count := worked_off(push)) < member.size:
            self._leases.stops_sooner(peer, member, count)
        if bad is not None:
            member.bad = bad
            self._out.warn(f"round {current.number}: {peer.name} refused: {bad}", peer)
            self._out.send(peer, wire.Refused(round=push.round, reason=bad))
            self._out_of_round(member, bad, now)
        else:
            current.take(member, push, now)
            self._ending.works(now)
            if current.whole(member):
                peer.took(now - current.opened_at)
                member.whole_at, member.compute_s = now, push.compute_s
                member.spent = push.spent
                waited_s = now - current.opened_at
                self._leases.computed(peer.id, member.samples, push.compute_s, waited_s)
                current.look_for_quorum(now)
            for bucket in (push.bucket, *push.without):
                self._out.effects += current.advance(bucket, now)
        return True

    def _push_late(
        self, peer: Peer, carried: Carried, push: wire.Push, bad: str | None, now: float
    ) -> bool:
        """A push of a round that went on without this worker: keep it until its gradient is
        complete, and can enter a round."""
        member = carried.member
        member.tells(push)
        self._leases.computed_late(peer, carried.lease, push, now)
        peer.late_with = None  # it is about to be done with that
        if bad is not None:
            for bucket in carried.refuse(bad):
                self._out.effects.append(Discard(peer.id, bucket))
            self._out.warn(f"round {carried.round}: {peer.name} refused: {bad}", peer)
            self._out.send(peer, wire.Refused(round=push.round, reason=bad))
        else:
            carried.take(push)
            self._ending.works(now)
            if push.spent is not None:
                member.spent, member.compute_s = push.spent, push.compute_s
        if carried.is_complete:
            self._let_in(now)
        return True

    def _out_of_round(self, member: Member, why: str, now: float) -> None:
        """Expect nothing more of this member. What it pushed stays in the round."""
        current = self.round
        if current is None or member.out is not None or current.whole(member):
            return
        member.out = why
        current.look_for_quorum(now)
        if current.deserted:
            self._void(f"{member.name} {why}, and no other worker is left in it")
            return
        for bucket in range(self._origin.buckets):
            self._out.effects += current.advance(bucket, now)

    def next_deadline(self) -> float | None:
        """When the open round closes without the rest, if its quorum has pushed."""
        if self._evaluations.hold(self.round):
            return None
        return self._waits.deadline(self.round)

    def _close_if_due(self, now: float) -> None:
        """Close the round without those that are late, after its quorum and its timeout."""
        current = self.round
        if current is None or self._evaluations.hold(current):
            return
        waited_s = now - current.opened_at
        for member in self._waits.late(current, now):
            self._goes_on_without(current, member, now)
            peer = self.peers.get(member.session)
            if peer is not None and not member.is_late:  # else its push says how long it took
                self._leases.computes_still(peer.id, member.size, waited_s)

    def _goes_on_without(self, current: Round, member: Member, now: float) -> None:
        """The open round goes on without this member. Where nothing of it came, its gradient may
        enter a later one; not if it was busy with an older lease, and has not begun this one."""
        why = self._waits.lateness(current, member, now)
        peer = self.peers.get(member.session)
        may = self.rules.max_staleness > 0 and not member.got and not current.began
        if may and peer is not None and peer.ready is not None and peer.late_with is None:
            member.is_late = True
            why = f"{why}, carried over"
        self._out_of_round(member, why, now)

    def _look_for_the_overdue(self, now: float) -> None:
        """Where a round without a quorum has waited long enough: go on without those it waits for,
        or make it void so that others can take part."""
        current = self.round
        if current is None or self._evaluations.hold(current):
            return
        if not self._waits.is_long(current, now):
            return
        others = self._could_take_part(current, now)
        replaced = any(p.ready is None or self._leases.share_of(p.id) != 0 for p in others)
        awaited = self._waits.given_up(current, others, now, replaced=replaced)
        if current.someone_is_whole:
            for member in awaited:
                self._goes_on_without(current, member, now)
        elif others and awaited:
            names = ", ".join(p.name for p in others)
            why = f"{self._waits.awaited(current, now)}, while {names} could take part"
            self._waits.overdue_rounds += 1
            self._void(why.removeprefix(f"round {current.number} "))
            for member in awaited:
                # With it in the next round those without a share would get nothing again; and after
                # two such waits, of half of `idle_timeout` each, the run would be given up.
                at_once = not replaced or current.local_steps > 1
                self._judge(self.peers[member.session], member, now, at_once=at_once)

    def _could_take_part(self, current: Round, now: float) -> list[Peer]:
        """Workers that are here and have no part in this round: they wait for a lease, or for a
        snapshot that could be given if it was in vain."""
        roles = self._snapshots.may_take(now, in_vain=True)
        snapshot = self._roster.has_replica and "worker" in roles
        return self._waits.could_take_part(current, snapshot)

    def _settle(self, now: float) -> wire.Close:
        """Make the complete round the next update of the log."""
        current, self.round = self.round, None
        assert current is not None and self.ledger is not None
        settled = {w: current.settlement(m) for w, m in current.members.items()}
        for worker, how in settled.items():
            member = current.members[worker]
            peer = self.peers.get(member.session)
            if member.is_late and peer is not None:
                self._leases.carry(current, peer, now)
            elif not (current.began and how == DONE):
                self._leases.settle(current, worker, how)
            elif not self._leases.go_on(current, worker):
                self._leases.settle(current, worker, PARTLY)
            if peer is not None:
                if how == DONE:
                    peer.evaluated_s = 0.0
                    self._snapshots.contributes(peer)
                    self._ending.departures.contributes(peer.id)
                self._judge(peer, member, now)
        self._look_for_the_deaf()
        self._leases.count_steps(current, now)
        self._leases.drop_old(current.step + 1)
        state, carried = self.ledger.state(), self._leases.carried()
        close = current.close(self.nonce, state, settled, now, carried)
        in_vain = current.refused and not close.contributors
        self._bad_rounds = self._bad_rounds + 1 if in_vain else 0
        self._turn(states.CLOSED)
        self._ending.works(now)
        self._waits.overdue_rounds = 0
        self._before = self.step, self.lineage
        close = self.log.append(close)
        self._holders = current.holders
        self._to_note = current, close, settled, now
        self._send_away_who_cannot_read(current.members.values(), now)
        return close

    def _note_closed(self) -> None:
        """Note what a closed round says about its members. Nothing of the next round depends on it:
        it is done with the next event, when the close is on its way to those who wait for it."""
        assert self._to_note is not None
        (current, close, settled, now), self._to_note = self._to_note, None
        for worker, member in current.members.items():
            self.tallies.setdefault(worker, Tally(member.host)).add(member, settled[worker])
        self._waits.look_for_the_slow(current, now)
        self._waits.say_late(close)
        self._say_groups(current)
        self.clocks.closed(current, settled, self.optimizer_steps, now)

    def _say_groups(self, current: Round) -> None:
        """Name, once for each worker, one whose loop sets other values of parameter groups than
        the one that counts."""
        if not any(member.groups for member in current.members.values()):
            return
        leader = current.leader
        for worker, member in current.members.items():
            differs = leader is not None and member.groups and member.groups != leader.groups
            differs = differs and not member.is_carried
            if leader is None or not differs or worker in self._sets_others:
                continue
            self._sets_others.add(worker)
            names = ", ".join(sorted(differing(member.groups, leader.groups))[:4])
            self._out.warn(
                f"{member.name} sets {printable(names)} of the optimizer to other values than "
                f"{leader.name}, whose count for all: a loop should set them from cluster.step"
            )

    def _name_the_odd(self, event: Compared) -> None:
        """Name a worker whose gradients disagree with the others' in nearly every round."""
        for worker in self.disagreement.note(event.workers):
            peer = self._roster.by_id(worker)
            name = f"worker {worker}" if peer is None else peer.name
            rounds = self.disagreement.how_often(worker)
            text = f"the gradients of {name} disagree with the others' in {rounds}. {CHECK}"
            self._out.say(text, peer, warning=True, problem=True)

    def _judge(self, peer: Peer, member: Member, now: float, *, at_once: bool = False) -> None:
        """Take the leases of a worker that is left out from now on."""
        if self._waits.judge(peer, member, now, at_once=at_once):
            self._leases.take_back(peer, self.round)

    def _void(self, why: str) -> None:
        """End the open round without an update; `why` is logged."""
        current = self.round
        assert current is not None
        for worker in current.members:
            self._leases.settle(current, worker, RETURNED)
        self.round = None
        self._turn(states.VOID)
        self._out.effects.append(Void(current.number))
        if why:
            self._out.say(f"round {current.number} came to nothing: {why}")

    # ------------------------------------------------------------------ the run's end

    def _stop(self, event: Stop, now: float) -> bool:
        """End the run at the last closed step; the open round is void. Where that step is not known
        yet, after a restart, the run stays as it is."""
        if self.coming_back:
            self.put_off = True
            return False
        self._ending.is_last()
        reason, missing = event.reason, self._ending.departures.missing(FAILED)
        if missing and not self._roster.has_workers:  # somebody stops it because they failed
            reason = f"{reason}; {missing}"
        self._begin_end(reason, event.error, now, stopped=not event.error)
        return True

    def _stopped_by(self, peer: Peer, message: wire.StopRun, now: float) -> bool:
        """A worker's script stops the run, in order, or the observer, by what it has evaluated.
        Any worker can greet: one that nothing in the log is of cannot stop the others."""
        others = [p for p in self._roster.in_state(REPLICA) if p.role == "worker" and p.proven]
        if not peer.has_shown and others:
            self._out.warn(f"{peer.name} cannot stop the run before its first step", peer)
            return False
        if self.ending is None:
            reason = f"{peer.name} stopped it: {message.reason or 'its script said so'}"
            self._begin_end(reason, False, now, stopped=True)
        return True

    def _give_up_if_due(self, now: float) -> None:
        """End a run for which nobody is left, or left who holds its state, or nothing happens."""
        if self.coming_back or self.ending is not None:
            return
        end = self._ending.due(self.log, self._leases.own, now)
        if end is not None:
            self._begin_end(*end, now)
        elif self._ending.is_idle(now, self._phases.starts_with_fewer(self.state, self.started)):
            what = self._waits.awaited(self.round, now) if self.round else self.phase(now)
            idle = self.rules.idle_timeout
            self._begin_end(f"nothing happened for {idle:g} s: {what}", True, now)

    def _begin_end(self, reason: str, error: bool, now: float, *, stopped: bool = False) -> None:
        """Open no more rounds. Workers stay until the observer has kept the last step: if it dies
        before that, another observer takes the state from them."""
        if self.ending is not None:
            return
        if self.round is not None:
            self._void("")  # the end itself is logged
        for peer in self.peers.values():
            self._leases.take_back(peer, self.round)
        self._leases.release(self.round, math.inf)
        self._ending.begin(reason, error, now, stopped=stopped)
        self._turn(states.END)
        self._out.effects.append(Publish(self.pulse(now)))  # the observer answers with Stand

    def _end(self) -> None:
        self._turn(states.OVER)
        self._out.effects.append(Ended(self._ending.end(self.nonce, self._run, self.log)))

    # ------------------------------------------------------------------ what others may ask

    @property
    def observer(self) -> Peer | None:
        """The observer, if it is here."""
        return self._roster.observer

    @property
    def observer_comes(self) -> bool:
        """The observer's process runs, whether it has greeted or not."""
        return self._ending.observer_comes

    @observer_comes.setter
    def observer_comes(self, comes: bool) -> None:
        self._ending.observer_comes = comes

    @property
    def ending(self) -> tuple[str, bool] | None:
        """Why the run ends, and whether that is an error; None while it goes on."""
        return self._ending.begun

    @property
    def ended(self) -> wire.End | None:
        return self._ending.ended

    @property
    def more(self) -> bool:
        """Another run of this server follows."""
        return self._ending.more

    @property
    def deserted(self) -> bool:
        """Nobody came back to a server that was started again in the middle of a run."""
        return self._origin.deserted

    @property
    def layout(self) -> wire.Layout | None:
        """What is exchanged, since the origin is known."""
        return self._origin.layout

    @property
    def ledger(self) -> Ledger | None:
        return self._leases.ledger

    @property
    def data_set(self) -> DataSet | None:
        """What the workers' data sets have in common, as far as it is known. The program notes it
        before the first update, for the server that may follow this one."""
        return self._leases.data_set

    @property
    def snapshot(self) -> Snapshot | None:
        """The snapshot under way."""
        return self._snapshots.running

    @property
    def step(self) -> int:
        return self.log.step

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps in the newest state, which is what people are shown; `step` counts
        updates."""
        return self._leases.optimizer_steps(self.step)

    @property
    def lineage(self) -> str:
        return self.log.lineage

    @property
    def log_begun(self) -> bool:
        """Does an update follow the first state? Before that, the state is where it came from."""
        return self.log.begun

    @property
    def buckets(self) -> int:
        """The number of buckets of the layout; 0 before there is one."""
        return self._origin.buckets

    def knows(self, step: int, lineage: str) -> bool:
        """Can a replica at (step, lineage) follow from there by fetching updates?"""
        return self.log.knows(step, lineage)

    def workers_ready(self) -> list[Peer]:
        return self._roster.workers_ready()

    def share_of(self, worker: int) -> int | None:
        """A worker's samples of a round, where they follow its speed."""
        return self._leases.share_of(worker)

    def lost_by_name(self) -> list[str]:
        """The first ranges of samples that were skipped, and why."""
        return self._leases.lost_by_name()

    def may_say(self, id: int, name: str) -> bool:
        """May one more sentence about this worker be logged?"""
        return self._out.sentences.may(id, name)

    def open_message(self) -> wire.Open | None:
        current = self.round
        if current is None:
            return None
        peers = {m: self._roster.by_id(m) for m in current.members}
        leases = {m: _of(peer) if peer else () for m, peer in peers.items()}
        return wire.Open(
            nonce=self.nonce,
            round=current.number,
            step=self.step,
            lineage=self.lineage,
            leases=leases,
            local_steps=current.local_steps,
            began=current.began,
            shards=self.shards.shares,
        )

    def pulse(self, now: float) -> wire.Pulse:
        doing, sentence = self._phase(now)
        return wire.Pulse(
            nonce=self.nonce,
            step=self.step,
            lineage=self.lineage,
            phase=sentence,
            open=self.open_message(),
            closed=self._rounds - (1 if self.round else 0),
            ending=self.ending is not None,
            doing=doing,
            closing=self._closing(),
        )

    def phase(self, now: float) -> str:
        """What the run is doing or waiting for, as a sentence."""
        return self._phase(now)[1]

    def doing(self, now: float) -> wire.Phase:
        """The same for programs."""
        return self._phase(now)[0]

    def _phase(self, now: float) -> tuple[wire.Phase, str]:
        return self._phases.now(self.state, self.started, self.optimizer_steps, now)


def _of(peer: Peer) -> tuple[wire.Lease, ...]:
    """The leases that a worker has, that of the open round first."""
    return tuple(peer.leases) if peer.under_way is None else (peer.under_way, *peer.leases)
