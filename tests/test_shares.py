"""Shares: sizes that follow speed, and nothing else."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import Run

from paramserver.rounds.ledger import Ledger
from paramserver.rounds.shares import (
    TRY_AGAIN_ROUNDS,
    Cost,
    Limits,
    Shares,
    Speed,
    split,
)

FREE = Limits()


def shared(total: int, **costs: Cost) -> dict[int, int]:
    by_id = {int(name[1:]): cost for name, cost in costs.items()}
    return split(total, by_id, dict.fromkeys(by_id, FREE))


class Machines:
    """Machines of known speed that do what they are given, with some noise."""

    def __init__(self, costs: dict[int, Cost], size: int, noise: float = 0.0, seed: int = 0):
        self.costs, self.size, self.noise = costs, size, noise
        self.shares, self.random = Shares(), random.Random(seed)
        self.limits = dict.fromkeys(costs, FREE)
        self.history: list[dict[int, int]] = []

    def round(self) -> float:
        """Seconds that a round took."""
        sizes = self.shares.sizes(dict.fromkeys(self.costs, self.size), self.limits)
        self.history.append(dict(sizes))
        seconds = {w: self.costs[w].of(n) for w, n in sizes.items()}
        for w, n in sizes.items():
            if n:
                off = 1 + self.noise * self.random.uniform(-1, 1)
                self.shares.took(w, n, seconds[w] * off)
        return max(seconds.values())

    def rounds(self, count: int) -> list[float]:
        return [self.round() for _ in range(count)]


def test_samples_go_by_speed() -> None:
    sizes = shared(128, w1=Cost(0, 1), w2=Cost(0, 2), w3=Cost(0, 4), w4=Cost(0, 4))
    assert sizes == {1: 64, 2: 32, 3: 16, 4: 16}


def test_a_fixed_cost_is_paid_in_samples() -> None:
    # T = (W + sum(a / b)) / sum(1 / b) = (60 + 10) / 2 = 35
    assert shared(60, w1=Cost(0, 1), w2=Cost(10, 1)) == {1: 35, 2: 25}


def test_a_worker_that_would_only_cost_gets_nothing() -> None:
    assert shared(96, w1=Cost(0, 1), w2=Cost(0, 1), w3=Cost(60, 1)) == {1: 48, 2: 48, 3: 0}
    assert shared(96, w1=Cost(0, 1), w2=Cost(0, 1), w3=Cost(0, 50)) == {1: 48, 2: 48, 3: 0}


def test_limits_are_kept_and_the_others_compute_the_rest() -> None:
    costs = {1: Cost(0, 1), 2: Cost(0, 2), 3: Cost(0, 4)}
    limits = {1: Limits(most=10), 2: FREE, 3: Limits(least=2)}
    sizes = split(40, costs, limits)
    assert sizes == {1: 10, 2: 20, 3: 10}


def test_where_limits_forbid_the_total_all_get_the_most() -> None:
    costs = {1: Cost(0, 1), 2: Cost(0, 2)}
    assert split(100, costs, dict.fromkeys(costs, Limits(most=10))) == {1: 10, 2: 10}


COSTS = st.builds(Cost, st.floats(0, 10), st.floats(1e-6, 10))


@given(st.lists(COSTS, min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 2000))
def test_the_total_stays(costs: list[Cost], least: int, total: int) -> None:
    by_id = dict(enumerate(costs))
    sizes = split(total, by_id, dict.fromkeys(by_id, Limits(least)))
    assert sum(sizes.values()) == max(total, least)
    assert all(n == 0 or n >= least for n in sizes.values())


@given(st.lists(COSTS, min_size=2, max_size=6), st.integers(50, 500))
def test_no_sample_moved_to_another_makes_a_round_shorter(costs: list[Cost], total: int) -> None:
    by_id = dict(enumerate(costs))
    sizes = split(total, by_id, dict.fromkeys(by_id, FREE))
    seconds = max(c.of(sizes[w]) for w, c in by_id.items())
    for w, to in ((a, b) for a in by_id for b in by_id if a != b and sizes[a] > 1 and sizes[b]):
        moved = {**sizes, w: sizes[w] - 1, to: sizes[to] + 1}
        assert max(c.of(moved[x]) for x, c in by_id.items()) >= seconds * (1 - 1e-9)


def test_four_two_one_one_is_found_in_a_few_rounds() -> None:
    machines = Machines({1: Cost(0, 1), 2: Cost(0, 2), 3: Cost(0, 4), 4: Cost(0, 4)}, 32)
    seconds = machines.rounds(8)
    assert seconds[0] == 128 and seconds[-1] == 64


@pytest.mark.parametrize("seed", range(20))
def test_machines_that_are_alike_keep_equal_shares_under_noise(seed: int) -> None:
    costs = dict.fromkeys(range(4), Cost(0.5, 0.01))
    machines = Machines(costs, 32, noise=0.1, seed=seed)
    machines.rounds(500)
    moves = sum(a != b for a, b in pairwise(machines.history))
    assert moves <= 5
    assert all(24 <= n <= 40 for n in machines.history[-1].values())


@pytest.mark.parametrize("seed", range(20))
def test_a_machine_that_becomes_slow_is_followed(seed: int) -> None:
    machines = Machines(dict.fromkeys(range(4), Cost(0, 0.01)), 32, noise=0.05, seed=seed)
    machines.rounds(40)
    machines.costs[3] = Cost(0, 0.04)
    ideal = 128 / (3 / 0.01 + 1 / 0.04)
    seconds = machines.rounds(10)
    assert seconds[-1] <= ideal / 0.9


def test_one_round_that_stutters_moves_nothing() -> None:
    machines = Machines(dict.fromkeys(range(2), Cost(0, 0.01)), 32)
    machines.rounds(20)
    before = machines.history[-1]
    machines.shares.took(1, 32, 2.0)
    machines.rounds(1)
    assert machines.history[-1] == before


def test_whoever_got_nothing_is_tried_again_and_takes_part_when_it_pays() -> None:
    machines = Machines({1: Cost(0, 1), 2: Cost(0, 1), 3: Cost(0, 60)}, 32)
    machines.rounds(10)
    assert machines.history[-1][3] == 0
    machines.costs[3] = Cost(0, 1)
    machines.rounds(2 * TRY_AGAIN_ROUNDS)
    assert machines.history[-1][3] > 20


def test_a_line_is_fitted_where_sizes_differ() -> None:
    speed = Speed()
    for n in (10, 20, 30, 20, 10):
        speed.took(n, 2.0 + 0.5 * n)
    assert speed.cost == pytest.approx((2.0, 0.5))


def test_nonsense_is_no_measurement() -> None:
    speed = Speed()
    for n, s in ((0, 1.0), (5, 0.0), (5, -1.0), (5, float("inf")), (5, float("nan"))):
        speed.took(n, s)
    assert speed.cost is None


# ------------------------------------------------------------------------------- in a run


def speeds(**rules: Any) -> Run:
    run = Run(num_workers=4, shares="speed", epochs=3, **rules).observer()
    return run.workers(1, 2, 3, 4, samples=1000, batch=8)


def a_round(run: Run, seconds: dict[int, float]) -> dict[int, int]:
    """All who have a lease push, each after its seconds for each sample; what each computed."""
    current = run.rounds.round
    assert current is not None
    inside = {w: m for w, m in current.members.items() if m.out is None}
    sizes = {w: m.samples for w, m in inside.items()}
    took = {w: seconds[w] * n for w, n in sizes.items()}
    for w in sorted(sizes, key=lambda w: took[w]):
        run.now = current.opened_at + took[w]
        for bucket in range(run.buckets):
            last = bucket == run.buckets - 1
            life = inside[w].session.removeprefix(f"w{w}")
            run.push(w, bucket, life=life, compute_s=took[w] if last else None)
    return sizes


SPEEDS = {1: 0.01, 2: 0.02, 3: 0.04, 4: 0.04}


def test_a_run_follows_speed_and_counts_each_sample_once() -> None:
    run = speeds()
    sizes = [a_round(run, SPEEDS)]
    while run.rounds.ended is None and run.rounds.round is not None:
        sizes.append(a_round(run, SPEEDS))
    assert sizes[0] == dict.fromkeys(SPEEDS, 8) and sizes[9] == {1: 16, 2: 8, 3: 4, 4: 4}
    ledger = run.rounds.ledger
    assert ledger is not None and ledger.finished and ledger.done == 3000
    assert sum(sum(s.values()) for s in sizes) == 3000
    assert sum(sum(s.values()) == 32 for s in sizes) >= len(sizes) - 12  # but at epochs' ends
    assert len(run.closes) <= 3000 // 32 + 3


def test_equal_shares_are_equal() -> None:
    for rules in ({"shares": "equal"}, {"deterministic": True}):
        run = Run(**{"num_workers": 2, "shares": "speed", **rules}).observer().workers(1, 2)
        for _ in range(4):
            assert set(a_round(run, {1: 0.01, 2: 0.1}).values()) == {10}


def test_a_worker_that_would_only_cost_follows_without_samples_and_is_named() -> None:
    run = speeds(timeout=1000.0)
    for _ in range(12):
        sizes = a_round(run, {**SPEEDS, 4: 3.0})
    assert set(sizes) == {1, 2, 3} and sum(sizes.values()) == 32
    assert run.rounds.peers["w4"].leases == []


def test_what_a_worker_measures_that_is_late_is_at_least_the_rounds_time() -> None:
    run = speeds(timeout=1.0, quorum=0.5)
    for _ in range(9):
        current = run.rounds.round
        assert current is not None
        run.now += 0.1
        for w in set(current.members) - {4}:
            run.push(w, compute_s=0.1)
        run.tick(run.now + 1.1, 1, 2, 3, 4)
    current = run.rounds.round
    assert current is not None and (4 not in current.members or current.members[4].samples < 4)


def test_another_process_of_the_same_number_begins_anew() -> None:
    run = speeds()
    for _ in range(9):
        sizes = a_round(run, SPEEDS)
    assert sizes[1] == 16
    run.leave(1)
    run.hello(1, "b")
    run.join(1, "b")
    while 1 not in a_round(run, SPEEDS):
        if run.snapshot(1, "b"):
            run.ready(1, "b", samples=1000, batch=8)
    assert run.lease(1)[2] - run.lease(1)[1] == 8  # it was measured in none of the rounds before


@pytest.mark.parametrize("told", [5e-324, 1e-310, 1e-200, 1e-25, 1e-9, 1e300, -1.0, math.nan])
def test_whatever_a_worker_says_of_its_speed_costs_itself_only(told: float) -> None:
    run = speeds()
    for _ in range(12):
        current = run.rounds.round
        assert current is not None
        run.now += 1.0
        sizes = {w: m.samples for w, m in current.members.items()}
        for w in sizes:
            run.push(w, 0)
            run.push(w, 1, compute_s=told if w == 1 else SPEEDS[w] * sizes[w])
    assert sum(sizes.values()) == 32 and all(math.isfinite(n) for n in sizes.values())


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats()), max_size=30), st.integers(1, 500))
def test_no_measurements_make_a_split_fail(told: list[tuple[int, float]], total: int) -> None:
    shares = Shares()
    for n, seconds in told:
        shares.took(1, n, seconds)
        shares.took(2, n, 0.01 * n)
    for _ in range(4):
        sizes = shares.sizes({1: total, 2: total}, {1: FREE, 2: FREE})
        assert sum(sizes.values()) in (2 * total, 2 * total + 1)


def test_a_slow_first_batch_is_forgotten() -> None:
    """It may have compiled. Nobody waits for it meanwhile: the others compute what it would have,
    until it is known that it is as fast as they."""
    machines = Machines(dict.fromkeys((1, 2, 3), Cost(0.005, 0.003)), 32)
    for worker, seconds in ((1, 10.0), (2, 0.1), (3, 0.1)):
        machines.shares.took(worker, 32, seconds)
    machines.rounds(30)
    assert machines.history[0] == {1: 1, 2: 48, 3: 47}
    assert all(sum(sizes.values()) == 96 for sizes in machines.history)
    assert min(machines.history[-1].values()) >= 30


def one_gets_nothing(step_s: float = 0.0) -> Run:
    """Worker 4 is so slow that it gets no samples. A step of the others takes `step_s` more."""
    run = speeds()
    for _ in range(12):
        seconds = {w: s + step_s / 8 for w, s in SPEEDS.items()}
        sizes = a_round(run, {**seconds, 4: 100 * max(seconds.values())})
    assert 4 not in sizes and run.rounds.round is not None
    return run


def test_who_got_no_samples_gets_all_where_those_who_have_them_hang() -> None:
    """They beat, and push nothing: the run would wait for them until `idle_timeout`."""
    run = one_gets_nothing()
    began = run.now
    for seconds in range(1, 30):
        assert all(e.startswith("#") for e in run.tick(began + seconds, 0, 1, 2, 3, 4))
    [void, why, *left_out, back, opened] = run.tick(began + 30, 0, 1, 2, 3, 4)
    assert void.startswith("void") and opened.startswith("all <- open")
    assert "while worker 4 (pi) could take part" in why
    assert left_out == [
        f"# worker {w} (pi) brought nothing to a round, which waited 30 s for it: rounds go on "
        "without it for 30 s"
        for w in (1, 2, 3)
    ]
    assert back == "# worker 4 (pi) gets samples again"
    for _ in range(2):
        current = run.rounds.round
        assert current is not None and list(current.members) == [4]
        run.now += 20.0
        run.push(4)
    current = run.rounds.round
    assert current is not None and {1, 2, 3} <= set(current.members), "they may hang no more"


def test_long_steps_are_not_given_up_for_the_sake_of_one_that_is_much_slower() -> None:
    """A round that takes longer than any would have to wait for somebody is one like the others."""
    run = one_gets_nothing(step_s=40.0)
    current, began = run.rounds.round, run.now
    for seconds in range(1, 100):
        run.tick(began + seconds, 0, 1, 2, 3, 4)
    assert run.rounds.round is current
    for seconds in range(100, 400):
        run.tick(began + seconds, 0, 1, 2, 3, 4)
    assert run.rounds.round is not current


def test_the_short_rest_that_is_dropped_is_that_of_a_batch() -> None:
    ledger = Ledger(100, 1)
    assert ledger.lease(64, drop_last=True, short=32) == (0, 0, 64)
    assert ledger.lease(60, drop_last=True, short=32) == (0, 64, 100)
    assert Ledger(100, 1).lease(128, drop_last=True, short=32) == (0, 0, 100)
    rest = Ledger(100, 1)
    assert rest.lease(80, drop_last=True, short=32) == (0, 0, 80)
    assert rest.lease(80, drop_last=True, short=32) is None and rest.skipped == 20


def test_a_worker_of_unknown_speed_is_not_waited_for_and_gets_little_when_it_is_done() -> None:
    """Rounds go on without it while it computes, and its late push says how long that took."""
    run = speeds()

    def others() -> None:
        current = run.rounds.round
        assert current is not None
        for w in (1, 2, 3):
            seconds = SPEEDS[w] * current.members[w].samples
            run.now = max(run.now, current.opened_at + seconds)
            run.push(w, compute_s=seconds)

    others()
    run.tick(run.now + 1.1, 1, 2, 3, 4)
    assert list(run.closes[-1].late) == [4]
    for _ in range(3):
        current = run.rounds.round
        assert current is not None and list(current.members) == [1, 2, 3]
        others()
    run.push(4, run.buckets - 1, round=1, samples=8, compute_s=40.0)
    others()
    current = run.rounds.round
    assert current is not None and current.members[4].samples == 1
    assert sum(m.samples for m in current.members.values()) == 32
