"""What a model brings that a toy forgets, beside what `test_cluster` has: each optimizer and
schedule of torch, dropout, buffers, and parameters held for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import CLASSES, INPUTS, PERCEPTRON, Noise, Setup, drawn, loss, train
from torch import Tensor, nn, optim
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedules
from whole import CLONE, LOOPBACK, Run, Served, free_port

import workers
from workers.builtin.data import order
from workers.replica.replica import Replica
from workers.replica.state import flatten, unflatten

# ------------------------------------------------------------------ any optimizer, any schedule

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    name: getattr(optim, name)
    for name in (
        "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam",
        "RMSprop", "Rprop", "SGD",
    )
}  # fmt: skip

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 10),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o), schedules.CosineAnnealingLR(o, 10)], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]
    ),
}


def alone(setup: Setup, data: Noise, until: int = 12) -> Replica:
    """Train without a server for some steps; returns the replica."""
    with workers.join(port=free_port(), say=lambda line: None, alone={"num_epochs": 99}) as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer, **setup.attach)
        for x, y, _ in cluster.batches(data, batch_size=8):
            loss(model, x, y).backward()
            optimizer.step()
            if cluster.step == until:
                break
        assert cluster._replica is not None
        return cluster._replica


def same(setup: Setup, other: Setup) -> None:
    theirs = other.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in setup.model.state_dict().items())
    rates = [[group["lr"] for group in s.optimizer.param_groups] for s in (setup, other)]
    assert rates[0] == rates[1]


def check_one(make: Callable[[], Setup]) -> None:
    """It trains as in a plain loop, and one that joins later, by a snapshot, goes on as it does."""
    data = Noise(96)
    setup, plain, joiner = make(), make(), make()
    replica = alone(setup, data)
    scheduler = plain.attach.get("scheduler")
    for indices in order(96, 42, 0).split(8):
        plain.optimizer.zero_grad()
        loss(plain.model, data.x[indices], data.y[indices]).backward()
        plain.optimizer.step()
        if scheduler is not None:
            scheduler.step()
    same(setup, plain)
    late = Replica(joiner.model, joiner.optimizer, bucket_mb=1, codec="float32", **joiner.attach)
    text, tensors = flatten(replica.state())  # not copies
    late.load(unflatten(text, [t.clone() for t in tensors]), 12, replica.lineage)
    same(setup, joiner)
    for s, r in ((setup, replica), (joiner, late)):
        s.optimizer.zero_grad()
        loss(s.model, data.x, data.y).backward()
        s.optimizer.step()
        if r._schedule is not None:
            r._schedule()
    same(setup, joiner)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name: str) -> None:
    def make() -> Setup:
        model = drawn(PERCEPTRON, 1)
        return Setup(model, OPTIMIZERS[name](model.parameters()))

    check_one(make)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_any_schedule(name: str) -> None:
    def make() -> Setup:
        model = drawn(PERCEPTRON, 1)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        return Setup(model, optimizer, scheduler=SCHEDULES[name](optimizer))

    check_one(make)


def test_a_schedule_that_ends_before_the_run_stays_there() -> None:
    model = drawn(PERCEPTRON, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    scheduler = schedules.OneCycleLR(optimizer, 0.1, total_steps=5)
    replica = alone(Setup(model, optimizer, scheduler=scheduler), Noise(96))
    assert replica.step == 12 and scheduler.last_epoch == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 25 / 1e4)


# ------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("threaded", [False, True])
def test_gradients_that_came_without_backward_are_taken(
    threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set by hand: all of them, or those of the parameters that backward did not reach."""
    if threaded:
        monkeypatch.setattr("workers.replica.gradients.THREAD_FROM_BYTES", 0)
    data, setup, plain = Noise(96), *(_of_two() for _ in range(2))

    def by_hand(s: Setup, x: Tensor, y: Tensor, step: int) -> None:
        first, second, _ = s.model
        outputs = first(x) + second(x)
        whole = loss(nn.Identity(), outputs, y)
        if step % 2:
            gradients = torch.autograd.grad(whole, [*s.model.parameters()][:4])
            for p, g in zip(s.model.parameters(), gradients, strict=False):
                p.grad = g
        else:
            second.weight.grad, second.bias.grad = torch.autograd.grad(
                whole, [second.weight, second.bias], retain_graph=True
            )
            whole.backward(inputs=[first.weight, first.bias])

    with workers.join(port=free_port(), say=lambda line: None, alone={"num_epochs": 99}) as cluster:
        _, optimizer = cluster.attach(setup.model, setup.optimizer)
        for x, y, indices in cluster.batches(data, batch_size=8):
            by_hand(setup, x, y, cluster.step)
            plain.optimizer.zero_grad()
            by_hand(plain, data.x[indices], data.y[indices], cluster.step)
            optimizer.step()
            plain.optimizer.step()
            same(setup, plain)
            assert setup.model[2].weight.grad is None
            if cluster.step == 12:
                break


def _of_two() -> Setup:
    layers = (nn.Linear(INPUTS, CLASSES), nn.Linear(INPUTS, CLASSES), nn.Linear(2, 2))
    model = drawn(nn.Sequential(*layers), 1)
    return Setup(model, SGD(model.parameters(), lr=0.1, momentum=0.9))


# ---------------------------------------------------------------------------- held for a while


def test_a_parameter_is_held_for_a_while_by_before_step() -> None:
    def make(seed: int) -> Setup:
        model = drawn(PERCEPTRON, seed)
        applied = [0]

        def hold(model: nn.Module) -> None:
            applied[0] += 1
            if applied[0] <= 3:
                model[0].weight.grad = None

        return Setup(model, SGD(model.parameters(), lr=0.1, momentum=0.9), before_step=hold)

    crew = train(make, Noise(96), {1: 4, 2: 8}, num_epochs=1)
    crew.check()


class Counting(nn.Module):
    """A buffer that belongs to no normalisation layer, and that forward leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(INPUTS, CLASSES)
        self.register_buffer("mask", torch.ones(INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.mask)


def test_other_buffers_come_with_the_snapshot() -> None:
    def make(seed: int) -> Setup:
        model = drawn(Counting(), seed)
        model.mask[seed] = 0.0  # another one in each worker
        return Setup(model, SGD(model.parameters(), lr=0.1))

    crew = train(make, Noise(96), {1: 4, 2: 8}, num_epochs=1)
    crew.check()
    masks = [setup.model.mask for setup in crew.setups.values()]
    assert torch.equal(*masks) and masks[0][crew.origin()] == 0.0


# ------------------------------------------------------------------------------------- dropout

DROPOUT = """
import sys, torch, workers
from torch import nn
from crew import Noise, loss

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4))
cluster = workers.join(say=lambda line: None)
model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
seen = []
for x, y, indices in cluster.batches(Noise(64), batch_size=8):
    seen.append((cluster.step, indices))
    loss(model, x, y).backward()
    optimizer.step()
cluster.leave()
torch.save({"model": model.state_dict(), "seen": seen}, sys.argv[1])
"""


def dropout_run(folder: Path) -> tuple[dict[int, Any], Served]:
    """Two processes, since a process has one random generator; what each of them saved."""
    with Served(num_workers=2, num_epochs=2, deterministic=True) as served, Run(folder) as run:
        processes = {
            number: run.start(
                f"worker {number}", "-c", DROPOUT, str(folder / f"{number}.pt"),
                PATH="",
                PYTHONPATH=f"{CLONE}:{CLONE / 'tests'}",
                PARAMSERVER_HOST=LOOPBACK,
                PARAMSERVER_PORT=str(served.port),
                PARAMSERVER_ID=str(number),
            )
            for number in (1, 2)
        }  # fmt: skip
        assert [p.end() for p in processes.values()] == [0, 0]
        served.wait(served.end)
    return {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in processes}, served


def dropout_truth(saved: dict[int, Any], served: Served, seeds: dict[int, int]) -> dict[str, Any]:
    """One process that computes each worker's batches with that worker's generator."""
    data = Noise(64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4))
        optimizer = SGD(model.parameters(), lr=0.1)
        states = {n: torch.Generator().manual_seed(seed).get_state() for n, seed in seeds.items()}
        seen = {(n, step): indices for n in saved for step, indices in saved[n]["seen"]}
        for close in served.closes:
            optimizer.zero_grad()
            for n, count in close.contributors.items():
                indices = seen[n, close.step - 1]
                torch.set_rng_state(states[n])
                share = count / sum(close.contributors.values())
                loss(model, data.x[indices], data.y[indices], share).backward()
                states[n] = torch.get_rng_state()
            optimizer.step()
    return model.state_dict()


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_dropout_has_other_masks_in_each_worker_and_the_same_in_the_next_run(
    tmp_path: Path,
) -> None:
    saved, served = dropout_run(tmp_path)
    assert len(served.closes) == 8
    assert far(saved[1]["model"], saved[2]["model"]) == 0.0
    own = dropout_truth(saved, served, {1: 42 + 1, 2: 42 + 2})
    assert far(saved[1]["model"], own) < 1e-5
    alike = dropout_truth(saved, served, {1: 42 + 1, 2: 42 + 1})
    assert far(saved[1]["model"], alike) > 1e-3
    again, _ = dropout_run(tmp_path)
    assert far(saved[1]["model"], again[1]["model"]) == 0.0
