"""The ledger: its sums always agree, nothing is given out twice, and nothing is lost."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripts import leased, unleased

from paramserver.protocol.messages import OWN, Lease
from paramserver.rounds.ledger import (
    DONE,
    DROPPED,
    KILLED,
    LOST_NAMED,
    PARTLY,
    RETURNED,
    SKIPPED,
    SUSPECTS_KEPT,
    UNREAD,
    Ledger,
    Lost,
    OwnLedger,
)

# ---------------------------------------------------------------------------------- scripts


def all_of(ledger: Ledger, size: int, least: int = 1) -> list[Lease]:
    leases = []
    while (lease := ledger.lease(size, least)) is not None:
        leases.append(lease)
    return leases


def test_ranges_come_in_order_and_the_last_of_an_epoch_may_be_short() -> None:
    assert all_of(Ledger(5, 2), 2) == [
        *((0, 0, 2), (0, 2, 4), (0, 4, 5)),
        *((1, 0, 2), (1, 2, 4), (1, 4, 5)),
    ]


def test_no_samples_or_no_epochs_is_nothing_to_do() -> None:
    for ledger in (Ledger(0, 3), Ledger(7, 0)):
        assert ledger.lease(4) is None
        assert ledger.exhausted and ledger.finished and ledger.total == 0 == unleased(ledger)


def test_what_is_returned_goes_first_in_its_old_order() -> None:
    ledger = Ledger(8, 1)
    first, second, third = (ledger.lease(2) for _ in range(3))
    assert first and second and third
    for lease in (third, first):
        ledger.settle(lease, RETURNED)
    assert all_of(ledger, 2) == [first, third, (0, 6, 8)]


def test_a_returned_range_may_be_leased_in_parts() -> None:
    ledger = Ledger(10, 1)
    lease = ledger.lease(8)
    assert lease is not None
    ledger.settle(lease, RETURNED)
    assert all_of(ledger, 3) == [(0, 0, 3), (0, 3, 6), (0, 6, 8), (0, 8, 10)]
    for lease in ((0, 0, 3), (0, 3, 6)):
        ledger.settle(lease, RETURNED)
    assert all_of(ledger, 1) == [(0, i, i + 1) for i in range(6)]


@given(
    samples=st.integers(1, 200),
    size=st.integers(1, 20),
    fates=st.lists(st.sampled_from(["done", "returned", "the server dies"]), max_size=60),
)
def test_what_comes_back_is_no_more_leases_than_before(
    samples: int, size: int, fates: list[str]
) -> None:
    """So a killed server costs no step by that; a round that closes with fewer members does."""
    ledger, out, counted = Ledger(samples, 2), list[Lease](), 0
    for fate in [*fates, *["done"] * 800]:
        while len(out) < 4 and (lease := ledger.lease(size)) is not None:
            out.append(lease)
        if fate == "the server dies":
            ledger, out = Ledger.from_state(ledger.state()), []
        elif out:
            ledger.settle(out.pop(0), fate)
            counted += fate == "done"
    assert ledger.finished and counted == 2 * -(-samples // size)


def test_each_way_to_settle_is_counted_on_its_own() -> None:
    ledger = Ledger(10, 1)
    for how in (DONE, PARTLY, SKIPPED, RETURNED):
        lease = ledger.lease(2)
        assert lease is not None
        ledger.settle(lease, how)
    assert (ledger.done, ledger.partly, ledger.skipped, ledger.counted) == (2, 2, 2, 6)
    assert (leased(ledger), unleased(ledger)) == (0, 4)


def test_a_lease_that_is_worked_off_in_part_is_split() -> None:
    ledger = Ledger(20, 1)
    lease = ledger.lease(8)
    assert lease is not None
    first = ledger.split(lease, 3)
    assert first == (0, 0, 3)
    ledger.settle(first, DONE)
    assert ledger.done == 3
    assert ledger.lease(8) == (0, 3, 8)


def test_exhausted_is_not_finished_while_leases_are_out() -> None:
    ledger = Ledger(2, 1)
    lease = ledger.lease(9)
    assert lease == (0, 0, 2)
    assert ledger.exhausted and not ledger.finished
    ledger.settle(lease, RETURNED)
    assert not ledger.exhausted
    again = ledger.lease(9)
    assert again == lease
    ledger.settle(lease, DONE)
    assert ledger.finished


def test_a_lease_is_settled_once_and_only_if_it_was_given() -> None:
    ledger = Ledger(4, 1)
    lease = ledger.lease(2)
    assert lease is not None
    ledger.settle(lease, DONE)
    for wrong in (lease, (0, 2, 4)):
        with pytest.raises(KeyError):
            ledger.settle(wrong, DONE)
    with pytest.raises(ValueError, match="at least one"):
        ledger.lease(0)
    other = ledger.lease(2)
    assert other is not None
    with pytest.raises(ValueError, match="lost"):
        ledger.settle(other, "lost")


# ------------------------------------------------------------------------- a rest that is too short


def test_no_rest_of_one_stays_where_two_are_needed() -> None:
    assert all_of(Ledger(5, 2), 2, least=2) == [(0, 0, 2), (0, 2, 5), (1, 0, 2), (1, 2, 5)]
    assert all_of(Ledger(6, 1), 5, least=3) == [(0, 0, 6)]
    assert all_of(Ledger(1, 1), 5, least=2) == [(0, 0, 1)]  # there is nothing to add


def test_what_comes_back_leaves_no_rest_of_one_either() -> None:
    ledger = Ledger(9, 1)
    lease = ledger.lease(8)
    assert lease is not None
    ledger.settle(lease, RETURNED)
    assert all_of(ledger, 3, least=2) == [(0, 0, 3), (0, 3, 6), (0, 6, 9)]


def test_a_single_one_that_comes_back_is_leased_with_its_neighbours() -> None:
    ledger = Ledger(6, 1)
    first, second, third = (ledger.lease(1) for _ in range(3))
    assert first and second and third
    for lease in (first, second, third):
        ledger.settle(lease, RETURNED)
    assert all_of(ledger, 2, least=2) == [(0, 0, 2), (0, 2, 4), (0, 4, 6)]


def test_a_short_rest_is_dropped_on_request_and_named() -> None:
    ledger = Ledger(5, 2)
    leases = []
    while (lease := ledger.lease(2, drop_last=True)) is not None:
        leases.append(lease)
        ledger.settle(lease, DONE)
    assert leases == [(0, 0, 2), (0, 2, 4), (1, 0, 2), (1, 2, 4)]
    assert (ledger.done, ledger.skipped, ledger.finished) == (8, 2, True)
    assert ledger.take_news() == [Lost((0, 4, 5), DROPPED), Lost((1, 4, 5), DROPPED)]
    assert ledger.take_news() == []


# ------------------------------------------------------------------------ what workers die of


def die(ledger: Ledger, size: int, error: bool = True, spare: bool = False) -> Lease:
    """The next range kills its worker."""
    lease = ledger.lease(size)
    assert lease is not None
    ledger.settle(lease, RETURNED)
    ledger.died(lease, error=error, spare=spare)
    return lease


def test_two_deaths_with_an_error_halve_a_range_and_one_more_skips_the_half() -> None:
    ledger = Ledger(8, 1)
    assert [die(ledger, 4) for _ in range(2)] == [(0, 0, 4)] * 2
    assert die(ledger, 4) == (0, 0, 2)
    assert ledger.lost == [Lost((0, 0, 2), KILLED)]
    assert (ledger.skipped, ledger.killed, ledger.killed_ranges) == (2, 2, 1)
    assert all_of(ledger, 4) == [(0, 2, 4), (0, 4, 8)]


def test_without_an_error_it_takes_three() -> None:
    ledger = Ledger(8, 1)
    assert [die(ledger, 4, error=False) for _ in range(3)] == [(0, 0, 4)] * 3
    assert die(ledger, 4, error=False) == (0, 0, 2)
    assert ledger.lost == [Lost((0, 0, 2), KILLED)]


def test_one_of_each_and_another_are_three() -> None:
    ledger = Ledger(8, 1)
    die(ledger, 4, error=False), die(ledger, 4, error=True), die(ledger, 4, error=False)
    assert ledger.lease(4) == (0, 0, 2)


def test_with_workers_to_spare_only_the_sample_that_kills_is_skipped() -> None:
    ledger = Ledger(64, 1)
    deaths = 0
    while (lease := ledger.lease(32)) is not None:
        if lease[1] <= 21 < lease[2]:
            ledger.settle(lease, RETURNED)
            ledger.died(lease, error=True, spare=True)
            deaths += 1
        else:
            ledger.settle(lease, DONE)
    assert ledger.lost == [Lost((0, 21, 22), KILLED)]
    assert (ledger.done, ledger.skipped, deaths) == (63, 1, 7)


def test_a_single_sample_is_skipped_at_once() -> None:
    ledger = Ledger(3, 1)
    die(ledger, 1), die(ledger, 1)
    assert ledger.lost == [Lost((0, 0, 1), KILLED)]


def test_a_half_is_never_too_short_to_train_with() -> None:
    ledger = Ledger(8, 1)
    for _ in range(2):
        lease = ledger.lease(3, least=2)
        assert lease == (0, 0, 3)
        ledger.settle(lease, RETURNED)
        ledger.died(lease, error=True, spare=True)
    assert ledger.lost == [Lost((0, 0, 3), KILLED)]


def test_deaths_follow_a_range_that_is_leased_in_parts() -> None:
    ledger = Ledger(8, 1)
    die(ledger, 8)
    assert die(ledger, 4) == (0, 0, 4)
    assert ledger.lease(4) == (0, 0, 2)  # the second death: halved


def test_what_was_computed_is_not_suspected_any_more() -> None:
    ledger = Ledger(8, 1)
    die(ledger, 8)
    lease = ledger.lease(4)
    assert lease is not None
    ledger.settle(lease, DONE)
    assert [suspect[0] for suspect in ledger.state()["suspects"]] == [(0, 4, 8)]
    lease = ledger.lease(4)
    assert lease is not None
    ledger.settle(lease, DONE)
    assert "suspects" not in ledger.state()


def test_who_seemed_dead_and_lived_does_not_count() -> None:
    ledger = Ledger(8, 1)
    for _ in range(9):
        ledger.lived(die(ledger, 4, error=False))
    assert "suspects" not in ledger.state() and not ledger.skipped


def test_a_death_that_is_told_while_another_computes_counts_when_it_comes_back() -> None:
    ledger = Ledger(8, 1)
    lease = die(ledger, 4)
    assert ledger.lease(4) == lease
    ledger.died(lease, error=True, spare=False)
    ledger.settle(lease, RETURNED)
    assert ledger.lease(4) == (0, 0, 2)


def test_what_is_kept_of_deaths_is_bounded() -> None:
    ledger = Ledger(1000, 1)
    leases = [ledger.lease(1) for _ in range(200)]
    for lease in leases:
        assert lease is not None
        ledger.died(lease, error=True, spare=False)
    assert len(ledger.state()["suspects"]) == SUSPECTS_KEPT
    for lease in leases:
        assert lease is not None
        ledger.settle(lease, SKIPPED, [0])
    assert len(ledger.state()["lost"]) == LOST_NAMED
    Ledger.from_state(msgspec.json.decode(msgspec.json.encode(ledger.state())))


def test_a_restarted_server_goes_on_counting() -> None:
    ledger = Ledger(8, 1)
    die(ledger, 4)
    ledger = Ledger.from_state(msgspec.json.decode(msgspec.json.encode(ledger.state())))
    die(ledger, 4)
    assert ledger.lease(4) == (0, 0, 2)


def test_unreadable_samples_are_skipped_beside_the_rest() -> None:
    ledger = Ledger(8, 1)
    lease = ledger.lease(4)
    assert lease is not None
    ledger.settle(lease, DONE, [1, 2])
    assert (ledger.done, ledger.skipped, ledger.unread) == (2, 2, 2)
    assert ledger.lost == [Lost((0, 1, 3), UNREAD)]


def test_more_than_one_in_a_hundred_unreadable_is_hopeless() -> None:
    ledger = Ledger(200, 2)
    for count, hopeless in ((2, False), (1, True)):
        lease = ledger.lease(50)
        assert lease is not None
        ledger.settle(lease, DONE, range(count))
        assert (ledger.hopeless is not None) == hopeless


# ---------------------------------------------------------------------------------- its state


def test_in_its_state_leases_that_are_out_wait() -> None:
    ledger = Ledger(10, 2)
    for how in (DONE, RETURNED, None):
        lease = ledger.lease(2)
        if how and lease:
            ledger.settle(lease, how)
    state = ledger.state()
    assert state == {
        "samples": 10,
        "epochs": 2,
        "head": (0, 4),
        "waiting": [(0, 2, 4)],
        "done": 2,
        "partly": 0,
        "skipped": 0,
    }
    back = Ledger.from_state(msgspec.json.decode(msgspec.json.encode(state)))
    assert back.state() == state and leased(back) == 0
    assert back.lease(2) == (0, 2, 4)


def test_a_run_that_is_continued_may_have_more_or_fewer_epochs() -> None:
    ledger = Ledger(4, 2)
    for _ in range(3):
        lease = ledger.lease(2)
        assert lease is not None
        ledger.settle(lease, DONE)
    assert unleased(Ledger.from_state(ledger.state(), 3)) == 6
    fewer = Ledger.from_state(ledger.state(), 1)
    assert fewer.finished and unleased(fewer) == 0


GOOD: dict[str, Any] = {
    "samples": 10,
    "epochs": 2,
    "head": (1, 4),
    "waiting": [(0, 2, 4), (1, 0, 2)],
    "done": 6,
    "partly": 2,
    "skipped": 2,
}


def test_the_good_state_that_garbled_ones_are_made_of_is_good() -> None:
    ledger = Ledger.from_state(GOOD)
    assert ledger.counted + unleased(ledger) == ledger.total
    assert all_of(ledger, 5) == [(0, 2, 4), (1, 0, 2), (1, 4, 9), (1, 9, 10)]


@pytest.mark.parametrize(
    "change",
    [
        {"waiting": [(0, 0, 2), (0, 8, 10)]},
        {"waiting": [(0, 8, 10), (1, 0, 2)]},
        {"waiting": [(1, 0, 2), (0, 2, 4)]},
        {"waiting": [(0, 2, 3), (0, 3, 6)]},
        {"waiting": [(0, 5, 6), (1, 1, 4)]},
        {"epochs": 0},
        {"suspects": [[[0, 2, 4], 1, 0, 0]], "lost": [[[0, 0, 1], "unread"]], "unread": 1},
    ],
    ids=str,
)
def test_a_state_that_may_be_is_taken(change: dict[str, Any]) -> None:
    assert Ledger.from_state({**GOOD, **change}).counted == 10


def test_samples_of_ones_own_are_counted_as_they_are_told() -> None:
    ledger = OwnLedger()
    assert ledger.lease(8) == ledger.lease(1) == OWN
    for told, how in ((5, DONE), (5, DONE), (3, PARTLY), (4, SKIPPED), (9, RETURNED)):
        ledger.settle((0, 0, told), how)
    ledger.settle(OWN, RETURNED)
    assert (ledger.done, ledger.partly, ledger.skipped) == (10, 3, 4)
    again = Ledger.from_state(ledger.state(), epochs=3)
    assert isinstance(again, OwnLedger) and again.state() == ledger.state()
    assert not again.exhausted and not again.finished and unleased(again) == 0


def test_the_state_of_an_empty_set_may_be() -> None:
    assert Ledger.from_state(Ledger(0, 2).state()).finished


@pytest.mark.parametrize(
    "change",
    [
        {"head": (0, 10), "done": 4, "waiting": [(0, 2, 4)]},
        {"waiting": [(0, 2, 6), (0, 7, 7)]},
        {"waiting": [(0, 8, 12)]},
        {"samples": 0, "head": (1, 1), "done": 0, "partly": 1, "skipped": 0, "waiting": []},
        {"samples": -1},
        {"samples": 10.5},
        {"samples": "10"},
        {"samples": 3},
        {"samples": 10**30},
        {"epochs": -1},
        {"head": (1, 5)},
        {"head": (1, 10)},
        {"head": (0, 14)},
        {"head": (2, -6)},
        {"head": (-1, 24)},
        {"head": (1,)},
        {"head": None},
        {"waiting": []},
        {"waiting": [(0, 2, 4)]},
        {"waiting": [(0, 2, 4), (0, 2, 4)]},
        {"waiting": [(0, 2, 4), (0, 3, 5)]},
        {"waiting": [(0, 2, 4), (1, 4, 6)]},
        {"waiting": [(0, 2, 4), (2, 0, 2)]},
        {"waiting": [(0, 2, 4), (1, 2, 0), (1, 0, 4)]},
        {"waiting": [(0, 2, 4), (-1, 0, 2)]},
        {"waiting": [(0, 10, 14)]},
        {"waiting": [(0, -2, 2)]},
        {"waiting": [(0, 2, 4, 5)]},
        {"waiting": 4},
        {"done": 7},
        {"done": -2, "partly": 10},
        {"partly": -1, "skipped": 5},
        {"skipped": True},
        {"skipped": None},
    ],
    ids=str,
)
def test_a_garbled_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        Ledger.from_state({**GOOD, **change})
    assert isinstance(error.value, msgspec.ValidationError)


@pytest.mark.parametrize("missing", GOOD)
def test_a_state_with_something_missing_is_refused(missing: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        Ledger.from_state({k: v for k, v in GOOD.items() if k != missing})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), ANYTHING, max_size=3))
@example({"epochs": 0})
def test_whatever_a_state_holds_it_is_refused_or_agrees(change: dict[str, Any]) -> None:
    try:
        ledger = Ledger.from_state({**GOOD, **change})
    except msgspec.ValidationError:
        return
    # It may end before what it has leased already: a run goes on with fewer epochs.
    ahead = max(ledger.total, ledger._epoch * ledger.samples + ledger._start)
    assert ledger.counted + unleased(ledger) in (ahead, ledger.counted)
    assert len(ledger._waiting) == len(set(ledger._waiting))


# ------------------------------------------------------------------- what killed in earlier epochs


def backwards(n: int, lease: Lease, epoch: int) -> list[int]:
    """Every other epoch goes through the set from its end."""
    of, start, stop = lease
    turned = (of - epoch) % 2 == 1
    return (
        [n - 1 - p for p in range(stop - 1, start - 1, -1)] if turned else list(range(start, stop))
    )


def sample(n: int, epoch: int, place: int) -> int:
    return n - 1 - place if epoch % 2 else place


@given(
    samples=st.integers(1, 40),
    epochs=st.integers(1, 4),
    size=st.integers(1, 9),
    least=st.integers(1, 2),
    deadly=st.sets(st.integers(0, 39), max_size=3),
)
def test_what_killed_once_kills_nobody_in_a_later_epoch(
    samples: int, epochs: int, size: int, least: int, deadly: set[int]
) -> None:
    ledger = Ledger(samples, epochs)
    ledger.places = backwards
    trained: list[tuple[int, int]] = []
    killed_in: dict[int, set[int]] = {}
    while (lease := ledger.lease(size, least)) is not None:
        epoch, start, stop = lease
        held = {sample(samples, epoch, place) for place in range(start, stop)}
        if held & deadly:
            for index in held & deadly:  # as it was never found to kill by itself, or with others
                killed_in.setdefault(index, set()).add(epoch)
            ledger.died(lease, error=True, spare=True)
            ledger.settle(lease, RETURNED)
        else:
            trained += [(epoch, index) for index in held]
            ledger.settle(lease, DONE)
        ledger = continued(ledger)
    assert ledger.finished and ledger.counted == ledger.total
    assert len(trained) == len(set(trained)) == ledger.done
    assert all(len(epochs_of) == 1 for epochs_of in killed_in.values())
    # A neighbour is lost with each of them at most, where a range must hold two.
    assert ledger.skipped <= len(killed_in) * epochs * (1 if least == 1 else 3)


def continued(ledger: Ledger) -> Ledger:
    """What a restarted server makes of its state."""
    again = Ledger.from_state(msgspec.json.decode(msgspec.json.encode(ledger.state())))
    again.places = ledger.places
    return again


# ---------------------------------------------------------------------------------- at random


class Random(RuleBasedStateMachine):
    """Against a model that knows each single sample: where it is, and that it is there once."""

    @initialize(samples=st.integers(0, 20), epochs=st.integers(0, 3))
    def begin(self, samples: int, epochs: int) -> None:
        self.ledger = Ledger(samples, epochs)
        self.all = [(e, i) for e in range(epochs) for i in range(samples)]
        self.to_do = list(self.all)  # in the order in which they must come
        self.out: list[Lease] = []
        self.settled: dict[str, list[tuple[int, int]]] = {DONE: [], PARTLY: [], SKIPPED: []}
        self.unread = 0

    @rule(size=st.integers(1, 7), least=st.sampled_from([1, 1, 2]))
    def lease(self, size: int, least: int) -> None:
        lease = self.ledger.lease(size, least)
        if lease is None:
            assert not self.to_do
            return
        epoch, start, stop = lease
        taken = [(epoch, i) for i in range(start, stop)]
        # Behind a short rest of what was returned there may be one of the epoch.
        assert 0 < len(taken) <= max(size, least) + 2 * (least - 1)
        assert taken == self.to_do[: len(taken)], "not the first that are to do"
        del self.to_do[: len(taken)]
        self.out.append(lease)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), how=st.sampled_from([DONE, PARTLY, SKIPPED, RETURNED]))
    def settle(self, data: st.DataObject, how: str) -> None:
        lease = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        epoch, start, stop = lease
        samples = [(epoch, i) for i in range(start, stop)]
        places = st.sets(st.integers(0, stop - start - 1)) if how != RETURNED else st.just(set())
        unread = sorted(data.draw(places))
        self.ledger.settle(lease, how, unread)
        if how == RETURNED:
            self.to_do = sorted([*self.to_do, *samples])
            self.lose(self.ledger.take_news())
            return
        self.settled[SKIPPED] += [samples[i] for i in unread]
        self.settled[how] += [s for i, s in enumerate(samples) if i not in unread]
        self.unread += len(unread)
        named = [i for lost in self.ledger.take_news() for i in range(*lost.lease[1:])]
        assert named == [start + i for i in unread]

    @precondition(lambda self: self.out)
    @rule(data=st.data(), error=st.booleans(), spare=st.booleans(), told_first=st.booleans())
    def died(self, data: st.DataObject, error: bool, spare: bool, told_first: bool) -> None:
        """Of the range that it computed, which comes back at once or with the round's end."""
        lease = data.draw(st.sampled_from(self.out))
        epoch, start, stop = lease
        if told_first:
            self.ledger.died(lease, error=error, spare=spare)
            return
        self.out.remove(lease)
        self.ledger.settle(lease, RETURNED)
        self.lose(self.ledger.take_news())
        back = [(epoch, i) for i in range(start, stop)]
        self.to_do = sorted([*self.to_do, *(s for s in back if s not in self.settled[SKIPPED])])
        self.ledger.died(lease, error=error, spare=spare)
        self.lose(self.ledger.take_news())

    def lose(self, news: list[Lost]) -> None:
        for lost in news:
            epoch, start, stop = lost.lease
            assert lost.why == KILLED
            gone = [(epoch, i) for i in range(start, stop)]
            self.settled[SKIPPED] += gone
            self.to_do = [s for s in self.to_do if s not in gone]

    @rule()
    def restart(self) -> None:
        """A new server: what was out waits again."""
        state = msgspec.json.decode(msgspec.json.encode(self.ledger.state()))
        self.ledger = Ledger.from_state(state)
        back = [(e, i) for e, start, stop in self.out for i in range(start, stop)]
        self.to_do, self.out = sorted([*self.to_do, *back]), []

    @invariant()
    def sums_agree(self) -> None:
        ledger = self.ledger
        assert ledger.done == len(self.settled[DONE])
        assert ledger.partly == len(self.settled[PARTLY])
        assert ledger.skipped == len(self.settled[SKIPPED])
        assert ledger.unread == self.unread
        assert leased(ledger) == sum(stop - start for _, start, stop in self.out)
        assert unleased(ledger) == len(self.to_do)
        assert ledger.counted + leased(ledger) + unleased(ledger) == ledger.total
        assert ledger.exhausted == (not self.to_do)
        assert ledger.finished == (not self.to_do and not self.out)

    @invariant()
    def each_sample_is_in_one_place(self) -> None:
        out = [(e, i) for e, start, stop in self.out for i in range(start, stop)]
        everywhere = [*self.to_do, *out, *(s for where in self.settled.values() for s in where)]
        assert sorted(everywhere) == self.all


Random.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestRandom = Random.TestCase
