"""The sentence about the last minute: planted faults are named, and nothing else is."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.status.diagnosis import Told, diagnose
from paramserver.status.value import (
    SENTENCE_CHARS,
    THIS_MACHINE,
    Cause,
    Diagnosis,
    Link,
    Machine,
    State,
    Times,
)


def cluster(
    *workers: tuple[float, float],
    rounds: int = 100,
    late: dict[int, int] | None = None,
    encode: float = 0.0,
    samples: float = 64.0,
) -> list[Machine]:
    """Workers of (compute, cable) seconds a round; each round ends with its slowest member. Those
    that are `late` in so many of the rounds are not waited for in them, but for half a second."""
    late = late or {}
    ends = [compute + encode + cable for compute, cable in workers]
    period = max(ends)
    machines = []
    for id, (compute, cable) in enumerate(workers, 1):
        missed = late.get(id, 0)
        made = rounds - missed
        wait = period - compute - encode - cable + (0.5 if late and not missed else 0.0)
        machines.append(
            Machine(
                id=id,
                host=f"mini{id}",
                state=State.TRAINING,
                minute=Times(
                    made * compute, made * encode, made * cable, made * wait, missed * period
                ),
                minute_rounds=rounds,
                minute_late=missed,
                samples_per_s=samples / period * made / rounds,
            )
        )
    return machines


def links(machines: list[Machine], rate: float = 0.1125e9, kind: str = "Ethernet") -> list[Link]:
    return [Link(machine=m.id, kind=kind, measured_bytes_per_s=rate) for m in machines]


TRAINS = Told()


def diagnosed(
    machines: list[Machine], told: Told = TRAINS, kind: str = "Ethernet 1 Gbit/s"
) -> Diagnosis:
    return diagnose(machines, links(machines, kind=kind), told)


def test_a_late_worker_is_named_with_what_it_costs() -> None:
    found = diagnosed(cluster((0.1, 0.02), (0.1, 0.02), (0.1, 0.02), late={2: 40}))
    assert found.cause == Cause.LATE and found.machine == 2
    assert found.sentence.startswith("worker 2 (mini2) is late in 40 % of the rounds: without it ")
    assert found.sentence.endswith("times faster")


def test_a_slow_worker_is_named_with_what_it_costs() -> None:
    found = diagnosed(cluster((0.1, 0.01), (0.1, 0.01), (0.8, 0.01)))
    assert found.cause == Cause.SLOW and found.machine == 3
    assert found.sentence == (
        "worker 3 (mini3) computes 0.80 s of each round, the slowest other 0.10 s: 86 % of the "
        "time all wait for it: without it 4.9 times faster, shares=speed gives it less"
    )


def test_where_shares_follow_speed_that_is_not_proposed() -> None:
    found = diagnosed(cluster((0.1, 0.01), (0.4, 0.01)), Told(by_speed=True))
    assert found.cause == Cause.SLOW and "shares" not in found.sentence


def test_a_slow_worker_that_brings_most_of_the_samples_is_not_told_to_leave() -> None:
    machines = cluster((0.1, 0.01), (0.2, 0.01))
    machines[1] = msgspec.structs.replace(machines[1], samples_per_s=10_000.0)
    found = diagnosed(machines)
    assert found.cause == Cause.SLOW and found.machine == 2 and "without" not in found.sentence


def test_a_slow_cable_is_named_with_its_rate() -> None:
    found = diagnosed(cluster((0.1, 0.02), (0.1, 0.02), (0.1, 0.1)))
    assert found.cause == Cause.CABLE and found.machine == 3
    assert found.sentence.startswith(
        "the cable of worker 3 (mini3) carries 0.9 Gbit/s, 50 % of each round waits for it: "
        "codec=float16 (1.3 times faster) or local_steps=16 (1.9 times)"
    )
    found = diagnosed(cluster((0.1, 0.02), (0.1, 0.02), (0.1, 0.1)), Told(codec="topk"))
    assert "waits for it: local_steps=16 (1.9 times faster) or a larger" in found.sentence


def test_a_slow_network_is_nobodys_cable() -> None:
    found = diagnosed(cluster((0.1, 0.1), (0.1, 0.1)))
    assert found.cause == Cause.CABLE and found.machine is None
    assert found.sentence.startswith("each round waits 0.10 s (50 %) for the exchange over Ether")
    assert "codec=float16" in found.sentence and "local_steps=16" in found.sentence


def test_on_one_machine_no_codec_is_proposed() -> None:
    found = diagnosed(cluster((0.001, 0.002), (0.001, 0.002)), kind=THIS_MACHINE)
    assert found.cause == Cause.CABLE and "codec" not in found.sentence
    assert found.sentence.startswith("each round waits 2.0 ms (67 %) for the exchange: local_steps")


def test_a_codec_that_takes_long_is_named() -> None:
    found = diagnosed(cluster((0.1, 0.01), (0.1, 0.01), encode=0.05), Told(codec="topk"))
    assert found.cause == Cause.ENCODE and found.sentence.startswith("encoding as topk takes 31 %")


def test_where_now_one_is_the_slowest_and_now_another_nobody_is_named() -> None:
    machines = [
        msgspec.structs.replace(m, minute=m.minute + Times(wait=100 * wait))
        for m, wait in zip(cluster((0.1, 0.01), (0.101, 0.01)), (0.03, 0.025), strict=True)
    ]
    found = diagnosed(machines)
    assert (found.cause, found.machine) == (Cause.SLOW, None)
    assert found.sentence == (
        "20 % of the time all wait for the slowest of a round, which is now one of them and now "
        "another: local_steps=16 lets them meet less often"
    )


def test_a_run_that_only_computes_says_so() -> None:
    found = diagnosed(cluster((1.0, 0.04), (1.0, 0.04)))
    assert found.cause == Cause.NOTHING
    assert found.sentence.startswith("all machines compute 96 % of the time")


def test_a_run_that_waits_repeats_its_phase() -> None:
    found = diagnosed(cluster((1.0, 1.0)), Told(trains=False, phase="waiting for 2 workers"))
    assert found == Diagnosis(cause=Cause.NOT_TRAINING, sentence="waiting for 2 workers")


@pytest.mark.parametrize(
    "machines",
    [
        [],
        cluster((0.1, 0.1), rounds=2),
        [Machine(id=1, minute_rounds=100)],
        [msgspec.structs.replace(m, state=State.GONE) for m in cluster((0.1, 0.1))],
    ],
)
def test_too_little_is_no_reason_for_a_guess(machines: list[Machine]) -> None:
    assert diagnosed(machines).cause == Cause.UNKNOWN


busy = st.floats(1e-3, 1.0)
times = st.tuples(busy, busy)
Usual = list[tuple[float, float]]
any_seconds = st.floats(0.0, 1e6)
machines_at_all = st.lists(
    st.builds(
        Machine,
        id=st.integers(1, 1024),
        host=st.text("ab<\x1b\u202e", max_size=300),
        state=st.sampled_from(State),
        minute=st.builds(Times, any_seconds, any_seconds, any_seconds, any_seconds, any_seconds),
        minute_rounds=st.integers(0, 100_000),
        minute_late=st.integers(0, 100_000),
        samples_per_s=st.none() | st.floats(0.0, 1e9),
    ),
    max_size=8,
    unique_by=lambda m: m.id,
)


@given(machines_at_all, st.sampled_from(["float32", "float16", "topk"]), st.integers(1, 10**6))
def test_whatever_was_measured_makes_a_sentence(
    machines: list[Machine], codec: str, local_steps: int
) -> None:
    told = Told(codec=codec, local_steps=local_steps, phase="training")
    found = diagnose(machines, links(machines), told)
    assert 0 < len(found.sentence) <= SENTENCE_CHARS and found.sentence.isprintable()
    assert "nan" not in found.sentence and "inf" not in found.sentence
    assert found.machine is None or found.machine in {m.id for m in machines}
    assert diagnose(machines[::-1], links(machines), told) == found, "their order means nothing"


@given(st.lists(times, min_size=1, max_size=5), st.integers(0, 4), busy)
def test_a_planted_slow_worker_is_found(usual: Usual, at: int, more: float) -> None:
    slow = (sum(map(sum, usual)) * 2 + more, min(cable for _, cable in usual))
    workers = [*usual[:at], slow, *usual[at:]]
    found = diagnosed(cluster(*workers))
    assert (found.cause, found.machine) == (Cause.SLOW, workers.index(slow) + 1)


@given(st.lists(times, min_size=1, max_size=5), st.integers(0, 4), busy)
def test_a_planted_slow_cable_is_found(usual: Usual, at: int, more: float) -> None:
    slow = (min(compute for compute, _ in usual), sum(map(sum, usual)) * 2 + more)
    workers = [*usual[:at], slow, *usual[at:]]
    found = diagnosed(cluster(*workers))
    assert (found.cause, found.machine) == (Cause.CABLE, workers.index(slow) + 1)


@given(st.lists(times, min_size=2, max_size=5), st.integers(0, 4), st.integers(6, 100))
def test_a_planted_late_worker_is_found(usual: Usual, at: int, missed: int) -> None:
    late = at % len(usual) + 1
    found = diagnosed(cluster(*usual, late={late: missed}))
    assert (found.cause, found.machine) == (Cause.LATE, late)


@given(st.lists(times, min_size=1, max_size=5), st.floats(0.01, 100.0))
def test_slower_in_all_is_the_same_cause(usual: Usual, factor: float) -> None:
    def cause(by: float) -> tuple[Cause, int | None]:
        scaled = cluster(*((by * compute, by * cable) for compute, cable in usual))
        found = diagnosed(scaled)
        return found.cause, found.machine

    assert cause(1.0) == cause(2.0 ** round(factor).bit_length()), "powers of two change no bits"
