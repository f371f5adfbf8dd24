"""Scripts with two loops, and runs whose rounds hold samples of one epoch only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crew import Noise, in_float64, loss, perceptron
from scripts import Run, but_words
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from whole import Served, free_port

import workers
from paramserver.errors import UserError
from paramserver.rounds.ledger import DONE, RETURNED, Ledger
from paramserver.tensors.order import order
from workers.cluster import Cluster

MADE = in_float64(perceptron)


def doubles(samples: int) -> TensorDataset:
    data = Noise(samples)
    return TensorDataset(data.x.double(), data.y)


# ------------------------------------------------------------------------------------ the ledger


def test_with_a_barrier_nothing_of_an_epoch_is_leased_before_the_one_before_is_settled() -> None:
    ledger = Ledger(20, 2)
    ledger.barrier = True
    one, two, three = (ledger.lease(8) for _ in range(3))
    assert (one, two, three) == ((0, 0, 8), (0, 8, 16), (0, 16, 20))
    assert ledger.lease(8) is None and not ledger.finished and not ledger.exhausted
    for lease, how in ((one, DONE), (three, DONE), (two, RETURNED)):
        assert lease is not None
        ledger.settle(lease, how)
    assert ledger.lease(8) == two  # what comes back goes first
    assert ledger.lease(8) is None
    ledger.settle((0, 8, 16), DONE)
    assert ledger.lease(8) == (1, 0, 8)


def test_with_a_barrier_a_short_rest_that_is_dropped_ends_its_epoch() -> None:
    ledger = Ledger(20, 2)
    ledger.barrier = True
    leases = [ledger.lease(8, drop_last=True) for _ in range(3)]
    assert leases == [(0, 0, 8), (0, 8, 16), None] and ledger.skipped == 4
    ledger.settle((0, 0, 8), DONE), ledger.settle((0, 8, 16), DONE)
    assert ledger.lease(8, drop_last=True) == (1, 0, 8)


def test_the_last_round_of_an_epoch_holds_only_its_rest() -> None:
    run = Run(buckets=1, epochs=2, epoch_barrier=True, observer=False)
    run.workers(1, 2, samples=24)
    run.push(1)
    assert "open 2 at step 1 for 1: 0/20-24" in but_words(run.push(2))[-1]
    assert "open 3 at step 2 for 1: 1/0-10 1/20-24, 2: 1/10-20" in run.push(1)[-1]
    assert [c.contributors for c in run.closes] == [{1: 10, 2: 10}, {1: 4}]


# ------------------------------------------------------------------------------------- whole runs


def truth(samples: int, size: int, epochs: int, step_size: int = 1) -> tuple[Any, int]:
    """One process with the batch of all workers together, and its steps."""
    setup, data, steps = MADE(1), doubles(samples), 0
    schedule = StepLR(setup.optimizer, step_size, gamma=0.5)
    for epoch in range(epochs):
        for indices in order(samples, 42, epoch).split(size):
            setup.optimizer.zero_grad()
            loss(setup.model, *data[indices]).backward()
            setup.optimizer.step()
            steps += 1
        schedule.step()
    return setup.model.state_dict(), steps


def two_loops(cluster: Cluster, data: Any, how: str, seen: list[tuple[int, int]]) -> Any:
    """The usual script; `how` its schedule is stepped."""
    setup = MADE(1)
    schedule = StepLR(setup.optimizer, 1, gamma=0.5)
    attach = {"scheduler": schedule, "schedule_by": "epoch"} if how == "attached" else {}
    model, optimizer = cluster.attach(setup.model, setup.optimizer, **attach)
    for epoch in cluster.epochs():
        for x, y in cluster.batches(DataLoader(data, 8, shuffle=True)):
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
        seen.append((epoch, cluster.step))
        if how == "in the loop":
            schedule.step()
    return model


@pytest.mark.parametrize("how", ["attached", "in the loop"])
@pytest.mark.parametrize("count", [2, 3])
def test_with_a_barrier_the_two_loops_are_those_of_one_process(how: str, count: int) -> None:
    """100 samples are no multiple of what these workers compute in a step."""
    seen: dict[int, list[tuple[int, int]]] = {n: [] for n in range(1, count + 1)}

    def work(number: int) -> Any:
        with served.join(number, served.say) as cluster:
            return two_loops(cluster, data, how, seen[number])

    data = doubles(100)
    with Served(num_workers=count, num_epochs=3, epoch_barrier=True) as served:
        ends = [served.start(work, number) for number in seen]
        served.wait(*ends, served.end)
    expected, steps = truth(100, 8 * count, 3)
    assert served.end.result().step == steps == {2: 21, 3: 15}[count]
    for number, end in zip(seen, ends, strict=True):
        torch.testing.assert_close(end.result().state_dict(), expected, rtol=0, atol=1e-9)
        assert seen[number] == [(e, (e + 1) * steps // 3) for e in range(3)]


def test_deterministic_runs_have_the_bits_of_one_process_that_adds_up_gradients() -> None:
    data, steps = Noise(64), 8

    def work(number: int) -> Any:
        setup = perceptron(1)
        with served.join(number, served.say) as cluster:
            model, optimizer = cluster.attach(setup.model, setup.optimizer)
            for x, y, _ in cluster.batches(data, batch_size=8):
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
        return model

    with Served(num_workers=2, num_epochs=2, deterministic=True) as served:
        ends = [served.start(work, number) for number in (1, 2)]
        served.wait(*ends, served.end)
    setup = perceptron(1)
    for epoch in range(2):
        for both in order(64, 42, epoch).split(16):
            setup.optimizer.zero_grad()
            for indices in both.split(8):
                loss(setup.model, data.x[indices], data.y[indices]).backward()
            for p in setup.model.parameters():
                assert p.grad is not None
                p.grad /= 2
            setup.optimizer.step()
    assert served.end.result().step == steps
    for end in ends:
        torch.testing.assert_close(
            end.result().state_dict(), setup.model.state_dict(), rtol=0, atol=0
        )


def test_without_a_barrier_each_epoch_has_a_pass_and_all_samples_are_done() -> None:
    def work(number: int) -> None:
        with served.join(number, served.say) as cluster:
            setup = perceptron(1)
            model, optimizer = cluster.attach(setup.model, setup.optimizer)
            batches = cluster.batches(data, batch_size=8)
            for epoch in cluster.epochs():
                for x, y, indices in batches:
                    optimizer.zero_grad()
                    loss(model, x, y).backward()
                    optimizer.step()
                    done.append((epoch, indices.tolist()))

    data, done = Noise(100), list[tuple[int, list[int]]]()
    with Served(num_workers=2, num_epochs=3) as served:
        served.wait(*(served.start(work, number) for number in (1, 2)), served.end)
    for epoch in range(3):
        assert sorted(i for e, indices in done if e == epoch for i in indices) == list(range(100))


@pytest.mark.parametrize("more", [{}, {"overlap": True}, {"epoch_barrier": True}])
def test_local_steps_end_with_their_epoch(more: dict[str, Any]) -> None:
    def work(number: int) -> list[tuple[int, int]]:
        seen = list[tuple[int, int]]()
        with served.join(number, served.say) as cluster:
            two_loops(cluster, data, "attached", seen)
        return seen

    data = doubles(100)
    with Served(num_workers=2, num_epochs=3, local_steps=3, **more) as served:
        ends = [served.start(work, number) for number in (1, 2)]
        served.wait(*ends, served.end)
    assert served.samples == (300, 0, 0)
    assert len(served.digests()) == 1
    assert all([epoch for epoch, _ in end.result()] == [0, 1, 2] for end in ends)


def alone(**settings: Any) -> Cluster:
    return workers.join(port=free_port(), say=lambda line: None, alone=settings)


@pytest.mark.parametrize("barrier", [False, True])
def test_alone_the_two_loops_are_a_plain_script(barrier: bool) -> None:
    seen = list[tuple[int, int]]()
    with alone(num_epochs=3, epoch_barrier=barrier) as cluster:
        model = two_loops(cluster, doubles(20), "attached", seen)
        assert cluster.end is not None and not cluster.end.error
    expected, steps = truth(20, 8, 3)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=1e-9)
    assert seen == [(0, 3), (1, 6), (2, 9)] and steps == 9


def test_a_pass_that_is_broken_off_leaves_its_epoch_to_the_next_one() -> None:
    with alone(num_epochs=2) as cluster:
        setup, seen = perceptron(1), list[int]()
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for epoch in cluster.epochs():
            seen.append(epoch)
            for x, y, _ in cluster.batches(Noise(24), batch_size=8):
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
                if len(seen) == 1:
                    break
        assert seen == [0, 0, 1] and cluster.step == 6


def test_own_batches_are_passes_too() -> None:
    with alone(num_epochs=3) as cluster:
        setup, data, seen = perceptron(1), Noise(16), list[int]()
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for epoch in cluster.epochs():
            seen.append(epoch)
            for x, y in cluster.own_batches([(data.x, data.y)]):
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
        assert seen == [0, 1, 2] and cluster.step == 3


def test_a_loop_without_batches_is_told() -> None:
    with alone() as cluster:
        with pytest.raises(UserError, match="before attach"):
            next(cluster.epochs())
        setup = perceptron(1)
        cluster.attach(setup.model, setup.optimizer)
        with pytest.raises(UserError, match="an epoch without batches"):
            list(cluster.epochs())
