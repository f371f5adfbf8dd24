"""What the last minute waited for, and what would change it, in one sentence.

Every round ends when its slowest member is done. That member waits for nobody, and the others wait
for it; so the member that waits least is the one that a round waits for, and the wait of the one
after it is what the round would gain without it. If nobody waits for anybody, the exchange or the
encoding is what is left.

Pure: the times come in as they are measured, see `value.Times`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paramserver.status.value import THIS_MACHINE, Cause, Diagnosis, Link, Machine, State
from paramserver.units import bit_rate

ROUNDS_MIN = 3
LATE_SHARE = 0.05  # of the rounds: who misses more is named
WAIT_SHARE = 0.10  # of a round: a wait that is shorter is not worth a sentence
CABLE_SHARE = 0.10
ENCODE_SHARE = 0.15
CONSTANT = 0.5  # of a wait: what a machine's usual times must explain for it to be named
SAME = 1.05  # a run that would be less than this many times faster would be as fast
LOCAL_STEPS = 16  # that are proposed where each step is exchanged
SMALLER = {"float32": ("float16", 0.5), "float16": ("int8", 0.5), "bfloat16": ("int8", 0.5)}
"""By codec: one that sends less, and the part of the bytes that it sends. None for those whose
accuracy is to be weighed."""


@dataclass(frozen=True)
class Told:
    """What is known of the run beside its machines."""

    trains: bool = True
    phase: str = ""
    codec: str = "float32"
    local_steps: int = 1
    by_speed: bool = False
    """Samples follow speed (`shares: speed`)."""


def diagnose(machines: Sequence[Machine], links: Sequence[Link], told: Told) -> Diagnosis:
    """What the rounds of the last minute waited for most."""
    if not told.trains:
        return Diagnosis(cause=Cause.NOT_TRAINING, sentence=told.phase)
    here = sorted((m for m in machines if m.id > 0 and m.state != State.GONE), key=lambda m: m.id)
    workers = [m for m in here if m.minute_rounds >= ROUNDS_MIN]
    if not workers:
        return Diagnosis(cause=Cause.UNKNOWN, sentence="too few rounds so far to tell")
    late = max(workers, key=_late_share)
    if _late_share(late) > LATE_SHARE:
        return _late(late, workers)
    on_time = [m for m in workers if m.minute_rounds > m.minute_late and m.minute.total > 0]
    if not on_time:
        return Diagnosis(cause=Cause.UNKNOWN, sentence="too few rounds so far to tell")
    return _held_up(on_time, links, told) or _alone(on_time, links, told)


def _late(late: Machine, workers: Sequence[Machine]) -> Diagnosis:
    others = [m for m in workers if m is not late]
    head = f"{late.name} is late in {100 * _late_share(late):.0f} % of the rounds"
    faster = _without(late, others)
    if faster > SAME:
        sentence = f"{head}: without it {faster:.1f} times faster"
    elif others:
        sentence = f"{head}, and nobody waits long for it: the run would be no faster without it"
    else:
        sentence = head
    return Diagnosis(cause=Cause.LATE, sentence=sentence, machine=late.id)


def _held_up(workers: Sequence[Machine], links: Sequence[Link], told: Told) -> Diagnosis | None:
    """Do all wait for one of them?"""
    if len(workers) < 2:
        return None
    slowest = min(workers, key=_wait)
    others = [m for m in workers if m is not slowest]
    gain = min(map(_wait, others))
    period = max(_per_round(m, m.minute.total) for m in workers)
    if gain <= WAIT_SHARE * period:
        return None
    computes = _per_round(slowest, slowest.minute.compute + slowest.minute.encode)
    sends = _per_round(slowest, slowest.minute.cable)
    usual = max(_per_round(m, m.minute.compute + m.minute.encode) for m in others)
    usual_sends = max(_per_round(m, m.minute.cable) for m in others)
    if max(computes - usual, sends - usual_sends) < CONSTANT * gain:
        return None  # now one of them is the slowest, now another
    faster = _without(slowest, others)
    alone = f"without it {faster:.1f} times faster" if faster > SAME else ""
    if computes - usual >= sends - usual_sends:
        remedy = "" if told.by_speed or told.local_steps > 1 else "shares=speed gives it less"
        sentence = _sentence(
            f"{slowest.name} computes {_seconds(computes)} of each round, the slowest other "
            f"{_seconds(usual)}: {_percent(gain, period)} of the time all wait for it",
            alone,
            remedy,
        )
        return Diagnosis(cause=Cause.SLOW, sentence=sentence, machine=slowest.id)
    sentence = _sentence(
        f"{_cable_of(slowest, links)}, {_percent(sends, period)} of each round waits for it",
        _cures(computes, sends, told),
        alone,
    )
    return Diagnosis(cause=Cause.CABLE, sentence=sentence, machine=slowest.id)


def _alone(workers: Sequence[Machine], links: Sequence[Link], told: Told) -> Diagnosis:
    """Nobody waits for another: what do all wait for?"""
    total = sum(_per_round(m, m.minute.total - m.minute.late) for m in workers) or 1.0
    compute = sum(_per_round(m, m.minute.compute) for m in workers)
    encode = sum(_per_round(m, m.minute.encode) for m in workers)
    cable = sum(_per_round(m, m.minute.cable) for m in workers)
    wait = sum(map(_wait, workers))
    if wait > WAIT_SHARE * total and wait >= max(cable, encode):
        sentence = (
            f"{_percent(wait, total)} of the time all wait for the slowest of a round, which is "
            "now one of them and now another"
        )
        cure = f"local_steps={_more_steps(told)} lets them meet less often"
        return Diagnosis(cause=Cause.SLOW, sentence=_sentence(sentence, cure))
    if cable > CABLE_SHARE * total and cable >= encode:
        n = len(workers)
        kinds = {link.kind for link in links if link.machine in {m.id for m in workers}}
        kind = kinds.pop() if len(kinds) == 1 else ""
        local = kind == THIS_MACHINE
        what = "the exchange" if local or not kind else f"the exchange over {kind}"
        cures = _cures((compute + encode) / n, cable / n, told, local=local)
        sentence = _sentence(
            f"each round waits {_seconds(cable / n)} ({_percent(cable, total)}) for {what}", cures
        )
        return Diagnosis(cause=Cause.CABLE, sentence=sentence)
    if encode > ENCODE_SHARE * total:
        sentence = f"encoding as {told.codec} takes {_percent(encode, total)} of the time"
        cure = "" if told.codec == "float32" else "codec=float32 needs none, and sends more"
        return Diagnosis(cause=Cause.ENCODE, sentence=_sentence(sentence, cure))
    who = "the worker computes" if len(workers) == 1 else "all machines compute"
    sentence = f"{who} {_percent(compute, total)} of the time: more machines would make it faster"
    return Diagnosis(cause=Cause.NOTHING, sentence=sentence)


def _cures(busy_s: float, cable_s: float, told: Told, *, local: bool = False) -> str:
    """What would make the exchange a smaller part of each round, with what it would bring."""
    cures = []
    if told.codec in SMALLER and not local:
        codec, part = SMALLER[told.codec]
        faster = (busy_s + cable_s) / (busy_s + part * cable_s)
        if faster > SAME:
            cures.append(f"codec={codec} ({faster:.1f} times faster)")
    steps = _more_steps(told)
    once = told.local_steps / steps
    faster = (busy_s + cable_s) / (busy_s + once * cable_s)
    if faster > SAME:
        cures.append(f"local_steps={steps} ({faster:.1f} times{'' if cures else ' faster'})")
    cures.append("a larger batch_size")
    return " or ".join(cures)


def _more_steps(told: Told) -> int:
    return LOCAL_STEPS if told.local_steps == 1 else 2 * told.local_steps


def _cable_of(machine: Machine, links: Sequence[Link]) -> str:
    link = _link(machine, links)
    if link is None or not link.measured_bytes_per_s:
        return f"the cable of {machine.name} is slow"
    return f"the cable of {machine.name} carries {bit_rate(link.measured_bytes_per_s)}"


def _link(machine: Machine, links: Sequence[Link]) -> Link | None:
    return next((link for link in links if link.machine == machine.id), None)


def _without(one: Machine, others: Sequence[Machine]) -> float:
    """How many times as fast the others would be alone: they would not wait, and its samples would
    be missing. 0 where there are no others."""
    working = [m for m in others if m.minute_rounds > m.minute_late]
    if not working:
        return 0.0
    period = max(_per_round(m, m.minute.total) for m in working)
    saved = min(map(_wait, working))
    rest = sum(m.samples_per_s or 0.0 for m in working)
    lost = one.samples_per_s or 0.0
    share = rest / (rest + lost) if rest else 1.0
    return share * period / max(period - saved, 1e-9) if period > 0 else 0.0


def _late_share(machine: Machine) -> float:
    return machine.minute_late / machine.minute_rounds


def _wait(machine: Machine) -> float:
    return _per_round(machine, machine.minute.wait)


def _per_round(machine: Machine, seconds: float) -> float:
    """Seconds of a round that the machine was in time for, on average."""
    return seconds / max(1, machine.minute_rounds - machine.minute_late)


def _sentence(what: str, *cures: str) -> str:
    told = ", ".join(cure for cure in cures if cure)
    return f"{what}: {told}" if told else what


def _percent(part: float, whole: float) -> str:
    return f"{100 * min(1.0, part / whole) if whole else 0.0:.0f} %"


def _seconds(seconds: float) -> str:
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
