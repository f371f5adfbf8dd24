"""The parts of the benchmark: what is compared with what, and what the limit of each is.

A part yields groups of `Case`s. Those of a group are compared, so they are measured in turn, A B C
A B C, and whatever else the machine is doing meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs
from benchmarks.machine import Machine, link_rate
from benchmarks.network import Hosts, why_no_hosts
from benchmarks.report import ALONE, DDP, GLOO, Row
from benchmarks.runs import DEFAULT, HERE, Limits, Place, ring_bytes, size_bytes
from paramserver.protocol import sharding
from paramserver.protocol.sharding import SERVER, Cable
from paramserver.tensors.codec import CODECS

COMPUTE_TO_EXCHANGE = 2.0
MEGA = 1e6


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    name: str
    minutes: float
    """No new run starts after that."""
    repeats: int
    run_s: float
    """How long one run may take."""
    rounds: dict[str, int]
    """By size: what is exchanged, and how often in one run."""
    workers: tuple[int, ...]
    codecs: tuple[str, ...]
    few_codecs: tuple[str, ...]
    """For what need not be measured with each of them: one worker, 250 MB, what compute hides."""
    extras: bool
    """Also gloo in float16, and tcp where memory would be shared."""
    training_steps: int
    training_workers: tuple[int, ...]
    link_rounds: dict[str, int]
    link_workers: tuple[int, ...]
    share_rounds: int
    local_links: dict[str, str]
    """Rates of links on which local steps are measured, with their names."""
    sharded: tuple[tuple[str, int], ...]
    """Rates of links, and numbers of hosts that average together over them."""
    few_workers: tuple[int, ...]
    """For what need not be measured with each number of them."""
    scale: tuple[int, ...]
    scale_rounds: int
    epochs: dict[str, int]
    """By data set: how long the training is whose accuracy counts."""

    def limits(self, rounds: int) -> Limits:
        return Limits(self.run_s, rounds)


FULL = Effort(
    name="full",
    minutes=100,
    repeats=3,
    run_s=180,
    rounds={"1.35 MB": 300, "46.8 MB": 20, "250 MB": 6},
    workers=(1, 2, 3, 4),
    codecs=tuple(CODECS),
    few_codecs=tuple(dict.fromkeys((DEFAULT.codec, "float16"))),
    extras=True,
    training_steps=1200,
    training_workers=(1, 2, 3, 4),
    link_rounds={"1.35 MB": 40, "46.8 MB": 5},
    link_workers=(2, 3, 4),
    share_rounds=150,
    local_links={"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s"},
    sharded=(("1gbit", 4), ("1gbit", 3), ("200mbit", 8)),
    few_workers=(2, 4),
    scale=(4, 64),
    scale_rounds=1200,
    epochs={"digits": 15, "FashionMNIST": 3},
)
QUICK = Effort(
    name="quick",
    minutes=2.2,
    repeats=2,
    run_s=60,
    rounds={"1.35 MB": 100, "46.8 MB": 8},
    workers=(2, 4),
    codecs=tuple(dict.fromkeys((DEFAULT.codec, "float32", "float16"))),
    few_codecs=(DEFAULT.codec,),
    extras=False,
    training_steps=1000,
    training_workers=(2,),
    link_rounds={"46.8 MB": 3},
    link_workers=(2,),
    share_rounds=100,
    local_links={"1gbit": "1 Gbit/s"},
    sharded=(("1gbit", 3),),
    few_workers=(2,),
    scale=(4, 64),
    scale_rounds=400,
    epochs={"digits": 5},
)
TINY = replace(
    QUICK,
    name="tiny",
    repeats=1,
    rounds={"0.1 MB": 5},
    workers=(2,),
    codecs=(DEFAULT.codec,),
    training_steps=20,
    link_rounds={"0.1 MB": 3},
    scale=(2, 4),
    scale_rounds=40,
    epochs={"digits": 1},
)
EFFORTS = {effort.name: effort for effort in (FULL, QUICK, TINY)}


Figure = tuple[float, float | None]
"""A value and its limit, in the row's unit."""


@dataclass
class Case:
    """One way to do something: its row, and how it is measured once."""

    row: Row
    measure: Callable[[], Figure]


Groups = Generator[list[Case], None, None]


class Skipped(Exception):
    """This part cannot be measured here; a sentence."""


def alternate(
    cases: list[Case],
    repeats: int,
    go_on: Callable[[], bool],
    failed: Callable[[Row, Exception], None],
) -> None:
    """Measure all cases in turn, `repeats` times, while `go_on()`; a case that fails drops out."""
    for _ in range(repeats):
        for case in list(cases):
            if not go_on():
                return
            try:
                value, limit = case.measure()
            except Exception as error:
                cases.remove(case)
                failed(case.row, error)
                continue
            case.row.values.append(value)
            if limit is not None:
                case.row.limits.append(limit)


def our_name(codec: str) -> str:
    return f"paramserver {codec}" + (" (default)" if codec == DEFAULT.codec else "")


def _gloo_name(half: bool) -> str:
    return "gloo float16" if half else GLOO


# ------------------------------------------------------------------ the exchange


def exchange(effort: Effort, machine: Machine) -> Groups:
    """The limit: all bytes over what TCP carries or, in shared memory, what the cores copy."""
    for size, rounds in effort.rounds.items():
        limits = effort.limits(rounds)
        for workers in effort.few_workers if size == "250 MB" else effort.workers:
            cases = []
            for half in (False, True) if effort.extras and workers > 1 else (False,):
                row = Row("exchange", size, workers, _gloo_name(half), "ms")
                share = workers * _half(half) / machine.tcp_rate
                cases.append(Case(row, partial(gloo, limits, size, workers, HERE, half, share)))
            few = workers == 1 or size == "250 MB"
            for codec in effort.few_codecs if few else effort.codecs:
                row = Row("exchange", size, workers, our_name(codec), "ms")
                cases.append(Case(row, partial(_ours, limits, size, workers, codec, machine)))
            for how, guarded in {"tcp": False, "tcp with CURVE": True}.items():
                if effort.extras:
                    name = f"{our_name(DEFAULT.codec)}, {how}"
                    row = Row("exchange", size, workers, name, "ms")
                    ours = partial(_ours, limits, size, workers, DEFAULT.codec, machine)
                    cases.append(Case(row, partial(ours, tcp=True, guarded=guarded)))
            yield cases


def _ours(
    limits: Limits,
    size: str,
    workers: int,
    codec: str,
    machine: Machine,
    *,
    tcp: bool = False,
    guarded: bool = False,
) -> Figure:
    one = runs.exchange(limits, size, workers, codec, tcp=tcp, guarded=guarded)
    if tcp:
        limit_s = (one.sent_bytes + one.received_bytes) / machine.tcp_rate
    else:  # what goes up is written and read; what comes down, written once for all, is read
        limit_s = (one.received_bytes + one.sent_bytes / 2) / machine.copy_rate
    return 1e3 * one.seconds, 1e3 * limit_s


def gloo(
    limits: Limits, size: str, ranks: int, place: Place, half: bool, s_per_ring_byte: float
) -> Figure:
    seconds = runs.all_reduce(limits, size, ranks, place, half=half)
    return 1e3 * seconds, 1e3 * ring_bytes(size_bytes(size), ranks) * s_per_ring_byte


def _half(half: bool) -> float:
    return 0.5 if half else 1.0


def links(effort: Effort) -> Groups:
    """The limit: the busiest link's bytes in its busier direction, over its measured rate."""
    reason = why_no_hosts()
    if reason is not None:
        raise Skipped(reason)
    most = max(effort.link_workers)
    with Hosts(["server", *(f"host{k}" for k in range(1, most + 1))]) as hosts:
        rate = link_rate(hosts, "host2", "host1")
        for size, rounds in effort.link_rounds.items():
            limits = effort.limits(rounds)
            for server_on, words in (
                ("host1", "server on worker 1's host"),
                ("server", "server on a host of its own"),
            ):
                for workers in effort.link_workers:
                    what, place = f"{size}, {words}", Place(hosts, server_on)
                    cases = []
                    for half in (False, True) if effort.extras else (False,):
                        row = Row("links", what, workers, _gloo_name(half), "ms")
                        theirs = partial(
                            gloo, limits, size, workers, place, half, _half(half) / rate
                        )
                        cases.append(Case(row, theirs))
                    for codec in effort.codecs:
                        row = Row("links", what, workers, our_name(codec), "ms")
                        ours = partial(_linked, limits, size, workers, codec, place, rate)
                        cases.append(Case(row, ours))
                    for codec in effort.codecs if workers > 2 and server_on == "server" else ():
                        row = Row("links", what, workers, f"{our_name(codec)}, shards", "ms")
                        ours = partial(_linked, limits, size, workers, codec, place, rate)
                        cases.append(Case(row, partial(ours, sharded=True)))
                    for sharded in (False, True)[: workers - 1] if effort.extras else ():
                        name = "paramserver float16, CURVE" + (", shards" if sharded else "")
                        row = Row("links", what, workers, name, "ms")
                        ours = partial(_linked, limits, size, workers, "float16", place, rate)
                        cases.append(Case(row, partial(ours, guarded=True, sharded=sharded)))
                    yield cases


def _linked(
    limits: Limits,
    size: str,
    workers: int,
    codec: str,
    place: Place,
    rate: float,
    guarded: bool = False,
    sharded: bool = False,
) -> Figure:
    if sharded:
        return _sharded(limits, size, workers, codec, place, rate, guarded)
    one = runs.exchange(limits, size, workers, codec, place, guarded=guarded)
    remote = workers if place.server_on == "server" else workers - 1
    busiest = max(one.sent_bytes, one.received_bytes) * remote / workers
    return 1e3 * one.seconds, 1e3 * busiest / rate


def _sharded(
    limits: Limits, size: str, workers: int, codec: str, place: Place, rate: float, guarded: bool
) -> Figure:
    """With a shard beside each worker; the server is that of its host."""
    apart = place.server_on == "server"
    shards = workers + apart
    one = runs.exchange(limits, size, workers, codec, place, shards=shards, guarded=guarded)
    cables = {shard: Cable(rate) for shard in range(1 - apart, workers + 1 - apart)}
    cables |= {SERVER: Cable(rate, workers=0, copies=0)} if apart else {}
    seconds = sharding.seconds(cables, sharding.equal(sorted(cables)), workers, workers)
    return 1e3 * one.seconds, 1e3 * seconds * size_bytes(size) * part_of_float32(codec)


def part_of_float32(codec: str) -> float:
    buffers, _ = CODECS[codec].encode(torch.ones(2**16))
    return sum(memoryview(b).nbytes for b in buffers) / (4 * 2**16)


def exposed(effort: Effort) -> Groups:
    """Backward waits twice as long as the exchange takes."""
    size, rounds = [pair for pair in effort.rounds.items() if pair[0] != "250 MB"][-1]
    limits = effort.limits(rounds)

    def ddp(ranks: int) -> Figure:
        return share_exposed(partial(runs.ddp_exchange, limits, size, ranks)), None

    def ours(workers: int, codec: str) -> Figure:
        def rounds_of(backward_s: float) -> tuple[float, float]:
            one = runs.exchange(limits, size, workers, codec, backward_s=backward_s)
            return one.seconds, one.alone_s

        return share_exposed(rounds_of), None

    for workers in effort.few_workers:
        cases = [Case(Row("exposed", size, workers, DDP, "%"), partial(ddp, workers))]
        for codec in effort.few_codecs:
            row = Row("exposed", size, workers, our_name(codec), "%")
            cases.append(Case(row, partial(ours, workers, codec)))
        yield cases


def share_exposed(rounds_of: Callable[[float], tuple[float, float]]) -> float:
    """Percent of an exchange that compute does not hide.

    `rounds_of(backward_s)` gives the seconds of a round whose backward waits that long, and of
    that backward alone. What the round takes longer than its backward was not hidden.
    """
    whole, backward = rounds_of(0.0)
    exchange_s = whole - backward
    whole, backward = rounds_of(COMPUTE_TO_EXCHANGE * exchange_s)
    return 100 * (whole - backward) / exchange_s


# ------------------------------------------------------------------ the whole


def training(effort: Effort) -> Groups:
    """The limit: the same processes without any exchange."""
    limits = effort.limits(effort.training_steps)
    ways = {ALONE: "no exchange", DDP: "float32"}
    if effort.extras:
        ways["DDP, gloo float16"] = "float16"

    def ours(row: Row) -> Figure:
        seen = runs.training(limits, row.workers)
        if seen.late:
            row.notes.append(f"a worker was late {seen.late} times in {seen.steps} rounds")
        return seen.steps_per_s, None

    for workers in effort.training_workers:
        cases = []
        for how, way in ways.items():
            row = Row("training", "SimpleNN", workers, how, "steps/s")
            cases.append(Case(row, partial(_ddp_training, limits, workers, way)))
        row = Row("training", "SimpleNN", workers, our_name(DEFAULT.codec), "steps/s")
        cases.append(Case(row, partial(ours, row)))
        rows = [case.row for case in cases]
        yield cases
        for row in rows[1:]:
            row.limits = list(rows[0].values)


def shares(effort: Effort) -> Groups:
    """Machines of unlike speed, played by waits. The limit: every machine at its own speed."""
    limits = effort.limits(effort.share_rounds)

    def run(speeds: tuple[float, ...], words: str) -> Figure:
        seen = runs.shared(limits, speeds, SAMPLE_S, f"shares={words}")
        return seen.samples_per_s, sum(speeds) / SAMPLE_S

    unlike, alike = (4.0, 2.0, 1.0, 1.0), (1.0, 1.0, 1.0)
    yield [
        Case(
            Row("shares", "speeds 4 : 2 : 1 : 1", 4, f"shares: {words}", "samples/s"),
            partial(run, unlike, words),
        )
        for words in ("equal", "speed")
    ]
    yield [
        Case(
            Row("shares", "one of 50 times slower", 4, how, "samples/s"),
            partial(run, speeds, "speed"),
        )
        for how, speeds in {"without it": alike, "shares: speed": (*alike, 0.02)}.items()
    ]
    yield [
        Case(Row("shares", "one becomes 4 times slower", 4, "shares: speed", "rounds"), _follows)
    ]
    steps = effort.limits(effort.training_steps)
    for workers in [n for n in effort.training_workers if n in (2, 4)]:
        yield [
            Case(
                Row("shares", "alike, SimpleNN", workers, f"shares: {words}", "steps/s"),
                partial(_training_with, steps, workers, f"shares={words}"),
            )
            for words in ("equal", "speed")
        ]


SAMPLE_S = 0.004
"""The wait for a sample, at speed 1."""


def _follows() -> Figure:
    """Rounds until a round takes at most 1 / 0.9 of what it ideally takes, and stays there."""
    before, batch = 60, 32
    seen = runs.shared(
        Limits(120, before + 80), (1.0,) * 4, SAMPLE_S, "shares=speed", slower_after=before
    )
    ideal_s = 4 * batch * SAMPLE_S / 3.25
    late = [i for i, s in enumerate(seen.seconds[before:]) if s > ideal_s / 0.9 + MARGIN_S]
    steady = [i for i in late if i < 40]
    return float(1 + max(steady, default=-1)), None


MARGIN_S = 0.005
"""What the exchange and a late timer may add to a round."""


def _training_with(limits: Limits, workers: int, setting: str) -> Figure:
    return runs.training(limits, workers, setting).steps_per_s, None


def local(effort: Effort) -> Groups:
    """Local steps. The limit: computing alone."""
    for workers in [n for n in effort.training_workers if n in (2, 4)]:
        limits = effort.limits(effort.training_steps)
        cases = [
            Case(Row("local", "SimpleNN, one host", workers, how, "steps/s"), measure)
            for how, measure in {
                ALONE: partial(_ddp_training, limits, workers, "no exchange"),
                DDP: partial(_ddp_training, limits, workers, "float32"),
                "paramserver, local_steps=8": partial(
                    _training_with, limits, workers, "local_steps=8"
                ),
            }.items()
        ]
        rows = [case.row for case in cases]
        yield cases
        for row in rows[1:]:
            row.limits = list(rows[0].values)
    reason = why_no_hosts()
    if reason is not None:
        raise Skipped(reason)
    size, workers = next(reversed(effort.link_rounds)), max(effort.few_workers)
    for rate, words in effort.local_links.items():
        with Hosts([f"host{k}" for k in range(1, workers + 1)], rate=rate) as hosts:
            place, few = Place(hosts, "host1"), effort.limits(3)
            what = f"{size}, {1000 * STEP_S:.0f} ms a step, {words}"
            row = Row("local", what, workers, DDP, "steps/s")
            ddp = partial(runs.ddp_steps, few, size, workers, STEP_S, place)
            cases = [Case(row, partial(_steps_per_s, ddp))]
            for codec, overlap in (("float16", False), ("float16", True), ("int8", True)):
                how = f"paramserver {codec}, local_steps={LOCAL_STEPS}"
                row = Row("local", what, workers, how + ", overlap" * overlap, "steps/s")
                ours = partial(
                    runs.local, few, size, workers, codec, place, LOCAL_STEPS, STEP_S,
                    overlap=overlap,
                )  # fmt: skip
                cases.append(Case(row, partial(_steps_per_s, ours)))
            yield cases


LOCAL_WORKERS = 4
STEP_S, LOCAL_STEPS = 0.1, 32
"""Where local steps go over a link: what a step computes, and how many make a round."""


def _ddp_training(limits: Limits, ranks: int, way: str) -> Figure:
    return runs.ddp_training(limits, ranks, way), None


def _steps_per_s(seconds: Callable[[], float]) -> Figure:
    return 1 / seconds(), 1 / STEP_S


def memory(effort: Effort) -> Groups:
    """The limit: three times the gradients and the history."""

    def ours(size: str, rounds: int, workers: int) -> Figure:
        grown = runs.server_memory(effort.limits(rounds), size, workers, DEFAULT.codec)
        allowed = 3 * size_bytes(size) + DEFAULT.history_mb * 2**20
        return grown / MEGA, allowed / MEGA

    for size, rounds in effort.rounds.items():
        if size == "1.35 MB":
            continue
        cases = []
        for workers in effort.few_workers:
            row = Row("memory", size, workers, our_name(DEFAULT.codec), "MB")
            cases.append(Case(row, partial(ours, size, rounds, workers)))
        yield cases
    yield from _memory_with_shards(effort)


def _memory_with_shards(effort: Effort) -> Groups:
    """What each process has more than with a model of 0.1 MB. The limit, of those that average:
    three times their share and the history."""
    if (reason := why_no_hosts()) is not None:
        raise Skipped(f"{reason}, so not with shards")
    size, workers = next(reversed(effort.rounds)), max(3, *effort.few_workers)
    with Hosts([f"host{k}" for k in range(1, workers + 1)]) as hosts:
        place = Place(hosts, "host1")
        allowed = 3 * size_bytes(size) / workers + DEFAULT.history_mb * 2**20
        grown: dict[str, float] = {}

        def look() -> None:
            for name, sign in (("0.1 MB", -1), (size, 1)):
                limits = effort.limits(3)
                seen = runs.memory_by_role(limits, name, workers, DEFAULT.codec, place, workers)
                for role, found in seen.items():
                    grown[role] = grown.get(role, 0.0) + sign * found

        def measure(role: str) -> Figure:
            if role == runs.ROLES[0]:
                grown.clear()
                look()
            return grown[role] / MEGA, allowed / MEGA if role in ("server", "shard") else None

        yield [
            Case(
                Row("memory", f"{size}, a shard on each host", workers, role, "MB", observer=True),
                partial(measure, role),
            )
            for role in runs.ROLES
        ]


def scale(effort: Effort) -> Groups:
    """The same work for each worker, few of them and many."""
    size = next(iter(effort.rounds))

    def ours(workers: int) -> Figure:
        limits = effort.limits(max(10, effort.scale_rounds // workers))
        seconds = runs.many_workers(limits, size, workers, DEFAULT.codec)
        return 1e3 * seconds / workers, None

    cases = []
    for workers in effort.scale:
        row = Row("scale", size, workers, our_name(DEFAULT.codec), "ms per worker")
        cases.append(Case(row, partial(ours, workers)))
    yield cases


FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package of that name


def accuracy(effort: Effort) -> Groups:
    """Each run has another seed; in the limit's place, points above float32 with that seed."""

    def train(dataset: dict[str, Any], epochs: int, codec: str, seeds: Iterator[int]) -> Figure:
        seed = next(seeds)
        right = runs.accuracy(effort.run_s, dataset, codec, seed, epochs)
        if codec == "float32":
            plain[dataset["name"], seed] = right
        return right, right - plain[dataset["name"], seed]

    def locally(dataset: dict[str, Any], epochs: int, steps: int, seeds: Iterator[int]) -> Figure:
        seed, name = next(seeds), dataset["name"]
        right = runs.local_accuracy(effort.run_s, dataset, steps, seed, epochs, LOCAL_WORKERS)
        if steps == 1:
            together[name, seed] = right
        return right, right - together[name, seed]

    plain: dict[tuple[str, int], float] = {}
    together: dict[tuple[str, int], float] = {}
    for name, epochs in effort.epochs.items():
        dataset = {"name": name}
        if name == "FashionMNIST":
            if not FASHION.is_dir():
                raise Skipped("FashionMNIST needs Debian's package dataset-fashion-mnist")
            dataset["root"] = str(FASHION)
        cases = []
        for codec in CODECS:
            row = Row("accuracy", f"{name}, {epochs} epochs", 2, our_name(codec), "% right")
            seeds = count(DEFAULT.seed)
            cases.append(Case(row, partial(train, dataset, epochs, codec, seeds)))
        yield cases
        if name == "digits":
            continue  # too few samples for rounds of many steps
        yield [
            Case(
                Row("accuracy", f"{name}, {epochs} epochs", LOCAL_WORKERS, how, "% right"),
                partial(locally, dataset, epochs, steps, count(DEFAULT.seed)),
            )
            for how, steps in {
                "synchronous": 1,
                "local_steps=32": 32,
                "local_steps=128": 128,
            }.items()
        ]
