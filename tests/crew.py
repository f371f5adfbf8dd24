"""Workers in threads, each with a user's own loop; what they did, and what it should have come to.

`Crew.truth` replays the log of a run in one process: it takes from the run only who was in which
round, and with which samples.
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
from whole import DEADLINE_S, Served

INPUTS = 6
CLASSES = 4


class Noise:
    """A data set of noise; each sample tells its index too."""

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


class Crew:
    """Workers in threads, each with a user's own loop, and what they did."""

    def __init__(
        self,
        served: Served,
        make: Make,
        data: Any,
        hold: Callable[[int, int], None] = lambda number, step: None,
    ) -> None:
        """`hold(worker, step)` is called before each backward pass and may wait, or raise."""
        self.served, self.make, self.data, self.hold = served, make, data, hold
        self.setups: dict[int, Setup] = {}
        self.said: list[str] = []
        self.batches: dict[tuple[int, int], list[int]] = {}
        """(worker, step) -> the indices that this worker computed on at that step."""

    def start(self, number: int, batch_size: int | None = None) -> Future[None]:
        return self.served.start(self._work, number, batch_size)

    def _work(self, number: int, batch_size: int | None) -> None:
        with self.served.join(number, self.said.append) as cluster:
            setup = self.setups[number] = self.make(number)
            parts = setup.attach.get("accumulate", 1)
            model, optimizer = cluster.attach(setup.model, setup.optimizer, **setup.attach)
            for x, y, indices in cluster.batches(self.data, batch_size=batch_size):
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

    def truth(self) -> Setup:
        """One process that does what the log says, from the run's first state."""
        setup = self.make(self.origin())
        for close in self.served.closes:
            batches = [self.batches[worker, close.step - 1] for worker in close.contributors]
            assert [len(b) for b in batches] == list(close.contributors.values())
            one_step(setup, [(self.data.x[b], self.data.y[b]) for b in batches])
        return setup

    def check(self, tolerance: float = 1e-5) -> None:
        """All replicas are equal bit by bit, and equal to the truth within rounding."""
        end = self.served.end.result(DEADLINE_S)
        assert end.reason == "all epochs are done" and end.step == len(self.served.closes) > 0
        assert len(self.served.server.digests) == len(self.setups)
        assert len(self.served.digests()) == 1
        expected = self.truth().model.state_dict()
        for setup in self.setups.values():
            torch.testing.assert_close(setup.model.state_dict(), expected, rtol=0, atol=tolerance)
        start = self.make(self.origin()).model.state_dict()
        assert any(not torch.equal(start[name], expected[name]) for name in start)


def loss(model: nn.Module, x: Tensor, y: Tensor, share: float = 1.0) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), y) * share


def split(x: Tensor, y: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.chunk(parts), y.chunk(parts), strict=True)


def one_step(setup: Setup, batches: list[tuple[Tensor, Tensor]]) -> None:
    """The weighted mean over batches that all start from the same buffers, then one step."""
    model, optimizer, attach = setup.model, setup.optimizer, setup.attach
    total = sum(len(y) for _, y in batches)
    gradients: dict[str, Tensor] = {}
    buffers = {name: torch.zeros_like(b) for name, b in model.named_buffers()}
    before = copy.deepcopy(dict(model.named_buffers()))
    for x, y in batches:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        model.zero_grad()
        parts = attach.get("accumulate", 1)
        for part in split(x, y, parts):
            loss(model, *part, share=len(part[1]) / len(y)).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                summed = gradients.setdefault(name, torch.zeros(p.shape))
                summed += p.grad.float() * (len(y) / total)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffers[name] += buffer * (len(y) / total)
            else:
                buffers[name] = torch.maximum(buffers[name], buffer)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for name, p in model.named_parameters():
        p.grad = gradients[name].to(p.dtype) if name in gradients else None
    if "clip_norm" in attach:
        nn.utils.clip_grad_norm_(model.parameters(), attach["clip_norm"])
    if "before_step" in attach:
        attach["before_step"](model)
    optimizer.step()
    if "scheduler" in attach:
        attach["scheduler"].step()


def train(make: Make, data: Any, sizes: dict[int, int], **settings: Any) -> Crew:
    """A whole run of workers with these batch sizes; checked against the truth."""
    with Served(num_workers=len(sizes), **settings) as served:
        crew = Crew(served, make, data)
        served.wait(*[crew.start(number, size) for number, size in sizes.items()], served.end)
    return crew
