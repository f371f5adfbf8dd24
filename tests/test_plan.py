"""The plan before a run: what is predicted, what is shown of it, and how machines are measured."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from whole import Program

from benchmarks.network import free_port
from paramserver.fleet import plan_watch, planning
from paramserver.fleet.findings import Measured, Report
from paramserver.fleet.plan import (
    Choice,
    CodecCost,
    Job,
    Link,
    Links,
    Machine,
    Model,
    Plan,
    _shared,
    carried,
    cost_of,
    plans,
    predict,
    table,
)
from paramserver.fleet.plan_watch import Expected, PlanWatch
from paramserver.fleet.planning import links_of, machine
from paramserver.net.hosts import read
from paramserver.net.interfaces import Interface
from paramserver.net.interfaces import Path as Way
from paramserver.rounds.local_steps import LocalSteps
from paramserver.rounds.shares import Cost
from paramserver.settings import Settings

CLONE = Path(__file__).resolve().parent.parent
GIGABIT = 117e6
RESNET = Model((*[2.0 * 2**20] * 22, 620_000.0))  # 46.8 MB
TINY = Model((1000.0,))
NAMES = ("one", "two", "three", "four", "five")


def wired(names: tuple[str, ...], rate: float = GIGABIT, trip_s: float = 1e-4) -> Links:
    """Links of one switch."""
    return {
        (a, b): Link(rate, rate, trip_s, f"cable of {b}") for a in names for b in names if a != b
    }


def alike(count: int, step_s: float = 0.1, backward: float = 1.0) -> list[Machine]:
    return [Machine(name, Cost(step_s, 1e-9), backward) for name in NAMES[:count]]


def run_of(
    machines: list[Machine], server: Machine, job: Job, choice: Choice, rate: float = GIGABIT
) -> Plan:
    names = tuple({m.name: m for m in (*machines, server)})
    found = predict(machines, server, wired(names, rate), job, choice)
    assert found is not None
    return found


def exchange_s(workers: int, beside: bool, codec: str, shards: int | None) -> float:
    """Of a round without any computing, with the server beside a worker or on a machine of its
    own."""
    machines = [Machine(n, Cost(0.0, 1e-9)) for n in NAMES[:workers]]
    server = machines[0] if beside else Machine("own", Cost(0.0, 1.0), works=False)
    return run_of(machines, server, Job(RESNET, 1, shards=shards), Choice(codec)).round_s


# ------------------------------------------------------------------------------ known numbers


def test_shares_by_speed_gain_what_the_speeds_say() -> None:
    """A GPU box at ten times, a laptop at three, two boards at a tenth of a machine's speed: equal
    shares run at four tenths, by speed at 13.2."""
    machines = [
        Machine(n, Cost(0.0, 10 / v)) for n, v in zip(NAMES, (10, 3, 0.1, 0.1), strict=False)
    ]
    job = Job(TINY, 3300)
    equal = run_of(machines, machines[0], job, Choice())
    by_speed = run_of(machines, machines[0], job, Choice(shares="speed"))
    assert equal.samples_per_s == pytest.approx(0.4 / 10, rel=0.01)
    assert by_speed.samples_per_s == pytest.approx(13.2 / 10, rel=0.01)


@pytest.mark.parametrize(
    ("workers", "beside", "codec", "measured_s"),
    [
        (2, True, "float32", 0.420),
        (4, True, "float32", 1.274),
        (2, False, "float32", 0.847),
        (4, False, "float32", 1.718),
        (4, True, "float16", 0.643),
        (4, False, "float16", 0.861),
        (4, True, "int8", 0.332),
    ],
)
def test_an_exchange_takes_what_was_measured(
    workers: int, beside: bool, codec: str, measured_s: float
) -> None:
    """Beside a worker the server moves N - 1 gradients each way, on a machine of its own N: the
    figures of docs/performance.md, without any computing."""
    assert exchange_s(workers, beside, codec, 1) == pytest.approx(measured_s, rel=0.08)


@pytest.mark.parametrize(
    ("workers", "beside", "codec", "measured_s"),
    [
        (3, True, "float32", 0.546),
        (4, True, "float32", 0.637),
        (3, True, "float16", 0.289),
        (4, True, "float16", 0.334),
        (4, False, "float16", 0.327),
    ],
)
def test_an_exchange_with_a_shard_on_each_machine_takes_what_was_measured(
    workers: int, beside: bool, codec: str, measured_s: float
) -> None:
    """Each machine averages a share: the figures of docs/performance.md, where all processes shared
    two cores, so that float16 took a little longer than its bytes."""
    assert exchange_s(workers, beside, codec, None) == pytest.approx(measured_s, rel=0.17)


def test_shards_are_planned_where_the_server_would_choose_them() -> None:
    machines = alike(4)
    alone = run_of(machines, machines[0], Job(RESNET, 8, shards=1), Choice(local_steps=8))
    two = run_of(machines, machines[0], Job(RESNET, 8, shards=2), Choice(local_steps=8))
    all_of_them = run_of(machines, machines[0], Job(RESNET, 8), Choice(local_steps=8))
    assert all_of_them.exchange_s < two.exchange_s < alone.exchange_s
    for few, model in ((2, RESNET), (4, TINY)):
        chosen = [
            run_of(alike(few), alike(few)[0], Job(model, 8, shards=shards), Choice())
            for shards in (None, 1)
        ]
        assert chosen[0] == chosen[1]


def test_with_the_same_bits_run_after_run_the_server_alone_averages_what_leaves_something_out() -> (
    None
):
    found = {"found": [{"buckets": RESNET.buckets, "other": 0, "samples": 60_000}]}

    def job(**settings: Any) -> Job:
        return planning._job(Settings(**settings), {}, found, linked=True)

    assert job().alone == ()
    planned = job(deterministic=True)
    assert planned.codecs == ("float32", "float16", "int8") and planned.alone == ("int8",)
    machines = alike(4)
    for codec in planned.codecs:
        expected = planned._replace(alone=(), shards=1 if codec in planned.alone else None)
        runs = [run_of(machines, machines[0], j, Choice(codec)) for j in (planned, expected)]
        assert runs[0].exchange_s == pytest.approx(runs[1].exchange_s)
    several = job(deterministic=True, shards=3)  # the server refuses these with it
    assert several.codecs == ("float32", "float16")


def shared_load(machines: list[Machine], server: Machine, job: Job) -> float | None:
    """Gradients that go through the slowest cable, where several machines average."""
    links = wired(tuple({m.name: m for m in (*machines, server)}))
    there = {m.name: links[m.name, server.name] for m in machines if m is not server}
    shared = _shared(machines, server, there, job)
    return None if shared is None else shared[0] * GIGABIT


def test_what_others_average_crosses_a_cable_once_for_all_replicas_of_a_machine() -> None:
    machines = [replace(m, processes=4) for m in alike(3)]
    assert shared_load(machines, machines[0], Job(RESNET, 8)) == pytest.approx(10 / 3, rel=0.005)
    observed = Job(RESNET, 8, observer=True)  # beside workers it costs nothing
    assert shared_load(machines, machines[0], observed) == pytest.approx(10 / 3, rel=0.005)


def test_an_observer_on_a_machine_of_its_own_is_planned() -> None:
    own = Machine("own", Cost(0.0, 1.0), works=False)
    loads = [shared_load(alike(4), own, Job(RESNET, 8, observer=seen)) for seen in (False, True)]
    assert loads == [pytest.approx(4 / 3, rel=0.005), pytest.approx(1.6, rel=0.005)]
    found = {"buckets": [4.0], "other": 0, "samples": 100}
    for settings in (Settings(), Settings(observer=False), Settings(deterministic=True)):
        job = planning._job(settings, {}, {"one": [found]}, linked=True)
        assert (job.observer, job.equal_shares) == (settings.observer, settings.deterministic)


def test_shares_are_planned_equal_where_they_will_be() -> None:
    machines, links = alike(3), {**wired(NAMES[:3]), ("two", "one"): Link(GIGABIT / 5, GIGABIT / 5)}
    rounds = [
        predict(machines, machines[0], links, Job(RESNET, 8, equal_shares=equal), Choice())
        for equal in (False, True)
    ]
    assert rounds[0] is not None and rounds[1] is not None
    assert rounds[0].exchange_s < rounds[1].exchange_s


def test_where_the_server_has_all_shares_it_is_planned_alone() -> None:
    machines, links = alike(3), {**wired(NAMES[:3]), ("two", "one"): Link(GIGABIT / 5, GIGABIT / 5)}
    two, one = (
        predict(machines, machines[0], links, Job(RESNET, 8, shards=shards), Choice())
        for shards in (2, 1)
    )
    assert two == one


def test_backward_hides_the_exchange_but_for_the_last_bucket() -> None:
    machines = alike(2, step_s=1.0)
    hidden = run_of(machines, machines[0], Job(RESNET, 1), Choice())
    assert 2 / 23 * 0.4 / 2 < hidden.exchange_s < 4 / 23 * 0.4
    nothing = [replace(m, backward=0.0) for m in machines]
    assert run_of(nothing, nothing[0], Job(RESNET, 1), Choice()).exchange_s > 0.4
    half = [replace(m, backward=0.2) for m in machines]
    assert 0.2 < run_of(half, half[0], Job(RESNET, 1), Choice()).exchange_s < 0.25


def test_local_steps_share_one_exchange_that_nothing_hides() -> None:
    machines = alike(4)
    job = Job(RESNET, 8, shards=1)
    one = run_of(machines, machines[0], job, Choice())
    many = run_of(machines, machines[0], job, Choice(local_steps=32))
    assert many.compute_s == pytest.approx(3.2, rel=0.01)
    assert many.exchange_s == pytest.approx(1.27, rel=0.05)
    assert many.samples_per_s == pytest.approx(32 * 4 * 8 / many.round_s)
    assert one.samples_per_s < many.samples_per_s / 5


def test_local_steps_by_speed_are_as_many_as_fit_into_the_time_of_the_fastest() -> None:
    fast, slow = Machine("one", Cost(0.0, 0.01)), Machine("two", Cost(0.0, 0.04))
    equal = run_of([fast, slow], fast, Job(TINY, 10), Choice(local_steps=8))
    by_speed = run_of([fast, slow], fast, Job(TINY, 10), Choice("float32", 8, "speed"))
    assert equal.compute_s == pytest.approx(3.2) and by_speed.compute_s == pytest.approx(0.8)
    assert by_speed.samples_per_s == pytest.approx((80 + 20) / 0.8, rel=0.01)


def test_codecs_carry_what_their_table_says() -> None:
    assert carried("float16").up == 0.5
    assert carried("int8").down == pytest.approx(0.25, rel=0.005)
    assert carried("topk", 0.01) == (0.01, 0.02)


def test_a_codec_that_a_machine_is_slow_at_costs_its_time() -> None:
    machines = alike(2, backward=0.0)
    cheap = run_of(machines, machines[0], Job(RESNET, 1), Choice("int8"))
    dear = [replace(m, codecs={"int8": machine_codec(1e-7)}) for m in machines]
    assert run_of(dear, dear[0], Job(RESNET, 1), Choice("int8")).round_s > cheap.round_s + 4.6


def machine_codec(seconds: float) -> CodecCost:
    return CodecCost(seconds, 0.0)


def test_a_medium_that_carries_one_way_at_a_time_takes_both_ways_time() -> None:
    machines = alike(2, backward=0.0)
    job, links = Job(RESNET, 1), wired(("one", "two"))
    air = {pair: replace(link, one_way_at_once=True) for pair, link in links.items()}
    cable = predict(machines, machines[0], links, job, Choice())
    wifi = predict(machines, machines[0], air, job, Choice())
    assert cable is not None and wifi is not None
    assert wifi.exchange_s == pytest.approx(2 * cable.exchange_s, rel=0.1)


def test_the_cost_is_a_line_through_two_steps_and_right_at_the_first() -> None:
    assert cost_of([(32, 0.5), (64, 0.9)]) == pytest.approx(Cost(0.1, 0.0125))
    assert cost_of([(32, 0.5), (64, 1.4)]) == pytest.approx(Cost(0.0, 0.5 / 32))
    assert cost_of([(32, 0.5), (64, 0.4)]).of(32) == pytest.approx(0.5)
    assert cost_of([(32, 0.5)]) == pytest.approx(Cost(0.0, 0.5 / 32))


# ---------------------------------------------------------------------------------- properties

SPEEDS = st.lists(st.floats(1e-4, 0.1), min_size=2, max_size=4)
RATES = st.floats(1e5, 1e10)


@given(
    SPEEDS, RATES, st.floats(1.0, 10.0), st.sampled_from(("float32", "float16", "int8")),
    st.sampled_from((1, 8, 128)), st.sampled_from(("equal", "speed")), st.floats(0.0, 1.0),
)  # fmt: skip
def test_a_faster_link_is_never_predicted_slower(
    speeds: list[float], rate: float, more: float, codec: str, steps: int, shares: str, part: float
) -> None:
    machines = [Machine(n, Cost(1e-3, s), part) for n, s in zip(NAMES, speeds, strict=False)]
    job, choice = Job(RESNET, 16), Choice(codec, steps, shares)
    slow = run_of(machines, machines[0], job, choice, rate)
    fast = run_of(machines, machines[0], job, choice, rate * more)
    assert fast.samples_per_s >= slow.samples_per_s * (1 - 1e-9)


@examples(max_examples=20)
@given(SPEEDS, RATES)
def test_one_machine_alone_is_in_every_table_and_the_best_first(
    speeds: list[float], rate: float
) -> None:
    machines = [Machine(n, Cost(1e-3, s)) for n, s in zip(NAMES, speeds, strict=False)]
    found = plans(machines, wired(NAMES[: len(speeds)], rate), Job(RESNET, 16))
    shown = table(found)
    assert shown[0].plan == found[0] and len(shown) <= 12
    assert any(row.plan.workers == 1 for row in shown)
    assert all(row.sentence for row in shown)
    assert [r.plan.worth for r in shown] == sorted((r.plan.worth for r in shown), reverse=True)


@examples(max_examples=20)
@given(RATES, st.floats(200.0, 1e6))
def test_a_machine_that_cannot_help_is_left_out(rate: float, times: float) -> None:
    machines = [Machine(n, Cost(0.02, 0.005)) for n in ("one", "two")]
    machines.append(Machine("board", Cost(0.02 * times, 0.005 * times)))
    found = plans(machines, wired(("one", "two", "board"), rate), Job(RESNET, 16))
    assert "board" not in found[0].machines


# ----------------------------------------------------------------------------------- sentences


def sentences(machines: list[Machine], rate: float, job: Job) -> dict[str, str]:
    """What is said, by machines and number of local steps."""
    links = wired(tuple(m.name for m in machines), rate)
    said: dict[str, str] = {}
    for row in table(plans(machines, links, job)):
        key = f"{'+'.join(row.plan.machines)} {row.plan.choice.local_steps}"
        said.setdefault(key, row.sentence)  # of the best place of the server
    return said


def test_a_machine_that_costs_is_named() -> None:
    machines = [*alike(2, 0.1), Machine("pi2", Cost(0.14, 1e-9))]
    job = Job(TINY, 16, local_steps=(1,), shares=("equal",))
    said = sentences(machines, 1e9, job)
    best = "2.1 times as fast as one alone; all wait for pi2, which computes 140 ms"
    assert said["one+two+pi2 1"] == best
    machines[2] = Machine("pi2", Cost(0.16, 1e-9))
    assert sentences(machines, 1e9, job)["one+two+pi2 1"] == "pi2 costs 6 %: leave it out"


def test_over_a_slow_link_the_number_of_local_steps_that_pays_is_named() -> None:
    said = sentences(alike(4), GIGABIT / 10, Job(RESNET, 16, codecs=("float32",), shards=1))
    assert said["one+two+three+four 1"] == (
        "slower than one alone (157 samples/s): over this link only local_steps >= 128 pays"
    )


def test_one_machine_alone_that_is_faster_is_first() -> None:
    job = Job(RESNET, 16, codecs=("float32",), local_steps=(1,))
    said = sentences(alike(2), GIGABIT / 10, job)
    assert next(iter(said.values())).startswith("one machine alone is faster: 15")
    assert said["one+two 1"].startswith("slower than one alone (15")
    assert "for the exchange and computes 100 ms" in said["one+two 1"]


def test_all_numbers_of_workers_of_one_machine_are_in_the_table() -> None:
    several = [Machine("this machine", Cost(0.0, 0.01 * n), processes=n) for n in (1, 2)]
    found = [p for m in several for p in plans([m], {}, Job(RESNET, 16))]
    shown = table(sorted(found, key=lambda p: -p.worth))
    assert shown[0].plan.workers == 1 and {row.plan.workers for row in shown} == {1, 2}
    assert (
        shown[0].sentence
        == f"one worker alone is faster: {shown[0].plan.samples_per_s:,.0f} samples/s"
    )


def test_overlap_hides_the_exchange_behind_the_next_steps() -> None:
    machines = alike(4)
    plain, ahead = Choice(local_steps=32), Choice(local_steps=32, overlap=True)
    for rate in (GIGABIT, GIGABIT / 10):
        job = Job(RESNET, 8)
        one_by_one = run_of(machines, machines[0], job, plain, rate)
        at_once = run_of(machines, machines[0], job, ahead, rate)
        longer_s = max(one_by_one.compute_s, one_by_one.exchange_s)
        assert at_once.round_s == pytest.approx(longer_s, rel=0.01)
    found = plans(machines, wired(NAMES[:4]), Job(RESNET, 8, overlap=(False,)))
    assert not any(p.choice.overlap for p in found)


@pytest.mark.parametrize("overlap", [False, True])
def test_auto_is_planned_with_the_steps_that_the_server_would_choose(overlap: bool) -> None:
    machines = alike(4)
    choice = Choice(local_steps="auto", overlap=overlap)
    job = Job(RESNET, 8, shards=1)
    found = run_of(machines, machines[0], job, choice)
    assert found.steps == (13 if overlap else 239)
    assert found.shown_steps == ("auto (13), overlap" if overlap else "auto (239)")
    share = found.exchange_s / found.round_s
    assert share == pytest.approx(0.0 if overlap else 0.05, abs=0.03)
    server = LocalSteps("auto", overlap=overlap)
    exchange_s = run_of(machines, machines[0], job, Choice(local_steps=32)).exchange_s
    times = (1, 0.1 + exchange_s, 0.1), (found.steps, found.round_s, found.compute_s)
    for steps, round_s, compute_s in times:  # what it chooses from such times is the same
        for _ in range(16):
            server.took(steps, seconds=round_s, compute_s=compute_s)
        assert server.of_next(100, local=True) == found.steps
    fast = run_of(alike(2, step_s=1.0), alike(2)[0], Job(TINY, 8), choice)
    assert fast.steps == 1


def test_what_was_typed_is_not_chosen_and_a_round_is_no_longer_than_an_epoch() -> None:
    machines = alike(2)
    job = Job(RESNET, 16, codecs=("float16",), shares=("equal",), samples=16 * 2 * 10)
    found = plans(machines, wired(("one", "two")), job)
    assert {(p.choice.codec, p.choice.shares) for p in found} == {("float16", "equal")}
    assert max(p.steps for p in found if p.workers == 2) == 10  # auto's
    assert {p.steps for p in found if p.workers == 2 and p.choice.local_steps != "auto"} == {1, 8}


def test_what_was_typed_stays_in_the_command_of_one_worker() -> None:
    job = Job(RESNET, 16, codecs=("float32",), shares=("equal",), local_steps=(8,))
    alone = next(p for p in plans(alike(2), wired(("one", "two")), job) if p.workers == 1)
    command = planning._command(alone, [], ["local_steps=8", "lr=0.1", "num_workers=2"])
    assert "make server num_workers=1 lr=0.1 codec=float32 local_steps=8\n" in command


def test_the_command_names_the_machines_as_they_were_typed() -> None:
    hosts = read([{"name": "one", "role": "both"}, {"name": "two", "ssh": "me@two"}, "three"])
    job = Job(RESNET, 16, codecs=("float32",), shares=("equal",), local_steps=(8,))
    best = next(p for p in plans(alike(2), wired(("one", "two")), job) if p.workers == 2)
    best = best._replace(server="two") if hasattr(best, "_replace") else replace(best, server="two")
    command = planning._command(best, hosts, ["hosts=one,me@two,three:2", "seed=1"])
    assert "make up HOSTS=me@two,one seed=1 " in command


def test_one_machine_elsewhere_is_not_planned_as_if_it_were_this_one(tmp_path: Path) -> None:
    said = plan_on_this_machine(tmp_path, "hosts=mini1", code=2)
    assert "mini1 is the only machine" in said


# ------------------------------------------------------------------------------------ measuring


def test_links_go_both_ways_and_the_servers_address_is_their_cable() -> None:
    far, near = (Interface("eth0", "ethernet", f"10.0.0.{n}", 24, 1500) for n in (1, 2))
    hosts = read([{"name": "one", "role": "both"}, "two"])
    found = Measured("two", "one", Way(far, near), 1e-3, 30.0, 70.0)
    links = links_of(Report(hosts, measured=(found,)))
    assert links["two", "one"] == Link(30.0, 70.0, 1e-3, "10.0.0.1")
    assert links["one", "two"] == Link(70.0, 30.0, 1e-3, "10.0.0.2")


def plan_on_this_machine(folder: Path, *words: str, code: int = 0) -> str:
    empty = folder / "cluster.yaml"
    empty.write_text("{}")
    command = [sys.executable, "-m", "paramserver.launch", "plan", f"cluster={empty}", *words]
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_this_machine_is_planned_for_what_num_workers_says(tmp_path: Path) -> None:
    small = ("dataset.name=digits", "num_workers=2", "local_steps=8", f"run_dir={tmp_path}")
    told = json.loads(plan_on_this_machine(tmp_path, "--json", *small))
    assert set(told["measured"]) == {"1", "2"} and len(told["measured"]["2"]) == 2
    assert machine("here", told["measured"]["2"], 2).cost.of(32) > 0
    assert sum(told["measured"]["1"][0]["buckets"]) == 4 * 337_674  # SimpleNN's parameters
    assert {p["workers"] for p in told["plans"]} == {1, 2}
    assert {p["local_steps"] for p in told["plans"]} == {8}
    assert "make server num_workers=" in told["command"] and "local_steps=8" in told["command"]

    settings = Settings(dataset={"name": "digits"}, local_steps=8, run_dir=str(tmp_path))
    watch = plan_watch.read(settings)
    two = next(p for p in told["plans"] if p["workers"] == 2)
    assert watch is not None
    assert two["samples_per_s"] >= watch.expected.samples_per_s > 0
    assert plan_watch.read(replace(settings, batch_size=33)) is None
    assert plan_watch.read(replace(settings, num_workers=3)) is None
    assert plan_watch.read(replace(settings, model={"type": "CNN"})) is None


# ----------------------------------------------------------------------------- during the run


def told_by(watch: PlanWatch, compute_s: float, round_s: float, seconds: float = 65) -> list[str]:
    """What it says of so many seconds of rounds of two workers, 100 samples each."""
    told, now = [], 0.0
    while now < seconds:
        now += round_s
        watch.pushed("worker 1 (mini1)", compute_s / 2)
        watch.pushed("worker 2 (pi5)", compute_s)
        told.append(watch.closed(2, 100, round_s, now))
    return [sentence for sentence in told if sentence]


def watching() -> PlanWatch:
    return PlanWatch(Expected(2, "float32", 1, "equal", 100 / 0.2, 0.15, 0.05))


def test_a_run_as_fast_as_planned_is_not_mentioned() -> None:
    assert told_by(watching(), 0.16, 0.25) == []
    assert told_by(watching(), 0.5, 1.0, seconds=29) == []  # not yet


def test_a_worker_that_is_slower_than_measured_is_named_once() -> None:
    assert told_by(watching(), 0.5, 0.55) == [
        "182 samples/s, where the plan had predicted 500: worker 2 (pi5) computes 500 ms in a "
        "round, 150 ms were measured: does something else run there?"
    ]


def test_a_longer_exchange_is_named() -> None:
    assert told_by(watching(), 0.15, 0.55) == [
        "182 samples/s, where the plan had predicted 500: a round takes 400 ms beside computing, "
        "50 ms were predicted: a cable, a busy network? make doctor looks closer"
    ]


def test_the_rounds_in_which_auto_measures_are_not_compared() -> None:
    expected = Expected(2, "float32", "auto", "equal", 500, 0.15, 0.05, steps=32)
    watch = PlanWatch(expected)
    slow = [watch.closed(2, 10, 1.0, float(t)) for t in range(100)]
    assert slow == [None] * 100
    assert any(watch.closed(2, 10, 1.0, float(t), local_steps=32) for t in range(100, 200))


def test_rounds_of_fewer_workers_are_not_compared() -> None:
    watch = watching()
    assert [watch.closed(1, 50, 1.0, float(t)) for t in range(100)] == [None] * 100


@pytest.mark.long
def test_a_run_says_that_it_is_slower_than_planned(tmp_path: Path) -> None:
    settings = Settings(dataset={"name": "digits"})
    fast = Plan(("one",), "one", Choice(), 2, 1e6, 1e-5, 10.0, "one", 1e-5)
    (tmp_path / plan_watch.FILE).write_text(plan_watch.kept(settings, [fast]))
    (tmp_path / "cluster.yaml").write_text("{}")
    command = [sys.executable, "-m", "paramserver.launch", "demo", f"port={free_port()}"]
    command += [f"cluster={tmp_path / 'cluster.yaml'}", f"run_dir={tmp_path}", "num_epochs=10000"]
    demo = Program("demo", [*command, "plain=true", "wandb.mode=disabled"], tmp_path)
    try:
        said = demo.wait_for("samples/s, where the plan had predicted 1,000,000: ")
        assert re.search(r"worker [12] .*computes \d+ ms in a round, 0 ms were measured", said)
        demo.send(signal.SIGINT)
        assert demo.end() == 0
    finally:
        demo.kill()


def test_a_mistake_of_a_person_is_told_as_one(tmp_path: Path) -> None:
    said = plan_on_this_machine(tmp_path, "dataset.name=digits", "model.type=Perceptron", code=2)
    assert said.startswith("error: ") and "Perceptron" in said and "Traceback" not in said
