"""Mistakes of a loop raise an error, at `attach` or at the step where they happen; no worker
hangs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import CLASSES, INPUTS, PERCEPTRON, Crew, Noise, Setup, drawn, loss, perceptron
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from whole import Served, free_port

import workers
from paramserver.errors import UserError
from workers.cluster import Cluster


@pytest.fixture
def cluster() -> Cluster:
    """A cluster of one: it refuses what a worker refuses before it asks a server."""
    return workers.join(port=free_port(), say=lambda line: None)


# ------------------------------------------------------------------------------ at the door


def complex_model() -> nn.Module:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return model


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))


class TakesClosure(SGD):
    def step(self, closure: Callable[[], Any]) -> None: ...


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "nothing to train": (frozen, SGD, "no parameter that requires a gradient"),
    "complex numbers": (complex_model, SGD, "phase is complex"),
    "a sparse embedding": (embedding, SGD, r"0\.weight has a sparse gradient"),
    "LBFGS": (lambda: nn.Linear(2, 2), LBFGS, "LBFGS computes the loss again and again"),
    "a closure": (lambda: nn.Linear(2, 2), TakesClosure, "TakesClosure computes the loss"),
    "SparseAdam": (lambda: nn.Linear(2, 2), SparseAdam, "SparseAdam is for sparse gradients"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_averaged_is_refused(name: str, cluster: Cluster) -> None:
    make, optimizer, sentence = REFUSED[name]
    model = make()
    with pytest.raises(UserError, match=sentence):
        cluster.attach(model, optimizer(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"after_step": 3},
        {"before_step": "clip"},
        {"clip_norm": "1.0"},
        {"clip_norm": -1.0},
        {"clip_norm": 0},
        {"accumulate": 0},
        {"accumulate": 1.5},
    ],
)
def test_an_argument_of_another_kind_is_refused(wrong: dict[str, Any], cluster: Cluster) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=next(iter(wrong))):
        cluster.attach(model, SGD(model.parameters(), lr=0.1), **wrong)


@pytest.mark.parametrize("way", ["batches", "own_batches"])
def test_samples_is_a_function(way: str, cluster: Cluster) -> None:
    model = nn.Linear(2, 2)
    cluster.attach(model, SGD(model.parameters(), lr=0.1))
    with pytest.raises(UserError, match="it is a function of the batch"):
        next(iter(getattr(cluster, way)([torch.ones(2, 2)], samples=8)))


def test_an_optimizer_must_own_what_is_trained(cluster: Cluster) -> None:
    model = drawn(PERCEPTRON, 1)
    with pytest.raises(UserError, match=r"2\.bias requires a gradient, but the optimizer"):
        cluster.attach(model, SGD(list(model.parameters())[:-1], lr=0.1))


def test_a_schedule_that_follows_a_metric_is_refused(cluster: Cluster) -> None:
    setup = perceptron(1)
    with pytest.raises(UserError, match="ReduceLROnPlateau"):
        cluster.attach(setup.model, setup.optimizer, scheduler=ReduceLROnPlateau(setup.optimizer))


def test_a_schedule_that_attach_was_not_given_is_told(cluster: Cluster) -> None:
    setup = perceptron(1)
    StepLR(setup.optimizer, 3)
    with pytest.raises(UserError, match="attach\\(\\) was not given it"):
        cluster.attach(setup.model, setup.optimizer)


def test_a_schedule_of_another_optimizer_is_told(cluster: Cluster) -> None:
    setup, other = perceptron(1), perceptron(2)
    with pytest.raises(UserError, match="belongs to another optimizer"):
        cluster.attach(setup.model, setup.optimizer, scheduler=StepLR(other.optimizer, 3))


def test_a_schedule_goes_by_step_or_epoch(cluster: Cluster) -> None:
    setup = perceptron(1)
    with pytest.raises(UserError, match="schedule_by is one of step, epoch, not 'week'"):
        cluster.attach(setup.model, setup.optimizer, schedule_by="week")


# ------------------------------------------------------------------------------ in the loop


def steps(cluster: Cluster, act: Callable[[nn.Module, Any, Tensor], None]) -> None:
    """A loop that does `act(model, optimizer, loss)` with each batch."""
    setup = perceptron(1)
    model, optimizer = cluster.attach(setup.model, setup.optimizer)
    for x, y, _ in cluster.batches(Noise(64), batch_size=8):
        optimizer.zero_grad()
        act(model, optimizer, loss(model, x, y))


def forget(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    loss.backward()


def step_twice(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.step()


def backward_twice(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def clip(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def forget_gradients(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()


def replace(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    loss.backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * 0.5
    optimizer.step()


def close_over(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    loss.backward()
    optimizer.step(lambda: loss)


def scale(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def freeze(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    next(model.parameters()).requires_grad_(False)
    loss.backward()
    optimizer.step()


def freeze_earlier(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    next(model.parameters()).requires_grad_(False)
    model(torch.ones(3, INPUTS)).sum().backward()
    optimizer.step()


def add_group(model: nn.Module, optimizer: Any, loss: Tensor) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    loss.backward()
    optimizer.step()


MISTAKES = {
    forget: r"optimizer\.step\(\) was not called for the last batch",
    step_twice: r"optimizer\.step\(\) without a batch of its own",
    backward_twice: r"got its gradient 2 times in one step, 1 were stated",
    clip: r"gradient of 2\.bias was changed after backward",
    forget_gradients: r"gradient of 2\.bias was dropped after backward",
    replace: r"gradient of 2\.bias was changed after backward",
    close_over: r"step\(closure\)",
    scale: "GradScaler",
    freeze: r"0\.weight was frozen in the middle of the run",
    freeze_earlier: r"0\.weight was frozen in the middle of the run",
    add_group: "a parameter group was added",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_loop_is_told(mistake: Any, cluster: Cluster) -> None:
    with pytest.raises(UserError, match=MISTAKES[mistake]) as error:
        steps(cluster, mistake)
    assert mistake != freeze or "thaw it before step()" in (error.value.hint or "")


def test_a_thawed_parameter_is_told(cluster: Cluster) -> None:
    model = drawn(PERCEPTRON, 1)
    model[0].requires_grad_(False)
    model, optimizer = cluster.attach(model, SGD(model.parameters(), lr=0.1))
    x, y, _ = next(cluster.batches(Noise(64), batch_size=8))
    model[0].requires_grad_(True)
    loss(model, x, y).backward()
    with pytest.raises(UserError, match=r"0\.weight was thawed in the middle of the run"):
        optimizer.step()


def test_a_schedule_stepped_by_the_loop_is_told(cluster: Cluster) -> None:
    setup = perceptron(1)
    scheduler = StepLR(setup.optimizer, 3)
    cluster.attach(setup.model, setup.optimizer, scheduler=scheduler)
    with pytest.raises(UserError, match="stepped with every update"):
        scheduler.step()


def test_a_model_is_attached_before_the_loop_and_once(cluster: Cluster) -> None:
    with pytest.raises(UserError, match=r"batches\(\) before attach\(\)"):
        next(cluster.batches(Noise(64)))
    setup = perceptron(1)
    cluster.attach(setup.model, setup.optimizer)
    with pytest.raises(UserError, match="called twice"):
        cluster.attach(setup.model, setup.optimizer)


@pytest.mark.parametrize("mistake", [forget, step_twice, freeze], ids=lambda m: m.__name__)
def test_the_mistake_of_one_worker_does_not_stop_the_others(mistake: Any) -> None:
    def work() -> None:
        with workers.join(port=served.port, worker_id=2, say=served.say) as cluster:
            steps(cluster, mistake)

    with Served(num_workers=2, num_epochs=2) as served:
        crew = Crew(served, perceptron, Noise(64))
        first, second = crew.start(1, 8), served.start(work)
        served.wait(first)
        with pytest.raises(UserError, match=MISTAKES[mistake]):
            served.wait(second)
    assert served.samples[0] + served.samples[1] == 128
    assert re.search(rf"worker 2 \(.*left: .*{MISTAKES[mistake]}", served.text)


def test_a_sparse_gradient_is_told_where_it_comes_from_no_embedding(cluster: Cluster) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(INPUTS, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.embedding(x.argmax(1), self.table, sparse=True)

    model = Sparse()
    cluster.attach(model, SGD(model.parameters(), lr=0.1))
    x, y, _ = next(cluster.batches(Noise(64), batch_size=8))
    with pytest.raises(UserError, match="table has a sparse gradient"):
        loss(model, x, y).backward()


def test_the_refused_setup_of_one_worker_is_told() -> None:
    """A schedule by epoch beside one by step would drift apart."""

    def scheduled(by: str) -> Callable[[int], Setup]:
        def make(seed: int) -> Setup:
            setup = perceptron(seed)
            return Setup(
                setup.model,
                setup.optimizer,
                scheduler=StepLR(setup.optimizer, 3),
                schedule_by=by,
            )

        return make

    with Served(num_workers=2) as served:
        crew = Crew(served, scheduled("step"), Noise(64))
        crew.start(1, 8)
        served.until(lambda: any(p.join for p in served.server.rounds.peers.values()))
        crew.make = scheduled("epoch")
        with pytest.raises(UserError, match=r"StepLR by epoch.*the run has.*StepLR by step"):
            served.wait(crew.start(2, 8))
