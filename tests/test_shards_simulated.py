"""Whole runs with several shards and faults in virtual time, and proof that they would show a
mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import planted
import pytest
from simulation import Parts, Schedule, simulate

from paramserver.protocol import messages as wire
from paramserver.protocol.sharding import Shares
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.relays import Relays as Chosen
from paramserver.rounds.roster import Peer
from paramserver.rounds.round import Round
from paramserver.rounds.shards import Shard, Shards
from paramserver.server.control import Control
from paramserver.server.spread import Data, Order, Spread
from paramserver.shard.adder import Adder, Sums, Waiting
from workers.link.follow import Follow
from workers.link.relays import Relays

SCHEDULES = 1000
BLOCK = 100
SEARCHED = 1500
"""Seeds in which a planted fault must show."""


@pytest.mark.parametrize(
    "first",
    [0, *(pytest.param(first, marks=pytest.mark.long) for first in range(BLOCK, SCHEDULES, BLOCK))],
)
def test_the_promises_hold_with_shards(first: int) -> None:
    outcomes = [simulate(seed, sharded=True) for seed in range(first, first + BLOCK)]
    told = "\n".join(
        f"python -m tests.simulation --shards --seed {o.seed}: {o.failure}"
        for o in outcomes
        if o.failure
    )
    assert not told, told
    seen = sum((o.seen for o in outcomes[1:]), start=outcomes[0].seen)
    assert seen["averages of shards"] > 5 * BLOCK
    assert seen["averages handed on"] > BLOCK
    assert min(seen["pushes in an outbox"], seen["averages in a shard's ring"]) > BLOCK
    for fault in (
        "kill a shard",
        "stop a shard",
        "cut channels",
        "hold channels",
        "void rounds",
        "stop a machine",
        "firewall",
    ):
        assert seen[fault] > 2, f"{fault} hardly ever happens: {seen}"


# ------------------------------------------------------------------------------ planted faults


class ClosesAtOnce(Rounds):
    """A round is closed when its averages are made, whoever has them."""

    def _is_held(self, current: Round, now: float) -> bool:
        return not current.unmade


class TakesAnyHolder(Shards):
    """Who stands beside a shard is enough to hold what it made."""

    def _is_held(self, shard: Shard, current: Round) -> bool:
        return bool(current.holders)


class ClosesBeforeAllReport(Rounds):
    """A round is closed when one shard has reported its averages, whatever the others do."""

    def _is_held(self, current: Round, now: float) -> bool:
        first = 0 < len(current.unmade) < len(current.made_elsewhere())
        return first or super()._is_held(current, now)


class DropsNoHungShard(Shards):
    """A shard of which nothing is heard stays in the map."""

    def silent(self, now: float) -> list[Shard]:
        return []

    def overdue(self, current: Round, now: float, left_s: float) -> list[tuple[Shard, str]]:
        return []


class KeepsWhoIsNotReached(Shards):
    """A shard is in the map although a firewall is in between."""

    def _shares(self, chosen: list[int], workers: Collection[Peer]) -> Shares:
        return super()._shares([0, *sorted(self.live)], workers)


class WaitsForAGoneShard(Rounds):
    """The open round goes on without the shard that it needs."""

    def _void(self, why: str) -> None:
        if "shard" not in why:
            super()._void(why)


class WaitsForNoReport(Control):
    """A push is handled whether its numbers have come to the shard or not."""

    def _must_wait(self, route: bytes, message: Any) -> bool:
        return False


class WaitsForEver(Control):
    """Nothing is given up that was sent to a shard."""

    def _give_up_payloads(self, now: float) -> None:
        pass


class DropsTheSecondCopy(Spread):
    """A push that comes twice is not needed, nor is the first one."""

    def _is_taken(self, session: str, push: wire.Push) -> bool:
        return False


class PromisesWhatIsGone(Spread):
    """What a shard kept can be fetched for ever."""

    def dismiss(self, shard: int) -> None:
        reach = self._reach
        super().dismiss(shard)
        self._reach = reach


class JudgesNoNorms(Spread):
    """The norm that a shard reports is not judged."""

    def push(self, *push: Any, **more: Any) -> tuple[str | None, float | None]:
        bad, norm = super().push(*push, **more)
        return bad, None if push[2].shard else norm


class KeepsWhatItGivesUp(Adder):
    """What a codec left out of an average goes to the next one who averages, and stays here."""

    def order(self, message: Any, buffers: Sequence[Any] = ()) -> None:
        super().order(message, buffers)
        if isinstance(message, wire.GiveUp) and self.gave:
            self._sums.take_over(message.bucket, self.gave)

    def __init__(self, sums: Sums, *, tell: Callable[..., object], **more: Any) -> None:
        super().__init__(sums, tell=self._note, **more)
        self._told, self.gave = tell, list[Any]()

    def _note(self, message: wire.Message, *buffers: Any) -> None:
        if isinstance(message, wire.LeftOut):
            self.gave = list(buffers)
        self._told(message, *buffers)


class AddsInAnyOrder(Spread):
    """The shards add gradients in another order than that of the workers."""

    def __init__(self, own: Data, order: Order, nonce: str) -> None:
        super().__init__(own, self._later, nonce)
        self._now, self._adds = order, list[tuple[int, wire.Message]]()

    def _later(self, shard: int, message: wire.Message, *buffers: Any) -> None:
        if isinstance(message, wire.AddUp):
            self._adds.append((shard, message))
            return
        adds, self._adds = self._adds, []
        for added in (*reversed(adds), (shard, message, *buffers)):
            self._now(*added)


class RefusesWhatComesEarly(Adder):
    """A payload that comes before its round has begun here is dropped."""

    def came(self, session: str, number: int, push: wire.Push, *more: Any) -> None:
        if not self._round or push.round <= self._round + 1:
            super().came(session, number, push, *more)


class KeepsVoidSums(Adder):
    """The sums of a void round stay."""

    def order(self, message: Any, buffers: Sequence[Any] = ()) -> None:
        if not isinstance(message, wire.Over) or message.step:
            super().order(message, buffers)


class AddsWhatComes(Adder):
    """A payload is added as it comes, not when it is its turn."""

    def came(self, session: str, number: int, push: wire.Push, *more: Any) -> None:
        super().came(session, number, push, *more)
        payload = self._waiting[session].payloads.get(number)
        if payload is not None:
            worker = int(session.rpartition("-")[2])
            self._sums.add(payload, worker, push.samples, late=False)

    def _add(self, order: wire.AddUp) -> None:
        self._waiting[order.session].payloads.pop(order.number)


class FreesTooSoon(Adder):
    """The slot of a push is free before its numbers are added."""

    def came(self, session: str, number: int, push: wire.Push, buffers: Any, release: Any) -> None:
        super().came(session, number, push, buffers, lambda: None)
        release()


class NeverFrees(Adder):
    """The slot of a push that is not needed stays taken."""

    def _drop(self, order: wire.Unneeded) -> None:
        payloads = self._waiting.setdefault(order.session, Waiting()).payloads
        found = payloads.get(order.number)
        if found is not None:
            payloads[order.number] = msgspec.structs.replace(found, release=lambda: None)
        super()._drop(order)


class RecallsWhatIsGone(Adder):
    """What a shard kept is there for ever, whatever was written over it."""

    def _recall(self, order: wire.Recall) -> None:
        for kept in self._kept:
            kept.since = 2**62
        super()._recall(order)


class HoldsWhatItLost(Follow):
    """An average of which only the header came counts as held."""

    def closing(self, m: wire.Closing) -> tuple[int, ...] | None:
        lacks = super().closing(m)
        return None if lacks is None else ()


class ListensOn(Shards):
    """Who lacks an average listens on to the relay that has not handed it on."""

    class make_relays(Chosen):
        def lacks(self, peer: Peer, now: float) -> None:
            pass


class TakesAnyRound(Relays):
    """What a relay has handed on of a bucket is of the round that is awaited."""

    def payload(self, average: wire.Average) -> Any:
        source: Any = self._source
        if source is not None and self.brings(average):
            for key in source._passed:
                if key[2] == average.bucket:
                    return source.payload(key)
        return None


def test_what_is_planted_takes_what_the_methods_that_it_replaces_take() -> None:
    assert not planted.misfits(sys.modules[__name__])


@pytest.mark.long
@pytest.mark.parametrize(
    ("parts", "symptom", "first"),
    [
        (Parts(rounds=ClosesAtOnce), "only a shard has", 0),
        (Parts(shards=TakesAnyHolder), "only a shard has", 0),
        (Parts(rounds=ClosesBeforeAllReport), "averaged were", 2),
        (Parts(shards=DropsNoHungShard), "does not end|could have gone on", 98),
        (Parts(shards=KeepsWhoIsNotReached), "does not reach shard", 10),
        (Parts(rounds=WaitsForAGoneShard), "does not end|could have gone on", 41),
        (Parts(control=WaitsForNoReport), "not understood", 0),
        (Parts(control=WaitsForEver), "could have gone on|does not end", 355),
        (Parts(spread=DropsTheSecondCopy), "no payload .* to add", 80),
        (Parts(spread=PromisesWhatIsGone), "could have gone on|but not for", 2),
        (Parts(spread=JudgesNoNorms), "out of all proportion", 80),
        (Parts(spread=AddsInAnyOrder), "in this order", 5),
        (Parts(adder=RefusesWhatComesEarly), "without a word", 56),
        (Parts(adder=KeepsVoidSums), "is divided by|twice in bucket|not in the update", 150),
        (Parts(adder=KeepsWhatItGivesUp), "into two averages", 0),
        (Parts(adder=AddsWhatComes), "of another model|is divided by|weigh|freed twice", 2),
        (Parts(adder=FreesTooSoon), "its worker may write to", 0),
        (Parts(adder=NeverFrees), "is not freed", 0),
        (Parts(adder=RecallsWhatIsGone), "that was written over", 244),
        (Parts(follow=HoldsWhatItLost), "only a shard has", 80),
        (Parts(shards=ListensOn), "go on with a relay", 6),
        (Parts(relays=TakesAnyRound), "differ|another|model", 6),
    ],
    ids=planted.name,
)
def test_a_planted_fault_of_shards_is_found(parts: Parts, symptom: str, first: int) -> None:
    planted.is_found(parts, symptom, first, SEARCHED, sharded=True)


def test_the_other_schedules_have_no_shards() -> None:
    assert Schedule(5).rules.shards == 1
