"""Batches of a worker's own: its data stay with it, and weigh the number of samples that it
reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crew import Noise, in_float64, loss, one_step, perceptron
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from whole import Served, free_port

import workers
from paramserver.errors import UserError

Batch = tuple[Tensor, Tensor]


def batches_of(number: int) -> list[Batch]:
    """Worker 1 has few samples of its own, worker 2 three times as many, each of another kind."""
    data = Noise(80)
    mine = range(20) if number == 1 else range(20, 80)
    size = 4 if number == 1 else 12
    x, y = data.x[list(mine)].double() + number, data.y[list(mine)]
    return list(zip(x.split(size), y.split(size), strict=True))


def work(served: Served, number: int, done: dict[tuple[int, int], Batch], models: Any) -> None:
    with workers.join(port=served.port, worker_id=number, say=served.say) as cluster:
        setup = models[number] = in_float64(perceptron)(number)
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for _ in range(2):
            for x, y in cluster.own_batches(batches_of(number)):
                done[number, cluster.step] = (x, y)
                loss(model, x, y).backward()
                optimizer.step()


def test_batches_weigh_what_they_hold_and_the_run_ends_with_the_last_of_them() -> None:
    done: dict[tuple[int, int], Batch] = {}
    models: dict[int, Any] = {}
    with Served(num_workers=2) as served:
        served.wait(*(served.start(work, served, n, done, models) for n in (1, 2)), served.end)
        assert served.end.result().reason == "every worker has finished"
    assert len(served.closes) == 10
    assert all(close.contributors == {1: 4, 2: 12} for close in served.closes)
    assert served.samples == (160, 0, 0)
    truth = in_float64(perceptron)(1 if "first state comes from worker 1" in served.text else 2)
    for close in served.closes:
        one_step(truth, [done[n, close.step - 1] for n in close.contributors])
    for setup in models.values():
        for name, value in truth.model.state_dict().items():
            torch.testing.assert_close(setup.model.state_dict()[name], value, rtol=0, atol=1e-10)


def test_a_data_loader_alone() -> None:
    data = Noise(45)
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=8)
    setup, plain = perceptron(1), perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for _ in range(2):
            for x, y in cluster.own_batches(loader):
                loss(model, x, y).backward()
                optimizer.step()
        assert cluster.step == 12
    for _ in range(2):
        for x, y in loader:
            plain.optimizer.zero_grad()
            loss(plain.model, x, y).backward()
            plain.optimizer.step()
    expected = plain.model.state_dict()
    assert all(torch.equal(setup.model.state_dict()[name], expected[name]) for name in expected)


def test_what_cannot_be_counted_is_told() -> None:
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        cluster.attach(setup.model, setup.optimizer)
        for batches, samples, sentence in (
            ([7], None, "how many samples are in a int"),
            ([(torch.zeros(5, 2), torch.zeros(7))], None, "samples="),
            ([torch.zeros(0, 2)], None, "a batch of 0 samples"),
            ([7], lambda batch: -batch, "a batch of -7 samples"),
        ):
            with pytest.raises(UserError) as told:
                next(cluster.own_batches(batches, samples=samples))
            assert sentence in str(told.value) + told.value.hint


def test_a_forgotten_step_is_told_here_too() -> None:
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        cluster.attach(setup.model, setup.optimizer)
        with pytest.raises(UserError, match=r"optimizer\.step\(\) was not called"):
            for _ in cluster.own_batches(batches_of(1)):
                pass


def test_an_epoch_of_ones_own_moves_no_schedule() -> None:
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        cluster.attach(setup.model, setup.optimizer, schedule_by="epoch")
        with pytest.raises(UserError, match="epochs of a set that all workers share"):
            next(cluster.own_batches(batches_of(1)))
