"""`python -m benchmarks.late`: what a worker that stutters costs, and what it costs with its late
work carried over (`max_staleness`).

Four workers, of which one is four times slower in every fifth of its batches. Computing is a wait
for each sample; the processes, the exchange and the server are real. `python -m benchmarks.late
accuracy` trains SimpleNN on Fashion-MNIST (5,000 real digits of MNIST where that is not installed):
the server's own `Rounds` and `Data`, with workers in virtual time, so that only the rules decide
who is late.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.robust import FASHION, MODEL
from benchmarks.runs import Limits, shared
from paramserver.protocol import messages as wire
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.effects import (
    Add,
    Closed,
    Discard,
    Effect,
    Ended,
    Finish,
    Publish,
    Start,
    Void,
)
from paramserver.rounds.events import Event, Greeted, Heard, Pushed, PushRefused, Tick, Told
from paramserver.rounds.rules import Rules
from paramserver.server.data import Data
from paramserver.settings import Settings
from paramserver.tensors.codec import CODECS
from paramserver.tensors.order import order
from workers.builtin import data, models
from workers.link.follow import Follow

WORKERS, BATCH = 4, 32
SLOWER, EVERY = 4.0, 5
SAMPLE_S, VIRTUAL_SAMPLE_S = 0.002, 0.01
STALENESS = (0, 1, 2, 3)
NONCE = "bench"


# ---------------------------------------------------------------------- how fast


WITHOUT = "max_staleness=0"
MODES: dict[str, tuple[str, ...]] = {
    **{f"max_staleness={s}": (f"max_staleness={s}",) for s in STALENESS},
    "shares=speed": ("shares=speed",),
    "local_steps=5": ("local_steps=5",),
    "shares=speed max_staleness=3": ("shares=speed", "max_staleness=3"),
}
KINDS = {
    "one of four stutters": ((1.0,) * WORKERS, EVERY),
    "one of four is always four times slower": ((1.0, 1.0, 1.0, 1 / SLOWER), 0),
    "nobody is slow": ((1.0,) * WORKERS, 0),
}


def speeds(
    kinds: Sequence[str], modes: Sequence[str], rounds: int, times: int, sample_s: float
) -> None:
    """Print samples a second for each mode, and over those without: the median of several runs,
    each beside one without."""
    ideal = {kind: sum(each) / sample_s for kind, (each, _) in KINDS.items()}
    print(
        f"| {BATCH} samples of {1000 * sample_s:g} ms | mode | samples/s | over max_staleness=0 |"
    )
    print("|---|---|---|---|")
    for kind in kinds:
        machines, every = KINDS[kind]
        seen: dict[str, list[float]] = {mode: [] for mode in (WITHOUT, *modes)}
        for _ in range(times):
            for mode in seen:
                run = shared(
                    Limits(300.0, rounds),
                    machines,
                    sample_s,
                    *MODES[mode],
                    batch_size=BATCH,
                    stutters_every=every,
                )
                seen[mode].append(run.samples_per_s)
        usual = seen[WITHOUT]
        for mode, rates in seen.items():
            ratio = median(a / b for a, b in zip(rates, usual, strict=True))
            told = f"{median(rates):.0f} of {ideal[kind]:.0f}"
            print(f"| {kind} | {mode} | {told} | {ratio:.2f} |", flush=True)


# ---------------------------------------------------------------------- how well


class Standing:
    """Where a worker stands in the log, for its `Follow`."""

    def __init__(self) -> None:
        self.step, self.lineage = 0, ""


class Machine:
    """A worker: what it computes, and what it has not read."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.stands = Standing()
        self.follow = Follow(NONCE, self.stands, 0.0)
        self.unread: list[wire.Close] = []
        self.round = 0
        self.busy = False
        self.batches = 0

    def read(self) -> None:
        """Take in what was published while it computed."""
        for close in self.unread:
            self.stands.step, self.stands.lineage = close.step, close.lineage
            self.follow.applied(close)
        self.unread.clear()


class Training:
    """A run in virtual time: the model of each step, and the workers that compute on it."""

    def __init__(self, settings: Settings, seed: int, epochs: int) -> None:
        images = {"name": "FashionMNIST", "root": str(FASHION)}
        self.data = data.load(images if FASHION.is_dir() else {"name": "digits"}, seed)
        self.model = models.build(MODEL, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.001)
        self.params = list(self.model.parameters())
        self.weights: dict[int, list[Tensor]] = {0: self._copy()}  # by step
        self.server = Data(settings, NONCE, None)
        self.most = settings.max_staleness
        self.now, self.step, self.seed, self.over = 0.0, 0, seed, False
        self.right: list[float] = []
        self.late = 0
        self.samples = len(self.data.train)
        self.rounds = Rounds(
            Rules(
                num_workers=WORKERS,
                epochs=epochs,
                observer=False,
                max_staleness=settings.max_staleness,
            ),
            NONCE,
            0.0,
            lambda layout: len(self.server.plan.buckets) if self.server.plan else 1,
        )
        self.machines = {n: Machine(n) for n in range(1, WORKERS + 1)}
        self.queue: list[tuple[float, int, Machine, list[tuple[wire.Push, list[Any]]]]] = []
        self.order = itertools.count()
        self.averages: dict[int, Tensor] = {}

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def run(self) -> tuple[float, float]:
        """Accuracy in percent, the mean over the last fifth; samples in the time of one sample."""
        layout = wire.Layout(
            tuple(
                wire.Tensor(name, tuple(p.shape), "float32")
                for name, p in self.model.named_parameters()
            )
        )
        self.server.start(layout)
        for n in self.machines:
            self._happens(Greeted(str(n), "worker", n, f"process {n}", "host", n))
        for n in self.machines:
            join = wire.Join(layout=layout, step=0, lineage="first", device="cpu")
            self._happens(Told(str(n), join))
        for n in self.machines:
            self._happens(Told(str(n), wire.Ready(samples=self.samples, batch_size=BATCH)))
        while not self.over:
            due = self.rounds.next_deadline()
            if self.queue and (due is None or self.queue[0][0] <= due):
                self.now, _, machine, pushes = heapq.heappop(self.queue)
                machine.busy = False
                for push, buffers in pushes:
                    self._arrives(machine, push, buffers)
                self._begins(machine)
            else:
                self.now = max(self.now, due if due is not None else self.now + 1.0)
            for n in self.machines:
                self._happens(Heard(str(n)))
            self._happens(Tick())
        rate = self.samples * self.rounds.rules.epochs * VIRTUAL_SAMPLE_S / self.now
        return sum(self.right) / len(self.right), rate

    def _arrives(self, machine: Machine, push: wire.Push, buffers: list[Any]) -> None:
        session = str(machine.number)
        why = self.rounds.refusal(session, push)
        if why is None:
            late = self.rounds.is_late(push)
            self.late += late
            bad, norm = self.server.push(session, machine.number, push, buffers, late=late)
            self._happens(Pushed(session, push, bad, norm))
        else:
            self._happens(PushRefused(session, push, why))

    def _begins(self, machine: Machine) -> None:
        """If it is free, and has samples: compute its gradient, which is there when its time is
        over."""
        if machine.busy:
            return
        machine.read()
        follow = machine.follow
        found = follow.lease(machine.number, machine.round)
        if found is None or not (
            machine.round == 0 or follow.is_settled(machine.number, machine.round)
        ):
            return
        machine.round, lease = found
        machine.busy, machine.batches = True, machine.batches + 1
        epoch, start, stop = lease
        images, labels = self.data.train.batch(order(self.samples, self.seed, epoch)[start:stop])
        gradient = self._gradient(machine.stands.step, images, labels)
        stutters = machine.number == WORKERS and machine.batches % EVERY == 0
        seconds = VIRTUAL_SAMPLE_S * (stop - start) * (SLOWER if stutters else 1.0)
        pushes = []
        assert self.server.plan is not None
        for b in self.server.plan.buckets:
            buffers, scale = CODECS["float32"].encode(gradient[b.start : b.stop].clone())
            push = wire.Push(
                round=machine.round,
                bucket=b.index,
                samples=stop - start,
                scale=scale,
                made_at=machine.stands.step,
            )
            pushes.append((push, buffers))
        heapq.heappush(self.queue, (self.now + seconds, next(self.order), machine, pushes))

    def _gradient(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            for p, at in zip(self.params, self.weights[step], strict=True):
                p.copy_(at)
        loss = nn.functional.cross_entropy(self.model(images), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.params)])

    # ------------------------------------------------------------------ the server's part

    def _happens(self, event: Event) -> None:
        for effect in self.rounds.handle(event, self.now):
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Add():
                self.server.add(effect.worker, effect.bucket, effect.weight, late=effect.late)
            case Discard():
                self.server.drop(effect.worker, effect.bucket)
            case Finish():
                self.server.finish(effect)
                assert self.server.plan is not None
                [(average, frames)] = self.server.due()
                size = self.server.plan.buckets[effect.bucket].size
                values = CODECS["float32"].decode(frames[1:], average.scale, torch.empty(size))
                self.averages[effect.bucket] = values.clone()
            case Void():
                self.server.forget_round(())
                self.averages.clear()
            case Closed():
                self._applies(effect.close)
            case Publish() if isinstance(effect.message, wire.Open):
                for machine in self.machines.values():
                    machine.follow.opened(effect.message)
                    self._begins(machine)
            case Ended():
                self.over = True
            case Start():
                pass

    def _applies(self, close: wire.Close) -> None:
        self.server.forget_round(close.buckets)
        flat = torch.cat([self.averages[b] for b in sorted(self.averages)])
        self.averages.clear()
        self._load(close.step - 1)
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, flat.split(sizes), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()
        self.weights[close.step] = self._copy()
        done = (close.ledger["done"] + close.ledger["partly"]) / (
            self.samples * self.rounds.rules.epochs
        )
        if done > 0.8 + 0.02 * len(self.right):
            self.right.append(self._accuracy())
        for machine in self.machines.values():
            machine.unread.append(close)
        used = min(m.stands.step for m in self.machines.values())
        self.weights = {step: w for step, w in self.weights.items() if step >= used}
        for machine in self.machines.values():
            self._begins(machine)

    def _load(self, step: int) -> None:
        with torch.no_grad():
            for p, at in zip(self.params, self.weights[step], strict=True):
                p.copy_(at)

    def _accuracy(self) -> float:
        images, labels = self.data.val.batch(torch.arange(len(self.data.val)))
        with torch.no_grad():
            return 100 * float((self.model(images).argmax(1) == labels).float().mean())


def accuracies(staleness: Sequence[int], seeds: int, epochs: int) -> None:
    """Print a line for each number of updates, as its runs are done."""
    print(
        f"| max_staleness | accuracy, {epochs} epochs, {seeds} seeds | by seed | late gradients ",
        end="",
    )
    print("| samples in a sample's time |")
    print("|---|---|---|---|---|")
    for most in staleness:
        runs = [
            Training(Settings(max_staleness=most), seed, epochs) for seed in range(1, seeds + 1)
        ]
        seen = [run.run() for run in runs]
        mean = sum(right for right, _ in seen) / seeds
        each = ", ".join(f"{right:.2f}" for right, _ in seen)
        rate = sum(rate for _, rate in seen) / seeds
        late = sum(run.late for run in runs) // seeds
        print(f"| {most} | {mean:.2f} | {each} | {late} | {rate:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.late", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["speed", "accuracy"], default="speed")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--sample-s", type=float, default=SAMPLE_S)
    parser.add_argument("--staleness", nargs="+", type=int, default=list(STALENESS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    words = parser.parse_args()
    if words.what == "accuracy":
        torch.set_num_threads(2)
        accuracies(words.staleness, words.seeds, words.epochs)
    else:
        speeds(words.kinds, words.modes, words.rounds, words.times, words.sample_s)


if __name__ == "__main__":
    main()
