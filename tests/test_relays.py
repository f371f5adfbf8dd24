"""Who hands on averages to whom, as scripts."""

from __future__ import annotations

from typing import Any

import pytest
from scripts import but_words, session
from test_shards_rounds import PLACES, Sharded

from paramserver.protocol import messages as wire
from paramserver.protocol.sharding import Cable, shares
from paramserver.rounds.effects import Send
from paramserver.rounds.events import Offered, Placed
from paramserver.rounds.relays import RETRY_S


class Crowded(Sharded):
    """Worker 3 is beside worker 2; there is one shard, and the observer beside worker 1."""

    def __init__(self, **rules: Any) -> None:
        super().__init__(shards=2, **rules)
        self.happens(Placed(session(3), PLACES[2]))
        self.hello(0), self.follows(0)
        self.happens(Placed(session(0), PLACES[1]))
        self.at = 1.0

    def next(self, seconds: float = 1.0) -> list[str]:
        """The effects of a tick so much later, in which all were heard."""
        self.at += seconds
        self.works(1)
        return but_words(self.tick(self.at, 0, 1, 2, 3))

    def begin(self) -> Crowded:
        self.tick(1.0, 0, 1, 2, 3), self.happens(Offered(session(2)))
        for who in PLACES:
            self.reached(who, 1)
        for who in PLACES:
            self.push(who)
        assert self.rounds.shards.shares
        return self

    def listening(self) -> Crowded:
        """Worker 3 listens to worker 2."""
        self.begin().next()
        self.tells(2, wire.HandsOn(folder="/two"))
        self.next(), self.tells(3, wire.Listens())
        return self


def test_the_lowest_worker_of_a_host_with_several_replicas_hands_on() -> None:
    run = Crowded().begin()
    assert run.next() == ["w1 <- hand on", "w2 <- hand on"]
    assert run.next() == []
    assert run.tells(2, wire.HandsOn(folder="/two")) == []
    assert run.next() == ["w3 <- listen at /two"]
    assert run.tells(3, wire.Listens()) == ["shards send w3 nothing more"]
    assert run.tells(3, wire.Listens()) == []  # it comes twice


def test_without_shards_nobody_hands_on() -> None:
    run = Crowded()
    assert not [e for e in run.next() if "hand on" in e]


def test_only_a_relay_of_elsewhere_hands_on_what_the_server_averages() -> None:
    run = Crowded().begin()
    run.next()
    run.tells(1, wire.HandsOn(folder="/one")), run.tells(2, wire.HandsOn(folder="/two"))
    run.rounds.shards.look_for_relays(run.at)
    told = [e for e in run.rounds._out.take() if isinstance(e, Send)]
    assert [e.message for e in told] == [
        wire.Listen(folder="/one", server=False),
        wire.Listen(folder="/two", server=True),
    ]


@pytest.mark.parametrize(
    "sign",
    [
        wire.Lacks(round=2, buckets=(1,)),
        wire.Fetch(step=0, lineage=""),
        wire.Listens(problem="no"),
    ],
    ids=lambda sign: type(sign).__name__,
)
def test_who_lacks_something_gets_its_own_copies_for_a_while(sign: wire.Message) -> None:
    run = Crowded().listening()
    if isinstance(sign, wire.Fetch):
        sign = wire.Fetch(step=run.rounds.step, lineage=run.rounds.lineage)
    for wait_s in (RETRY_S, 2 * RETRY_S, 4 * RETRY_S):
        told = run.tells(3, sign)
        assert told[:2] == ["shards send w3 averages again", "w3 <- listen no more"]
        waited = 0.0
        while waited + 2.0 < wait_s:
            waited += 2.0
            assert run.next(2.0) == []
        assert run.next(2.5) == ["w3 <- listen at /two"]
        run.tells(3, wire.Listens())


def test_who_cannot_listen_is_not_asked_again() -> None:
    run = Crowded().begin()
    run.next(), run.tells(2, wire.HandsOn(folder="/two")), run.next()
    assert run.tells(3, wire.Listens(problem="another user")) == ["w3 <- listen no more"]
    assert run.next() == ["w2 <- hand on no more"]  # nobody else is there
    for _ in range(20):
        assert run.next(2.0) == []


def test_who_cannot_hand_on_is_not_asked_again() -> None:
    run = Crowded().begin()
    run.next()
    assert run.tells(2, wire.HandsOn()) == ["w2 <- hand on no more"]
    for _ in range(20):
        assert run.next(2.0) == []


def test_with_its_relay_gone_who_listened_gets_its_own_copies() -> None:
    run = Crowded().listening()
    told = but_words(run.leave(2))
    assert "shards send w3 averages again" in told and "w3 <- listen no more" in told


def test_who_is_taken_out_does_not_listen_any_more() -> None:
    run = Crowded().listening()
    assert "shards send w3 averages again" in run.relinked(3)


def test_a_worker_cannot_hand_on_unless_it_is_asked() -> None:
    run = Crowded().begin()
    run.next()
    assert run.tells(3, wire.HandsOn(folder="/three")) == []
    assert run.next() == []


def test_a_relay_that_nobody_can_listen_to_hands_on_no_more() -> None:
    run = Crowded().listening()
    run.relinked(3)
    assert "w2 <- hand on no more" in run.next()


def test_shares_count_one_copy_for_a_host_with_a_relay_and_one_for_each_replica_without() -> None:
    run = Sharded().begin()
    run.hello(0), run.follows(0)
    run.happens(Placed(session(0), PLACES[1]))
    shards, workers = run.rounds.shards, run.rounds.workers_ready()
    shards.rates = dict.fromkeys(PLACES.values(), 1.0)
    alone = {0: Cable(1.0, 1, 2), 1: Cable(1.0), 2: Cable(1.0)}
    assert shards._shares([0, 1, 2], workers) == shares(alone, 3, 4)
    run.works(), run.tick(2.0, 0, 1, 2, 3)
    run.tells(1, wire.HandsOn(folder="/one"))
    relayed = {shard: Cable(1.0) for shard in range(3)}
    assert shards._shares([0, 1, 2], workers) == shares(relayed, 3, 3) != shares(alone, 3, 4)
