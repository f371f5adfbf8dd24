"""The open round: what is expected of whom, and what of it has come.

A `Member` is a worker's part in one `Round`. A round knows which pushes it can use, whether enough
have come, and which bucket is complete; `coordinator` decides what follows from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec
from msgspec import UNSET

from paramserver.protocol.messages import OWN, CarriedOver, Close, Groups, Lease, Push, Spent
from paramserver.protocol.pacing import WINDOW
from paramserver.protocol.sharding import SERVER
from paramserver.rounds.effects import Add, Effect, Finish
from paramserver.rounds.ledger import DONE, PARTLY, RETURNED, SKIPPED
from paramserver.rounds.roster import Peer

NEXT = ""
"""In place of a pair's name: the member asks for its next lease."""


class Tally(msgspec.Struct):
    """What one worker did in the whole run, for the summary."""

    host: str
    rounds: int = 0
    samples: int = 0
    late: int = 0

    def add(self, member: Member, how: str) -> None:
        """Count a closed round. `how` its lease was settled is in the ledger's words."""
        if member.got:
            self.samples += member.samples
            self.rounds += 1
        if how != DONE:
            self.late += 1


class Member:
    """A worker's part in the open round."""

    def __init__(self, peer: Peer, lease: Lease) -> None:
        self.name = peer.name
        self.host = peer.host
        self.session = peer.session
        self.lease = lease
        self.got: set[int] = set()  # buckets whose push was taken
        self.without: set[int] = set()  # buckets that it has nothing for
        self.added: set[int] = set()  # of those that it pushed, the ones that were added
        self.out: str | None = None  # why no more is expected of it
        self.bad: str | None = None  # why a bucket was refused as bad
        self.loss: float | None = None
        self.whole_at: float | None = None
        self.compute_s: float | None = None  # by its own clock
        self.spent: Spent | None = None  # by its own clock, too
        self.under_way = 0  # buckets that have come, and whose average is not there
        self.blocked_at: float | None = None  # since when it cannot go on without others
        self.blocked_s = 0.0  # how long it could not, before that
        self.steps = 1  # optimizer steps that it made
        self.timed_out = False  # the round waited as long as any round does
        self.waited_s = 0.0  # in vain: since the quorum, where the round had one
        self.unread: tuple[int, ...] = ()  # places in the lease of what could not be read
        self.groups: Groups = {}  # values of parameter groups that its loop has changed
        self.goes_on = peer.under_way is not None  # its lease was in rounds before this one
        self.weighs = peer.ready is not None and peer.ready.weighs
        self.is_late = False  # the round went on without it
        self.is_carried = False  # it brings the gradient of an earlier round, see `late`
        self.share = 1.0  # of its weight, which that has
        self._told_weight = 0

    def tells(self, push: Push) -> None:
        """Note what a worker's first push says: how many samples it took, if it brings its own, and
        which samples of a lease could not be read."""
        if self.lease == OWN:
            self.lease = (0, 0, push.samples)
        self.unread, self.steps, self._told_weight = push.unread, push.steps, push.weight

    @property
    def size(self) -> int:
        return self.lease[2] - self.lease[1]

    @property
    def samples(self) -> int:
        """The number of samples that were computed."""
        return self.size - len(self.unread)

    @property
    def weight(self) -> int:
        """What its gradient weighs in the average: `samples`, if it says nothing else."""
        return self._told_weight or self.samples

    @property
    def counts(self) -> float:
        """The same, less where it is late."""
        return self.weight * self.share if self.is_carried else self.weight


class Round:
    """The open round that leads to `step`, of `buckets` buckets and `tensors` parameters. The
    shards in `owners` average the buckets.

    After a `quorum` of those still expected its deadline runs. `in_order`: gradients are added in
    the order of the workers' ids, which is that of `members`. `local_steps`: see `wire.Open`;
    `batch`: the samples of one optimizer step of all members together.

    Where the layout has `pairs`, by name, leases last over several rounds, of which the first was
    number `began`. The round is of one `pair`, that of the member which came first (`first`);
    `NEXT` where that asks for its next lease.
    """

    def __init__(
        self,
        number: int,
        step: int,
        opened_at: float,
        members: dict[int, Member],
        *,
        buckets: int,
        tensors: int,
        quorum: float,
        in_order: bool,
        local_steps: int = 1,
        batch: int = 1,
        began: int = 0,
        pairs: tuple[str, ...] = (),
        owners: tuple[int, ...] = (),
    ) -> None:
        self.number = number
        self.step = step
        self.opened_at = opened_at
        self.members = members
        self.absent: dict[int, set[int]] = {}
        self.finished: set[int] = set()
        self.quorum_at: float | None = None
        self.buckets = buckets
        self._tensors = tensors
        self._quorum = quorum
        self._in_order = in_order
        self.local_steps = local_steps
        self.batch = batch
        self.began = began
        self.pair: str | None = None
        self.first: Peer | None = None
        self._pairs = pairs
        self.owners = owners or (SERVER,) * buckets
        self.unmade: dict[int, float] = {}
        """Buckets of which another shard than the server makes the average, since when."""
        self.closing_at: float | None = None
        """All averages are made: since then the replicas are asked whether they have them."""
        self.holders: set[str] = set()
        """Sessions of those that have."""

    def member_of(self, peer: Peer) -> Member | None:
        """The peer's part in this round (of this session, not of an earlier one)."""
        member = self.members.get(peer.id)
        return member if member is not None and member.session == peer.session else None

    def computed_by(self, peer: Peer) -> Lease | None:
        """The lease that this worker computes, of which nothing has come yet."""
        member = self.member_of(peer)
        if member is None or member.out is not None or member.got or member.lease == OWN:
            return None
        return None if member.goes_on else member.lease

    def refusal(self, peer: Peer, push: Push) -> str | None:
        """Why this push must not be used; None when its payload may be looked at."""
        if push.round != self.number:
            return f"round {push.round} is not open; round {self.number} is"
        member = self.member_of(peer)
        if member is None:
            return f"{peer.name} has no lease in round {push.round}"
        if member.out is not None and member.bad is None:
            return f"too late for round {push.round}: {member.out}"
        if push.pair not in (self._pairs or ("",)):
            return f"the run has no pair {push.pair[:64]!r}"
        if (apart := self.apart(peer, push.pair)) is not None:
            return apart
        return misfit(
            member,
            push,
            buckets=self.buckets,
            tensors=self._tensors,
            local_steps=self.local_steps,
        )

    def apart(self, peer: Peer, pair: str) -> str | None:
        """Why this worker, which steps a `pair` (`NEXT`: asks for its next lease), is in another
        place of its loop than those before it in this round; None where it is not, or where they
        have shown less than it has."""
        first = self.first
        if first is None or pair == self.pair or (peer.proven and not first.proven):
            return None
        return f"{peer.name} {_does(pair)}, {first.name} {_does(self.pair)}"

    def leaves_lease(self, member: Member) -> None:
        """This member has made all steps with its lease: it has nothing for this round."""
        member.without.update(range(self.buckets))

    @property
    def is_next(self) -> bool:
        """Do the members ask for their next leases?"""
        return self.pair == NEXT

    def take(self, member: Member, push: Push, now: float) -> None:
        """Take a push that `refusal` let pass and whose numbers are good."""
        member.got.add(push.bucket)
        member.under_way += 1
        member.without.update(push.without)
        if push.loss is not None:
            member.loss = push.loss
        if push.groups is not UNSET:
            member.groups = push.groups
        absent = self.absent.get(push.bucket)
        if absent is None:
            self.absent[push.bucket] = set(push.absent)
        else:
            absent.intersection_update(push.absent)
        if member.blocked_at is None and (member.under_way >= WINDOW or self.whole(member)):
            member.blocked_at = now

    def waited_s(self, member: Member, now: float) -> float:
        """How long this member has waited for others in this round: everything that it may have
        under way was here, and no average."""
        blocked_s = 0.0 if member.blocked_at is None else now - member.blocked_at
        return member.blocked_s + blocked_s

    def whole(self, member: Member) -> bool:
        """Has it pushed everything?"""
        return len(member.got) + len(member.without) == self.buckets

    def expected(self) -> list[Member]:
        """The members of whom something is still to come."""
        return [m for m in self.members.values() if m.out is None and not self.whole(m)]

    @property
    def inside(self) -> list[Member]:
        """The members that are not out."""
        return [m for m in self.members.values() if m.out is None]

    @property
    def someone_is_whole(self) -> bool:
        """Has anybody who is not out pushed everything?"""
        return any(map(self.whole, self.inside))

    @property
    def deserted(self) -> bool:
        """Is nobody left who pushed everything, still may, or was refused for bad numbers?"""
        return all(m.out is not None and m.bad is None for m in self.members.values())

    @property
    def complete(self) -> bool:
        return len(self.finished) == self.buckets

    def look_for_quorum(self, now: float) -> None:
        """Have enough of those who are not out pushed everything?"""
        inside = [m for m in self.inside if not m.is_carried]
        needed = math.ceil(self._quorum * len(inside))
        if self.quorum_at is None and sum(map(self.whole, inside)) >= max(1, needed):
            self.quorum_at = now

    @property
    def may_be_entered(self) -> bool:
        """May the gradient of an earlier round enter, since no bucket is averaged yet?"""
        return not self.finished

    def let_in(
        self, entering: Mapping[int, tuple[Member, Sequence[Push]]], now: float
    ) -> list[Effect]:
        """Members enter with gradients of earlier rounds, by worker, all pushes of which are here,
        or with none where one was refused. They enter together: where nobody else is in the round,
        the first alone would make it complete."""
        came = {worker: member for worker, (member, _) in entering.items()}
        self.members = dict(sorted({**self.members, **came}.items()))
        for member, pushes in entering.values():
            member.is_carried, member.out = True, member.bad
            for push in pushes:
                self.take(member, push, now)
        return [effect for bucket in range(self.buckets) for effect in self.advance(bucket, now)]

    def advance(self, bucket: int, now: float) -> list[Effect]:
        """Add what may be added, in order where that is asked for, and finish a full bucket."""
        if bucket in self.finished:
            return []
        effects: list[Effect] = []
        complete = True
        for worker, member in self.members.items():
            if bucket in member.got:
                if bucket not in member.added and (complete or not self._in_order):
                    member.added.add(bucket)
                    effects.append(Add(worker, bucket, member.counts, member.is_carried))
            elif member.out is None and bucket not in member.without:
                complete = False
        if complete:
            self.finished.add(bucket)
            self._go_on(bucket, now)
            weight = sum(m.counts for m in self.members.values() if bucket in m.got)
            if weight:
                absent = tuple(sorted(self.absent[bucket]))
                shard = self.owners[bucket]
                effects.append(Finish(self.number, self.step, bucket, weight, absent, shard))
                if shard != SERVER:
                    self.unmade[bucket] = now
        return effects

    def _go_on(self, bucket: int, now: float) -> None:
        """Those who waited for this average may send more."""
        for member in self.members.values():
            if bucket in member.got:
                member.under_way -= 1
                blocked_at = member.blocked_at
                if blocked_at is not None and member.under_way < WINDOW and not self.whole(member):
                    member.blocked_s += now - blocked_at
                    member.blocked_at = None

    def paused(self, since: float, now: float) -> None:
        """Nobody was timed from then until now: so much later everything has begun."""
        self.opened_at += now - max(since, self.opened_at)
        if self.quorum_at is not None:
            self.quorum_at += now - max(since, self.quorum_at)
        for member in self.members.values():
            if member.blocked_at is not None:
                member.blocked_at += now - max(since, member.blocked_at)

    def made_elsewhere(self) -> tuple[int, ...]:
        """The buckets with an average that another shard than the server makes."""
        return tuple(b for b in sorted(self.absent) if self.owners[b] != SERVER)

    def averaged(self) -> tuple[int, ...]:
        """The buckets that anybody contributed to."""
        return tuple(sorted(self.absent))

    def close(
        self,
        nonce: str,
        ledger: dict[str, Any],
        settled: Mapping[int, str],
        now: float,
        carried: dict[int, CarriedOver] | None = None,
    ) -> Close:
        """The close of a complete round, without its lineage: what came of whom, and with which
        mean loss. `ledger` is the state of the ledger in which its leases are `settled`, `carried`
        whose gradients may enter a later round."""
        members, leader = self.members.items(), self.leader
        late = {worker: m.out or "" for worker, m in members if settled[worker] != DONE}
        losses = [
            (m.counts, m.loss)
            for m in self.members.values()
            if m.got and m.loss is not None and math.isfinite(m.loss)
        ]
        weight = sum(n for n, _ in losses)
        return Close(
            nonce=nonce,
            round=self.number,
            step=self.step,
            lineage="",
            buckets=self.averaged(),
            contributors={worker: m.samples for worker, m in members if m.got},
            late=late,
            loss=sum(n * loss for n, loss in losses) / weight if weight else None,
            seconds=now - self.opened_at,
            ledger=ledger,
            reason=self.shortfall(late),
            local_steps=self.local_steps,
            partly={w: tuple(sorted(m.got)) for w, m in members if settled[w] == PARTLY},
            groups=UNSET if leader is None else leader.groups or UNSET,
            pair=self.pair or UNSET,
            carried=carried or UNSET,
        )

    @property
    def leader(self) -> Member | None:
        """The member with the lowest number that pushed everything: all replicas set the values of
        parameter groups that its loop has set. Those of a late one were for an older step."""
        inside = (m for m in self.members.values() if self.whole(m))
        return next((m for m in inside if not m.is_carried), None)

    @property
    def refused(self) -> bool:
        """Was anybody's gradient refused?"""
        return any(m.bad is not None for m in self.members.values())

    def settlement(self, member: Member) -> str:
        """What becomes of a member's samples, in the ledger's words."""
        if self.whole(member):
            return DONE
        if member.got:
            return PARTLY
        return RETURNED if member.bad is None else SKIPPED

    def shortfall(self, late: dict[int, str]) -> str:
        """The close's sentence: who is `late` and why; empty where nobody is."""
        if not late:
            return ""
        count, who = len(self.members), [f"{self.members[w].name} {why}" for w, why in late.items()]
        return f"round {self.number} closed with {count - len(late)} of {count}: {'; '.join(who)}"


def misfit(
    member: Member, push: Push, *, buckets: int, tensors: int, local_steps: int = 1
) -> str | None:
    """Why this push does not fit what its member may send, and has sent, in a round of so many
    buckets, parameters and local steps; None where it does."""
    if push.steps > local_steps:
        return f"{push.steps} steps in a round of {local_steps}"
    if member.bad is not None:
        return f"a bucket of this round was refused: {member.bad}"
    if push.bucket in member.got or push.bucket in member.without:
        return f"bucket {push.bucket} of round {push.round} came twice"
    if not 0 <= push.bucket < buckets:
        return f"there is no bucket {push.bucket}"
    if member.weighs != (push.weight > 0):
        return "it says no weight" if member.weighs else "it says a weight, unlike the others"
    if member.got and push.weight != (member.weight if member.weighs else 0):
        return "another weight than in the bucket before"
    if member.lease == OWN:
        if push.samples < 1:
            return f"{push.samples} samples pushed"
        if push.unread:
            return "samples of its own are told to be unreadable"
    elif member.got and push.unread != member.unread:
        return "other samples could not be read than in the bucket before"
    elif push.samples < 1 or not _fits(member, push, local_steps):
        but = f", {len(push.unread)} not readable" if push.unread else ""
        return f"{push.samples} samples pushed{but} for a lease of {member.size}"
    elif not _in_order(push.unread, worked_off(push)):
        return "it names samples that its lease does not have"
    if any(not 0 <= index < tensors for index in push.absent):
        return "it names parameters that the run does not have"
    if any(
        not 0 <= bucket < buckets or bucket in member.got or bucket == push.bucket
        for bucket in push.without
    ):
        return "it has nothing for buckets that are not there, or that it pushed"
    return None


def _fits(member: Member, push: Push, local_steps: int) -> bool:
    """Is this push of a whole lease, or of the first samples of one that local steps work off? The
    first push of a round decides that."""
    count = worked_off(push)
    sooner = not member.got and push.steps < local_steps and count < member.size
    return count == member.size or sooner


def _does(pair: str | None) -> str:
    return f"steps {pair!r}" if pair else "asks for its next samples"


def worked_off(push: Push) -> int:
    """The samples of the lease that this push is of: computed, or not readable."""
    return push.samples + len(push.unread)


def differing(ours: Groups, theirs: Groups) -> set[str]:
    """The names of the values that are not the same in both."""
    return {
        name
        for number in ours.keys() | theirs.keys()
        for name in ours.get(number, {}).keys() | theirs.get(number, {}).keys()
        if ours.get(number, {}).get(name) != theirs.get(number, {}).get(name)
    }


def _in_order(places: tuple[int, ...], size: int) -> bool:
    """Are these places in a lease of `size`, each once and in order?"""
    limits = (-1, *places, size)
    return all(a < b for a, b in pairwise(limits))
