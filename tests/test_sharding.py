"""Shares of the buckets by cable, and the map of buckets that both sides compute."""

from __future__ import annotations

import random

import pytest
from scripts import session
from test_shards_rounds import PLACES, Sharded

from paramserver.protocol import messages as wire
from paramserver.protocol.sharding import (
    SERVER,
    WHOLE,
    Cable,
    Shares,
    equal,
    foreseen,
    owners,
    relayed,
    seconds,
    shares,
)
from paramserver.rounds.events import Placed


def parts(cables: dict[int, Cable], workers: int, receivers: int | None = None) -> list[float]:
    return [s / WHOLE for _, s in shares(cables, workers, receivers or workers)]


def test_equal_cables_get_equal_shares_and_carry_what_a_ring_carries() -> None:
    cables = {shard: Cable(125e6) for shard in range(4)}
    assert shares(cables, 4, 4) == ((0, 250), (1, 250), (2, 250), (3, 250))
    ring = 2 * (4 - 1) / 4 / 125e6
    assert seconds(cables, shares(cables, 4, 4), 4, 4) == pytest.approx(ring)
    assert seconds(cables, (), 4, 4) == pytest.approx(3 / 125e6)  # one server beside a worker


def test_a_host_without_worker_takes_what_its_idle_cable_is_worth() -> None:
    """As in BytePS: with k extra hosts the time is 2n(n-1)/(n^2+kn-2k)."""
    n, k = 4, 1
    cables = {0: Cable(1.0, workers=0, copies=0), **{i: Cable(1.0) for i in range(1, n + 1)}}
    below = n * n + k * n - 2 * k
    found = parts(cables, n)
    assert found[0] == pytest.approx(2 * (n - 1) / below, abs=2e-3)
    assert found[1:] == pytest.approx([(n - k) / below] * n, abs=2e-3)
    assert seconds(cables, shares(cables, n, n), n, n) == pytest.approx(
        2 * n * (n - 1) / below, rel=5e-3
    )


def test_a_slow_cable_carries_no_shard_and_the_rest_share_equally() -> None:
    cables = {0: Cable(125e6), 1: Cable(125e6), 2: Cable(125e6), 3: Cable(25e6)}
    assert shares(cables, 4, 4) == ((0, 334), (1, 333), (2, 333))
    # Its own push takes 1 / 25e6, and nothing makes the exchange shorter than that.
    assert seconds(cables, shares(cables, 4, 4), 4, 4) == pytest.approx(1 / 25e6)


def test_where_no_other_cable_can_carry_a_shard_the_server_is_alone() -> None:
    assert shares({0: Cable(1.0), 1: Cable(0.2)}, 3, 3) == ()


def test_a_somewhat_slower_cable_carries_a_smaller_share() -> None:
    cables = {0: Cable(1.0), 1: Cable(1.0), 2: Cable(1.0), 3: Cable(0.8)}
    found = parts(cables, 4)
    time = seconds(cables, shares(cables, 4, 4), 4, 4)
    for cable, share in zip(cables.values(), found, strict=True):
        assert (1 + 2 * share) / cable.rate == pytest.approx(time, rel=5e-3)  # all done together


def test_no_other_shares_are_sooner_done() -> None:
    rng = random.Random(5)
    for _ in range(200):
        cables = {
            i: Cable(rng.choice((0.2, 1.0, 1.0, 3.0)), workers=rng.randint(0, 2), copies=1)
            for i in range(rng.randint(2, 5))
        }
        workers = sum(c.workers for c in cables.values())
        if workers < 2:
            continue
        receivers = max(workers, len(cables))
        chosen = shares(cables, workers, receivers)
        assert sum(s for _, s in chosen or ((SERVER, WHOLE),)) == WHOLE
        best = seconds(cables, chosen, workers, receivers)
        for _ in range(20):
            cut = sorted(rng.randint(0, WHOLE) for _ in range(len(cables) - 1))
            sizes = [b - a for a, b in zip([0, *cut], [*cut, WHOLE], strict=True)]
            other = tuple(zip(cables, sizes, strict=True))
            # Rounding to thousandths is worth half a percent at most here.
            assert best <= seconds(cables, other, workers, receivers) * 1.02


def test_two_hosts_gain_nothing_from_unequal_shares() -> None:
    cables = {0: Cable(1.0), 1: Cable(1.0)}
    assert seconds(cables, equal([0, 1]), 2, 2) == seconds(cables, (), 2, 2)


def test_the_map_follows_the_shares_at_any_place() -> None:
    """So that no shard is idle while another one's buckets are pushed."""
    told: Shares = ((0, 500), (1, 300), (2, 200))
    sizes = [100] * 60
    found = owners(sizes, told, frozenset())
    for end in range(1, 61):
        for shard, share in told:
            got = 100 * found[:end].count(shard)
            assert abs(got - share * 100 * end / WHOLE) <= 100


def test_the_map_divides_bytes_not_buckets() -> None:
    rng = random.Random(6)
    sizes = [rng.randint(1, 1000) for _ in range(300)]
    told = equal([0, 1, 2])
    found = owners(sizes, told, frozenset())
    for shard, share in told:
        got = sum(size for size, owner in zip(sizes, found, strict=True) if owner == shard)
        assert abs(got - sum(sizes) * share / WHOLE) <= 2 * max(sizes)


def test_buckets_that_stay_are_the_servers() -> None:
    found = owners([1] * 6, ((1, 500), (2, 500)), frozenset({0, 5}))
    assert found[0] == found[5] == SERVER
    assert set(found[1:5]) == {1, 2}


def test_what_is_foreseen_before_a_run_is_what_it_chooses() -> None:
    """With an observer beside the server, and a relay on its host."""
    run = Sharded().begin()
    run.hello(0), run.follows(0)
    run.happens(Placed(session(0), PLACES[1]))
    run.works(), run.tick(2.0, 0, 1, 2, 3)
    run.tells(1, wire.HandsOn(folder="/one"))
    shards, workers = run.rounds.shards, run.rounds.workers_ready()
    shards.rates = {"": 1.0, PLACES[2]: 1.0, PLACES[3]: 0.8}
    cables = {0: relayed(1.0, 1, observer=True), 1: relayed(1.0, 1), 2: relayed(0.8, 1)}
    found, _ = foreseen(cables, 3, alike=False)
    assert shards._shares([0, 1, 2], workers) == found != equal([0, 1, 2])
    assert foreseen(cables, 2, alike=True)[0] == equal([0, 1])


def test_without_shards_all_is_the_servers() -> None:
    assert owners([5, 5], (), frozenset()) == (SERVER, SERVER)
    assert equal([SERVER]) == ()
    assert shares({SERVER: Cable(1.0)}, 4, 4) == ()
