"""What a loop sets by hand in its optimizer's groups, and what runs after each step: the same in
every replica, and the same as in one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Noise, Setup, in_float64, one_step, perceptron
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from whole import DEADLINE_S, ENDLESS, Served

import workers
from paramserver.errors import UserError
from paramserver.protocol import messages as wire
from workers.replica.groups import ByHand, shown

EXACT = 1e-9
Change = Callable[[float, str], Any]
"""What a loop does at a step: "before" backward, "between" backward and step, or "after" it."""


def adam(number: int) -> Setup:
    setup = in_float64(perceptron)(number)
    first, *rest = setup.model.parameters()
    return Setup(setup.model, AdamW([{"params": [first]}, {"params": rest, "lr": 0.02}], lr=0.01))


def rate(step: float) -> float:
    return 0.01 / (1 + step % 7)


def rate_before(optimizer: Optimizer) -> Change:
    def change(step: float, when: str) -> None:
        if when == "before":
            for number, group in enumerate(optimizer.param_groups):
                group["lr"] = rate(step) * (1 + number)

    return change


def rate_between(optimizer: Optimizer) -> Change:
    def change(step: float, when: str) -> None:
        if when == "between":
            for group in optimizer.param_groups:
                group["lr"] = rate(step)

    return change


def own_schedule(optimizer: Optimizer) -> Change:
    """A schedule of torch that `attach` does not know."""
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step % 5))

    def change(step: float, when: str) -> None:
        if when == "after":
            schedule.step()

    return change


def betas_and_decay(optimizer: Optimizer) -> Change:
    def change(step: float, when: str) -> None:
        if when == "before" and step == 3:
            optimizer.param_groups[0]["betas"] = (0.5, 0.9)
            optimizer.param_groups[1]["weight_decay"] = 0.3
            optimizer.param_groups[1]["amsgrad"] = False

    return change


def origin(served: Served) -> int:
    """The worker whose model was the run's first state."""
    found = re.search(r"the first state comes from worker (\d+)", served.text)
    assert found
    return int(found[1])


class Loops:
    """Workers in threads whose loops set values by hand."""

    def __init__(self, served: Served, make: Callable[[Optimizer], Change]) -> None:
        self.served, self.make = served, make
        self.data = Noise(96)
        self.data.x = self.data.x.double()
        self.batches: dict[tuple[int, int], list[int]] = {}
        self.models: dict[int, nn.Module] = {}
        self.rates: dict[int, list[Any]] = {}
        self.said: dict[int, list[str]] = {}
        self.hold: Callable[[int, int], None] = lambda number, step: None

    def work(self, number: int, *, steps_known: bool = True) -> None:
        """With `steps_known`, the loop goes by `cluster.step`, else by a count of its own."""
        said = self.said[number] = list[str]()
        with self.served.join(number, said.append) as cluster:
            setup = adam(number)
            model, optimizer = cluster.attach(setup.model, setup.optimizer)
            change = self.make(optimizer)
            for count, (x, y, i) in enumerate(cluster.batches(self.data, batch_size=8)):
                # No whole number: rates repeat, and at some steps both counts would give the same.
                step = cluster.step if steps_known else count + 0.5
                self.hold(number, cluster.step)
                self.batches[number, cluster.step] = i.tolist()
                change(step, "before")
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                change(step, "between")
                optimizer.step()
                change(step, "after")
            self.models[number] = model
            self.rates[number] = [g["lr"] for g in optimizer.param_groups]

    def truth(self) -> nn.Module:
        setup = adam(origin(self.served))
        change = self.make(setup.optimizer)
        for step, close in enumerate(self.served.closes):
            change(step, "before")
            change(step, "between")
            batches = [self.batches[worker, step] for worker in close.contributors]
            one_step(setup, [(self.data.x[b], self.data.y[b]) for b in batches])
            change(step, "after")
        return setup.model

    def check(self) -> None:
        assert len(self.served.digests()) == 1
        expected = self.truth().state_dict()
        for model in self.models.values():
            torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("make", [rate_before, rate_between, own_schedule, betas_and_decay])
def test_values_that_all_loops_set_are_those_of_one_process(make: Any) -> None:
    with Served(num_workers=2, num_epochs=2, digest_steps=5) as served:
        loops = Loops(served, make)
        served.wait(served.start(loops.work, 1), served.start(loops.work, 2))
    loops.check()
    assert "other weights" not in served.text
    assert not any("this loop set" in line for said in loops.said.values() for line in said)


def test_a_late_loop_with_a_count_of_its_own_is_told_and_changes_nothing() -> None:
    with Served(num_workers=2, num_epochs=ENDLESS, digest_steps=5) as served:
        loops = Loops(served, rate_before)
        first = [served.start(loops.work, number) for number in (1, 2)]
        served.until(lambda: len(served.closes) >= 4)
        late = served.start(loops.work, 3, steps_known=False)
        served.until_contributes(3)
        served.stop()
        served.wait(*first, late)
    loops.check()
    assert "other weights" not in served.text
    said = "\n".join(loops.said[3])
    assert re.search(r"this loop set lr to .* worker 1 set lr to .*cluster\.step", said)
    assert said.count("this loop set") == 1 and "this loop set" not in "\n".join(loops.said[1])
    assert re.search(r"worker 3 .* sets lr .* other values than worker 1", served.text)


def test_a_value_that_nobody_set_before_is_read_in_step_from_then_on() -> None:
    """The first time it is set after the gradient had left: it counts one step later, which is
    said, and everywhere."""

    def make(optimizer: Optimizer) -> Change:
        def change(step: float, when: str) -> None:
            if when == "between" and step in (6, 9):
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 * step

        return change

    with Served(num_workers=2, num_epochs=2) as served:
        loops = Loops(served, make)
        served.wait(served.start(loops.work, 1), served.start(loops.work, 2))
    assert len(served.digests()) == 1
    sets = [close.step for close in served.closes if close.groups is not wire.msgspec.UNSET]
    assert sets == [8, 10]  # the value of step 6 counts for the step to 8, that of 9 for its own
    assert sum("it counts from the next step on" in line for line in loops.said[1]) == 1
    assert loops.rates[1] == loops.rates[2] == [0.9, 0.9]


def test_what_one_loop_alone_sets_is_put_back() -> None:
    """Worker 1's counts, also where it sets nothing."""

    def only_second(number: int) -> Callable[[Optimizer], Change]:
        def make(optimizer: Optimizer) -> Change:
            def change(step: float, when: str) -> None:
                if number == 2 and when == "before" and step == 3:
                    optimizer.param_groups[0]["lr"] = 1.0

            return change

        return make

    with Served(num_workers=2, num_epochs=1) as served:
        loops = Loops(served, only_second(1))
        other = Loops(served, only_second(2))
        served.wait(served.start(loops.work, 1), served.start(other.work, 2))
    assert len(served.digests()) == 1
    assert loops.rates[1] == other.rates[2] == [0.01, 0.02]
    assert any("worker 1 set none of it" in line for line in other.said[2])


# --------------------------------------------------------------------------------- after the step


class Ema(Setup):
    def __init__(self, number: int) -> None:
        setup = adam(number)
        super().__init__(setup.model, setup.optimizer)
        self.ema = AveragedModel(setup.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def test_an_average_of_the_weights_is_that_of_one_process_also_in_a_late_joiner() -> None:
    data = Noise(96)
    data.x = data.x.double()
    batches: dict[tuple[int, int], list[int]] = {}
    emas: dict[int, nn.Module] = {}

    with Served(num_workers=2, num_epochs=ENDLESS) as served:

        def work(number: int) -> None:
            with served.join(number, lambda line: None) as cluster:
                setup = Ema(number)
                model, optimizer = cluster.attach(
                    setup.model, setup.optimizer, after_step=setup.ema.update_parameters
                )
                emas[number] = setup.ema
                for x, y, i in cluster.batches(data, batch_size=8):
                    batches[number, cluster.step] = i.tolist()
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()

        first = [served.start(work, number) for number in (1, 2)]
        served.until(lambda: len(served.closes) >= 4)
        late = served.start(work, 3)
        served.until_contributes(3)
        served.stop()
        served.wait(*first, late)

    truth = Ema(origin(served))
    for step, close in enumerate(served.closes):
        own = [batches[worker, step] for worker in close.contributors]
        one_step(truth, [(data.x[b], data.y[b]) for b in own])
        truth.ema.update_parameters(truth.model)
    assert any(3 in close.contributors for close in served.closes)
    for ema in emas.values():
        torch.testing.assert_close(ema.state_dict(), truth.ema.state_dict(), rtol=0, atol=EXACT)


def test_what_runs_after_a_step_may_change_weights_and_buffers() -> None:
    """The weights of a critic are clipped so."""

    def clip(model: nn.Module) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.05, 0.05)
            model.steps += 1

    with Served(num_workers=2, num_epochs=1) as served:
        models = {}

        def work(number: int) -> None:
            with served.join(number, lambda line: None) as cluster:
                setup = adam(number)
                setup.model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
                model, optimizer = cluster.attach(setup.model, setup.optimizer, after_step=clip)
                models[number] = model
                for x, y, _ in cluster.batches(Doubles(), batch_size=8):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()

        served.wait(served.start(work, 1), served.start(work, 2))
    assert len(served.digests()) == 1
    for model in models.values():
        assert all(float(p.detach().abs().max()) <= 0.05 for p in model.parameters())
        assert int(model.steps) == len(served.closes) > 0


class Doubles(Noise):
    def __init__(self) -> None:
        super().__init__(64)
        self.x = self.x.double()


def test_a_worker_without_the_average_is_refused() -> None:
    with Served(num_workers=2) as served:
        first = served.join(1, lambda line: None)
        setup = Ema(1)
        attached = served.start(
            first.attach, setup.model, setup.optimizer, after_step=setup.ema.update_parameters
        )
        served.until(lambda: any(p.join for p in served.server.rounds.peers.values()))
        other = adam(2)
        with (
            served.join(2, lambda line: None) as second,
            pytest.raises(UserError, match="after_step update_parameters"),
        ):
            second.attach(other.model, other.optimizer)
        attached.result(DEADLINE_S)
        first.leave()


# ------------------------------------------------------------------------- the attached optimizer


def alone(**attach: Any) -> tuple[workers.Cluster, nn.Module, Any]:
    cluster = workers.join(port=1, alone={"num_epochs": 1}, say=lambda line: None)
    setup = adam(1)
    return cluster, *cluster.attach(setup.model, setup.optimizer, **attach)


def test_the_attached_optimizer_is_an_optimizer() -> None:
    cluster, _, optimizer = alone()
    assert isinstance(optimizer, Optimizer)
    assert optimizer.state_dict()["param_groups"][1]["lr"] == 0.02
    assert "AdamW" in repr(optimizer) and optimizer.defaults["lr"] == 0.01
    for change in (
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: optimizer.step(lambda: 0.0),
    ):
        with pytest.raises(UserError):
            change()
    cluster.leave()
    optimizer.load_state_dict(optimizer.state_dict())
    assert StepLR(optimizer, 3).get_last_lr() == [0.01, 0.02]


def test_a_loop_alone_sets_its_rate_too() -> None:
    cluster, model, optimizer = alone()
    start = [p.clone() for p in model.parameters()]
    for step, (x, y, _) in enumerate(cluster.batches(Doubles(), batch_size=32)):
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step == 0 else 0.1
            group["weight_decay"] = 0.0
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)]
        assert any(moved) == (step > 0)
    cluster.leave()


# -------------------------------------------------------------------------------- values as such


def sgd(**values: Any) -> Optimizer:
    return SGD([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **values})


def test_numbers_of_tensors_are_values_as_well() -> None:
    optimizer = sgd(lr=torch.tensor(0.5))
    by_hand = ByHand(optimizer)
    assert by_hand.changed() == {}
    optimizer.param_groups[0]["lr"].fill_(0.25)
    assert by_hand.changed() == {0: {"lr": 0.25}}
    by_hand.put({0: {"lr": 0.125}})
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == 0.125


@pytest.mark.parametrize("value", [float("nan"), object(), torch.zeros(3), "x" * 100, {1: 2}])
def test_a_value_that_cannot_be_sent_is_an_error(value: Any) -> None:
    optimizer = sgd()
    by_hand = ByHand(optimizer)
    optimizer.param_groups[0]["lr"] = value
    with pytest.raises(UserError, match="lr of a parameter group"):
        by_hand.changed()


@pytest.mark.parametrize(
    "values",
    [
        {7: {"lr": 1.0}},
        {-1: {"lr": 1.0}},
        {0: {"params": (1, 2)}},
        {0: {"lr": "fast"}},
        {0: {"nesterov": 1.5}},
        {0: {"unknown": 1.0}},
        {0: {"lr": (1.0, 2.0)}},
    ],
)
def test_values_of_a_liar_change_nothing(values: Any) -> None:
    optimizer = sgd()
    by_hand = ByHand(optimizer)
    before = dict(optimizer.param_groups[0])
    by_hand.put(values)
    after = optimizer.param_groups[0]
    assert {k: v for k, v in after.items() if k != "unknown"} == before


def test_what_was_set_is_told_in_words() -> None:
    assert shown({0: {"lr": 0.5, "betas": (0.9, 0.99)}}) == "lr to 0.5, betas to (0.9, 0.99)"
    assert shown({1: {"lr": 0.5}}) == "lr to 0.5 in group 1"
    assert shown({}) == "nothing"


def test_a_schedule_made_for_the_attached_optimizer_goes_into_the_next_training() -> None:
    cluster, model, optimizer = alone()
    schedule = StepLR(optimizer, 1, gamma=0.5)
    cluster.leave()
    cluster = workers.join(port=1, alone={"num_epochs": 1}, say=lambda line: None)
    model, optimizer = cluster.attach(model, optimizer, scheduler=schedule)
    for x, y, _ in cluster.batches(Doubles(), batch_size=32):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    cluster.leave()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.005]


def test_a_function_after_each_step_needs_the_model_at_the_anchor() -> None:
    with Served(num_workers=1, local_steps=4, overlap=True) as served:
        setup = adam(1)
        with (
            served.join(1, lambda line: None) as cluster,
            pytest.raises(UserError, match="overlap=false"),
        ):
            cluster.attach(setup.model, setup.optimizer, after_step=lambda model: None)
