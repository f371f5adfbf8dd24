"""Predicts how fast a run would be, from measured machines and links, and says why. Pure.

`predict` computes one round of a set of machines, with the server on one of them. A worker
computes, then each bucket passes these stages, one bucket after the other in each: it is encoded,
goes up, is added on the server, comes down, and is decoded. With one local step buckets leave while
backward still computes; with more they leave after the last step; and with `overlap` the next steps
are computed meanwhile, so that a round takes as long as its computing or as its exchange. `plans`
tries every sensible set of machines, place of the server, codec, number of local steps and way of
sharing samples, and `table` chooses what to show of these, each with a sentence.

What travels: one server moves (N-1) G each way through its link where it is beside a worker, and
N G on a machine of its own; from three machines on each averages a share
(`paramserver.protocol.sharding`), and moves 2 (N-1)/N G where all cables are alike. Links are taken
as carrying both directions at once, except Wi-Fi.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

from paramserver.protocol import sharding
from paramserver.rounds.local_steps import AUTO, CHANGE_MIN, EXCHANGE_SHARE, LocalSteps, suiting
from paramserver.rounds.shards import wanted
from paramserver.rounds.shares import SAMPLE_S_MIN, SHARE_TIMES_MAX, Cost, Limits, split

HERE = "this machine"
LOCAL_STEPS = (1, 8, 32, 128, AUTO)
CODECS = ("float32", "float16", "int8")
SHARES = ("equal", "speed")
ROWS = 12

ROUND_S = 1.5e-3
"""What a round costs beside its bytes: messages and changes of thread. Measured on one host."""

MESSAGE_S = 2e-4
"""What the server needs for a push beside its bytes. Measured on one host."""

OUTER_PASSES = 6
"""Passes over the weights for the outer step of a round of local steps, and for the way back."""

CURVE_BYTES_PER_S = 0.85e9
"""What an encrypted link carries at most: an I/O thread encrypts for all of them in turn."""

ALL_SETS = 5  # machines; of more, only the fastest are tried, and all but one
CODEC_WORTH = {"float32": 1.0, "float16": 0.99, "bfloat16": 0.98, "int8": 0.97, "topk": 0.95}
STEPS_WORTH = {1: 1.0, 8: 0.97, 32: 0.95, 128: 0.93}
SHARES_WORTH = {"equal": 1.0, "speed": 0.97}
AUTO_WORTH, OVERLAP_WORTH = 0.99, 0.97
"""What costs accuracy, or effort, must bring more than so much."""

MACHINE_WORTH = MOVED_WORTH = 0.98
IDLE_WORTH = 0.5  # of a machine without samples, for which the others' batches grow
LOST = 0.01  # of the speed: a machine that costs less is not worth a sentence
UNLIKE = 1.1  # times as long as the fastest machine computes: then the slowest is named
FASTER = 1.05  # than one worker alone: then several pay


class CodecCost(NamedTuple):
    """Seconds for each byte of float32."""

    encode_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What was measured on a machine, with as many of its processes at once as will run there."""

    name: str
    cost: Cost
    """Of one process, for forward, backward and the optimizer's step."""
    backward: float = 0.6
    """The share of backward in that."""
    processes: int = 1
    copy_s: float = 0.0
    """Seconds to copy a byte."""
    codecs: Mapping[str, CodecCost] = field(default_factory=dict)
    works: bool = True

    def codec(self, name: str) -> CodecCost:
        return self.codecs.get(name, CodecCost())


@dataclass(frozen=True)
class Link:
    """From a worker's machine to a server's: bytes a second each way, and a round trip."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float = 0.0
    port: str = ""
    """The server's address: links to the same one share its cable."""
    one_way_at_once: bool = False

    @property
    def turned(self) -> Link:
        """The same link where the server is at its other end."""
        return Link(
            self.down_bytes_per_s, self.up_bytes_per_s, self.round_trip_s, "", self.one_way_at_once
        )


Links = Mapping[tuple[str, str], Link]
"""By (worker's machine, server's machine)."""


def cost_of(points: Sequence[tuple[int, float]]) -> Cost:
    """A line through (samples, seconds) of two steps of unlike size, the smaller one first, which
    is the one that counts; where it says that samples or the rest cost less than nothing, all
    seconds of the first go to the samples or to the rest."""
    samples, seconds = points[0]
    slope = 0.0
    if len(points) > 1:
        more, longer = points[-1]
        slope = (longer - seconds) / (more - samples)
    if len(points) == 1 or slope * samples > seconds:
        return Cost(0.0, max(SAMPLE_S_MIN, seconds / samples))
    slope = max(SAMPLE_S_MIN, slope)
    return Cost(max(0.0, seconds - slope * samples), slope)


class Model(NamedTuple):
    """What an exchange carries."""

    buckets: tuple[float, ...]
    """Bytes of each bucket as float32, in the order in which backward completes them."""
    other_bytes: float = 0.0
    """What no codec makes smaller: float64, buffers."""


class Carried(NamedTuple):
    """Bytes on the wire for each byte of float32."""

    up: float
    down: float


def carried(codec: str, topk_ratio: float = 0.01) -> Carried:
    """What a codec carries, see `paramserver.tensors.codec`."""
    if codec == "topk":
        return Carried(topk_ratio, min(1.0, 2 * topk_ratio))
    of_one = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5, "int8": (1 + 4 / 1024) / 4}[codec]
    return Carried(of_one, of_one)


class Job(NamedTuple):
    """What is planned: the model, the samples of a worker's step, and what is free to choose."""

    model: Model
    batch_size: int
    codecs: tuple[str, ...] = CODECS
    local_steps: tuple[int | str, ...] = LOCAL_STEPS
    shares: tuple[str, ...] = SHARES
    overlap: tuple[bool, ...] = (False, True)
    topk_ratio: float = 0.01
    encrypted: bool = False
    samples: int | None = None
    """Of an epoch; a round holds no more."""
    shards: int | None = None
    """At most so many machines average; None: what the server chooses."""
    alone: tuple[str, ...] = ()
    """Codecs with which the server averages alone."""
    observer: bool = False
    """Is an observer on the server's machine? It takes averages of other machines, too."""
    equal_shares: bool = False
    """Are the shares of these machines equal, whatever their cables carry?"""


class Choice(NamedTuple):
    """Settings of a run that a plan is free to choose."""

    codec: str = "float32"
    local_steps: int | str = 1
    shares: str = "equal"
    overlap: bool = False


@dataclass(frozen=True)
class Plan:
    """A run that could be started, and what is predicted for it."""

    machines: tuple[str, ...]
    server: str
    choice: Choice
    workers: int
    samples_per_s: float
    compute_s: float
    """Of the slowest worker in a round."""
    exchange_s: float
    """What computing does not hide of the round's exchange."""
    slowest: str
    """The machine that computes longest."""
    fastest_s: float
    """What the machine computes that is done first."""
    idle: tuple[str, ...] = ()
    """Machines that get no samples."""
    steps: int = 1
    """Local steps of a round; with auto, those that the server would choose."""
    moved: bool = False
    """The server would be on another machine than it is now."""

    @property
    def round_s(self) -> float:
        return self.compute_s + self.exchange_s

    @property
    def worth(self) -> float:
        """Samples a second, less what local steps, codecs and further machines must bring."""
        factor = IDLE_WORTH ** len(self.idle) * (MOVED_WORTH if self.moved else 1.0)
        factor *= MACHINE_WORTH ** (self.workers - 1 + (self.server not in self.machines))
        codec, local_steps, shares, overlap = self.choice
        factor *= CODEC_WORTH[codec] * SHARES_WORTH[shares]
        factor *= STEPS_WORTH[max(n for n in STEPS_WORTH if n <= self.steps)]
        factor *= AUTO_WORTH if local_steps == AUTO else 1.0
        factor *= OVERLAP_WORTH if overlap else 1.0
        return self.samples_per_s * factor

    @property
    def shown_steps(self) -> str:
        """The local steps, as words."""
        number = f"auto ({self.steps})" if self.choice.local_steps == AUTO else str(self.steps)
        return f"{number}, overlap" if self.choice.overlap else number


# ---------------------------------------------------------------------------------- one prediction


def predict(
    chosen: Sequence[Machine], server: Machine, links: Links, job: Job, choice: Choice
) -> Plan | None:
    """A run on these machines; None where one of them does not reach the server's."""
    if any((m.name, server.name) not in links for m in chosen if m.name != server.name):
        return None
    steps = choice.local_steps
    if isinstance(steps, str):
        steps = _chosen_by_auto(chosen, server, links, job, choice)
    samples, seconds = _computed(chosen, job.batch_size, steps, choice.shares)
    slowest = max(chosen, key=lambda m: seconds[m.name])
    compute_s = seconds[slowest.name]
    if steps == 1:
        hidden_s = slowest.backward * compute_s
        exchange_s = _exchange(chosen, server, links, job, choice.codec, hidden_s)
    else:
        exchange_s, own_s = _exchange_local(chosen, server, links, job, choice.codec)
        if choice.overlap:
            exchange_s = max(own_s, exchange_s - compute_s)
    computed = sum(m.processes * samples[m.name] for m in chosen)
    return Plan(
        tuple(m.name for m in chosen),
        server.name,
        choice,
        sum(m.processes for m in chosen),
        computed / (compute_s + exchange_s),
        compute_s,
        exchange_s,
        slowest.name,
        min(seconds.values()),
        tuple(m.name for m in chosen if not samples[m.name]),
        steps,
    )


def _exchange_local(
    chosen: Sequence[Machine], server: Machine, links: Links, job: Job, codec: str
) -> tuple[float, float]:
    """Seconds from the last local step of a round to the new anchor, and those of them in which a
    worker cannot compute: it encodes, decodes, and makes the outer step."""
    total = sum(job.model.buckets)
    outer_s = OUTER_PASSES * total * max(m.copy_s for m in chosen)
    coded_s = max(sum(m.codec(codec)) + 2 * m.copy_s for m in chosen)
    exchange_s = _exchange(chosen, server, links, job, codec, 0.0) + outer_s
    return exchange_s, min(exchange_s, coded_s * total + outer_s)


def _chosen_by_auto(
    chosen: Sequence[Machine], server: Machine, links: Links, job: Job, choice: Choice
) -> int:
    """The local steps that the server would choose (`LocalSteps`): it begins with synchronous ones,
    and stays there where their exchange hardly costs anything."""
    _, seconds = _computed(chosen, job.batch_size, 1, "equal")
    slowest = max(chosen, key=lambda m: seconds[m.name])
    step_s = max(SAMPLE_S_MIN, seconds[slowest.name])
    hidden_s = slowest.backward * step_s
    exchange_s = _exchange(chosen, server, links, job, choice.codec, hidden_s)
    if math.ceil((1 if choice.overlap else EXCHANGE_SHARE) * exchange_s / step_s) < CHANGE_MIN:
        return 1
    exchange_s, _ = _exchange_local(chosen, server, links, job, choice.codec)
    found = max(2, suiting(step_s, exchange_s, overlap=choice.overlap))
    if job.samples is not None:
        workers = sum(m.processes for m in chosen)
        found = max(2, min(found, job.samples // (workers * job.batch_size)))
    return found


def _computed(
    chosen: Sequence[Machine], batch_size: int, steps: int, shares: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Samples of a round, and seconds for them, of a process of each machine."""
    by_speed = shares == "speed"
    if by_speed and steps > 1:
        numbers = LocalSteps(steps).by_speed(
            steps, dict.fromkeys(range(len(chosen)), batch_size),
            {i: m.cost for i, m in enumerate(chosen)},
        )  # fmt: skip
        return (
            {m.name: numbers[i] * batch_size for i, m in enumerate(chosen)},
            {m.name: numbers[i] * m.cost.of(batch_size) for i, m in enumerate(chosen)},
        )
    sizes = {m.name: batch_size for m in chosen}
    if by_speed:
        places = [m for m in chosen for _ in range(m.processes)]
        found = split(
            batch_size * len(places),
            {i: m.cost for i, m in enumerate(places)},
            {i: Limits(1, SHARE_TIMES_MAX * batch_size) for i in range(len(places))},
        )
        sizes = {}
        for i, m in enumerate(places):  # processes of a machine differ by what rounding left
            sizes[m.name] = max(sizes.get(m.name, 0), found[i])
    return (
        {name: steps * n for name, n in sizes.items()},
        {m.name: steps * m.cost.of(sizes[m.name]) for m in chosen},
    )


def _exchange(
    chosen: Sequence[Machine],
    server: Machine,
    links: Links,
    job: Job,
    codec: str,
    backward_s: float,
) -> float:
    """Seconds from the end of backward to the last average, where backward takes `backward_s` and
    completes buckets at an even pace."""
    there = {m.name: links[m.name, server.name] for m in chosen if m.name != server.name}
    wire = carried(codec, job.topk_ratio)
    up_s, down_s = _link_seconds(chosen, there, job.encrypted)
    workers = sum(m.processes for m in chosen)
    own, share = server.codec(codec), 1.0
    shared = None if codec in job.alone else _shared(chosen, server, there, job)
    if shared is not None:
        up_s, down_s, share = shared
    # Beside the codec: a worker copies a bucket out and the average in, a shard adds each push.
    encode_s = max(m.codec(codec).encode_s + m.copy_s for m in chosen)
    decode_s = max(m.codec(codec).decode_s + m.copy_s for m in chosen)
    add_s = share * (workers * (own.decode_s + server.copy_s) + own.encode_s)

    def stages(as_float32: float, other: float) -> tuple[float, ...]:
        return (
            encode_s * as_float32,
            up_s * (wire.up * as_float32 + other),
            add_s * as_float32 + workers * (server.copy_s * other + MESSAGE_S),
            down_s * (wire.down * as_float32 + other),
            decode_s * as_float32,
        )

    parts = [stages(size, 0.0) for size in job.model.buckets]
    if job.model.other_bytes:
        parts.append(stages(0.0, job.model.other_bytes))
    total, done = sum(job.model.buckets), 0.0
    at = [0.0] * 5  # when each stage is free, from the end of backward on
    for index, seconds in enumerate(parts):
        if index < len(job.model.buckets):
            done += job.model.buckets[index]
        now = backward_s * (done / total - 1.0) if total else 0.0
        for stage, needed in enumerate(seconds):
            at[stage] = now = max(now, at[stage] if index else now) + needed
    trip_s = max((link.round_trip_s for link in there.values()), default=0.0)
    return max(0.0, at[-1]) + trip_s + ROUND_S


def _shared(
    chosen: Sequence[Machine], server: Machine, there: Mapping[str, Link], job: Job
) -> tuple[float, float, float] | None:
    """Where several machines average: seconds for a byte of every worker, up and down, and the
    largest share of a machine; None where the server does all. Pushes and averages go through the
    same cables at the same time, so a byte takes its time once, but for the last bucket's."""
    most = wanted(job.shards, len(there), sum(job.model.buckets))
    if most == 1 or not there:
        return None
    rates = {name: min(link.up_bytes_per_s, link.down_bytes_per_s) for name, link in there.items()}
    both = 2 if any(link.one_way_at_once for link in there.values()) else 1
    on = {m.name: m.processes for m in chosen}
    names = [server.name, *there]
    rates[server.name] = max(rates.values())
    cables = {
        number: sharding.relayed(
            rates[name] / both, on.get(name, 0), observer=job.observer and name == server.name
        )
        for number, name in enumerate(names)
    }
    found, needed = sharding.foreseen(cables, most, alike=job.equal_shares)
    if not found:
        return None
    return needed, needed / 2, max(share for _, share in found) / sharding.WHOLE


def _link_seconds(
    chosen: Sequence[Machine], there: Mapping[str, Link], encrypted: bool
) -> tuple[float, float]:
    """Seconds for a byte of every worker, up and down: of the slowest link, or of a cable at the
    server that several links share."""
    up_s = down_s = 0.0
    limit = CURVE_BYTES_PER_S if encrypted else float("inf")
    shared: dict[str, list[tuple[Link, int]]] = {}
    for m in chosen:
        if (link := there.get(m.name)) is not None:
            shared.setdefault(link.port or "?", []).append((link, m.processes))
    for found in shared.values():
        bytes_of_all = sum(n for _, n in found)
        both = 2 if any(link.one_way_at_once for link, _ in found) else 1
        for link, n in found:
            up_s = max(up_s, both * n / link.up_bytes_per_s)
            down_s = max(down_s, both * n / link.down_bytes_per_s)
        up_s = max(up_s, both * bytes_of_all / max(link.up_bytes_per_s for link, _ in found))
        down_s = max(down_s, both * bytes_of_all / max(link.down_bytes_per_s for link, _ in found))
    crossing = sum(m.processes for m in chosen if m.name in there)
    return max(up_s, crossing / limit), max(down_s, crossing / limit)


# ----------------------------------------------------------------------------------- all of them


def plans(machines: Sequence[Machine], links: Links, job: Job) -> list[Plan]:
    """Every sensible run, what is worth most first. The server is on the first machine now."""
    found = []
    for chosen in _sets([m for m in machines if m.works], job.batch_size):
        places = machines if len(chosen) > 1 else chosen  # one machine alone serves itself
        for server in places:
            for choice in _choices(job, sum(m.processes for m in chosen)):
                plan = predict(chosen, server, links, job, choice)
                if plan is not None:
                    found.append(replace(plan, moved=server is not machines[0]))
    return sorted(found, key=lambda p: -p.worth)


def _choices(job: Job, workers: int) -> Iterator[Choice]:
    for codec in job.codecs:
        for local_steps in job.local_steps:
            if workers == 1 and local_steps == AUTO and len(job.local_steps) > 1:
                continue
            if (
                job.samples is not None
                and isinstance(local_steps, int)
                and local_steps > max(1, job.samples // (workers * job.batch_size))
            ):
                continue
            for shares in job.shares if workers > 1 else job.shares[:1]:
                for overlap in job.overlap if workers > 1 and local_steps != 1 else (False,):
                    yield Choice(codec, local_steps, shares, overlap)


def _sets(workers: Sequence[Machine], batch_size: int) -> list[tuple[Machine, ...]]:
    """The sets of machines that are tried: all, or of many machines the fastest so many, all but
    each one, and each alone."""
    if len(workers) <= ALL_SETS:
        return [s for n in range(1, len(workers) + 1) for s in combinations(workers, n)]
    by_speed = sorted(workers, key=lambda m: m.cost.of(batch_size))
    tried = [tuple(by_speed[: n + 1]) for n in range(len(by_speed))]
    tried += [tuple(m for m in by_speed if m is not out) for out in by_speed]
    tried += [(m,) for m in by_speed]
    return list({tuple(m.name for m in s): s for s in tried}.values())


# ------------------------------------------------------------------------------------- sentences


class Row(NamedTuple):
    """A plan of the table, and what there is to say about it."""

    plan: Plan
    sentence: str


def table(found: Sequence[Plan], rows: int = ROWS) -> list[Row]:
    """What to show of all plans (`plans`), best first: the best one, the same with other numbers of
    local steps, at other places and with other machines, and one machine alone."""
    if not found:
        return []
    best, alone = found[0], _alone(found)
    shown = [best]
    if alone is not None and alone is not best:
        shown.append(alone)

    def add(group: Sequence[Plan], key: Callable[[Plan], Any]) -> None:
        seen = {key(p) for p in shown if p in group}
        for plan in group:
            if key(plan) not in seen and len(shown) < rows:
                seen.add(key(plan))
                shown.append(plan)

    add([p for p in found if _place(p) == _place(best)], lambda p: p.choice.local_steps)
    add([p for p in found if _place(p)[:2] == _place(best)[:2]], lambda p: p.server)
    add(found, lambda p: (p.machines, p.workers))
    shown.sort(key=lambda p: -p.worth)
    return [Row(p, sentence(p, found)) for p in shown]


def _place(plan: Plan) -> tuple[tuple[str, ...], int, str]:
    return plan.machines, plan.workers, plan.server


def _alone(found: Sequence[Plan]) -> Plan | None:
    """The best plan of one worker."""
    return next((p for p in found if p.workers == 1), None)


def sentence(plan: Plan, found: Sequence[Plan]) -> str:
    """What a person should know about this plan, beside all the others."""
    best, alone = found[0], _alone(found)
    if plan.workers == 1:
        speed = f"{plan.samples_per_s:,.0f} samples/s"
        if plan is best:
            one = "worker" if plan.machines[0] == HERE else "machine"
            return f"one {one} alone is faster: {speed}"
        return "alone, for comparison"
    if alone is not None and plan.samples_per_s < alone.samples_per_s:
        if plan.exchange_s <= plan.compute_s and (dead := _dead_weight(plan, found)):
            return dead
        told = f"slower than {_called(alone)} ({alone.samples_per_s:,.0f} samples/s)"
        return f"{told}: {_pays(plan, found, alone) or _why(plan)}"
    if dead := _dead_weight(plan, found):
        return dead
    if plan is best:
        return _of_the_best(plan, alone)
    if plan.samples_per_s > best.samples_per_s:
        more = 100 * (plan.samples_per_s / best.samples_per_s - 1)
        return f"{more:.0f} % more than the first one: not worth {_sacrifice(plan, best)}"
    return _why(plan)


def _fastest(found: Sequence[Plan], machines: tuple[str, ...]) -> float:
    return max((p.samples_per_s for p in found if p.machines == machines), default=0.0)


def _dead_weight(plan: Plan, found: Sequence[Plan]) -> str | None:
    """The machine that this set is faster without, if there is one."""
    worst: tuple[float, str] | None = None
    speed = _fastest(found, plan.machines)
    for name in plan.machines if len(plan.machines) > 1 else ():
        without = _fastest(found, tuple(m for m in plan.machines if m != name))
        lost = 1 - speed / without if without else 0.0
        if lost > LOST and (worst is None or lost > worst[0]):
            worst = lost, name
    if worst is not None:
        return f"{worst[1]} costs {100 * worst[0]:.0f} %: leave it out"
    if plan.idle:
        return f"{', '.join(plan.idle)} would get no samples: leave it out"
    return None


def _pays(plan: Plan, found: Sequence[Plan], alone: Plan) -> str | None:
    """From how many local steps on this is faster than one worker alone."""
    enough = min(
        (
            p.steps
            for p in found
            if _place(p) == _place(plan)
            and p.choice.local_steps != AUTO
            and not p.choice.overlap
            and p.steps > plan.steps
            and p.samples_per_s > FASTER * alone.samples_per_s
        ),
        default=None,
    )
    if enough is None:
        return None
    where = "over this link " if len({*plan.machines, plan.server}) > 1 else ""
    return f"{where}only local_steps >= {enough} pays"


def _called(alone: Plan) -> str:
    return "one worker alone" if alone.machines[0] == HERE else f"{alone.machines[0]} alone"


def _why(plan: Plan) -> str:
    """What a round waits for."""
    if plan.exchange_s > plan.compute_s:
        return (
            f"a round waits {_ms(plan.exchange_s)} for the exchange and computes "
            f"{_ms(plan.compute_s)}"
        )
    if plan.compute_s > UNLIKE * plan.fastest_s:
        return f"all wait for {plan.slowest}, which computes {_ms(plan.compute_s)}"
    return f"the exchange takes {100 * plan.exchange_s / plan.round_s:.0f} % of the time"


def _of_the_best(plan: Plan, alone: Plan | None) -> str:
    told = "the best"
    if alone is not None:
        times = plan.samples_per_s / alone.samples_per_s
        told = f"{times:.1f} times as fast as {_called(alone)}"
    return f"{told}; {_why(plan)}"


def _sacrifice(plan: Plan, best: Plan) -> str:
    more = [
        f"{name}={str(mine).lower()}"
        for name, mine, other in zip(Choice._fields, plan.choice, best.choice, strict=True)
        if mine != other
    ]
    further = [name for name in plan.machines if name not in best.machines]
    return " and ".join(more + further) or "another place of the server"


def _ms(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
