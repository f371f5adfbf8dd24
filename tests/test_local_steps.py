"""Local steps: the outer step's numbers, whole runs beside plain scripts, and how many are made."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Crew, Noise, Setup, in_float64, loss, perceptron
from torch import Tensor, nn
from whole import DEADLINE_S, ENDLESS, Served, free_port

from paramserver.config.schema import build
from paramserver.errors import UserError
from paramserver.rounds.ledger import Ledger, optimizer_steps
from paramserver.rounds.local_steps import LocalSteps, OuterStep, described, outer_of
from paramserver.rounds.shares import Cost
from paramserver.settings import Settings
from paramserver.tensors.order import order

SAMPLES, BATCH = 192, 4


class Doubles(Noise):
    """In float64, so that rounding hides no mistake."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.x = self.x.double()


def adam(seed: int) -> Setup:
    setup = perceptron(seed)
    optimizer = torch.optim.Adam(setup.model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return Setup(setup.model, optimizer, scheduler=schedule, clip_norm=0.5)


class Truth:
    """One process that does what the log of a run with local steps says."""

    def __init__(self, crew: Crew, outer: OuterStep, rounds: int | None = None) -> None:
        self.crew, self.outer = crew, outer
        first = crew.make(crew.origin())
        self.anchor = [p.detach().clone() for p in first.model.parameters()]
        self.own: dict[int, Setup] = {}
        self.momentum = [torch.zeros_like(p) for p in self.anchor]
        self.steps = 0
        for close in crew.served.closes[:rounds]:
            deltas = {w: self._steps_of(w, close.local_steps) for w in close.contributors}
            self._move(deltas, close.contributors)
            self.steps = optimizer_steps(close.ledger, close.step)

    def _steps_of(self, worker: int, most: int) -> list[Tensor]:
        setup = self.own.setdefault(worker, self.crew.make(self.crew.origin()))
        with torch.no_grad():
            for p, there in zip(setup.model.parameters(), self.anchor, strict=True):
                p.copy_(there)
        schedule: Any = setup.attach.get("scheduler")
        if schedule is not None:  # at the log's place, whatever steps this worker has made
            while schedule.last_epoch < self.steps:
                schedule.step()
            assert schedule.last_epoch == self.steps
        for step in range(self.steps, self.steps + most):
            indices = self.crew.batches.get((worker, step))
            if indices is None:
                break
            setup.optimizer.zero_grad()
            loss(setup.model, self.crew.data.x[indices], self.crew.data.y[indices]).backward()
            if "clip_norm" in setup.attach:
                nn.utils.clip_grad_norm_(setup.model.parameters(), setup.attach["clip_norm"])
            setup.optimizer.step()
            if schedule is not None:
                schedule.step()
        own = setup.model.parameters()
        return [a - p.detach() for a, p in zip(self.anchor, own, strict=True)]

    def _move(self, deltas: dict[int, list[Tensor]], samples: dict[int, int]) -> None:
        total = sum(samples.values())
        for i, anchor in enumerate(self.anchor):
            mean = sum(samples[w] * d[i] for w, d in deltas.items()) / total
            assert isinstance(mean, Tensor)
            self.momentum[i] = self.outer.momentum * self.momentum[i] + mean
            step = self.momentum[i]
            if self.outer.nesterov:
                step = mean + self.outer.momentum * step
            anchor -= self.outer.lr * step


DILOCO = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
HEAVY_BALL = {"lr": 1.0, "momentum": 0.2, "nesterov": False}


@pytest.mark.parametrize("make", [perceptron, adam])
@pytest.mark.parametrize("outer", [None, DILOCO, HEAVY_BALL])
def test_replicas_are_what_a_plain_script_computes(make: Any, outer: dict[str, Any] | None) -> None:
    """Two workers; each with inner moments of its own, a schedule that follows the log, and inner
    clipping."""
    settings = {"num_workers": 2, "num_epochs": 1, "batch_size": BATCH, "local_steps": 6}
    with Served(outer=outer, **settings) as served:
        crew = Crew(served, in_float64(make), Doubles(SAMPLES))
        served.wait(crew.start(1), crew.start(2), served.end)
        rule = outer_of(served.settings)
        assert rule is not None
        truth = Truth(crew, rule)
        assert [close.local_steps for close in served.closes] == [6, 6, 6, 6]
        assert truth.steps == SAMPLES // (2 * BATCH)
        assert sorted(i for b in crew.batches.values() for i in b) == list(range(SAMPLES))
        for setup in crew.setups.values():
            for p, there in zip(setup.model.parameters(), truth.anchor, strict=True):
                torch.testing.assert_close(p, there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [perceptron, adam])
@pytest.mark.parametrize("overlap", [False, True])
def test_one_worker_ends_as_a_script_without_us(make: Any, overlap: bool) -> None:
    """To the bit; with overlap, which carries steps over to the anchor, within rounding."""
    data = Doubles(96) if overlap else Noise(96)  # the last round of an epoch has two steps
    make = in_float64(make) if overlap else make
    settings = {"num_workers": 1, "num_epochs": 2, "batch_size": 8, "local_steps": 5}
    with Served(overlap=overlap, **settings) as served:
        crew = Crew(served, make, data)
        served.wait(crew.start(1), served.end)
        alone = make(crew.origin())
        steps = sorted(step for _, step in crew.batches)
        assert steps == list(range(len(steps)))
        for step in steps:
            indices = crew.batches[1, step]
            alone.optimizer.zero_grad()
            loss(alone.model, data.x[indices], data.y[indices]).backward()
            if "clip_norm" in alone.attach:
                nn.utils.clip_grad_norm_(alone.model.parameters(), alone.attach["clip_norm"])
            alone.optimizer.step()
            if "scheduler" in alone.attach:
                alone.attach["scheduler"].step()
        for p, there in zip(
            crew.setups[1].model.parameters(), alone.model.parameters(), strict=True
        ):
            torch.testing.assert_close(p, there, rtol=1e-12 * overlap, atol=1e-12 * overlap)


def test_the_fixture_of_torchft() -> None:
    """Weight 1, gradient 2, inner SGD with rate 1, outer SGD with rate 2, six steps: the weights
    after each step, as torchft's regression fixture for DiLoCo has them."""
    seen: list[float] = []

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    outer = {"lr": 2.0, "momentum": 0.0}
    with Served(num_workers=1, num_epochs=1, batch_size=1, local_steps=6, outer=outer) as served:

        def work() -> None:
            with served.join(1, lambda line: None) as cluster:
                model = Two()
                inner = torch.optim.SGD(model.parameters(), lr=1.0)
                model, optimizer = cluster.attach(model, inner)
                for _ in cluster.batches(Noise(12)):
                    seen.append(model.weight.item())
                    optimizer.zero_grad()
                    (2.0 * model.weight).sum().backward()
                    optimizer.step()

        served.wait(served.start(work), served.end)
    assert seen == [1, -1, -3, -5, -7, -9, -23, -25, -27, -29, -31, -33]


def test_warm_up_is_synchronous() -> None:
    """Gradients are averaged in the first steps, and the optimizer's state goes on from there."""
    settings = {"num_workers": 2, "batch_size": BATCH, "local_steps": 4, "local_warmup_steps": 3}
    with Served(num_epochs=1, **settings) as served:
        crew = Crew(served, in_float64(adam), Doubles(88))
        served.wait(crew.start(1), crew.start(2), served.end)
        assert [c.local_steps for c in served.closes] == [1, 1, 1, 4, 4]
        assert [optimizer_steps(c.ledger, c.step) for c in served.closes] == [1, 2, 3, 7, 11]
        both = [s.model for s in crew.setups.values()]
        for p, there in zip(*(m.parameters() for m in both), strict=True):
            assert torch.equal(p, there)


# ------------------------------------------------------------------------- the number of steps


def test_warm_up_and_number() -> None:
    fixed = LocalSteps(32, warmup=5)
    assert [fixed.of_next(done, local=False) for done in (0, 4, 5, 6)] == [1, 1, 32, 32]
    assert fixed.of_next(0, local=True) == 32
    assert not LocalSteps(1).used


def test_auto_chooses_from_measured_times_and_never_goes_back_to_one() -> None:
    auto = LocalSteps("auto")
    assert auto.of_next(0, local=False) == 1
    changes = [auto.took(1, seconds=0.11, compute_s=0.01) for _ in range(16)]
    assert changes == [False] * 15 + [True]
    assert auto.of_next(16, local=False) == 190  # 19 times 0.1 s, in steps of 0.01 s
    for _ in range(16):
        auto.took(190, seconds=1.9001, compute_s=1.9)
    assert auto.of_next(16 + 16 * 190, local=True) == 2
    for nonsense in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        assert not auto.took(2, seconds=1.0, compute_s=nonsense)


def test_auto_with_overlap_keeps_a_number_that_hides_the_exchange() -> None:
    """What is hidden is not measured: a smaller number would show it again."""
    auto = LocalSteps("auto", overlap=True)
    for round_s, compute_s, steps in ((1.01, 0.01, 101), (1.0, 0.99, 101), (2.02, 1.01, 202)):
        for _ in range(16):
            auto.took(auto.of_next(99, local=False), seconds=round_s, compute_s=compute_s)
        assert auto.of_next(99, local=True) == pytest.approx(steps, abs=2)


def test_slower_machines_make_fewer_steps() -> None:
    steps = LocalSteps(32)
    costs = {1: Cost(0.0, 0.001), 2: Cost(0.0, 0.002), 3: Cost(0.0, 0.004), 4: Cost(0.0, 0.1)}
    asked = {1: 8, 2: 8, 3: 8, 4: 8, 5: 8}
    assert steps.by_speed(32, asked, costs) == {1: 32, 2: 16, 3: 8, 4: 0, 5: 32}
    noisy = {**costs, 2: Cost(0.0, 0.00205)}
    assert steps.by_speed(32, asked, noisy)[2] == 16
    assert steps.by_speed(32, asked, {**costs, 2: Cost(0.0, 0.001)})[2] == 32


def test_steps_are_counted_by_samples_whatever_rounds_they_came_in() -> None:
    ledger = Ledger(1000, 1)
    ledger.begin_steps(0)
    for size, steps in ((100, 3), (60, 5), (32, 6), (8, 6), (56, 8)):
        ledger.settle(ledger.lease(size), "done")  # type: ignore[arg-type]
        ledger.count_steps(32, 1)
        assert ledger.steps == steps
        ledger = Ledger.from_state(ledger.state())
    assert optimizer_steps(ledger.state(), 5) == 8
    assert optimizer_steps(Ledger(10, 1).state(), 5) == 5


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({}, None),
        ({"local_steps": 32, "num_workers": 1}, OuterStep(1.0, 0.0, False, True)),
        ({"local_steps": 32}, OuterStep(0.6, 0.9, True, False)),
        ({"local_steps": 32, "num_workers": 4}, OuterStep(0.7, 0.9, True, False)),
        ({"local_steps": 32, "num_workers": 8}, OuterStep(0.8, 0.9, True, False)),
        ({"local_steps": 8}, OuterStep(1.0, 0.0, False, True)),
        ({"local_steps": 8, "codec": "int8"}, OuterStep(1.0, 0.0, False, False)),
        ({"local_steps": 8, "num_workers": 4}, OuterStep(1.0, 0.2, False, False)),
        ({"local_steps": "auto", "num_workers": 8}, OuterStep(1.0, 0.5, False, False)),
        ({"local_steps": 64, "codec": "topk"}, OuterStep(1.0, 0.0, False, False)),
        (
            {"local_steps": 4, "outer": {"lr": 0.5, "momentum": 0.3}},
            OuterStep(0.5, 0.3, True, False),
        ),
    ],
)
def test_the_outer_step_of_a_run(settings: dict[str, Any], rule: OuterStep | None) -> None:
    assert outer_of(Settings(**settings)) == rule


def test_a_run_says_what_its_outer_step_is() -> None:
    assert described(Settings()) == ""
    long = Settings(local_steps=32, num_workers=4, overlap=True, local_warmup_steps=100)
    assert described(long) == (
        "local steps: 32, after 100 synchronous steps; outer step: rate 0.7, momentum 0.9 "
        "(Nesterov); exchanged while the next ones are computed"
    )
    few = "local steps: as many as suit; outer step: rate 1, no momentum"
    assert described(Settings(local_steps="auto")) == few


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"local_steps": 0}, "local_steps must be 1 or more"),
        ({"local_steps": "many"}, "local_steps must be a whole number or auto"),
        ({"local_steps": "auto", "deterministic": True}, "local_steps must be a number with"),
        ({"overlap": True}, "overlap must be false with local_steps=1"),
        ({"overlap": True, "local_steps": 8, "deterministic": True}, "overlap must be false with"),
        ({"outer": {"lr": 0.7}}, "outer must be null with local_steps=1"),
        ({"local_steps": 8, "outer": {"name": "Adam"}}, "outer.name must be SGD"),
        ({"local_steps": 8, "outer": {"rate": 1}}, "outer.rate must be one of name, lr"),
        ({"local_steps": 8, "outer": {"lr": 0}}, "outer.lr must be a number, more than 0"),
        ({"local_steps": 8, "outer": {"momentum": 1}}, "outer.momentum must be a number from 0"),
        ({"local_steps": 8, "outer": {"nesterov": True}}, "outer.momentum must be more than 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    tree = {**copy.deepcopy(vars(Settings())), **settings}
    tree["wandb"] = vars(tree["wandb"])
    with pytest.raises(UserError, match=words):
        build(tree)


# ------------------------------------------------------------------------- joining and leaving


@pytest.mark.parametrize("overlap", [False, True])
def test_a_newcomer_takes_anchor_and_momentum(overlap: bool) -> None:
    """It has fresh inner moments, and stands where the others stand."""
    settings = {"num_workers": 2, "num_epochs": ENDLESS, "batch_size": BATCH, "local_steps": 4}
    with Served(outer=DILOCO, overlap=overlap, **settings) as served:
        crew = Crew(served, in_float64(adam), Doubles(SAMPLES))
        first = crew.start(1), crew.start(2)
        served.until(lambda: len(served.closes) > 3)
        third = crew.start(3)
        served.until_contributes(3)
        served.stop()
        served.wait(*first, third, served.end)
        assert "worker 3 (" in served.text and "took a snapshot of step" in served.text
        models = [setup.model for setup in crew.setups.values()]
        for both in zip(*(m.parameters() for m in models), strict=True):
            assert all(torch.equal(both[0], p) for p in both)
        done = sum(sum(close.contributors.values()) for close in served.closes)
        assert served.samples == (done, 0, 0)


@pytest.mark.parametrize("overlap", [False, True])
def test_who_leaves_in_the_middle_costs_its_own_part_only(overlap: bool) -> None:
    """Its samples come again, each is counted once, and the others' steps count."""
    settings = {"num_workers": 2, "num_epochs": 1, "batch_size": BATCH, "local_steps": 6}
    with Served(overlap=overlap, **settings) as served:

        def hold(number: int, step: int) -> None:
            if number == 2 and step == 9:
                raise KeyboardInterrupt

        crew = Crew(served, in_float64(perceptron), Doubles(SAMPLES), hold)
        left = crew.start(2)
        served.wait(crew.start(1), served.end)
        assert isinstance(left.exception(), KeyboardInterrupt)
        ledger = served.server.rounds.ledger
        assert ledger is not None and (ledger.done, ledger.partly) == (SAMPLES, 0)
        assert [2 in close.contributors for close in served.closes[:2]] == [True, False]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_loop_that_is_left_between_steps_takes_part_with_those_it_made(overlap: bool) -> None:
    """The rest of its lease comes back, and it holds the average of its last round."""
    settings = {"num_workers": 2, "num_epochs": 1, "batch_size": BATCH, "local_steps": 6}
    looked = threading.Event()
    with Served(overlap=overlap, outer=DILOCO, **settings) as served:
        rule = outer_of(served.settings)
        assert rule is not None

        made: list[int] = []

        def hold(number: int, step: int) -> None:
            """The other one stands before its third round until this one has looked."""
            made.append(step)
            assert len(made) <= 12 or looked.wait(DEADLINE_S)

        crew = Crew(served, in_float64(perceptron), Doubles(SAMPLES), hold)

        def leaves() -> None:
            setup = in_float64(perceptron)(2)
            with served.join(2, lambda line: None) as cluster:
                model, optimizer = cluster.attach(setup.model, setup.optimizer)
                for x, y, indices in cluster.batches(crew.data):
                    crew.batches[2, cluster.step] = indices.tolist()
                    optimizer.zero_grad()
                    loss(model, x, y).backward()
                    optimizer.step()
                    if cluster.step == 9:
                        break
                if not overlap:  # else the other one may have gone on from an anchor before
                    truth = Truth(crew, rule, rounds=2)
                    for p, there in zip(model.parameters(), truth.anchor, strict=True):
                        torch.testing.assert_close(p, there, rtol=1e-12, atol=1e-12)
            looked.set()

        served.wait(crew.start(1), served.start(leaves), served.end)
        assert served.closes[1].contributors == {1: 6 * BATCH, 2: 3 * BATCH}
        ledger = served.server.rounds.ledger
        assert ledger is not None and (ledger.done, ledger.partly) == (SAMPLES, 0)


@pytest.mark.parametrize("steps", [12, 9])
def test_who_leaves_its_loop_holds_the_average_of_its_last_round(steps: int) -> None:
    """With overlap, where this is under way when the loop is left: at a round's end, too."""
    settings = {"num_workers": 1, "num_epochs": 1, "batch_size": BATCH, "local_steps": 6}
    with Served(overlap=True, outer=DILOCO, **settings) as served:

        def leaves() -> None:
            setup = in_float64(perceptron)(1)
            with served.join(1, lambda line: None) as cluster:
                model, optimizer = cluster.attach(setup.model, setup.optimizer)
                for x, y, _ in cluster.batches(Doubles(SAMPLES)):
                    optimizer.zero_grad()
                    loss(model, x, y).backward()
                    optimizer.step()
                    if cluster.step == steps:
                        break
                assert cluster._replica is not None and cluster._replica._outer is not None
                assert cluster.step == steps and not cluster._replica.local
                for p, anchor in cluster._replica._outer._views:
                    assert torch.equal(p, anchor)

        served.start(leaves).result(DEADLINE_S)
        assert [sum(c.contributors.values()) for c in served.closes] == [24, 4 * (steps - 6)]


def test_a_lease_ahead_of_which_nothing_can_be_read() -> None:
    """With overlap it is loaded while the round before is exchanged."""

    settings = {"num_workers": 1, "num_epochs": 1, "batch_size": 1, "local_steps": 2}
    with Served(overlap=True, **settings) as served:
        broken = order(256, served.settings.seed, 0)[8:10].tolist()

        class Broken(Doubles):
            def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
                if index in broken:
                    raise OSError("it is cut off")
                return super().__getitem__(index)

        crew = Crew(served, in_float64(perceptron), Broken(256))
        served.wait(crew.start(1), served.end)
        ledger = served.server.rounds.ledger
        assert ledger is not None and (ledger.done, ledger.skipped) == (254, 2)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_end_in_the_middle_of_a_round_does_not_wait_for_it(overlap: bool) -> None:
    """A person stops the run while workers make their steps: the rest of these is not made."""
    made: list[int] = []
    settings = {"num_workers": 1, "num_epochs": 1, "batch_size": 1, "local_steps": 100_000}
    with Served(overlap=overlap, **settings) as served:

        def hold(number: int, step: int) -> None:
            made.append(step)
            if step == 5:
                served.server.stop("stopped by Ctrl-C")
                served.until(lambda: served.server.rounds.ended is not None)
            if step >= 5:  # a moment later it has come here, too
                link = crew.clusters[1].client.connection.link
                assert link is not None
                link.poll(100)

        crew = Crew(served, perceptron, Noise(100_000), hold)
        served.wait(crew.start(1), served.end)
        assert len(made) < 100


@pytest.mark.parametrize("overlap", [False, True])
def test_a_late_worker_stops_when_its_round_is_over(overlap: bool) -> None:
    """It makes no more of the steps than it has made when it hears so."""
    settings = {"num_workers": 2, "num_epochs": 1, "batch_size": BATCH, "local_steps": 100}
    made: list[int] = []
    with Served(timeout=0.05, overlap=overlap, **settings) as served:

        def late() -> nn.Module:
            setup = in_float64(perceptron)(2)
            with served.join(2, lambda line: None) as cluster:
                model, optimizer = cluster.attach(setup.model, setup.optimizer)
                for x, y, _ in cluster.batches(Doubles(1600)):
                    made.append(cluster.step)
                    if len(made) == 2:
                        served.until(lambda: len(served.closes) > 0)
                    if len(made) > 1:
                        assert cluster.client.connection.sub is not None
                        cluster.client.connection.sub.poll(100)  # it may come a moment later
                    optimizer.zero_grad()
                    loss(model, x, y).backward()
                    optimizer.step()
            return setup.model

        crew = Crew(served, in_float64(perceptron), Doubles(1600))
        other = served.start(late)
        served.wait(crew.start(1), other, served.end)
        first = served.closes[0]
        assert list(first.contributors) == [1] and list(first.late) == [2]
        # The round counted for 50 steps of both, from which it went on at once.
        assert 50 in made[:50]
        ledger = served.server.rounds.ledger
        assert ledger is not None and (ledger.done, ledger.partly) == (1600, 0)
        for p, there in zip(
            crew.setups[1].model.parameters(), other.result().parameters(), strict=True
        ):
            assert torch.equal(p, there)


@pytest.mark.parametrize("overlap", [False, True])
def test_batches_of_ones_own_are_local_steps_too(overlap: bool) -> None:
    """A pass that ends in the middle of a round pushes the steps that were made."""
    counted: list[int] = []
    with Served(num_workers=2, local_steps=4, batch_size=3, overlap=overlap) as served:

        def work(number: int) -> nn.Module:
            setup = perceptron(number)
            with served.join(number, lambda line: None) as cluster:
                model, optimizer = cluster.attach(setup.model, setup.optimizer)
                data = Noise(30)
                for _ in range(2):
                    batches = [(data.x[i : i + 3], data.y[i : i + 3]) for i in range(0, 30, 3)]
                    for x, y in cluster.own_batches(batches):
                        optimizer.zero_grad()
                        loss(model, x, y).backward()
                        optimizer.step()
                counted.append(cluster.step)
            return setup.model

        both = served.start(work, 1), served.start(work, 2)
        served.wait(*both, served.end)
        assert [sum(c.contributors.values()) for c in served.closes] == [24, 24, 12] * 2
        assert counted == [20, 20]
        for p, there in zip(*(f.result().parameters() for f in both), strict=True):
            assert torch.equal(p, there)


def test_a_batch_in_parts_is_one_local_step() -> None:
    """`batch_limit`: gradients are added, the optimizer steps once."""
    settings = {"num_workers": 1, "num_epochs": 1, "batch_size": 8, "local_steps": 3}
    ends = []
    for limit in (None, 3):
        with Served(**settings) as served:

            def work(served: Served = served, limit: int | None = limit) -> nn.Module:
                setup = in_float64(perceptron)(1)
                with served.join(1, lambda line: None) as cluster:
                    model, optimizer = cluster.attach(setup.model, setup.optimizer)
                    for x, y, _ in cluster.batches(Doubles(96), batch_limit=limit):
                        optimizer.zero_grad()
                        loss(model, x, y).backward()
                        optimizer.step()
                    assert cluster.step == 12
                return setup.model

            future = served.start(work)
            served.wait(future, served.end)
            ends.append(future.result())
    for p, there in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(p, there, rtol=1e-12, atol=1e-12)


TORCHS_OWN = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
model.load_state_dict(given["model"])
averager = PeriodicModelAverager(period=given["period"], warmup_steps=0)
averager.step = 1  # it averages at 0, H, 2 H: so behind each Hth step
inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = PostLocalSGDOptimizer(inner, averager)
for indices in given["batches"][rank]:
    optimizer.zero_grad()
    x, y = given["x"][indices], given["y"][indices]
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
if rank == 0:
    torch.save(model.state_dict(), f"{folder}/ended.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.long
def test_replicas_are_what_torch_makes_with_gloo(tmp_path: Path) -> None:
    """PostLocalSGDOptimizer with PeriodicModelAverager, every four steps, after twenty."""
    settings = {"num_workers": 2, "num_epochs": 1, "batch_size": BATCH, "local_steps": 4}
    with Served(**settings) as served:
        crew = Crew(served, perceptron, Noise(20 * 2 * BATCH))
        served.wait(crew.start(1), crew.start(2), served.end)
        first = crew.make(crew.origin()).model.state_dict()
    batches = [[torch.tensor(crew.batches[w, s]) for s in range(20)] for w in (1, 2)]
    given = {"model": first, "period": 4, "batches": batches, "x": crew.data.x, "y": crew.data.y}
    torch.save(given, tmp_path / "given.pt")
    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", TORCHS_OWN, rank, port, str(tmp_path)])
        for rank in ("0", "1")
    ]
    for rank in ranks:
        rank.wait(120)  # torch may abort while it takes its own threads down, behind the last step
    ended = torch.load(tmp_path / "ended.pt", weights_only=True)
    for name, there in ended.items():
        torch.testing.assert_close(
            crew.setups[1].model.state_dict()[name], there, rtol=1e-6, atol=1e-6
        )
