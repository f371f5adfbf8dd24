"""Late work that is carried over, in whole runs: it enters a later update once, and weighs less."""

from __future__ import annotations

import copy
import math
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Crew, Noise, in_float64, loss, perceptron
from msgspec import UNSET
from torch import Tensor, nn
from whole import DEADLINE_S, Gate, Run, Served

from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import WINDOW
from paramserver.rounds.effects import Finish
from paramserver.server.data import Data
from paramserver.settings import Settings
from paramserver.tensors.codec import CODECS
from paramserver.tensors.error_feedback import ErrorFeedback


class Late:
    """Worker 2 stands before a batch until worker 1 is three updates further, and that one until
    what the other brings has entered its round."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self._go, self.entered = threading.Event(), threading.Event()

    def __call__(self, number: int, step: int) -> None:
        if number == 2 and step >= 4 and not self.held:
            self.held.append(step)
            assert self._go.wait(DEADLINE_S)
        elif number == 1 and self.held and step >= self.held[0] + 3 and not self._go.is_set():
            self._go.set()
            assert self.entered.wait(DEADLINE_S)

    def until_entered(self, served: Served) -> None:
        """Until the late gradient is in the open round."""

        def entered() -> bool:
            current = served.server.rounds.round
            return current is not None and any(m.is_carried for m in current.members.values())

        served.until(lambda: self._go.is_set() and entered())
        self.entered.set()


def contributions(crew: Crew) -> list[list[tuple[int, int]]]:
    """For each update: the worker and the step at which its gradient was made."""
    used, found = set[tuple[int, int]](), []
    for close in crew.served.closes:
        made = []
        for worker in close.contributors:
            steps = [s for w, s in crew.batches if w == worker and s < close.step]
            made.append((worker, max(steps)))
        assert not used.intersection(made), "a gradient is in two updates"
        used.update(made)
        found.append(made)
    return found


def truth(crew: Crew) -> nn.Module:
    """One process that does what the log says."""
    setup = crew.make(crew.origin())
    weights = [copy.deepcopy(setup.model)]
    for close, made in zip(crew.served.closes, contributions(crew), strict=True):
        total, sums = 0.0, [torch.zeros_like(p) for p in setup.model.parameters()]
        for worker, step in made:
            indices = crew.batches[worker, step]
            assert len(indices) == close.contributors[worker]
            weight = len(indices) / math.sqrt(close.step - step)
            model = weights[step]
            gradients = torch.autograd.grad(
                loss(model, crew.data.x[indices], crew.data.y[indices]), list(model.parameters())
            )
            total += weight
            for each, gradient in zip(sums, gradients, strict=True):
                each += weight * gradient
        for p, each in zip(setup.model.parameters(), sums, strict=True):
            p.grad = each / total
        setup.optimizer.step()
        weights.append(copy.deepcopy(setup.model))
    return setup.model


def test_a_late_gradient_enters_a_later_update_with_less_weight_and_once() -> None:
    """The model has one bucket, so that nobody is late with a part of its gradient."""
    late = Late()
    settings = {"num_workers": 2, "num_epochs": 3, "timeout": 0.05, "max_staleness": 8}
    with Served(**settings) as served:
        data = Noise(160)
        data.x = data.x.double()
        crew = Crew(served, in_float64(perceptron), data, late)
        futures = [crew.start(1, 4), crew.start(2, 4)]
        late.until_entered(served)
        served.wait(*futures)
    assert served.samples == (480, 0, 0)
    applied = [index for made in contributions(crew) for key in made for index in crew.batches[key]]
    assert sorted(applied) == sorted([*range(160)] * 3)
    (held,) = late.held
    lags = [
        close.step - 1 - step
        for close, made in zip(served.closes, contributions(crew), strict=True)
        for worker, step in made
        if (worker, step) == (2, held)
    ]
    assert len(lags) == 1 and lags[0] >= 3
    assert len(served.digests()) == 1
    expected = truth(crew).state_dict()
    for setup in crew.setups.values():
        torch.testing.assert_close(setup.model.state_dict(), expected, rtol=0, atol=1e-10)


def test_a_late_gradient_of_many_buckets_comes_as_a_whole() -> None:
    """More buckets than are sent before an average has come."""
    late = Late()
    settings = {"num_workers": 2, "num_epochs": 3, "timeout": 0.05, "max_staleness": 8}
    with Served(bucket_mb=0.0001, **settings) as served:
        crew = Crew(served, perceptron, Noise(160), late)
        futures = [crew.start(1, 4), crew.start(2, 4)]
        late.until_entered(served)
        served.wait(*futures)
        (held,) = late.held
    assert len(served.closes[0].buckets) > WINDOW
    assert sum(served.samples) == 480
    with_2 = next(c for c in served.closes if c.step > held and 2 in c.contributors)
    assert with_2.step > held + 3 and 2 not in with_2.partly
    before = served.closes[with_2.step - 2]
    assert before.carried is not UNSET and set(before.carried) == {2}
    assert len(served.digests()) == 1


SMALL = """import torch


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(784, 10))
"""
"""So small that pyzmq sends nothing without a copy: it has a thread for that, which stays."""


def forks(run: Run) -> AbstractContextManager[None]:
    """What programs are forked from is there, before threads are counted."""
    assert run.start("a program", "-c", "pass").end() == 0
    return nullcontext()


def test_a_late_program_is_carried_over(tmp_path: Path) -> None:
    """Both stand at a gate: the first one two rounds after the second."""
    others = tmp_path / "others"
    others.mkdir()
    settings = {
        "num_workers": 2,
        "num_epochs": 1,
        "timeout": 0.5,
        "max_staleness": 8,
        "model": {"type": "gated:Net"},
        "dataset": {"name": "digits"},
        "batch_size": 100,
    }
    with Run(tmp_path) as run, forks(run), Served(**settings) as served:
        run.port = served.port
        with Gate(tmp_path, at=6) as first, Gate(others, at=4) as second:
            for folder in (tmp_path, others):
                module = folder / "gated/__init__.py"
                module.write_text(module.read_text().replace("class Net(SimpleNN):", SMALL))
            one = run.worker(1)
            two = run.start(
                "worker 2",
                *("-m", "workers", "id=2", f"port={run.port}", "threads=1"),
                folder=others,
            )
            second.wait(two)
            first.wait(one)
            second.open()

            def entered() -> bool:
                current = served.server.rounds.round
                return current is not None and any(m.is_carried for m in current.members.values())

            served.until(entered)
        assert one.end() == two.end() == 0
    carried = [c.step for c in served.closes if c.carried is not UNSET and 2 in c.carried]
    entered_at = next(c for c in served.closes if c.step > carried[0] and 2 in c.contributors)
    assert carried[0] == 4 and entered_at.step == 6 and set(entered_at.contributors) == {1, 2}
    assert served.samples[0] == sum(served.samples)
    assert len(served.digests()) == 1


# ------------------------------------------------------------------------------ what it becomes


LAYOUT = wire.Layout(
    (
        wire.Tensor("weight", (4,), "float32"),
        wire.Tensor("norm.running_mean", (2,), "float32", "stat"),
        wire.Tensor("norm.num_batches_tracked", (), "int64", "count", "int64"),
        wire.Tensor("queue.queue", (2,), "float32", "whole", "bytes"),
    )
)


def pushed(data: Data, worker: int, bucket: int, values: Tensor, *, late: bool = False) -> None:
    assert data.plan is not None
    if data.plan.buckets[bucket].kind == "whole":
        buffers: list[Any] = [bytearray(values.numpy().tobytes())]
    elif data.plan.buckets[bucket].kind == "grad":
        buffers, _ = CODECS["float32"].encode(values.clone())
    else:
        buffers = [values.numpy().data]
    push = wire.Push(round=1, bucket=bucket, samples=8)
    assert data.push(str(worker), worker, push, buffers, late=late)[0] is None


def average(data: Data, bucket: int, weight: float, dtype: torch.dtype) -> list[float]:
    data.finish(Finish(2, 2, bucket, weight, ()))
    [(told, frames)] = data.due()
    values = torch.frombuffer(bytearray(b"".join(bytes(f) for f in frames[1:])), dtype=dtype)
    return (values.double() / told.scale if told.scale != 1.0 else values.double()).tolist()


@pytest.mark.parametrize("aggregate", ["mean", "trimmed", "median", "clipped"])
def test_statistics_weigh_less_counters_are_the_largest_and_buffers_those_of_who_is_in_time(
    aggregate: str,
) -> None:
    data = Data(Settings(aggregate=aggregate, history_mb=0), "nonce", None)
    data.start(LAYOUT)
    assert data.plan is not None
    at = {b.kind: b.index for b in data.plan.buckets}
    share = 0.5
    values = {
        "grad": (torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 8.0, 0.0, 1.0])),
        "stat": (torch.tensor([1.0, 1.0]), torch.tensor([4.0, 7.0])),
        "count": (torch.tensor([9]), torch.tensor([6])),
        "whole": (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])),
    }
    for kind, (_, late) in values.items():
        pushed(data, 1, at[kind], late, late=True)
    data.forget_round(())  # of the round that went on without it
    for kind, (in_time, _) in values.items():
        pushed(data, 2, at[kind], in_time)
        data.add(1, at[kind], 8 * share, late=True)
        data.add(2, at[kind], 8)
    if aggregate == "mean":
        expected = (values["grad"][0] * 8 + values["grad"][1] * 4) / 12
        assert average(data, at["grad"], 12.0, torch.float32) == pytest.approx(expected.tolist())
    else:
        average(data, at["grad"], 12.0, torch.float32)
    if aggregate != "clipped":
        found = average(data, at["stat"], 12.0, torch.float32)
        weighed = [(1.0 * 8 + 4.0 * 4) / 12, (1.0 * 8 + 7.0 * 4) / 12]
        assert found in ([1.0, 1.0], pytest.approx(weighed))
        assert (found == [1.0, 1.0]) == (aggregate == "median"), "who weighs more is the middle"
    assert average(data, at["count"], 12.0, torch.int64) == [9.0]
    assert average(data, at["whole"], 12.0, torch.float32) == [1.0, 2.0]


def test_what_is_late_stays_through_the_end_of_a_round_and_is_dropped_by_name() -> None:
    data = Data(Settings(history_mb=0), "nonce", None)
    data.start(LAYOUT)
    pushed(data, 1, 0, torch.ones(4), late=True)
    pushed(data, 2, 0, torch.ones(4))
    data.forget_round((0,))
    assert set(data._payloads) == {(1, 0)}
    data.drop(1, 0)
    assert not data._payloads


def test_what_a_codec_left_of_a_late_gradient_weighs_as_little() -> None:
    data = Data(Settings(history_mb=0), "nonce", None)
    data.start(LAYOUT)
    assert data.plan is not None
    bucket = data.plan.buckets[0]
    left = []
    for share in (1.0, 0.5):
        feedback = ErrorFeedback(data.plan, CODECS["int8"])
        feedback.encode(bucket, torch.tensor([1.0, 0.001, 0.5, 0.3]), samples=8)
        residual = feedback._residuals[0].clone()
        feedback.settled((0,), share)
        feedback.encode(bucket, torch.zeros(4), samples=8)
        left.append(feedback._residuals[0] / residual)
    assert torch.isfinite(left[0]).any()
    with_all, with_half = (x[torch.isfinite(x)] for x in left)
    torch.testing.assert_close(with_half, with_all * 0.5, atol=0.02, rtol=0.05)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("deterministic=true",), "must be 0 with deterministic=true"),
        (("local_steps=8",), "must be 0 with local_steps=8"),
        (("local_steps=auto",), "must be 0 with local_steps=auto"),
    ],
)
def test_where_late_work_has_no_meaning_it_is_refused(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=why):
        load(["max_staleness=3", *words], "server")


def test_several_pairs_are_refused_with_the_way_out() -> None:
    pairs = {
        name: (model, torch.optim.SGD(model.parameters(), lr=0.1))
        for name, model in (("one", nn.Linear(2, 2)), ("two", nn.Linear(2, 2)))
    }
    with (
        Served(num_workers=1, max_staleness=2) as served,
        served.join(1, lambda line: None) as cluster,
        pytest.raises(UserError, match="max_staleness=0"),
    ):
        cluster.attach(**pairs)
