"""The worker's mind, as scripts of messages and the effect of each."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.protocol import messages as wire
from paramserver.protocol.messages import Average, Close, End, Fetch, Open, Pulse, next_lineage
from workers.link.follow import NOTHING, Apply, Diverged, Drop, Follow, Gap, Silent, Take, TooLate

NONCE = "server-1"
OLD = Drop("older than what I hold")
TWICE = Drop("came twice")
FOREIGN = Drop("of another server")


class Standing:
    """Where a replica stands."""

    def __init__(self, step: int, lineage: str) -> None:
        self.step, self.lineage = step, lineage


class Follower(Follow):
    """A replica and its `Follow`: what was applied or adopted is where it stands."""

    def __init__(self, nonce: str, step: int, lineage: str, now: float, run: str = "") -> None:
        self.replica = Standing(step, lineage)
        super().__init__(nonce, self.replica, now, run)

    def applied(self, m: Close) -> None:
        self.replica.step, self.replica.lineage = m.step, m.lineage
        super().applied(m)

    def adopts(self, step: int, lineage: str) -> None:
        self.replica.step, self.replica.lineage = step, lineage
        self.adopted()


class Log:
    """What a server says: the messages of its rounds, in order."""

    def __init__(self, buckets: int = 2) -> None:
        self.buckets = buckets
        self.lineages = ["first"]
        self.ledger: dict[str, Any] = {}
        self.round = 0

    @property
    def step(self) -> int:
        return len(self.lineages) - 1

    def open(self, leases: dict[int, tuple[wire.Lease, ...]] | None = None) -> Open:
        self.round += 1
        return Open(
            nonce=NONCE,
            round=self.round,
            step=self.step,
            lineage=self.lineages[-1],
            leases=leases or {1: ((0, 10 * self.step, 10 * self.step + 10),)},
        )

    def average(self, bucket: int) -> Average:
        return Average(nonce=NONCE, round=self.round, step=self.step + 1, bucket=bucket)

    def close(self, *buckets: int, open: Open | None = None) -> Close:
        close = Close(
            nonce=NONCE,
            round=self.round,
            step=self.step + 1,
            lineage="",
            buckets=buckets,
            contributors={1: 10},
            late={},
            loss=None,
            seconds=0.1,
            ledger=self.ledger,
        )
        self.lineages.append(next_lineage(self.lineages[-1], close))
        following = self.open() if open is None else open
        return msgspec.structs.replace(close, lineage=self.lineages[-1], open=following)

    def update(self) -> list[Average | Close]:
        """The messages of one whole round, which is open already."""
        averages = [self.average(b) for b in range(self.buckets)]
        return [*averages, self.close(*range(self.buckets))]

    def pulse(self, open: Open | None = None, closed: int | None = None) -> Pulse:
        return Pulse(
            nonce=NONCE,
            step=self.step,
            lineage=self.lineages[-1],
            phase="training",
            open=open,
            closed=closed,
            sent_bytes=7,
            received_bytes=5,
        )

    def end(self) -> End:
        return End(nonce=NONCE, step=self.step, lineage=self.lineages[-1], reason="done")


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def follow() -> Follower:
    return Follower(NONCE, 0, "first", now=0.0)


def apply(follow: Follower, messages: list[Average | Close]) -> None:
    """As the client does, where nothing is missing."""
    for m in messages:
        if isinstance(m, Average):
            assert isinstance(follow.average(m), Take)
        else:
            effect = follow.close(m)
            assert isinstance(effect, Apply), effect
            follow.applied(effect.close)


# ------------------------------------------------------------------------------- one step


def test_averages_are_taken_and_the_close_applies_them(follow: Follower, log: Log) -> None:
    assert follow.opened(log.open()) == NOTHING
    first, second, close = log.average(0), log.average(1), log.close(0, 1)
    assert follow.average(second) == Take(second, first=True)
    assert follow.average(first) == Take(first)
    assert follow.close(close) == Apply(close)
    assert follow.step == 0, "not before it is applied"
    follow.applied(close)
    next_first = log.average(0)
    assert follow.average(next_first) == Take(next_first, first=True)
    assert (follow.step, follow.lineage) == (1, close.lineage)
    assert follow.open == close.open and follow.is_over(1) and not follow.is_over(2)


def test_a_close_that_opens_nothing_still_ends_its_round(follow: Follower, log: Log) -> None:
    opened = log.open()
    follow.opened(opened)
    close = msgspec.structs.replace(log.close(), open=None)
    follow.applied(close)
    assert follow.is_over(1) and follow.open == opened
    assert follow.lease(1, after=0) is None


def test_an_update_without_averages_is_one(follow: Follower, log: Log) -> None:
    log.open()
    close = log.close()
    assert follow.close(close) == Apply(close, first=True)


def test_a_bucket_without_contributors_is_not_waited_for(follow: Follower, log: Log) -> None:
    log.open()
    follow.average(log.average(1))
    assert isinstance(follow.close(log.close(1)), Apply)


def test_what_is_older_or_comes_twice_is_dropped(follow: Follower, log: Log) -> None:
    opened = log.open()
    average = log.average(0)
    follow.average(average)
    assert follow.average(average) == TWICE
    follow.average(log.average(1))
    close = log.close(0, 1)
    follow.applied(close)
    assert follow.average(average) == OLD
    assert follow.close(close) == OLD
    assert follow.opened(opened) == OLD
    assert follow.open == close.open


def test_what_another_server_says_is_dropped(log: Log) -> None:
    follow = Follower("server-2", 0, "first", now=0.0)
    opened = log.open()
    assert follow.opened(opened) == FOREIGN
    assert follow.average(log.average(0)) == FOREIGN
    assert follow.close(log.close()) == FOREIGN
    assert follow.pulse(log.pulse(), 0.0) == FOREIGN
    assert follow.ended(log.end()) == FOREIGN
    assert follow.end is None and follow.open is None and follow.phase == ""


def test_a_log_that_does_not_continue_from_here_needs_a_snapshot(log: Log) -> None:
    follow = Follower(NONCE, 0, "another first state", now=0.0)
    log.open()
    assert follow.close(log.close()) == Diverged("update 1 does not continue from my step 0")
    assert follow.step == 0


# ------------------------------------------------------------------------------- gaps


def test_a_lost_average_shows_at_the_close_and_is_fetched(follow: Follower, log: Log) -> None:
    log.open()
    first, second, close = log.update()
    assert isinstance(first, Average) and isinstance(second, Average) and isinstance(close, Close)
    follow.average(second)
    assert follow.close(close) == Gap()
    assert follow.fetch(1.0) == Fetch(step=0, lineage="first")
    assert follow.average(first) == Take(first)  # from the link, in order
    assert follow.average(second) == TWICE
    assert follow.close(close) == Apply(close)
    follow.applied(close)
    assert follow.fetched(1, close.open) == NOTHING
    assert follow.close(close) == OLD  # the one from SUB that waited


def test_a_lost_close_shows_at_whatever_comes_next(log: Log) -> None:
    log.open()
    lost = log.update()
    later = [log.average(0), log.close(), log.end()]
    for m in (*later, lost[-1].open):  # type: ignore[union-attr]
        follow = Follower(NONCE, 0, "first", now=0.0)
        seen = {
            Average: follow.average,
            Close: follow.close,
            End: follow.ended,
            Open: follow.opened,
        }
        assert seen[type(m)](m) == Gap(), m  # type: ignore[operator]


def test_an_average_that_was_written_over_is_one_that_never_came(
    follow: Follower, log: Log
) -> None:
    log.open()
    first, second, close = log.update()
    assert isinstance(first, Average) and isinstance(second, Average) and isinstance(close, Close)
    follow.average(first)
    follow.average(second)
    follow.lost(0)
    assert follow.close(close) == Gap()
    follow.fetch(0.0)
    assert follow.average(first) == Take(first)
    assert follow.close(close) == Apply(close)
    follow.lost(0)  # too late to matter
    follow.lost(7)


def test_a_fetch_may_take_several_answers(follow: Follower, log: Log) -> None:
    log.open()
    updates = [log.update() for _ in range(3)]
    follow.fetch(0.0)
    apply(follow, updates[0])
    assert follow.fetched(3, None) == Gap()
    assert follow.fetching_since is None
    assert follow.fetch(0.0) == Fetch(step=1, lineage=log.lineages[1])
    apply(follow, updates[1] + updates[2])
    assert follow.fetched(3, None) == NOTHING


def test_what_is_fetched_tells_the_open_round(follow: Follower, log: Log) -> None:
    opened = log.open()
    follow.fetch(0.0)
    follow.fetched(0, opened)
    assert follow.open == opened
    follow.fetch(0.0)
    log.close()
    follow.fetched(1, log.open())
    assert follow.open == opened, "that one is of a step where I do not stand"


def test_a_fetch_without_an_answer_is_made_again(follow: Follower) -> None:
    follow.fetch(now=1.0)
    follow.heard(2.0)
    assert follow.tick(3.0, quiet_s=2.0) == NOTHING
    assert follow.tick(3.1, quiet_s=2.0) == Gap()
    follow.fetch(now=3.1)
    assert follow.tick(3.9, quiet_s=2.0) == NOTHING


def test_silence_is_told(follow: Follower) -> None:
    assert follow.tick(2.0, quiet_s=2.0) == NOTHING
    assert follow.tick(2.5, quiet_s=2.0) == Silent(2.5)
    follow.heard(2.5)
    assert follow.tick(4.5, quiet_s=2.0) == NOTHING


# ------------------------------------------------------------------------------- void rounds


def test_averages_of_a_void_round_are_forgotten_with_the_first_of_the_next(
    follow: Follower, log: Log
) -> None:
    log.open()
    void = log.average(0)
    assert follow.average(void) == Take(void, first=True)
    log.open()  # round 2 leads to the same step
    first, second, close = log.update()
    assert isinstance(first, Average) and isinstance(second, Average) and isinstance(close, Close)
    assert follow.average(first) == Take(first, first=True)
    assert follow.average(void) == OLD
    assert follow.close(close) == Gap(), "bucket 0 of round 1 does not stand for bucket 1"
    assert follow.average(second) == Take(second)
    assert follow.close(close) == Apply(close)


def test_averages_of_a_void_round_are_no_part_of_an_empty_update(
    follow: Follower, log: Log
) -> None:
    log.open()
    follow.average(log.average(0))
    log.open()
    close = log.close()
    assert follow.close(close) == Apply(close, first=True)


def test_a_close_of_another_round_than_the_averages_is_a_gap(follow: Follower, log: Log) -> None:
    log.open()
    follow.average(log.average(0))
    follow.average(log.average(1))
    log.open()
    assert follow.close(log.close(0, 1)) == Gap()


def test_a_void_round_is_over_when_the_next_opens_or_a_pulse_says_so(log: Log) -> None:
    for tell in ("open", "pulse with the next", "pulse"):
        follow = Follower(NONCE, 0, "first", now=0.0)
        log = Log()
        follow.opened(log.open())
        assert not follow.is_over(1)
        if tell == "open":
            follow.opened(log.open())
        elif tell == "pulse":
            follow.pulse(log.pulse(closed=1), 0.0)
        else:
            follow.pulse(log.pulse(log.open(), closed=1), 0.0)
        assert follow.is_over(1) and not follow.is_over(2)


# ------------------------------------------------------------------------------- pulses


def test_a_pulse_may_overtake_a_close_but_not_twice(follow: Follower, log: Log) -> None:
    log.open()
    update = log.update()
    assert follow.pulse(log.pulse(), 0.0) == NOTHING
    apply(follow, update)
    update = log.update()
    assert follow.pulse(log.pulse(), 0.0) == NOTHING, "behind again, but not at the same step"
    assert follow.pulse(log.pulse(), 0.0) == Gap()
    assert follow.pulse(log.pulse(), 0.0) == Gap()
    apply(follow, update)
    assert follow.pulse(log.pulse(), 0.0) == NOTHING


def test_a_pulse_tells_of_the_round_only_where_it_stands_at_my_step(
    follow: Follower, log: Log
) -> None:
    early = log.pulse(log.open(), closed=0)
    follow.pulse(early, 0.0)
    assert follow.open == early.open
    [*_, close] = update = log.update()
    late = log.pulse(close.open, closed=1)  # type: ignore[union-attr]
    follow.pulse(late, 0.0)
    assert follow.open == early.open and not follow.is_over(1)
    apply(follow, update)
    follow.pulse(early, 0.0)  # one from before, held up on its way
    assert follow.open == close.open  # type: ignore[union-attr]


def test_a_pulse_tells_what_the_server_does(follow: Follower, log: Log) -> None:
    follow.pulse(log.pulse(), 0.0)
    assert (follow.phase, follow.traffic, follow.ending) == ("training", (7, 5), False)
    assert follow.trains
    paused = msgspec.structs.replace(log.pulse(), doing="paused", ending=True)
    follow.pulse(paused, 0.0)
    assert follow.ending and not follow.trains


# ------------------------------------------------------------------------------- the end


def test_the_end_is_kept_and_the_last_updates_are_still_wanted(follow: Follower, log: Log) -> None:
    log.open()
    update = log.update()
    end = log.end()
    assert follow.ended(end) == Gap()
    assert follow.end == end
    follow.fetch(0.0)
    apply(follow, update)
    assert follow.fetched(1, None) == NOTHING
    assert follow.ended(end) == NOTHING


def test_a_run_that_has_ended_under_a_restarted_server_is_over(log: Log) -> None:
    """That server let this replica in no more, and answers nobody."""
    log.update()
    end = msgspec.structs.replace(log.end(), nonce="server-2", run="run-1")
    follow = Follower(NONCE, 0, "first", now=0.0, run="run-1")
    assert follow.ended(end) == TooLate()
    assert follow.end == end
    for run, of_end in (("run-2", "run-1"), ("", "run-1"), ("", ""), ("run-1", "")):
        other = Follower(NONCE, 0, "first", now=0.0, run=run)
        assert other.ended(msgspec.structs.replace(end, run=of_end)) == FOREIGN
        assert other.end is None


# ------------------------------------------------------------------------------- snapshots


def test_a_snapshot_moves_and_what_was_before_is_over(follow: Follower, log: Log) -> None:
    follow.opened(log.open())
    follow.average(log.average(0))
    follow.fetch(0.0)
    for _ in range(3):
        log.update()
    follow.adopts(3, log.lineages[3])
    assert (follow.step, follow.lineage, follow.fetching_since) == (3, log.lineages[3], None)
    assert follow.lease(1, after=0) is None, "no lease of a round that is over"
    assert follow.is_over(1)
    log.open()
    older = msgspec.structs.replace(log.average(0), step=3)
    assert follow.average(older) == OLD
    apply(follow, log.update())
    assert follow.step == 4


# ------------------------------------------------------------------------------- leases


def going_on(log: Log, began: int, *workers: int) -> Open:
    """A round of leases that began in that round."""
    leases = {w: ((0, 10 * w, 10 * w + 10),) for w in workers}
    return msgspec.structs.replace(log.open(leases), began=began)


def test_a_step_of_a_lease_over_several_rounds_has_its_place(follow: Follower, log: Log) -> None:
    follow.opened(going_on(log, 1, 1, 2))
    assert follow.lease(1, after=0) == (1, (0, 10, 20)) and follow.asks_in(1, 1) is None
    assert follow.may_step(1, 1, 1) is True and follow.may_step(1, 1, 2) is None
    follow.opened(going_on(log, 1, 1))  # round 1 was void, worker 2 has lost its lease
    assert follow.lease(1, after=1) is None, "leases that go on are no new ones"
    assert follow.may_step(1, 1, 1) is False and follow.may_step(1, 1, 2) is True
    assert follow.asks_in(1, 1) == 2
    for number in (1, 2, 3):
        assert follow.may_step(2, 1, number) is False, "others go on without it"
    assert follow.asks_in(2, 1) is None


def test_no_step_is_waited_for_whose_lease_has_ended(follow: Follower, log: Log) -> None:
    """Though its round has not come, or has the number of another one."""
    follow.opened(going_on(log, 1, 1, 2))
    follow.opened(going_on(log, 2, 1, 2))
    assert follow.may_step(1, 1, 2) is False and follow.may_step(1, 1, 3) is False
    assert follow.asks_in(1, 1) is None and follow.lease(1, after=1) == (2, (0, 10, 20))


def test_a_lease_is_that_of_the_open_round_after_the_last_one(follow: Follower, log: Log) -> None:
    assert follow.lease(1, after=0) is None and follow.lease_ahead(1) is None
    mine, ahead = (0, 0, 10), (0, 20, 30)
    follow.opened(log.open({1: (mine, ahead), 2: ((0, 10, 20),), 3: ()}))
    assert follow.lease(1, after=0) == (1, mine)
    assert follow.lease_ahead(1) == ahead
    assert follow.lease(2, after=0) == (1, (0, 10, 20))
    assert follow.lease_ahead(2) is None
    assert follow.lease(3, after=0) is None, "it was a member, and lost its leases"
    assert follow.lease(4, after=0) is None
    assert follow.lease(1, after=1) is None, "that one was worked on already"


def test_the_lease_of_a_round_that_is_over_is_none(follow: Follower, log: Log) -> None:
    follow.opened(log.open())
    follow.pulse(log.pulse(closed=1), 0.0)
    assert follow.lease(1, after=0) is None


# ------------------------------------------------------------------------------- at random


@settings(max_examples=200)
@given(data=st.data(), buckets=st.integers(1, 3))
def test_whatever_is_lost_or_repeated_each_update_is_applied_once_in_order(
    data: st.DataObject, buckets: int
) -> None:
    """SUB loses and repeats; the link answers fetches. The glue is the client's."""
    log, follow = Log(buckets), Follower(NONCE, 0, "first", now=0.0)
    log.open()
    updates: list[list[Average | Close]] = []
    sent: list[Average | Close] = []
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):  # some averages, then the round is void
            sent += [log.average(b) for b in range(data.draw(st.integers(0, buckets)))]
            log.open()
        updates.append(log.update())
        sent += updates[-1]
    taken: dict[int, int] = {}  # bucket -> round, as the replica holds it
    applied: list[int] = []

    def look(m: Average | Close) -> bool:
        effect = follow.average(m) if isinstance(m, Average) else follow.close(m)
        if isinstance(effect, Take | Apply) and effect.first:
            taken.clear()
        if isinstance(effect, Take):
            taken[effect.average.bucket] = effect.average.round
        elif isinstance(effect, Apply):
            assert taken == dict.fromkeys(effect.close.buckets, effect.close.round)
            taken.clear()
            applied.append(effect.close.step)
            follow.applied(effect.close)
        assert not isinstance(effect, Diverged)
        return effect != Gap()

    def fetch() -> None:
        request = follow.fetch(0.0)
        for update in updates[request.step : request.step + 2]:
            assert all(map(look, update))
        if follow.fetched(log.step, None) == Gap():
            fetch()

    for m in sent:
        if data.draw(st.integers(0, 3)):  # else it is lost
            for _ in range(data.draw(st.integers(1, 2))):
                if not look(m):
                    fetch()
                    assert look(m)
    for _ in range(2):
        if follow.pulse(log.pulse(), 0.0) == Gap():
            fetch()
    assert applied == list(range(1, log.step + 1))
    assert follow.lineage == log.lineages[-1]
