"""Shares: how many samples of a round each worker computes, so that all are done at once.

A worker needs `fixed_s + sample_s * n` seconds for n samples (`Cost`, estimated by `Speed` from
what the worker measures by its own clock). `split` hands out a round's samples so that the slowest
is done as soon as can be; `Shares` keeps the sizes from round to round and moves them only for a
gain that is worth it, so that noise does not. The total stays what it is, and with it the learning
rate and the result.

A worker whose fixed cost alone is more than what the others need gets nothing (`split`). It is
tried again after `TRY_AGAIN_ROUNDS` rounds.

The balance is that of LB-BSP (Chen et al., arXiv 1806.02508). No clock, no socket: seconds and
sample counts come in, sizes go out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from statistics import median
from typing import NamedTuple

KEPT = 24  # measurements of a worker that its cost is estimated from
RECENT = 3  # of them decide whether it has become another machine
CHANGED = 1.5  # times as slow, or as fast: what was measured before is forgotten
SPREAD = 1.25  # between the largest and the smallest share: then a fixed cost can be told apart
GAIN_MIN = 0.05  # of a round's time: sizes move only for more
LOOK_ROUNDS = 3
GROWTH_MAX = 2.0  # times as many samples at once, at most
TRY_AGAIN_ROUNDS = 100
SHARE_TIMES_MAX = 16  # as many samples as a worker asked for, it gets at most
MEASURED_MIN = 2  # measurements before a worker's share moves
DROPPED_MIN = 5  # before it gets nothing
PROBED_FROM = 4.0  # times as long as others a worker's first batch took: it gets few samples
SAMPLE_S_MIN = 1e-9
"""Whatever a worker says, no sample costs less: what is computed from it stays finite."""


class Cost(NamedTuple):
    """What a worker needs for n samples: `fixed_s + sample_s * n` seconds."""

    fixed_s: float
    sample_s: float

    def of(self, samples: float) -> float:
        """Seconds for so many samples; none are free."""
        return self.fixed_s + self.sample_s * samples if samples else 0.0


class Limits(NamedTuple):
    """Samples that a worker must have, if it gets any, and may have at most."""

    least: int = 1
    most: int | None = None


class Speed:
    """The cost of one worker, from what it measured in its last rounds."""

    def __init__(self) -> None:
        self._measured: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self.measured = 0
        self.first_s: float | None = None
        """Seconds for a sample in its first batches: it may have started a device, or compiled."""
        self.afresh = False
        """The next measurement says more than all that are kept: it got nothing for long."""

    def took(self, samples: int, seconds: float) -> None:
        """It computed so many samples in so many seconds of its own clock."""
        if samples < 1 or not 0.0 < seconds < float("inf"):
            return
        self.measured += 1
        if self.measured <= MEASURED_MIN:  # the first may be cut off, where it was late
            self.first_s = max(self.first_s or 0.0, seconds / samples)
        if self.measured == 1:
            return
        if self.afresh:
            self.afresh = False
            self._measured.clear()
        self._measured.append((samples, seconds))
        cost, recent = self.cost, list(self._measured)[-RECENT:]
        if cost is None or len(self._measured) <= RECENT:
            return
        # Each of the last ones by itself says so: one round that stuttered says nothing.
        off = [s / cost.of(n) for n, s in recent]
        if min(off) > CHANGED or max(off) < 1 / CHANGED:
            self._measured = deque(recent, maxlen=KEPT)

    @property
    def cost(self) -> Cost | None:
        """The estimate; None where too little was measured."""
        if self.measured <= MEASURED_MIN:
            return None
        by_size: dict[int, list[float]] = {}
        for n, seconds in self._measured:
            by_size.setdefault(n, []).append(seconds)
        if max(by_size) >= SPREAD * min(by_size):
            fitted = _fitted([(n, median(times), len(times)) for n, times in by_size.items()])
            if fitted is not None:
                return fitted
        return Cost(0.0, max(SAMPLE_S_MIN, median(s / n for n, s in self._measured)))


def _fitted(points: list[tuple[int, float, int]]) -> Cost | None:
    """A line through (samples, seconds, how often measured): the least squares of medians, which a
    few rounds that stuttered do not bend. None where it says that samples cost nothing."""
    weight = sum(w for _, _, w in points)
    mean_n = sum(w * n for n, _, w in points) / weight
    mean_s = sum(w * s for _, s, w in points) / weight
    spread = sum(w * (n - mean_n) ** 2 for n, _, w in points)
    slope = sum(w * (n - mean_n) * (s - mean_s) for n, s, w in points) / spread
    if slope <= SAMPLE_S_MIN:
        return None
    fixed = mean_s - slope * mean_n
    return Cost(fixed, slope) if fixed >= 0.0 else None


def split(
    total: int,
    costs: Mapping[int, Cost],
    limits: Mapping[int, Limits],
    kept: Collection[int] = (),
) -> dict[int, int]:
    """So many samples for each worker that all are done at once, as soon as can be.

    The sizes add up to `total`, unless the limits forbid it: everybody then has the least, or the
    most, that is allowed. A worker that is not in `kept` gets nothing where the others are sooner
    done without it. In the best time T worker i computes (T - fixed_i) / sample_i samples, and
    these add up to the total; T is found by halving, which takes the limits along; what rounding
    leaves goes where it is done soonest.
    """
    best = dict(costs)
    sizes = _balanced(total, best, limits)
    while len(best) > 1:
        slowest = max(best, key=lambda w: best[w].of(sizes[w]))
        if slowest in kept:
            break
        without = {w: c for w, c in best.items() if w != slowest}
        fewer = _balanced(total, without, limits)
        if sum(fewer.values()) < min(total, sum(sizes.values())):
            break  # they may not have so many
        too_many = sum(sizes.values()) > total  # even the least of each
        if not too_many and _seconds(fewer, without) > _seconds(sizes, best):
            break
        best, sizes = without, fewer
    return {w: sizes.get(w, 0) for w in costs}


def _seconds(sizes: Mapping[int, int], costs: Mapping[int, Cost]) -> float:
    return max((costs[w].of(n) for w, n in sizes.items()), default=0.0)


def _balanced(
    total: int, costs: Mapping[int, Cost], limits: Mapping[int, Limits]
) -> dict[int, int]:
    """`split` among these, who all get something."""

    def amounts(seconds: float) -> dict[int, float]:
        found = {}
        for w, cost in costs.items():
            least, most = limits[w].least, limits[w].most
            n = min(float(total), (seconds - cost.fixed_s) / cost.sample_s)
            found[w] = max(float(least), n if most is None else min(n, most))
        return found

    low, high = 0.0, max(c.of(total) for c in costs.values())
    for _ in range(60):
        middle = (low + high) / 2
        if sum(amounts(middle).values()) < total:
            low = middle
        else:
            high = middle
    sizes = {w: int(n) for w, n in amounts(high).items()}
    # What rounding left goes where it is done soonest; what the least of some was too much is
    # taken from where it takes longest.
    while sum(sizes.values()) < total:
        free = [w for w in sizes if _may_grow(sizes[w], limits[w])]
        if not free:
            break
        sizes[min(free, key=lambda w: (costs[w].of(sizes[w] + 1), w))] += 1
    while sum(sizes.values()) > total:
        free = [w for w in sizes if sizes[w] > limits[w].least]
        if not free:
            break
        sizes[max(free, key=lambda w: (costs[w].of(sizes[w]), w))] -= 1
    return sizes


def _may_grow(size: int, limits: Limits) -> bool:
    return limits.most is None or size < limits.most


class Shares:
    """The sizes of the rounds to come, by worker."""

    def __init__(self) -> None:
        self._speeds: dict[int, Speed] = {}
        self._sizes: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._rounds = 0
        self._firsts = 0.0  # the sum of what first batches took: it tells of a new one
        self._rounds_out: dict[int, int] = {}  # in which it got nothing, in a row

    def took(self, worker: int, samples: int, seconds: float) -> None:
        """What a worker measured in a round."""
        self._speeds.setdefault(worker, Speed()).took(samples, seconds)

    def forget(self, worker: int) -> None:
        """Another process, perhaps on another machine, has this number now."""
        for kept in (self._speeds, self._sizes, self._rounds_out):
            kept.pop(worker, None)

    def cost(self, worker: int) -> Cost | None:
        """What a worker's samples cost, as far as is known."""
        return self._speeds[worker].cost if worker in self._speeds else None

    def sizes(self, asked: Mapping[int, int], limits: Mapping[int, Limits]) -> dict[int, int]:
        """The next round's samples by worker: what all `asked` for, in all, divided by speed.

        Whoever was not measured yet gets what it asked for, or few (`_probes`). A share at most
        doubles at once. Looks for better sizes in every `LOOK_ROUNDS`th round, and where the
        workers are others.
        """
        self._rounds += 1
        firsts = sum(s.first_s or 0.0 for s in self._speeds.values())
        changed = dict(asked) != self._asked or asked.keys() != self._sizes.keys()
        changed, self._firsts = changed or firsts != self._firsts, firsts
        if changed:
            self._asked = dict(asked)
            self._sizes = {w: self._sizes.get(w, n) for w, n in asked.items()}
        if changed or self._rounds % LOOK_ROUNDS == 0:
            self._look(asked, limits)
        return self.trying(dict(self._sizes), limits)

    def _look(self, asked: Mapping[int, int], limits: Mapping[int, Limits]) -> None:
        costs = {w: cost for w in asked if (cost := self.cost(w)) is not None}
        probes = self._probes(asked, costs, limits)
        unknown = asked.keys() - costs.keys() - probes.keys()
        left = sum(asked[w] - n for w, n in probes.items())  # which the others compute
        for w in asked.keys() - costs.keys():
            self._sizes[w] = probes.get(w, asked[w])
        if not costs:
            for number, w in enumerate(sorted(unknown)):
                self._sizes[w] += left // len(unknown) + (number < left % len(unknown))
            return
        total = sum(asked[w] for w in costs) + left
        now = {w: self._sizes[w] for w in costs}
        seconds = [costs[w].of(n) for w, n in now.items()]
        if sum(now.values()) == total and min(seconds) >= (1.0 - GAIN_MIN) * max(seconds):
            return  # there is nothing to gain
        new = {w for w in costs if self._speeds[w].measured < DROPPED_MIN}
        wanted = split(total, costs, limits, new)
        if sum(now.values()) == total and _seconds(wanted, costs) > (1.0 - GAIN_MIN) * max(seconds):
            return
        taking = {w: c for w, c in costs.items() if wanted[w]}
        slowly = {w: Limits(limits[w].least, _most(now[w], limits[w])) for w in taking}
        bounded = _balanced(total, taking, slowly)
        if sum(bounded.values()) == total:
            wanted = {w: bounded.get(w, 0) for w in costs}
        self._sizes.update(wanted)

    def _probes(
        self, asked: Mapping[int, int], costs: Mapping[int, Cost], limits: Mapping[int, Limits]
    ) -> dict[int, int]:
        """Few samples for those whose first batch took much longer than that of the others, until
        it is known whether they are slow, or had something to start: nobody waits for them."""
        firsts = {
            w: speed.first_s
            for w in asked.keys() - costs.keys()
            if (speed := self._speeds.get(w)) is not None and speed.first_s is not None
        }
        known = [cost.sample_s for cost in costs.values()] + list(firsts.values())
        if not firsts or len(known) < 2:
            return {}
        usual = median(sorted(known)[: (len(known) + 1) // 2])  # of the faster half
        found = {
            w: max(limits[w].least, int(asked[w] * usual / first_s))
            for w, first_s in firsts.items()
            if first_s > PROBED_FROM * usual
        }
        return found if len(found) < len(asked) else {}

    def trying(self, sizes: dict[int, int], limits: Mapping[int, Limits]) -> dict[int, int]:
        """Whoever got nothing for long gets the least once: it may have become faster."""
        for w, n in sizes.items():
            self._rounds_out[w] = 0 if n else self._rounds_out.get(w, 0) + 1
            if self._rounds_out[w] >= TRY_AGAIN_ROUNDS:
                self._rounds_out[w] = 0
                sizes[w] = limits[w].least
                self._speeds[w].afresh = True
        return sizes


def _most(now: int, limits: Limits) -> int | None:
    """Twice what it had, and no more than it may."""
    if not now:
        return limits.most
    grown = int(GROWTH_MAX * now)
    return grown if limits.most is None else min(grown, limits.most)
