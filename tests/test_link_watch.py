"""Workers that come by another path than the chosen one, or over one that became slow: what is
said of which pushes. A whole run that does so is in test_up.py."""

from __future__ import annotations

import pytest

from paramserver.net.link_watch import (
    FAR_BELOW,
    ROUNDS,
    VARIABLE,
    WINDOW,
    Chosen,
    LinkMeter,
    LinkWatch,
    read,
    write,
)

NEAR, FAR, OTHER = "10.10.0.2", "10.10.0.1", "10.20.0.2"
MB = 1_000_000
CHOSEN = Chosen(2, NEAR, FAR, 100.0 * MB)  # bytes a second


def rounds(
    watch: LinkWatch,
    count: int,
    *,
    come_s: float,
    ready_s: float = 0.0,
    address: str = NEAR,
    pushes: int = WINDOW,
    worker: int = 2,
) -> list[str]:
    """The sentences of `count` rounds whose pushes, of 1 MB each, come `come_s` apart."""
    told = []
    for number in range(1, count + 1):
        for push in range(pushes):
            at, ready = 10.0 * number + push * come_s, 10.0 * number + push * ready_s
            told += watch.pushed(worker, "worker 2 (mini2)", address, number, ready, MB, at)
    return told


def test_another_path_is_told_once() -> None:
    watch = LinkWatch([CHOSEN])
    assert rounds(watch, 3, come_s=0.01) == []
    told = rounds(watch, 3, come_s=0.01, address=OTHER)
    assert len(told) == 1
    assert f"worker 2 (mini2) comes by {OTHER}, not by {NEAR} as make up had chosen" in told[0]
    assert rounds(watch, 3, come_s=0.01, address="") == []  # ipc
    assert rounds(watch, 3, come_s=0.01, address=OTHER, worker=3) == []  # without a chosen path


def test_where_the_system_decides_no_address_is_another_one() -> None:
    assert rounds(LinkWatch([Chosen(2, None, FAR, 1.0)]), 3, come_s=0.01, address=OTHER) == []


def test_a_path_that_became_slow_is_told_once_with_both_figures() -> None:
    watch = LinkWatch([CHOSEN])
    told = rounds(watch, 3 * ROUNDS, come_s=0.1)  # 10 MB a second
    assert len(told) == 1
    assert "worker 2 (mini2) brings 0.080 Gbit/s, where make up had measured 0.800" in told[0]
    watch = LinkWatch([Chosen(2, NEAR, FAR, 100.0 * MB, "make doctor")])
    assert "where make doctor had measured" in rounds(watch, 3 * ROUNDS, come_s=0.1)[0]


@pytest.mark.parametrize("count", [ROUNDS - 1, 1])
def test_a_few_slow_rounds_are_nothing(count: int) -> None:
    watch = LinkWatch([CHOSEN])
    for _ in range(3):
        assert rounds(watch, count, come_s=0.1) == []
        assert rounds(watch, 2, come_s=0.01) == []


def test_a_slow_computer_is_no_slow_path() -> None:
    watch = LinkWatch([CHOSEN])
    assert rounds(watch, 3 * ROUNDS, come_s=0.1, ready_s=0.09) == []
    assert rounds(watch, 3 * ROUNDS, come_s=0.1, ready_s=0.02) != []


def test_a_server_s_link_is_shared_by_those_who_come_over_it() -> None:
    come_s = 1.1 * MB / (FAR_BELOW * CHOSEN.bytes_per_s)
    assert rounds(LinkWatch([CHOSEN]), 3 * ROUNDS, come_s=come_s) != []
    two = LinkWatch([CHOSEN, Chosen(3, "10.10.0.3", FAR, CHOSEN.bytes_per_s)])
    assert rounds(two, 3 * ROUNDS, come_s=come_s) == []
    apart = LinkWatch([CHOSEN, Chosen(3, "10.20.0.3", "10.20.0.1", CHOSEN.bytes_per_s)])
    assert rounds(apart, 3 * ROUNDS, come_s=come_s) != []


def test_the_workers_of_a_host_share_its_cable() -> None:
    rates = {2: 100.0, 3: 40.0, 4: 40.0}
    watch = LinkWatch([Chosen(k, f"10.10.0.{k}", FAR, rate) for k, rate in rates.items()])
    places = [(1, ""), (2, "10.10.0.2"), (3, "10.10.0.3"), (4, "10.10.0.3"), (5, "10.10.0.5")]
    assert watch.cables(places) == {"": 100.0, "10.10.0.2": 100.0, "10.10.0.3": 80.0}
    assert watch.cables([(1, ""), (5, "10.10.0.5")]) == {}  # nobody of whom it is known


@pytest.mark.parametrize(
    ("rates", "slow"),
    [({}, False), ({2: 110e6, 3: 25e6}, True), ({2: 110e6, 3: 110e6}, False), ({3: 50e6}, True)],
)
def test_a_cable_is_slow_as_a_whole(rates: dict[int, float], slow: bool) -> None:
    assert (
        LinkWatch([Chosen(k, f"10.10.0.{k}", FAR, r) for k, r in rates.items()]).has_slow_cable
        is slow
    )
    shared = [Chosen(k, NEAR, FAR, 50e6) for k in (2, 3)]
    assert not LinkWatch(shared).has_slow_cable


def test_a_round_of_one_push_tells_nothing_of_speed() -> None:
    assert rounds(LinkWatch([CHOSEN]), 3 * ROUNDS, come_s=9.0, pushes=1) == []


def test_what_up_writes_is_what_the_server_reads() -> None:
    assert read({}) is None and read({VARIABLE: ""}) is None and read({VARIABLE: "[{]"}) is None
    assert read({VARIABLE: '[{"worker": "x"}]'}) is None
    watch = read({VARIABLE: write([CHOSEN])})
    assert watch is not None and rounds(watch, 1, come_s=0.0, address=OTHER) != []


def test_a_rate_is_told_where_pushes_wait_for_the_link() -> None:
    meter = LinkMeter()
    assert meter.rate(2) is None

    def round(number: int, come_s: float, ready_s: float) -> None:
        for push in range(WINDOW):
            at, ready = 10.0 * number + push * come_s, 10.0 * number + push * ready_s
            meter.pushed(2, number, ready, MB, at)

    round(1, come_s=0.1, ready_s=0.1)  # they come as they are ready: the link may be faster
    round(2, come_s=0.1, ready_s=0.01)
    assert meter.rate(2) is None
    round(3, come_s=0.1, ready_s=0.01)
    assert meter.rate(2) == pytest.approx(10 * MB)
    for number in range(4, 40):
        round(number, come_s=0.2, ready_s=0.01)
    assert meter.rate(2) == pytest.approx(5 * MB), "the newest count"
    assert meter.rate(3) is None
