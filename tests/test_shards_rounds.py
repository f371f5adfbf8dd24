"""Rounds with shards, as scripts of events and effects; and the orders that follow from these."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from scripts import Run, but_words, session

from paramserver.config.schema import build
from paramserver.errors import PeerError, UserError
from paramserver.protocol import messages as wire
from paramserver.rounds.disagreement import Comparison
from paramserver.rounds.effects import Finish
from paramserver.rounds.events import Failed, Made, Offered, Placed, Stop, Works
from paramserver.rounds.shards import wanted
from paramserver.server.history import Update
from paramserver.server.spread import Spread
from paramserver.settings import CODECS, LEAVE_OUT, Settings
from paramserver.shard.adder import Adder, Payload
from paramserver.tensors.codec import codec_of_averages

PLACES = {1: "", 2: "10.0.0.2", 3: "10.0.0.3"}
"""Worker 1 is on the server's host."""


class Sharded(Run):
    """Three workers, the last two on hosts of their own; of four buckets each shard has one, the
    server two."""

    def __init__(self, **rules: Any) -> None:
        super().__init__(
            **{"buckets": 4, "observer": False, "num_workers": 3, "shards": None, **rules}
        )
        self.workers(1, 2, 3)
        for who, address in PLACES.items():
            self.happens(Placed(session(who), address))

    def begin(self) -> Sharded:
        self.both_are_reached()
        assert self.rounds.round is not None
        assert self.rounds.round.owners == (0, 1, 2, 0)
        return self

    def both_are_reached(self) -> None:
        """Both shards are there and reached; the next round, which opens now, has them."""
        self.tick(1.0, 1, 2, 3)
        for who in (2, 3):
            self.happens(Offered(session(who)))
        for who in PLACES:
            for shard in (1, 2):
                self.reached(who, shard)
        self.works()
        for who in PLACES:
            self.push(who)

    def reached(self, who: int, shard: int, problem: str = "") -> list[str]:
        return self.tells(who, wire.Reached(shard=shard, problem=problem))

    def works(self, *shards: int) -> None:
        for shard in shards or (1, 2):
            self.happens(Works(shard))

    def all_push(self, *who: int) -> list[str]:
        """The effects of the last push."""
        effects: list[str] = []
        for worker in who or tuple(PLACES):
            for bucket, shard in enumerate((0, 1, 2, 0)):
                effects = self.push(worker, bucket, shard=shard)
        return effects

    def made(self, shard: int) -> list[str]:
        assert self.rounds.round is not None
        return self.happens(Made(shard, self.rounds.round.number, shard))

    def holds(self, who: int) -> list[str]:
        assert self.rounds.round is not None
        return self.tells(who, wire.Holds(self.rounds.round.number))


def test_a_worker_of_each_host_is_asked_for_a_shard_from_three_hosts_on() -> None:
    run = Sharded()
    assert run.tick(1.0, 1, 2, 3) == ["w2 <- carry a shard", "w3 <- carry a shard"]
    assert run.tick(2.0, 1, 2, 3) == []  # each once
    assert run.happens(Offered("w2")) == [
        "shard 1 of w2 begins",
        "# pi (10.0.0.2) carries shard 1",
    ]
    assert run.happens(Offered("w1")) == ["the shard of w1 is not wanted"]  # it was not asked
    run.push(3)  # it waits now, and reads what it was asked
    for now in range(10, 121, 5):
        run.works(1)
        assert not [e for e in run.tick(float(now), 1, 2, 3) if "shard" in e]
    run.works(1)
    run.tick(121.1, 1, 2, 3)
    run.works(1)
    assert run.tick(122.2, 1, 2, 3) == [
        "# the machine at 10.0.0.3 carries no shard so far: worker 3 (pi) has offered none since "
        "it was asked for one 121 s ago"
    ]
    run.works(1)
    assert run.tick(123.0, 1, 2, 3) == []  # nor is it asked again
    assert run.happens(Offered("w3"))[0] == "shard 2 of w3 begins"  # late, and welcome


def beats(run: Sharded, until: float) -> list[str]:
    """What the server does about shards while workers beat and say nothing else."""
    told: list[str] = []
    while run.now < until:
        run.works(*run.rounds.shards.live)
        told += [e for e in run.tick(min(until, run.now + 5.0), 1, 2, 3) if "shard" in e]
    return told


def test_who_computes_its_first_step_for_long_may_offer_a_shard_after_it() -> None:
    """It reads that it was asked for one when its step is over; its beats come from elsewhere."""
    run = Sharded(shards=2)
    assert run.tick(1.0, 1, 2, 3) == ["w2 <- carry a shard"]
    assert beats(run, 600.0) == []
    run.push(2)
    assert beats(run, 700.0) == []
    assert run.happens(Offered("w2"))[0] == "shard 1 of w2 begins"


def test_a_place_is_not_kept_for_ever_for_who_only_beats() -> None:
    run = Sharded(shards=2, idle_timeout=1000.0)
    run.tick(1.0, 1, 2, 3)
    assert beats(run, 1000.0) == []
    assert beats(run, 1005.0) == [
        "# the machine at 10.0.0.2 carries no shard so far: worker 2 (pi) has said nothing but its "
        "beats since it was asked for one 1004 s ago",
        "w3 <- carry a shard",
    ]


def test_a_shard_that_comes_when_others_have_its_place_ends_and_may_come_again() -> None:
    run = Sharded(shards=2)
    run.tick(1.0, 1, 2, 3), run.push(2)
    assert beats(run, 130.0)[1:] == ["w3 <- carry a shard"]
    assert run.happens(Offered("w2")) == ["the shard of w2 is not wanted"]
    assert run.happens(Offered("w3"))[0] == "shard 1 of w3 begins"
    assert run.happens(Offered("w2")) == ["the shard of w2 is not wanted"]  # a beat of before
    run.happens(Failed(1, "it is killed"))
    assert beats(run, 131.0) == ["w2 <- carry a shard"]


def test_a_shard_whose_link_was_cut_is_asked_for_again_and_need_not_end() -> None:
    run = Sharded(shards=2)
    run.tick(1.0, 1, 2, 3), run.happens(Offered("w2"))
    run.happens(Failed(1, "its link was cut"))
    assert run.happens(Offered("w2")) == []
    assert run.tick(2.0, 1, 2, 3) == ["w2 <- carry a shard"]
    assert run.happens(Offered("w2"))[0] == "shard 2 of w2 begins"


@pytest.mark.parametrize(("shards", "asked"), [(1, []), (2, ["w2"]), (3, ["w2", "w3"])])
def test_the_setting_says_how_many(shards: int, asked: list[str]) -> None:
    run = Sharded(shards=shards)
    assert run.tick(1.0, 1, 2, 3) == [f"{who} <- carry a shard" for who in asked]


def test_two_hosts_have_the_server_alone() -> None:
    run = Sharded()
    run.happens(Placed("w3", "10.0.0.2"))
    assert run.tick(1.0, 1, 2, 3) == []


def test_a_shard_has_part_in_the_round_after_all_have_reached_it() -> None:
    run = Sharded()
    run.tick(1.0, 1, 2, 3), run.happens(Offered("w2"))
    run.reached(1, 1), run.reached(2, 1)
    run.push(1), run.push(2)
    assert run.push(3)[-1].endswith("3: 0/50-60 0/80-90")  # worker 3 has not
    run.reached(3, 1)
    run.push(1), run.push(2)
    told = run.push(3)
    averaging = "the server lets several average the gradients: 50 % itself, 50 % pi"
    assert told[-1] == f"# {averaging}" and run.rounds.shards.sentence == averaging
    assert but_words(told)[-1].endswith("by 0:500 1:500")
    assert run.push(1, 1) == ["refused: bucket 1 goes to shard 1, not to shard 0"]
    assert run.push(1, 0, shard=1) == ["refused: bucket 0 goes to shard 0, not to shard 1"]


def test_who_averages_is_told_until_the_server_does_it_alone() -> None:
    run = Sharded()
    assert not run.rounds.shards.sentence
    run.begin()
    assert "33 % itself, 33 % pi, 33 % pi" in run.rounds.shards.sentence
    told = run.happens(Failed(1, "gone")) + run.happens(Failed(2, "gone"))
    assert "# the server averages all gradients" in told
    assert not run.rounds.shards.sentence


@pytest.mark.parametrize(
    ("slow", "rules", "told"),
    [
        (0.2, {}, "50 % itself, 50 % pi, as their cables were measured"),
        (0.8, {}, "43 % itself, 43 % pi, 14 % pi, as their cables were measured"),
        (1.0, {}, "33 % itself, 33 % pi, 33 % pi"),
        (0.2, {"deterministic": True}, "33 % itself, 33 % pi, 33 % pi"),
    ],
)
def test_shares_follow_the_cables_that_were_measured(
    slow: float, rules: dict[str, Any], told: str
) -> None:
    run = Sharded(**rules)
    run.rounds.shards.rates = {"": 1.0, PLACES[2]: 1.0, PLACES[3]: slow}
    run.both_are_reached()
    assert run.rounds.shards.sentence.endswith(f": {told}")


def test_the_memory_of_a_push_is_released_once_whatever_becomes_of_it() -> None:
    shop = Shop()
    shop.push(1, 1, float("nan")), shop.talk()
    early = wire.Push(round=1, bucket=0, samples=1, shard=1, sealed=2)
    shop.spread.release("w1", early), shop.talk()
    shop.push(1, 2, 2.0), shop.talk()  # not needed when it comes
    shop.spread.release("w1", shop.push(1, 3, 3.0)), shop.talk(), shop.talk()
    shop.push(1, 3, 4.0), shop.talk()  # comes twice
    added = shop.push(1, 4, 5.0)
    shop.talk(), shop.spread.push("w1", 1, added, []), shop.spread.add(1, 0, 1.0), shop.talk()
    shop.push(2, 1, 6.0), shop.talk()
    assert shop.released[1:] == [2.0, 3.0, 4.0, 5.0]
    shop.spread.forget("w2"), shop.talk()
    assert shop.released[1:] == [2.0, 3.0, 4.0, 5.0, 6.0] and shop.adder.waiting == 0


def test_an_average_that_was_written_over_is_not_recalled() -> None:
    shop = Shop()
    shop.newest = 1
    shop.update(1, 6.0)
    shop.newest = 5
    shop.update(2, 7.0), shop.update(3, 8.0)
    shop.oldest = 5
    assert [shop.recalled(round) for round in (1, 2, 3)] == [False, False, True]


def test_a_round_is_closed_when_replicas_elsewhere_hold_what_shards_made() -> None:
    run = Sharded().begin()
    assert run.all_push() == ["add 3.3 x10", "average 2.3 of 30"]
    assert run.made(1) == []
    assert run.made(2) == ["all <- closing 2, who holds 1 2?"]
    assert run.holds(2) == []  # it stands beside shard 1: that is enough for shard 2 only
    assert run.rounds.pulse(run.now).closing is not None
    [close] = but_words(run.holds(3))
    assert close.startswith("close 2 to step 2, in it 1:10 2:10 3:10; open 3")
    assert run.rounds.pulse(run.now).closing is None


def test_one_replica_elsewhere_is_enough() -> None:
    run = Sharded().begin()
    run.all_push(), run.made(1), run.made(2)
    assert but_words(run.holds(1))[0].startswith("close 2 to step 2")


def test_who_joins_again_does_not_hold_anything_any_more() -> None:
    run = Sharded().begin()
    run.all_push(), run.made(1), run.made(2)
    run.holds(3), run.relinked(3)
    run.follows(3)
    assert but_words(run.holds(2)) == []
    assert but_words(run.holds(3))[0].startswith("close 2 to step 2")


def test_a_word_of_somebody_unproven_does_not_count_beside_that_of_others() -> None:
    run = Sharded().begin()
    run.rounds.peers["w1"].proven = False
    run.all_push(), run.made(1), run.made(2)
    assert but_words(run.holds(1)) == []
    run.holds(2)
    assert but_words(run.holds(3))[0].startswith("close 2 to step 2")


def test_what_is_said_before_or_of_another_round_does_not_count() -> None:
    run = Sharded().begin()
    run.all_push()
    run.holds(1)
    assert run.happens(Made(1, 1, 1)) == []  # of the round before
    run.made(1)
    assert run.made(2) == ["all <- closing 2, who holds 1 2?"]
    assert run.tells(1, wire.Holds(1)) == []
    assert run.rounds.step == 1


def test_the_round_of_a_shard_that_dies_is_void_and_the_next_one_is_without_it() -> None:
    run = Sharded().begin()
    run.all_push(), run.made(1), run.made(2)
    assert but_words(run.happens(Failed(1, "its link was cut"))) == [
        "shard 1 is over",
        "void 2",
        "all <- open 3 at step 1 for 1: 0/60-70 0/30-40, 2: 0/70-80 0/40-50, "
        "3: 0/80-90 0/50-60, by 0:500 2:500",
    ]
    assert run.holds(3) == []
    assert run.happens(Made(1, 3, 1)) == []


def test_a_silent_shard_is_lost_and_so_is_that_of_a_worker_that_is_gone() -> None:
    run = Sharded().begin()
    run.now = 5.0
    run.works(1)
    told = run.tick(11.5, 1, 2, 3)
    assert told[1].startswith("# shard 2 on pi is gone: silent for 10.5 s; others average")
    run.works(1)
    told = run.drop(2, "it broke a rule")
    assert "shard 1 retires" in told and "void 3" in told


def test_after_the_end_a_silent_shard_is_lost_too() -> None:
    """Who lacks what it keeps waits for that, or for its end."""
    run = Sharded().begin()
    run.happens(Stop("enough", error=False))
    run.works(1)
    run.now = 5.0
    run.works(1)
    assert "shard 2 is over" in run.tick(11.5, 1, 2, 3)


def test_of_a_host_whose_shards_die_no_more_are_asked() -> None:
    run = Sharded(shards=2)
    for life in (1, 2, 3):
        run.tick(float(life), 1, 2, 3)
        assert run.happens(Offered("w2"))[0] == f"shard {life} of w2 begins"
        run.happens(Failed(life, "it is killed"))
    said, asked = run.tick(5.0, 1, 2, 3)
    assert said.startswith("# pi (10.0.0.2) carries no shard any more: 3 in a row have lived for")
    assert asked == "w3 <- carry a shard"
    assert run.tick(6.0, 1, 2, 3) == []  # it is said once
    assert run.happens(Offered("w2")) == ["the shard of w2 is not wanted"]


def test_a_host_whose_shards_live_long_may_lose_any_number_of_them() -> None:
    run = Sharded(shards=2, heartbeat_timeout=1e6, idle_timeout=1e6)
    for life in range(1, 6):
        assert run.tick(1000.0 * life, 1, 2, 3) == ["w2 <- carry a shard"]
        assert run.happens(Offered("w2"))[0] == f"shard {life} of w2 begins"
        run.tick(1000.0 * life + 900.0, 1, 2, 3)
        run.happens(Failed(life, "its worker is gone"))


def test_a_shard_that_nobody_elsewhere_hears_is_dropped_in_time() -> None:
    run = Sharded().begin()
    run.all_push(), run.made(1), run.made(2)
    run.holds(2)  # beside shard 1, of which nobody else has anything
    for now in (5.0, 10.0, 15.9):
        run.works()
        assert but_words(run.tick(now, 1, 2, 3)) == []
    run.works()
    told = but_words(run.tick(16.1, 1, 2, 3))
    assert told[:2] == ["shard 1 is over", "void 2"]


def test_where_loops_go_on_who_says_nothing_has_half_of_the_time_that_is_left() -> None:
    """A round that has waited for long before leaves others their turn, too, before the end."""
    run = Sharded(overlap=True, heartbeat_timeout=10.0, idle_timeout=200.0).begin()

    def until(now: float) -> list[str]:
        told: list[str] = []
        while run.now < now:
            run.works()
            told += but_words(run.tick(run.now + 5.0, 1, 2, 3))
        return told

    run.all_push(1)  # the others hang
    assert until(101.0) != []
    run.made(1), run.made(2)
    assert until(146.0) == []
    assert until(156.0)[:2] == ["shard 1 is over", "void 2"]


def test_an_average_that_is_not_made_in_time_costs_the_shard_its_place() -> None:
    run = Sharded().begin()
    run.all_push(), run.made(1)
    run.works()
    assert but_words(run.tick(10.9, 1, 2, 3)) == []
    run.works()
    told = run.tick(11.1, 1, 2, 3)
    assert told[:2] == [
        "shard 2 is over",
        "# shard 2 on pi is gone: an average has been due for 10 s; others average its part",
    ]


def test_who_loses_its_channel_is_out_of_the_round_and_the_shard_out_of_the_next() -> None:
    run = Sharded().begin()
    run.all_push(1, 2)
    told = run.reached(3, 2, "its connection was cut")
    assert told[0] == (
        "# worker 3 (pi) does not reach the shard on pi (10.0.0.3): its connection was cut; "
        "others average in its place"
    )
    run.made(1), run.made(2), run.holds(2)
    [close] = [e for e in run.holds(1) if e.startswith("close")]
    assert "late 3 (does not reach shard 2)" in close and close.endswith("by 0:500 1:500")


def test_who_holds_the_newest_averages_may_fetch_its_close_even_if_a_shard_is_gone() -> None:
    run = Sharded().begin()
    before = run.rounds.step, run.rounds.lineage
    run.all_push(), run.made(1), run.made(2)
    run.holds(3), run.holds(2)
    run.happens(Failed(1, "it is killed"))
    run.rounds.log.forget_before(run.rounds.step)  # as the server says then
    fetch = wire.Fetch(step=before[0], lineage=before[1])
    assert run.rounds.may_fetch("w3", fetch) and run.rounds.may_fetch("w2", fetch)
    assert not run.rounds.may_fetch("w1", fetch)
    assert run.tells(3, fetch) == []
    assert run.tells(1, fetch)[-1] == "w1 <- behind at step 2"


def test_what_is_carried_over_is_dropped_with_the_map() -> None:
    run = Sharded(max_staleness=2, timeout=1.0).begin()
    run.all_push(1, 2)
    run.tick(1.9, 1, 2, 3), run.works()
    run.tick(3.0, 1, 2, 3)  # without worker 3
    run.made(1), run.made(2), run.holds(1)
    assert run.rounds.peers["w3"].carried is not None
    run.works(2)
    told = but_words(run.happens(Failed(1, "it is killed")))
    assert run.rounds.peers["w3"].carried is None
    assert "0/50-60" in told[-1] and told[-1].endswith("by 0:500 2:500")  # it came back


# ------------------------------------------------------------------------------------- orders


class Own:
    """The server's own tensors, which are somebody else's test."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.updates: list[Update] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            self.told.append((name, *args))
            return {"due": [], "comparisons": dict[int, Comparison]()}.get(name)

        return call

    def close(self, close: wire.Close) -> Update:
        self.updates.append(Update(step=close.step, messages=[], bytes=1, stamp=0))
        return self.updates[-1]

    def reaches_back_to(self) -> int | None:
        return self.updates[0].step - 1 if self.updates else None

    def fetch(self, step: int) -> list[Update]:
        return [u for u in self.updates if u.step > step]


class Shop:
    """A `Spread` with one shard, whose `Adder` adds numbers; `now` and then both talk."""

    newest = oldest = 0

    def __init__(self, most: int = 8, limit: int = 2) -> None:
        self.own, self.orders = Own(), list[wire.Message]()
        self.spread = Spread(self.own, lambda shard, m: self.orders.append(m), "nonce")
        self.spread.employ(1)
        self.reports: list[tuple[wire.Message, tuple[Any, ...]]] = []
        self.adder = Adder(
            self,
            most=most,
            limit=limit,
            tell=lambda m, *buffers: self.reports.append((m, buffers)),
            send=lambda divide, buffers: 7,
            size=lambda buffer: 1,
        )
        self.sums: dict[int, float] = {}
        self.closed: list[tuple[int, ...]] = []
        self.released: list[float] = []

    def check(self, push: wire.Push, buffers: list[Any]) -> tuple[str | None, float | None]:
        return ("not finite", None) if buffers[0] != buffers[0] else (None, abs(buffers[0]))

    def add(self, payload: Payload, worker: int, weight: float, *, late: bool) -> None:
        bucket = payload.push.bucket
        self.sums[bucket] = self.sums.get(bucket, 0.0) + weight * payload.buffers[0]
        payload.release()

    def finish(self, divide: wire.Divide) -> tuple[list[Any], float, tuple[int, ...]]:
        return [self.sums.pop(divide.bucket) / divide.weight], 1.0, divide.absent

    def give_up(self, bucket: int) -> list[Any]:
        return []

    def take_over(self, bucket: int, buffers: list[Any]) -> None:
        raise AssertionError("nothing was left out")

    def close(self, averaged: tuple[int, ...]) -> None:
        self.closed.append(averaged)
        self.sums.clear()

    def recalled(self, round: int) -> bool:
        """Does the shard keep its average of this round?"""
        self.adder.order(wire.Recall(round=round, bucket=0))
        (message, _), *_ = self.reports
        self.reports.clear()
        assert isinstance(message, wire.Recalled)
        return message.kept

    def talk(self) -> None:
        """The shard carries out its orders, the server reads the reports."""
        while self.orders:
            self.adder.order(self.orders.pop(0))
        for message, buffers in self.reports:
            match message:
                case wire.Arrived():
                    self.spread.arrived(1, message, 10)
                case wire.Averaged():
                    self.spread.averaged(1, message)
                case wire.Recalled():
                    self.spread.recalled(1, message, list(buffers))
        self.reports.clear()

    def push(self, worker: int, number: int, value: float, round: int = 1) -> wire.Push:
        push = wire.Push(round=round, bucket=0, samples=1, shard=1, sealed=number)
        self.adder.came(f"w{worker}", number, push, [value], lambda: self.released.append(value))
        return push

    def update(self, step: int, value: float) -> None:
        """A whole round of one worker."""
        push = self.push(1, step, value, round=step)
        self.talk()
        self.spread.push("w1", 1, push, [])
        self.spread.add(1, 0, 1.0)
        self.spread.finish(Finish(step, step, 0, 1.0, (), 1))
        self.talk()
        close = wire.Close(
            nonce="nonce",
            round=step,
            step=step,
            lineage=f"s{step}",
            buckets=(0,),
            contributors={1: 1},
            late={},
            loss=None,
            seconds=0.0,
            ledger={},
        )
        self.spread.close(close)
        self.spread.forget_round((0,))
        self.talk()


def test_a_push_waits_for_its_report_and_is_added_once_told_so() -> None:
    shop = Shop()
    push = wire.Push(round=1, bucket=0, samples=1, shard=1, sealed=1)
    assert shop.spread.awaits("w1", push)
    shop.push(1, 1, 6.0), shop.talk()
    assert not shop.spread.awaits("w1", push)
    assert shop.spread.push("w1", 1, push, []) == (None, 6.0)
    other = shop.push(2, 1, 2.0)
    shop.talk(), shop.spread.push("w2", 2, other, [])
    shop.spread.add(2, 0, 1.0), shop.spread.add(1, 0, 3.0)
    shop.spread.finish(Finish(1, 1, 0, 4.0, (5,), 1))
    shop.talk()
    [average] = shop.spread.announced()
    assert (average.shard, average.number, average.absent) == (1, 7, (5,))
    assert shop.adder._open[0] == [5.0]


def test_bad_numbers_are_reported_and_not_kept() -> None:
    shop = Shop()
    push = shop.push(1, 1, float("nan"))
    shop.talk()
    assert shop.spread.push("w1", 1, push, []) == ("not finite", None)
    assert shop.adder.waiting == 0


def test_a_refused_push_is_dropped_before_and_after_it_comes() -> None:
    shop = Shop()
    early = wire.Push(round=1, bucket=0, samples=1, shard=1, sealed=1)
    shop.spread.release("w1", early)
    shop.talk()
    shop.push(1, 1, 6.0)
    assert shop.reports == [] and shop.adder.waiting == 0
    late = shop.push(1, 2, 6.0)
    shop.talk()
    assert shop.adder.waiting == 1
    shop.spread.release("w1", late), shop.talk()
    assert shop.adder.waiting == 0


def test_the_second_copy_of_a_push_does_not_drop_the_first() -> None:
    shop = Shop()
    push = shop.push(1, 1, 6.0)
    shop.talk(), shop.spread.push("w1", 1, push, [])
    shop.spread.release("w1", push), shop.talk()
    assert shop.adder.waiting == 1


def test_a_push_that_was_taken_is_added_when_its_sender_is_gone() -> None:
    shop = Shop()
    pushes = [shop.push(1, number, 6.0) for number in (1, 2)]
    shop.talk(), shop.spread.push("w1", 1, pushes[0], [])
    shop.spread.forget("w1"), shop.talk()
    assert shop.adder.waiting == 1  # the other one is dropped
    shop.spread.add(1, 0, 1.0), shop.talk()
    assert shop.sums and shop.adder.waiting == 0 and not shop.adder._waiting


def test_a_payload_of_another_push_is_no_use_and_nobody_is_sent_away_for_it() -> None:
    """The sender may lie, or the shard."""
    shop = Shop()
    shop.push(1, 1, 6.0), shop.talk()
    other = wire.Push(round=2, bucket=0, samples=1, shard=1, sealed=1)
    bad, norm = shop.spread.push("w1", 1, other, [])
    assert bad is not None and "another round or bucket" in bad and norm is None
    shop.talk()
    assert shop.adder.waiting == 0


# ------------------------------------------------------------------------- peers that lie to shards


def test_bad_numbers_count_until_the_server_has_taken_note() -> None:
    shop = Shop(most=2)
    pushes = [shop.push(1, number, float("nan")) for number in (1, 2)]
    with pytest.raises(PeerError, match="2 payloads wait"):
        shop.push(1, 3, float("nan"))
    shop.talk()
    for push in pushes:
        assert shop.spread.push("w1", 1, push, []) == ("not finite", None)
    shop.talk()
    shop.push(1, 4, 6.0)
    assert shop.adder.waiting == 1


def test_a_norm_that_is_no_number_is_bad() -> None:
    shop = Shop()
    push = shop.push(1, 1, float("inf"))
    shop.talk()
    assert shop.spread.push("w1", 1, push, []) == ("its norm is not finite", None)


def test_a_payload_has_no_number_that_cannot_be_told() -> None:
    with pytest.raises(PeerError, match="of number"):
        Shop().push(1, wire.NUMBER_MAX + 1, 6.0)


def test_what_is_not_needed_is_kept_in_mind_within_bounds() -> None:
    shop = Shop(most=4)
    for number in range(2**40, 2**40 + 100):
        push = wire.Push(round=9, bucket=0, samples=1, shard=1, sealed=number)
        shop.spread.release("w1", push)
    shop.talk()
    assert len(shop.adder._waiting["w1"].unneeded) == 4


# -------------------------------------------------------------------------------- shards that lie


def test_a_shard_cannot_tell_of_payloads_without_end() -> None:
    shop = Shop()
    reports = [wire.Arrived(session="w1", number=n, round=1, bucket=0) for n in range(1, 12)]
    for report in reports[:10]:
        shop.spread.arrived(1, report, 10)
    with pytest.raises(PeerError, match="11 payloads of one peer"):
        shop.spread.arrived(1, reports[10], 10)


def test_a_shard_leaves_out_of_an_average_what_it_is_told_to() -> None:
    """Its list goes into a message to all, which must not grow beyond what they take."""
    shop = Shop()
    shop.spread.finish(Finish(1, 1, 0, 1.0, (5,), 1))
    report = wire.Averaged(round=1, bucket=0, number=1, absent=tuple(range(60_000)), scale=1.0)
    with pytest.raises(PeerError, match="other tensors"):
        shop.spread.averaged(1, report)


def test_a_shard_does_not_answer_for_another_one() -> None:
    shop = Shop()
    shop.update(1, 6.0)
    assert shop.spread.recall(1)
    forged = wire.Recalled(round=1, bucket=0, kept=True)
    with pytest.raises(PeerError, match="another shard"):
        shop.spread.recalled(2, forged, [-1.0])
    assert shop.spread.found(1) == []
    shop.talk()
    assert [buffers for _, buffers in shop.spread.found(1)] == [[6.0]]


def test_a_void_round_leaves_nothing_but_what_is_late() -> None:
    shop = Shop()
    for worker in (1, 2, 3):
        push = shop.push(worker, 1, 6.0)
        shop.talk()
        shop.spread.push(f"w{worker}", worker, push, [], late=worker == 3)
    shop.spread.add(1, 0, 1.0)
    shop.spread.forget_round(()), shop.talk()
    assert shop.sums == {} and shop.adder.waiting == 1 and shop.closed == [()]
    shop.spread.drop(3, 0), shop.talk()
    assert shop.adder.waiting == 0


def test_an_average_of_a_void_round_is_not_announced() -> None:
    shop = Shop()
    push = shop.push(1, 1, 6.0)
    shop.talk(), shop.spread.push("w1", 1, push, [])
    shop.spread.add(1, 0, 1.0), shop.spread.finish(Finish(1, 1, 0, 1.0, (), 1))
    while shop.orders:
        shop.adder.order(shop.orders.pop(0))
    shop.spread.forget_round(())
    shop.talk()
    assert shop.spread.announced() == []


def test_what_a_shard_keeps_is_fetched_as_long_as_it_reaches_back() -> None:
    shop = Shop(limit=2)
    for step in (1, 2, 3):
        shop.update(step, float(step))
    assert shop.spread.recall(2)
    shop.talk()
    [(average, buffers)] = shop.spread.found(2)
    assert (average.round, average.bucket, buffers) == (2, 0, [2.0])
    shop.spread.handed_out(2)
    assert shop.spread.found(2) == []
    assert shop.spread.reaches_back_to() == 0
    assert shop.spread.recall(1)  # the shard has forgotten it
    shop.talk()
    assert shop.spread.reaches_back_to() == 1 and not shop.spread.recall(1)


def test_with_a_shard_all_is_gone_that_it_kept() -> None:
    shop = Shop(limit=5)
    shop.update(1, 1.0), shop.update(2, 2.0)
    shop.spread.dismiss(1)
    assert shop.spread.reaches_back_to() == 2
    assert not shop.spread.recall(2) and [u.step for u in shop.spread.fetch(1)] == [2]


def test_an_order_that_cannot_be_carried_out_is_no_order_of_the_server() -> None:
    shop = Shop()
    for order in (
        wire.AddUp(session="w1", number=1, worker=1, bucket=0, weight=1.0),
        wire.Beat(session="w1"),
    ):
        with pytest.raises(PeerError):
            shop.adder.order(order)


def test_a_peer_cannot_fill_a_shard() -> None:
    shop = Shop(most=2)
    shop.push(1, 1, 1.0), shop.push(1, 2, 1.0), shop.push(1, 2, 1.0)
    with pytest.raises(PeerError, match="2 payloads wait"):
        shop.push(1, 3, 1.0)
    shop.push(2, 1, 1.0)  # others may


def test_a_host_whose_worker_leaves_again_and_again_carries_no_more_shards() -> None:
    """Each time the open round is void, for all."""
    run = Sharded(shards=2)
    for life in (1, 2, 3):
        run.tick(float(life), 1, 2, 3)
        assert run.happens(Offered("w2"))[0] == f"shard {life} of w2 begins"
        run.rounds.shards.retire(life, run.now)
    assert run.tick(5.0, 1, 2, 3)[1:] == ["w3 <- carry a shard"]


@pytest.mark.parametrize(("setting", "hosts"), [(None, 64), (None, 500), (1000, 3)])
def test_a_round_has_no_more_shards_than_can_be_told(setting: int | None, hosts: int) -> None:
    assert wanted(setting, hosts, 1e9) == wire.SHARDS_MAX


def test_why_the_server_averages_alone_is_told_where_several_could() -> None:
    settings = Settings(deterministic=True, codec="int8")
    why = settings.averages_alone
    rules = {"deterministic": True, "shards": settings.shards_wanted, "averages_alone": why}
    assert Sharded(**rules).tick(1.0, 1, 2, 3) == [f"# the server averages all gradients: {why}"]
    run = Sharded(**rules)
    run.happens(Placed("w3", "10.0.0.2"))
    assert run.tick(1.0, 1, 2, 3) == []  # two hosts have the server alone anyhow
    run.happens(Placed("w3", "10.0.0.3"))
    assert len(run.tick(2.0, 1, 2, 3)) == 1
    assert run.tick(3.0, 1, 2, 3) == []  # once


def test_the_codecs_that_leave_something_out_of_an_average_are_known() -> None:
    leave = {name for name in CODECS if codec_of_averages(name, 0.01).leaves_residual}
    assert leave == LEAVE_OUT


@pytest.mark.parametrize(
    ("codecs", "alone"),
    [
        ({"codec": "int8"}, True),
        ({"codec_down": "topk"}, True),
        ({"codec": "int8", "codec_down": "float16"}, False),
        ({"codec": "bfloat16"}, False),
    ],
)
def test_with_the_same_bits_run_after_run_nothing_that_is_left_out_moves(
    codecs: dict[str, Any], alone: bool
) -> None:
    """When a bucket goes to another process is chance, and what was left out of it stays behind."""
    assert Settings(**codecs).shards_wanted is None
    settings = Settings(deterministic=True, **codecs)
    assert settings.shards_wanted == (1 if alone else None)
    assert bool(settings.averages_alone) is alone
    assert not replace(settings, shards=1).averages_alone  # as was asked for
    assert not replace(settings, aggregate="median").averages_alone  # it does so anyhow
    for shards in (None, 1, 3):
        tree = {**copy.deepcopy(vars(replace(settings, shards=shards)))}
        tree["wandb"] = vars(tree["wandb"])
        if alone and shards == 3:
            with pytest.raises(
                UserError, match=r"shards must be null or 1 with deterministic=true"
            ):
                build(tree)
        else:
            assert build(tree).shards == shards
