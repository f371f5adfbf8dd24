"""`python -m benchmarks.planned`: what `make plan` predicts, beside real runs on hosts.

Computing is simulated by waiting, since all processes share this machine's cores; steps, links and
codecs are measured as `make plan` measures them. It takes Linux and root.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks import team
from benchmarks.contenders import Layers, backward_alone
from benchmarks.network import Hosts, why_no_hosts
from benchmarks.runs import SIZES, Limits, Place, exchange, local
from benchmarks.team import Team
from paramserver.fleet import speed
from paramserver.fleet.plan import Choice, CodecCost, Job, Link, Machine, Model, predict
from paramserver.protocol.messages import Layout
from paramserver.protocol.messages import Tensor as Described
from paramserver.rounds.shares import Cost
from paramserver.settings import Settings
from paramserver.tensors.bucket import plan as cut
from workers.builtin.measure import codec_seconds

SECONDS = 400.0
LINK_S = 1.0
SMALL, LARGE = "1.35 MB", "46.8 MB"
WAITS = {SMALL: 0.02, LARGE: 0.1}  # seconds that a step computes
BURSTS = {SMALL: "64kb", LARGE: "512kb"}
"""A cable has none, and a small model's gradients would pass in it. But with a small one a virtual
link of 1 Gbit/s carries less where both directions are busy for long."""


class Case(NamedTuple):
    size: str
    rate: str
    codec: str
    workers: int
    local_steps: int


CASES = [
    Case(size, rate, codec, workers, local_steps)
    for size in WAITS
    for rate, codec in (("1gbit", "float32"), ("100mbit", "float16"))
    for workers in (2, 4)
    for local_steps in (1, 32)
]


class Compared(NamedTuple):
    """Seconds of a step."""

    predicted_s: float
    measured_s: float
    machine: Machine
    """What was measured before; the link from the server's machine to another one, too."""
    link: Link

    @property
    def off(self) -> float:
        """How far the predicted speed is from the measured one, as a share of that."""
        return self.measured_s / self.predicted_s - 1


def compare(case: Case) -> Compared:
    """Predict a run, and make it."""
    names = [f"host{k}" for k in range(1, case.workers + 1)]
    step_s = median(_at_once(names, measured_step, SIZES[case.size], WAITS[case.size]))
    seen = _at_once(names, measured_codecs)
    copy_s = median(copy_s for copy_s, _ in seen)
    codecs = {
        name: CodecCost(*(median(each[name][i] for _, each in seen) for i in (0, 1)))
        for name in seen[0][1]
    }
    with Hosts(names, case.rate, BURSTS[case.size]) as hosts:
        link = link_between(hosts, "host2", "host1")
        measured_s = _run(case, Place(hosts))
    machines = [Machine(name, Cost(step_s, 1e-9), 1.0, 1, copy_s, codecs) for name in names]
    links = {(name, "host1"): link for name in names[1:]}
    job, choice = Job(model(case.size, case.codec), 1), Choice(case.codec, case.local_steps)
    found = predict(machines, machines[0], links, job, choice)
    assert found is not None
    return Compared(found.round_s / case.local_steps, measured_s, machines[0], link)


def _run(case: Case, place: Place) -> float:
    """Seconds of a step of a real run, with the server on worker 1's host."""
    large, wait_s = case.size == LARGE, WAITS[case.size]
    if case.local_steps > 1:
        limits = Limits(SECONDS, 2 if large else 10)
        return local(
            limits, case.size, case.workers, case.codec, place, case.local_steps, wait_s
        )  # fmt: skip
    limits = Limits(SECONDS, 5 if large else 100)
    return exchange(limits, case.size, case.workers, case.codec, place, backward_s=wait_s).seconds


def model(size: str, codec: str) -> Model:
    """The buckets of the benchmarks' layers, the last layer first."""
    layers = [Described(str(i), (n,), "float32") for i, n in enumerate(SIZES[size])]
    settled = Settings(codec=codec).with_bucket(linked=True)
    layout = Layout(tuple(reversed(layers)))
    buckets = cut(layout, settled.bucket_size_mb, settled.min_bucket_mb).buckets
    return Model(tuple(float(b.nbytes) for b in buckets))


def _at_once(names: Sequence[str], measure: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What processes of these names measure at the same time."""
    with Team(SECONDS) as found:
        for name in names:
            found.start(name, measure, *arguments)
        return [found.wait(name) for name in names]


def measured_step(shapes: Sequence[int], wait_s: float) -> float:
    """Seconds."""
    torch.set_num_threads(1)
    return backward_alone(Layers(shapes, wait_s), rounds=20)


def measured_codecs() -> tuple[float, dict[str, tuple[float, float]]]:
    """Seconds to copy a byte, and of the codecs."""
    torch.set_num_threads(1)
    return codec_seconds(0.01)


def link_between(hosts: Hosts, near: str, far: str) -> Link:
    """The link as the doctor measures it."""
    with Team(SECONDS) as two:
        port = two.folder / "port"
        two.start("far", listen, hosts.address(far), str(port), host=hosts[far])
        two.until(port.exists, "for the listener")
        two.start("near", measure, hosts.address(far), str(port), host=hosts[near])
        found: dict[str, float] = two.wait("near")
    return Link(
        found["up_bytes_per_s"], found["down_bytes_per_s"], found["round_trip_s"], far
    )  # fmt: skip


def listen(address: str, port: str) -> None:
    """Answer until killed; the port goes into a file."""
    listener = speed.Listener(address)
    draft = Path(f"{port}.draft")
    draft.write_text(str(listener.port))
    draft.rename(port)
    time.sleep(SECONDS)


def measure(address: str, port: str) -> dict[str, Any]:
    return asdict(speed.measure(address, int(Path(port).read_text()), None, LINK_S))


def main(words: Sequence[str]) -> None:
    if (why := why_no_hosts()) is not None:
        raise SystemExit(why)
    team.prepare()
    for number, case in enumerate(CASES):
        if not words or str(number) in words:
            found = compare(case)
            up, down = 8e-6 * found.link.up_bytes_per_s, 8e-6 * found.link.down_bytes_per_s
            codec = found.machine.codec(case.codec)
            print(
                f"{number:2}  {case.size:>8} {case.rate:>8} {case.codec:>8} N = {case.workers} "
                f"local_steps = {case.local_steps:2}  predicted {1000 * found.predicted_s:8.1f} ms,"
                f" measured {1000 * found.measured_s:8.1f} ms a step: {100 * found.off:+.0f} %"
                f"  (computing {1000 * found.machine.cost.of(1):.1f} ms, link {up:.0f} and "
                f"{down:.0f} Mbit/s, a byte's copy {1e9 * found.machine.copy_s:.2f} ns, encoding "
                f"{1e9 * codec.encode_s:.2f}, decoding {1e9 * codec.decode_s:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
