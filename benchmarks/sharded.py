"""The part of the benchmark about shards: exchanges that several hosts average together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks import runs
from benchmarks.machine import link_rate
from benchmarks.network import Hosts, why_no_hosts
from benchmarks.parts import Case, Effort, Figure, Groups, Skipped, gloo, part_of_float32
from benchmarks.report import GLOO, Row
from benchmarks.runs import Place, size_bytes
from paramserver.net import link_watch
from paramserver.net.link_watch import Chosen
from paramserver.protocol import sharding
from paramserver.protocol.sharding import SERVER, Cable, Shares

CODECS = ("float32", "float16", "int8")
RATES = {"1gbit": "1 Gbit/s", "200mbit": "200 Mbit/s"}
"""Of cables, as tc takes them and as people say them."""
FAST, SLOW = RATES
UNEQUAL_WORKERS = SMALL_WORKERS = 4
SMALL, SMALL_ROUNDS = "0.01 MB", 300
WITH_OBSERVER = (False, True)


def shards(effort: Effort) -> Groups:
    """A worker on each host, the server and, in some rows, an observer beside the first. The limit:
    the time of the slowest cable, through which each average goes once for all replicas behind it.
    The server knows what the workers' cables carry, as after `make up`."""
    reason = why_no_hosts()
    if reason is not None:
        raise Skipped(reason)
    for rate, workers in effort.sharded:
        yield from _equal(effort, rate, workers)
    if effort.extras:
        yield from _unequal(effort)
        yield from _small(effort)


def _equal(effort: Effort, rate: str, workers: int) -> Groups:
    size, rounds = list(effort.link_rounds.items())[-1]
    with _hosts(workers, rate) as hosts:
        measured = link_rate(hosts, "host2", "host1")
        cables = {shard: Cable(measured) for shard in range(workers)}
        told = sharding.equal(sorted(cables))
        paths = _paths(hosts, dict.fromkeys(range(2, workers + 1), measured))
        group = _Group(effort, f"{size}, {RATES[rate]}", size, rounds, Place(hosts, "host1"))
        cases = [group.gloo(workers, measured)]
        for observed in WITH_OBSERVER:
            for codec in [c for c in CODECS if c in effort.codecs]:
                cases.append(group.ours(codec, cables, told, observed, paths))
        yield cases


def _unequal(effort: Effort) -> Groups:
    """The last host's cable is slow; and how it is where the server does not know that."""
    size, rounds = list(effort.link_rounds.items())[-1]
    workers = UNEQUAL_WORKERS
    with _hosts(workers, FAST) as hosts:
        hosts.throttle(f"host{workers}", SLOW)
        rates = {k: link_rate(hosts, f"host{k}", "host1") for k in range(2, workers + 1)}
        cables = {SERVER: Cable(max(rates.values()))}
        cables |= {worker - 1: Cable(rate) for worker, rate in rates.items()}
        what = f"{size}, {RATES[FAST]}, one cable {RATES[SLOW]}"
        group = _Group(effort, what, size, rounds, Place(hosts, "host1"))
        told = sharding.shares(cables, workers, workers)
        cases = [group.gloo(workers, min(rates.values()))]
        for observed in WITH_OBSERVER:
            cases.append(group.ours("float16", cables, told, observed, _paths(hosts, rates)))
        equal = group.ours("float16", cables, sharding.equal(sorted(cables)), False)
        equal.row.how += ", nothing measured"
        yield [*cases, equal]
        for case in cases[1:]:
            if case.row.values and case.row.limit:
                case.row.notes.append(f"{case.row.value / case.row.limit:.2f} times the limit")


def _small(effort: Effort) -> Groups:
    """Where shards cost a message more than they save bytes: off, on, and as the run chooses."""
    workers = SMALL_WORKERS
    with _hosts(workers, FAST) as hosts:
        group = _Group(
            effort, f"{SMALL}, {RATES[FAST]}", SMALL, SMALL_ROUNDS, Place(hosts, "host1")
        )
        cases = [group.gloo(workers, link_rate(hosts, "host2", "host1"))]
        for observed in WITH_OBSERVER:
            for wanted in (1, workers, None):
                how = f"paramserver float32, shards={'null' if wanted is None else wanted}"
                row = Row("shards", group.what, workers, how, "ms", observer=observed)
                measure = partial(group.measure, row, "float32", wanted, wanted or 1, observed)
                cases.append(Case(row, measure))
        yield cases
        for case in cases:
            if case.row.values:
                case.row.notes.append(f"{1e3 / case.row.value:,.0f} rounds/s")


class _Group:
    """Cases of one size at one place."""

    def __init__(self, effort: Effort, what: str, size: str, rounds: int, place: Place) -> None:
        self.what = what
        self._size, self._place = size, place
        self._limits = effort.limits(rounds)

    def gloo(self, workers: int, rate: float) -> Case:
        row = Row("shards", self.what, workers, GLOO, "ms")
        place = self._place
        return Case(row, partial(gloo, self._limits, self._size, workers, place, False, 1 / rate))

    def ours(
        self,
        codec: str,
        cables: Mapping[int, Cable],
        told: Shares,
        observed: bool,
        paths: str = "",
    ) -> Case:
        """With a shard for each of these cables; those of `told` average."""
        workers = len(cables)
        how = f"paramserver {codec}, shards"
        row = Row("shards", self.what, workers, how, "ms", observer=observed)
        bound_s = sharding.seconds(cables, told, workers, workers) * size_bytes(self._size)
        limit_ms = 1e3 * bound_s * part_of_float32(codec)
        measure = partial(self.measure, row, codec, workers, len(told), observed, paths, limit_ms)
        return Case(row, measure)

    def measure(
        self,
        row: Row,
        codec: str,
        wanted: int | None,
        averaging: int,
        observed: bool,
        paths: str = "",
        limit_ms: float | None = None,
    ) -> Figure:
        one = runs.exchange(
            self._limits,
            self._size,
            row.workers,
            codec,
            self._place,
            shards=wanted,
            averaging=averaging,
            observed=observed,
            paths=paths,
        )
        row.busy.append(100 * one.busy)
        return 1e3 * one.seconds, limit_ms


def _paths(hosts: Hosts, rates: Mapping[int, float]) -> str:
    """What `make up` tells the server of the paths of these workers, with bytes a second."""
    far = hosts.address("host1")
    return link_watch.write(
        [Chosen(k, hosts.address(f"host{k}"), far, rate) for k, rate in rates.items()]
    )


def _hosts(workers: int, rate: str) -> Hosts:
    return Hosts([f"host{k}" for k in range(1, workers + 1)], rate)
