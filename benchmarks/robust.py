"""`python -m benchmarks.robust`: what a broken worker costs, with each rule for averages.

Eight workers in one process train SimpleNN on a slice of Fashion-MNIST (5,000 real digits of MNIST
where that is not installed), and push to the server's own `Data`. None, one or two of them are
broken. `python -m benchmarks.robust cost` measures processor time and memory instead.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runs import SIZES
from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import WINDOW
from paramserver.rounds.aggregate import described
from paramserver.rounds.disagreement import Disagreement
from paramserver.rounds.effects import Finish
from paramserver.server.data import Data
from paramserver.settings import AGGREGATES, Settings
from paramserver.tensors.codec import CODECS
from workers.builtin import data, models

FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
WORKERS, BATCH, STEPS = 8, 32, 200
TRAIN, TEST = 12_000, 2_000
BROKEN = (1, 2)  # workers of these numbers, as many as are broken
MODEL = {"type": "SimpleNN", "input_dim": 784, "hidden": 128, "out": 10, "activation": "relu"}
LARGE = "46.8 MB"

Fault = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""What a broken worker sends: of its gradient, of its first one, and of chance."""


def _noise(gradient: Tensor, first: Tensor, chance: torch.Generator) -> Tensor:
    """Ten times as long as its gradient."""
    noise = torch.randn(gradient.shape, generator=chance)
    return noise * (10 * gradient.norm() / noise.norm())


FAULTS: dict[str, Fault] = {
    "sign-flipped": lambda gradient, first, chance: -gradient,
    "ten times too large": lambda gradient, first, chance: 10 * gradient,
    "ten times, flipped": lambda gradient, first, chance: -10 * gradient,
    "random": _noise,
    "zero": lambda gradient, first, chance: torch.zeros_like(gradient),
    "always the same": lambda gradient, first, chance: first,
}


class Images:
    """Images and labels to train on, and others to test with."""

    def __init__(self) -> None:
        fashion = {"name": "FashionMNIST", "root": str(FASHION)}
        self.name = "Fashion-MNIST" if FASHION.is_dir() else "digits"
        loaded = data.load(fashion if FASHION.is_dir() else {"name": "digits"}, 42)
        self.train = self._some(loaded.train, TRAIN)
        self.test = self._some(loaded.val, TEST)

    def _some(self, samples: Any, most: int) -> tuple[Tensor, Tensor]:
        images, labels = samples.batch(torch.arange(min(most, len(samples))))
        return images, labels


def cell(images: Images, rule: str, fault: str, broken: int, seed: int) -> tuple[float, str]:
    """The accuracy after the last step, in percent, and who was named."""
    model = models.build(MODEL, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    parameters = list(model.parameters())
    layout = wire.Layout(
        tuple(wire.Tensor(name, tuple(p.shape), "float32") for name, p in model.named_parameters())
    )
    server = Data(Settings(aggregate=rule, history_mb=0), "nonce", None)
    server.start(layout)
    chance = torch.Generator().manual_seed(seed)
    disagreement, named = Disagreement(), set[int]()
    firsts: dict[int, Tensor] = {}
    order = torch.empty(0, dtype=torch.long)
    for _ in range(STEPS):
        if len(order) < WORKERS * BATCH:
            order = torch.randperm(len(images.train[1]), generator=chance)
        for worker in range(1, WORKERS + 1):
            mine, order = order[:BATCH], order[BATCH:]
            gradient = _gradient(model, images.train[0][mine], images.train[1][mine])
            first = firsts.setdefault(worker, gradient)
            if worker in BROKEN[:broken]:
                gradient = FAULTS[fault](gradient, first, chance)
            _push(server, worker, gradient)
        average = _average(server)
        named |= set(disagreement.note(server.comparisons()))
        assert server.plan is not None
        server.forget_round(tuple(range(len(server.plan.buckets))))
        for p, part in zip(parameters, average.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
    with torch.no_grad():
        right = (model(images.test[0]).argmax(1) == images.test[1]).float().mean()
    return 100 * float(right), ", ".join(map(str, sorted(named)))


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _push(server: Data, worker: int, gradient: Tensor) -> None:
    assert server.plan is not None
    for b in server.plan.buckets:
        buffers, scale = CODECS["float32"].encode(gradient[b.start : b.stop].clone())
        push = wire.Push(round=1, bucket=b.index, samples=BATCH, scale=scale)
        bad, _ = server.push("session", worker, push, buffers)
        assert bad is None or not torch.isfinite(gradient).all()
        if bad is None:
            server.add(worker, b.index, BATCH)


def _average(server: Data) -> Tensor:
    assert server.plan is not None
    parts = []
    for b in server.plan.buckets:
        server.finish(Finish(1, 1, b.index, WORKERS * BATCH, ()))
        [(average, frames)] = server.due()
        values = CODECS["float32"].decode(frames[1:], average.scale, torch.empty(b.size))
        parts.append(values.clone())
    return torch.cat(parts)


def accuracies(rules: Sequence[str], faults: Sequence[str], seeds: int) -> None:
    """Print a line for each fault as its cells are done."""
    images = Images()
    print(
        f"\n{images.name}: {len(images.train[1]):,} images, {STEPS} steps of {WORKERS} x {BATCH}, "
        f"{seeds} seeds\n"
    )
    print(f"| broken | what it sends | {' | '.join(rules)} | named |")
    print(f"|---|---|{'---|' * len(rules)}---|")
    for broken, fault in [(0, "")] + [(n, fault) for n in (1, 2) for fault in faults]:
        cells, who = [], []
        for rule in rules:
            got = [cell(images, rule, fault, broken, seed) for seed in range(1, seeds + 1)]
            cells.append(f"{mean(each[0] for each in got):.1f}")
            if any(each[1] for each in got):
                who.append(f"{rule}: {'; '.join(dict.fromkeys(each[1] for each in got))}")
        told = ", ".join(who) or "nobody"
        print(f"| {broken} of {WORKERS} | {fault} | {' | '.join(cells)} | {told} |", flush=True)


# ---------------------------------------------------------------------- what it costs


def cost(rule: str, count: int, codec: str, *, weighted: bool = False, rounds: int = 3) -> str:
    """Processor time of a round's checks and averages, and the memory that the process took for it
    beyond what it had, in a process of its own; pushes come as the pacer lets them."""
    torch.set_num_threads(1)
    sizes = SIZES[LARGE]
    layout = wire.Layout(
        tuple(wire.Tensor(f"layer {i}", (n,), "float32") for i, n in enumerate(sizes))
    )
    server = Data(Settings(aggregate=rule, codec=codec, history_mb=0), "nonce", None)
    server.start(layout)
    assert server.plan is not None
    buckets = server.plan.buckets
    torch.manual_seed(0)
    wide = [torch.randn(max(b.size for b in buckets)) for _ in range(count)]
    before, least = _peak(), float("inf")
    for _ in range(rounds):
        spent = 0.0
        for at in range(len(buckets) + WINDOW - 1):
            for worker in range(count if at < len(buckets) else 0):
                b = buckets[at]
                buffers, scale = CODECS[codec].encode(wide[worker][: b.size].clone())
                push = wire.Push(round=1, bucket=at, samples=1, scale=scale)
                began = time.process_time()
                server.push("session", worker, push, [bytearray(each) for each in buffers])
                server.add(worker, at, 1 + worker if weighted else 1)
                spent += time.process_time() - began
            if at >= WINDOW - 1:
                began = time.process_time()
                server.finish(Finish(1, 1, at - WINDOW + 1, count, ()))
                server.due()
                spent += time.process_time() - began
        least = min(least, spent)
        server.forget_round(tuple(range(len(buckets))))
    kept = (_peak() - before) / 1e6
    weights = "unequal" if weighted else "equal"
    return f"| {rule} | {count} | {codec} | {weights} | {1000 * least:.0f} | {kept:.0f} |"


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def costs() -> None:
    """Print a line for each rule, each measured in a process of its own."""
    print(f"\nA gradient of {LARGE}\n")
    print("| rule | workers | codec | weights | ms of a processor | MB kept, with the averages |")
    print("|---|---|---|---|---|---|")
    for count in (4, 8):
        for rule, codec, weighted in (
            *((rule, "float32", "") for rule in AGGREGATES),
            ("trimmed", "float32", "weighted"),
            ("mean", "int8", ""),
            ("trimmed", "int8", ""),
        ):
            words = ["one", rule, str(count), codec, *([weighted] if weighted else [])]
            command = [sys.executable, "-m", "benchmarks.robust", *words]
            subprocess.run(command, check=True)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        rule, count, codec, *rest = sys.argv[2:]
        print(cost(rule, int(count), codec, weighted=bool(rest)), flush=True)
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robust", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["accuracy", "cost"], default="accuracy")
    parser.add_argument("--rules", nargs="+", choices=AGGREGATES, default=list(AGGREGATES))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seeds", type=int, default=2)
    words = parser.parse_args()
    if words.what == "cost":
        costs()
        return
    torch.set_num_threads(2)
    for rule in words.rules:
        if said := described(Settings(aggregate=rule, num_workers=WORKERS)):
            print(said)
    accuracies(words.rules, words.faults, words.seeds)


if __name__ == "__main__":
    main()
