"""Workers in threads, each with a user's own loop; what they did, and the right result.

`Crew.truth` replays the log of a run in one process: it takes from the run only which workers were
in which round, and with which samples.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from whole import DEADLINE_S, ENOUGH, Served

from workers.cluster import Cluster

INPUTS = 6
CLASSES = 4


class Noise:
    """A data set of noise; each sample has its index too."""

    def __init__(self, samples: int, shape: tuple[int, ...] = (INPUTS,)) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, *shape, generator=generator)
        self.y = torch.randint(CLASSES, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], index


class Setup:
    """Model, optimizer and what else `attach` gets, made anew by each worker and by the truth."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, **attach: Any) -> None:
        self.model, self.optimizer, self.attach = model, optimizer, attach


Make = Callable[[int], Setup]
"""From a seed. Workers get different ones: what they end with must come from the first."""

PERCEPTRON = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with weights drawn by `seed`."""
    own = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in own.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    return own


def perceptron(seed: int) -> Setup:
    model = drawn(PERCEPTRON, seed)
    return Setup(model, SGD(model.parameters(), lr=0.1, momentum=0.9))


def in_float64(make: Make) -> Make:
    """So that rounding neither hides a mistake nor looks like one; data must be so too."""

    def made(seed: int) -> Setup:
        setup = make(seed)
        setup.model.double()
        return setup

    return made


class Crew:
    """Workers in threads, each with a user's own loop, and what they did."""

    def __init__(
        self,
        served: Served,
        make: Make,
        data: Any,
        hold: Callable[[int, int], None] = lambda number, step: None,
        **batches: Any,
    ) -> None:
        """`hold(worker, step)` is called before each backward pass and may wait, or raise;
        `batches` gets these arguments, too."""
        self.served, self.make, self.data, self.hold = served, make, data, hold
        self.given = batches
        self.setups: dict[int, Setup] = {}
        self.clusters: dict[int, Cluster] = {}
        self.said: list[str] = []
        self.batches: dict[tuple[int, int], list[int]] = {}
        """(worker, step) -> the indices that this worker computed on at that step."""

    def start(self, number: int, batch_size: int | None = None) -> Future[None]:
        return self.served.start(self._work, number, batch_size)

    def _work(self, number: int, batch_size: int | None) -> None:
        with self.served.join(number, self.said.append) as cluster:
            self.clusters[number] = cluster
            setup = self.setups[number] = self.make(number)
            parts = setup.attach.get("accumulate", 1)
            model, optimizer = cluster.attach(setup.model, setup.optimizer, **setup.attach)
            for x, y, indices in cluster.batches(self.data, batch_size=batch_size, **self.given):
                self.hold(number, cluster.step)
                self.batches[number, cluster.step] = indices.tolist()
                optimizer.zero_grad()
                for part in split(x, y, parts):
                    loss(model, *part, share=len(part[1]) / len(y)).backward()
                optimizer.step()

    def origin(self) -> int:
        """The worker whose model was the run's first state."""
        found = re.search(r"the first state comes from worker (\d+)", self.served.text)
        assert found
        return int(found[1])

    def applied(self) -> Counter[int]:
        """How often each sample is in the log of updates."""
        return Counter(
            index
            for close in self.served.closes
            for worker in close.contributors
            for index in self.batches[worker, close.step - 1]
        )

    def truth(self, rounding: Rounding | None = None) -> Setup:
        """One process that does what the log says, from the run's first state."""
        setup = self.make(self.origin())
        for close in self.served.closes:
            batches = [self.batches[worker, close.step - 1] for worker in close.contributors]
            assert [len(b) for b in batches] == list(close.contributors.values())
            one_step(setup, [(self.data.x[b], self.data.y[b]) for b in batches], rounding)
        return setup

    def check(self, tolerance: float | None = None) -> None:
        """All replicas are equal bit by bit, and equal to the truth within `tolerance`: without
        one, within rounding (`rounding_bound`)."""
        end = self.served.end.result(DEADLINE_S)
        assert end.reason in ("all epochs are done", ENOUGH)
        assert end.step == len(self.served.closes) > 0
        assert len(self.served.server.digests) == len(self.setups)
        assert len(self.served.digests()) == 1
        expected = self.truth().model.state_dict()
        if tolerance is None:
            tolerance = rounding_bound(lambda rounding: self.truth(rounding).model)
        for setup in self.setups.values():
            torch.testing.assert_close(setup.model.state_dict(), expected, rtol=0, atol=tolerance)
        start = self.make(self.origin()).model.state_dict()
        assert any(not torch.equal(start[name], expected[name]) for name in start)


def loss(model: nn.Module, x: Tensor, y: Tensor, share: float = 1.0) -> Tensor:
    outputs = model(x)
    if outputs.dtype != torch.float64:
        outputs = outputs.float()
    return nn.functional.cross_entropy(outputs, y) * share


class Rounding:
    """Another order of the same sums: batches are shuffled, and cut into parts that weigh what they
    hold."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        parts = []
        for x, y in batches:
            order = torch.randperm(len(y), generator=self._generator)
            parts += [(x[own], y[own]) for own in order.split(max(1, len(y) // 2))]
        return parts


def rounding_bound(model: Callable[[Rounding | None], nn.Module]) -> float:
    """How far float32 trainings that add in another order may end apart, on this processor.

    Each number of a gradient is a sum, off by some 2^-24 of its terms. No constant bounds the
    effect on a training: an optimizer like Adam makes whole steps of it where terms cancel. So it
    is measured: trainings that differ in the order alone, twice as far as the furthest of four, and
    at least as far as eight roundings of the largest weight. In float64 all of it is 2^29 times
    less, and 1e-10 holds anywhere.
    """
    exact = model(None).state_dict()
    numbers = {name: v for name, v in exact.items() if v.is_floating_point()}
    if all(v.dtype == torch.float64 for v in numbers.values()):
        return 1e-10
    furthest = max(2.0**-22 * float(v.abs().max()) for v in numbers.values())
    for seed in range(4):
        other = model(Rounding(seed)).state_dict()
        furthest = max(furthest, *(float((other[n] - v).abs().max()) for n, v in numbers.items()))
    return 2 * furthest


def split(x: Tensor, y: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.chunk(parts), y.chunk(parts), strict=True)


def one_step(
    setup: Setup, batches: list[tuple[Tensor, Tensor]], rounding: Rounding | None = None
) -> None:
    """The weighted mean over batches that all start from the same buffers, then one step.

    Of normalisation layers statistics are averaged, too, counters take the largest; of other
    modules what a forward writes is that of the first batch that writes there.
    """
    model, optimizer, attach = setup.model, setup.optimizer, setup.attach
    if rounding is not None:
        batches = rounding(batches)
    total = sum(len(y) for _, y in batches)
    gradients: dict[str, Tensor] = {}
    before = copy.deepcopy(dict(model.named_buffers()))
    after: list[dict[str, Tensor]] = []
    for x, y in batches:
        put(model, before)
        model.zero_grad()
        parts = attach.get("accumulate", 1)
        for part in split(x, y, parts):
            loss(model, *part, share=len(part[1]) / len(y)).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                summed = gradients.setdefault(name, torch.zeros(p.shape, dtype=dtype_of_sums(p)))
                summed += p.grad * (len(y) / total)
        after.append(copy.deepcopy(dict(model.named_buffers())))
    put(model, together(model, before, after, [len(y) / total for _, y in batches], attach))
    for name, p in model.named_parameters():
        p.grad = gradients[name].to(p.dtype) if name in gradients else None
    if "clip_norm" in attach:
        nn.utils.clip_grad_norm_(model.parameters(), attach["clip_norm"])
    if "before_step" in attach:
        attach["before_step"](model)
    optimizer.step()
    if "scheduler" in attach:
        attach["scheduler"].step()


def dtype_of_sums(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def put(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, values in buffers.items():
            model.get_buffer(name).copy_(values)


def averaged(model: nn.Module, name: str) -> bool:
    layer = model.get_submodule(name.rpartition(".")[0])
    return isinstance(layer, nn.modules.batchnorm._NormBase)


def together(
    model: nn.Module,
    before: dict[str, Tensor],
    after: list[dict[str, Tensor]],
    shares: list[float],
    attach: dict[str, Any],
) -> dict[str, Tensor]:
    """The buffers of the next step, from what each batch made of those of this one."""
    rules, result = attach.get("buffers", {}), {}
    for name, old in before.items():
        module = name.rpartition(".")[0]
        own = [n for n in before if n.rpartition(".")[0] == module and n not in rules]
        rule = rules.get(name)
        if rule is None and averaged(model, name):
            rule = "mean" if old.is_floating_point() else "max"
        if rule == "mean":
            result[name] = sum(b[name] * share for b, share in zip(after, shares, strict=True))
        elif rule == "max":
            result[name] = torch.stack([b[name] for b in after]).amax(0)
        else:
            wrote = (b for b in after if any(not torch.equal(b[n], before[n]) for n in own))
            result[name] = next(wrote, before)[name]
    return result


def train(make: Make, data: Any, sizes: dict[int, int], **settings: Any) -> Crew:
    """A whole run of workers with these batch sizes; checked against the truth."""
    with Served(num_workers=len(sizes), **settings) as served:
        crew = Crew(served, make, data)
        served.wait(*[crew.start(number, size) for number, size in sizes.items()], served.end)
    return crew
