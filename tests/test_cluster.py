"""The door for one's own loop: what N workers compute is what one process computes.

Server and workers are threads here, their sockets are real.
"""

from __future__ import annotations

import copy
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from crew import (
    CLASSES,
    INPUTS,
    PERCEPTRON,
    Crew,
    Make,
    Noise,
    Setup,
    drawn,
    in_float64,
    perceptron,
    train,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from whole import DEADLINE_S, ENDLESS, Served

import workers
from paramserver.errors import UserError
from workers import living
from workers.builtin.data import order
from workers.cluster import Cluster

# --------------------------------------------------------------------------------- whose samples


def test_two_workers_compute_what_one_computes() -> None:
    data = Noise(160)
    data.x = data.x.double()
    crew = train(in_float64(perceptron), data, {1: 8, 2: 8}, num_epochs=3)
    crew.check()
    assert crew.served.end.result().step == 30


def test_batches_of_unequal_size_weigh_what_they_hold() -> None:
    crew = train(perceptron, Noise(160), {1: 3, 2: 13}, num_epochs=3)
    crew.check()
    assert all(close.contributors == {1: 3, 2: 13} for close in crew.served.closes[:10])


def test_a_short_last_batch_counts_as_what_it_is() -> None:
    crew = train(perceptron, Noise(45), {1: 8, 2: 8}, num_epochs=2)
    crew.check()
    assert [c.contributors for c in crew.served.closes] == [
        {1: 8, 2: 8}, {1: 8, 2: 8}, {1: 8, 2: 5},
        {1: 8, 2: 8}, {1: 8, 2: 8}, {1: 8, 2: 5},
    ]  # fmt: skip


def test_each_sample_of_an_epoch_is_applied_once() -> None:
    crew = train(perceptron, Noise(101), {1: 4, 2: 7, 3: 9}, num_epochs=3)
    crew.check()
    assert crew.applied() == dict.fromkeys(range(101), 3)
    assert crew.served.samples == (303, 0, 0)


def test_an_epoch_has_the_order_that_the_seed_gives() -> None:
    crew = train(perceptron, Noise(40), {1: 5, 2: 5}, num_epochs=2, seed=3)
    given = [crew.batches[worker, step] for step in range(8) for worker in (1, 2)]
    wanted = [*order(40, 3, 0).tolist(), *order(40, 3, 1).tolist()]
    assert [index for batch in given for index in batch] == wanted


def test_deterministic_runs_have_the_same_bits() -> None:
    digests = set[str]()
    for arrival in ([3, 2, 1], [1, 3, 2]):
        done = {number: threading.Event() for number in (0, 1, 2, 3)}

        def in_turn(number: int, step: int, arrival: list[int] = arrival, done: Any = done) -> None:
            """At the first step the workers compute one after another."""
            if step == 0:
                before = [0, *arrival][arrival.index(number)]
                assert before == 0 or done[before].wait(DEADLINE_S)

        with Served(num_workers=3, deterministic=True, num_epochs=1) as served:
            crew = Crew(served, lambda seed: perceptron(1), Noise(96), in_turn)
            futures = {number: crew.start(number, 8) for number in (1, 2, 3)}
            for number in arrival:
                served.until(lambda number=number: has_pushed(served, number))
                done[number].set()
            served.wait(*futures.values())
            digests |= served.digests()
    assert len(digests) == 1


def has_pushed(served: Served, number: int) -> bool:
    """Has this worker pushed all of its gradient in the open round, or was a round closed?"""
    current = served.server.rounds.round
    if served.closes:
        return True
    return current is not None and bool(current.members[number].got)


# ------------------------------------------------------------------------------------ who is there


def test_a_newcomer_is_told_that_the_server_waits_for_its_run() -> None:
    """It has nothing to wait for but the server, and waits for longer than for one that is not."""
    said: list[str] = []
    with Served(recovery="7", num_workers=1, heartbeat_timeout=3.0) as served:
        worker = served.start(served.join, 1, said.append, join_timeout=1.5)
        served.until(lambda: served.server.rounds.deserted)
        with pytest.raises(UserError, match="no server answered"):
            worker.result(DEADLINE_S)
    assert said[0].startswith("the server is waiting for the replicas of this run to come back")


def test_a_late_joiner_adopts_the_state_and_takes_part_from_the_next_round() -> None:
    joined, ready = threading.Event(), threading.Event()

    def hold(number: int, step: int) -> None:
        if (number, step) in ((1, 5), (1, 6)):
            assert (joined if step == 5 else ready).wait(DEADLINE_S)

    with Served(num_workers=1, num_epochs=3) as served:
        crew = Crew(served, perceptron, Noise(120), hold)
        futures = [crew.start(1, 8)]
        served.until(lambda: len(served.closes) == 5)
        futures.append(crew.start(2, 8))
        served.until_waits(2)
        joined.set()
        served.until(lambda: len(served.server.rounds.workers_ready()) == 2)
        ready.set()
        served.wait(*futures)
    crew.check()
    assert crew.applied() == dict.fromkeys(range(120), 3)
    assert re.search(r"worker 2 .* took a snapshot of step 6", served.text)
    # It was ready in the middle of the round that leads to step 7.
    assert next(close.step for close in served.closes if 2 in close.contributors) == 8


def has_joined(served: Served, number: int) -> bool:
    return any(p.id == number and p.join for p in served.server.rounds.peers.values())


def test_a_late_gradient_is_refused_and_its_samples_are_applied_later() -> None:
    held: list[int] = []
    late, again = threading.Event(), threading.Event()

    def hold(number: int, step: int) -> None:
        """Worker 2 stands once, some steps after the start. A busy machine may make it late before,
        which is not what is asked here. Then worker 1 stands until the other one has come back."""
        if number == 2 and step >= 4 and not held:
            held.append(step + 1)
            assert late.wait(DEADLINE_S)
        elif number == 1 and late.is_set():
            assert again.wait(DEADLINE_S)

    with Served(num_workers=2, num_epochs=3, timeout=0.05) as served:
        crew = Crew(served, perceptron, Noise(160), hold)
        futures = [crew.start(1, 4), crew.start(2, 4)]
        served.until(lambda: any(c.step in held and 2 in c.late for c in served.closes))
        late.set()
        served.until(lambda: any(2 in c.contributors for c in served.closes[held[0] :]))
        again.set()
        served.wait(*futures)
    crew.check()
    (step,) = held
    close = served.closes[step - 1]
    assert close.step == step and set(close.contributors) == {1}
    assert close.reason.startswith(f"round {close.round} closed with 1 of 2: worker 2")
    assert "late" in close.late[2] and "last seen" in close.late[2]
    assert close.reason in served.text
    assert crew.applied() == dict.fromkeys(range(160), 3)
    assert served.samples == (480, 0, 0)


def test_who_is_late_for_many_rounds_catches_up_before_it_computes_again() -> None:
    """A lease of a round that is over is computed in vain, and then the next one, and so on."""
    held, late, again = list[int](), threading.Event(), threading.Event()

    def hold(number: int, step: int) -> None:
        if number == 2 and step >= 4 and not held:
            held.append(step)
            assert late.wait(DEADLINE_S)
        elif number == 2 and held:
            held.append(step)
            again.set()
        elif held and step >= held[0] + 10:
            assert again.wait(DEADLINE_S)

    with Served(num_workers=2, num_epochs=6, timeout=0.05) as served:
        crew = Crew(served, perceptron, Noise(160), hold)
        futures = [crew.start(1, 4), crew.start(2, 4)]
        served.until(lambda: bool(held) and len(served.closes) >= held[0] + 10)
        late.set()
        served.wait(*futures)
    crew.check()
    assert held[1] == held[0] + 10


def test_who_leaves_in_the_middle_gives_its_samples_back() -> None:
    def hold(number: int, step: int) -> None:
        if (number, step) == (2, 4):
            raise LookupError("enough")

    with Served(num_workers=2, num_epochs=2) as served:
        crew = Crew(served, perceptron, Noise(80), hold)
        first, second = crew.start(1, 4), crew.start(2, 4)
        assert isinstance(second.exception(DEADLINE_S), LookupError)
        served.wait(first)
    assert re.search(r"worker 2 .* left: LookupError: enough", served.text)
    assert crew.applied() == dict.fromkeys(range(80), 2)
    assert served.samples == (160, 0, 0)


def test_a_gradient_out_of_all_proportion_is_refused_and_counted() -> None:
    def hold(number: int, step: int) -> None:
        if number == 2 and step in (20, 21):
            weight = next(crew.setups[2].model.parameters())
            if step == 20:
                hooks.append(weight.register_hook(lambda gradient: 1e6 * gradient))
            else:
                hooks.pop().remove()

    hooks: list[Any] = []
    with Served(num_workers=2, num_epochs=2) as served:
        crew = Crew(served, perceptron, Noise(160), hold)
        served.wait(crew.start(1, 4), crew.start(2, 4))
    crew.check()
    assert served.samples == (316, 0, 4)
    assert [2 in close.contributors for close in served.closes[19:22]] == [True, False, True]
    assert re.search(r"round 21: worker 2 .* refused: its norm of \S+ is .* times", served.text)


@pytest.mark.parametrize("other", [1, 3])
def test_a_replica_whose_weights_differ_takes_a_snapshot(other: int) -> None:
    def hold(number: int, step: int) -> None:
        if (number, step) == (other, 7):
            with torch.no_grad():
                next(crew.setups[other].model.parameters()).view(-1)[0] += 1.0

    with Served(num_workers=3, num_epochs=3, digest_steps=5) as served:
        crew = Crew(served, perceptron, Noise(160), hold)
        served.wait(*(crew.start(number, 4) for number in (1, 2, 3)))
        assert len(served.digests()) == 1
    named = re.findall(
        r"worker (\d+) .* has other weights than the rest \(its optim.*: it takes", served.text
    )
    assert named == [str(other)]
    assert re.search(rf"worker {other} .* took a snapshot of step 1\d", served.text)
    assert crew.applied() == dict.fromkeys(range(160), 3)


def test_fewer_than_min_workers_pause_the_run() -> None:
    def hold(number: int, step: int) -> None:
        if (number, step) == (2, 3) and crew.setups[2] is first_of_two[0]:
            raise LookupError("back soon")

    first_of_two: list[Setup] = []

    def make(seed: int) -> Setup:
        setup = perceptron(seed)
        if seed == 2:
            first_of_two.append(setup)
        return setup

    with Served(num_workers=2, min_workers=2, num_epochs=2) as served:
        crew = Crew(served, make, Noise(80), hold)
        first, second = crew.start(1, 4), crew.start(2, 4)
        assert isinstance(second.exception(DEADLINE_S), LookupError)
        served.until_said(r"paused: worker 1 \(")
        paused_at = len(served.closes)
        second = crew.start(2, 4)
        served.wait(first, second)
    assert all(set(close.contributors) == {1, 2} for close in served.closes[paused_at:-1])
    assert crew.applied() == dict.fromkeys(range(80), 2)


def test_a_server_that_stops_ends_its_workers() -> None:
    with Served(num_workers=2, num_epochs=ENDLESS) as served:
        crew = Crew(served, perceptron, Noise(80))
        futures = [crew.start(1), crew.start(2)]
        served.until(lambda: len(served.closes) > 5)
        served.server.stop("enough")
        end = served.end.result(DEADLINE_S)
        served.wait(*futures)
    assert (end.reason, end.error) == ("enough", False)
    assert end.run == served.server.control.run_id, "its peers know it by that"
    assert len(served.digests()) == 1


# ---------------------------------------------------------------------------------- which models


class Odd(nn.Module):
    """Frozen weights, tied weights, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, INPUTS)
        self.tied = nn.Linear(INPUTS, INPUTS)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(INPUTS, INPUTS)
        self.unused = nn.Linear(INPUTS, 3)
        self.last = nn.Linear(INPUTS, CLASSES)
        for p in self.frozen.parameters():
            p.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(self.tied(torch.tanh(self.first(x))))))


class Branches(nn.Module):
    """A branch that only some samples take: a batch may leave its parameters without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(INPUTS, CLASSES)
        self.trunk = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        taken = x[:, 0] > 1.2
        out = self.trunk(x)
        if taken.any():
            out = out + torch.where(taken[:, None], self.branch(x), 0)
        return out


NORMED = nn.Sequential(
    nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8),
    nn.BatchNorm1d(8, momentum=None), nn.Tanh(), nn.Linear(8, CLASSES),
)  # fmt: skip

CONVOLUTIONS = nn.Sequential(
    nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3),
    nn.Flatten(), nn.Linear(12, CLASSES),
)  # fmt: skip


def sgd(model: nn.Module, **attach: Any) -> Make:
    def make(seed: int) -> Setup:
        own = drawn(model, seed)
        groups = [p for p in own.parameters() if p.requires_grad]
        return Setup(own, SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01), **attach)

    return make


def channels_last(seed: int) -> Setup:
    model = drawn(CONVOLUTIONS, seed).to(memory_format=torch.channels_last)
    return Setup(model, SGD(model.parameters(), lr=0.05, momentum=0.9))


def groups(seed: int) -> Setup:
    model = drawn(PERCEPTRON, seed)
    first, *rest = model.parameters()
    each = [{"params": [first], "lr": 0.003}, {"params": rest, "weight_decay": 0.1}]
    return Setup(model, Adam(each, lr=0.01, eps=1e-3))


def adam(seed: int) -> Setup:
    model = drawn(PERCEPTRON, seed)
    return Setup(model, Adam(model.parameters(), lr=0.01))


def scheduled(seed: int) -> Setup:
    setup = sgd(PERCEPTRON)(seed)
    setup.attach["scheduler"] = StepLR(setup.optimizer, step_size=4, gamma=0.5)
    return setup


class Mixed(nn.Module):
    """Mixed precision: parameters of float32, a forward in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = copy.deepcopy(PERCEPTRON)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


class Transposed(nn.Module):
    """A parameter, and so a gradient, whose numbers do not lie in the order of its indices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, INPUTS).t())

    def forward(self, x: Tensor) -> Tensor:
        assert not self.weight.is_contiguous()
        return x @ self.weight


def everything(seed: int) -> Setup:
    """As scripts have it: autocast, parameter groups, a warm-up by OneCycleLR, clipping, and
    several passes for a step."""
    model = drawn(Mixed(), seed)
    first, *rest = model.parameters()
    each = [{"params": [first], "lr": 0.003}, {"params": rest, "weight_decay": 0.1}]
    optimizer = SGD(each, lr=0.01, momentum=0.9)
    schedule = OneCycleLR(optimizer, [0.05, 0.1], total_steps=40)
    return Setup(model, optimizer, scheduler=schedule, clip_norm=0.5, accumulate=2)


class Double(nn.Module):
    """A model that computes in float64, where it matters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, INPUTS)
        self.inner = copy.deepcopy(PERCEPTRON).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.first(x)).double())


def wide(seed: int) -> Setup:
    """Rows of 40 numbers."""
    layers = nn.Linear(INPUTS, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, CLASSES)
    return sgd(nn.Sequential(*layers))(seed)


def compiled(seed: int) -> Setup:
    model = torch.compile(drawn(NORMED, seed), backend="eager")
    return Setup(model, SGD(model.parameters(), lr=0.05))


def halve_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= 0.5


MODELS: dict[str, tuple[Make, tuple[int, ...], dict[str, Any]]] = {
    "batch norm": (sgd(NORMED), (INPUTS,), {}),
    "frozen, tied and unused parameters": (sgd(Odd()), (INPUTS,), {}),
    "a branch not always taken": (sgd(Branches()), (INPUTS,), {}),
    "a parameter larger than a bucket": (sgd(PERCEPTRON), (INPUTS,), {"bucket_mb": 0.0001}),
    "a bucket smaller than a parameter's row": (wide, (INPUTS,), {"bucket_mb": 0.0001}),
    "channels last": (channels_last, (2, 4, 4), {}),
    "two parameter groups with Adam": (groups, (INPUTS,), {}),
    "clipping": (sgd(PERCEPTRON, clip_norm=0.1), (INPUTS,), {}),
    "a schedule": (scheduled, (INPUTS,), {}),
    "accumulation": (sgd(PERCEPTRON, accumulate=2), (INPUTS,), {}),
    "accumulation of batch norm": (sgd(NORMED, accumulate=2), (INPUTS,), {}),
    "before_step": (sgd(PERCEPTRON, before_step=halve_gradients), (INPUTS,), {}),
    "mixed precision": (sgd(Mixed()), (INPUTS,), {}),
    "float32": (sgd(PERCEPTRON), (INPUTS,), {}),
    "Adam": (adam, (INPUTS,), {}),
    "some of it in float64": (sgd(Double()), (INPUTS,), {}),
    "a transposed parameter": (sgd(Transposed()), (INPUTS,), {}),
    "everything at once": (everything, (INPUTS,), {}),
}
ROUNDED = ("mixed precision", "everything at once", "float32", "some of it in float64")


@pytest.mark.parametrize("name", MODELS)
def test_any_model_trains_as_in_one_process(name: str) -> None:
    """In float64, where rounding neither hides nor breaks it, but for those that round by
    themselves."""
    make, shape, settings = MODELS[name]
    data = Noise(96, shape)
    if name not in ROUNDED:
        make, data.x = in_float64(make), data.x.double()
    crew = train(make, data, {1: 4, 2: 8}, num_epochs=2, **settings)
    crew.check()
    assert crew.applied() == dict.fromkeys(range(96), 2)


def test_a_compiled_model_has_the_names_of_one_that_is_not() -> None:
    """One worker may compile, where another has no compiler."""
    with Served(num_workers=2, num_epochs=2) as served:
        crew = Crew(served, lambda seed: (compiled if seed == 2 else sgd(NORMED))(seed), Noise(96))
        served.wait(crew.start(1, 4), crew.start(2, 8))
        assert len(served.digests()) == 1


def test_running_statistics_are_equal_in_all_replicas() -> None:
    crew = train(sgd(NORMED), Noise(96), {1: 4, 2: 8}, num_epochs=2)
    first, second = (dict(crew.setups[number].model.named_buffers()) for number in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert int(first["1.num_batches_tracked"]) == len(crew.served.closes)


def test_a_parameter_that_nothing_uses_stays_without_gradient() -> None:
    crew = train(sgd(Odd()), Noise(32), {1: 4, 2: 4}, num_epochs=1)
    start = crew.make(crew.origin()).model
    for setup in crew.setups.values():
        assert setup.model.unused.weight.grad is None
        assert torch.equal(setup.model.unused.weight, start.unused.weight)
        assert torch.equal(setup.model.frozen.weight, start.frozen.weight)
        assert setup.model.tied.weight is setup.model.first.weight


@pytest.mark.parametrize(("codec", "tolerance"), [("float16", 0.01), ("bfloat16", 0.1)])
def test_short_numbers_on_the_wire_train_equal_replicas(codec: str, tolerance: float) -> None:
    crew = train(sgd(NORMED), Noise(96), {1: 4, 2: 8}, num_epochs=2, codec=codec)
    crew.check(tolerance)
    with pytest.raises(AssertionError):
        crew.check(0.0)  # or the codec was not used


def test_a_model_of_half_precision_trains() -> None:
    def half(seed: int) -> Setup:
        model = nn.Sequential(drawn(PERCEPTRON, seed)).to(torch.bfloat16)
        return Setup(model, SGD(model.parameters(), lr=0.1))

    data = Noise(96)
    data.x = data.x.to(torch.bfloat16)
    train(half, data, {1: 4, 2: 8}, num_epochs=2).check(0.05)


# ------------------------------------------------------------------------------- what is refused


def test_another_model_is_refused_by_its_first_difference() -> None:
    wider = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, CLASSES + 1))
    with Served(num_workers=2) as served:
        crew = Crew(served, perceptron, Noise(32))
        crew.start(1)
        served.until(lambda: has_joined(served, 1))
        crew.make = sgd(wider)
        with pytest.raises(
            UserError, match=r"worker 2 .* another model .*: 2\.bias is 5 float"
        ) as e:
            served.wait(crew.start(2))
        assert "the run has 4 float32" in str(e.value)


def test_a_data_set_of_another_length_is_refused() -> None:
    with Served(num_workers=1, num_epochs=ENDLESS) as served:
        crew = Crew(served, perceptron, Noise(32))
        crew.start(1)
        served.until(lambda: served.server.rounds.ledger is not None)
        crew.data = Noise(31)
        with pytest.raises(UserError, match="data set of 31 samples, the run has one of 32"):
            served.wait(crew.start(2))


@pytest.mark.parametrize("make", [groups, adam, sgd(PERCEPTRON, clip_norm=1.0), scheduled])
def test_another_way_from_gradient_to_weights_is_refused(make: Make) -> None:
    """Another optimizer, clipping or schedule: replicas would drift apart."""
    with Served(num_workers=2, num_epochs=1) as served:
        crew = Crew(served, sgd(PERCEPTRON), Noise(32))
        first = crew.start(1)
        served.until(lambda: has_joined(served, 1))
        crew.make = make
        with pytest.raises(UserError, match=r"optimizer|clip_norm|schedule"):
            served.wait(crew.start(2))
        served.server.stop("enough")
        served.wait(first)


def test_a_worker_id_is_given_to_one_process_at_a_time() -> None:
    with Served(num_workers=2, max_workers=4) as served:
        with workers.join(port=served.port, worker_id=1, say=served.say):
            other_thread = served.start(  # in this one it would be the same worker again
                lambda: workers.join(port=served.port, worker_id=1, say=served.say)
            )
            with pytest.raises(UserError, match=r"worker id 1 is taken by pid \d+ on "):
                other_thread.result(DEADLINE_S)
            for number in (0, 5):
                with pytest.raises(UserError, match=f"id {number} is out of range.* 1 to 4"):
                    workers.join(port=served.port, worker_id=number, say=served.say)
            with workers.join(port=served.port, say=served.say) as other:
                assert other.worker_id == 2
        with workers.join(port=served.port, worker_id=1, say=served.say) as again:
            assert again.worker_id == 1


def test_threads_join_and_leave_while_another_one_does() -> None:
    class Joined:  # of a cluster, what is looked at
        host, port, asked = "nowhere", 1, None

    def join_and_leave(number: int) -> None:
        for _ in range(20_000):
            cluster = cast(Cluster, Joined())
            living.lives(cluster)
            assert living.leave_same("elsewhere", 1, number) is None
            living.left(cluster)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread stops between any two steps
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(join_and_leave, range(4))) == [None] * 4
    finally:
        sys.setswitchinterval(before)


def test_a_loop_that_breaks_off_waits_for_the_thread_that_pushes() -> None:
    """After a backward that failed it may still send, and a socket is used by one at a time."""
    calls = list[str]()
    cluster = object.__new__(Cluster)
    cluster._lost, cluster._phase, cluster.thread = None, "", threading.get_ident()
    cluster._gradients = cast(Any, SimpleNamespace(finish=lambda: calls.append("waits")))
    cluster.client = cast(
        Any, SimpleNamespace(ended=None, unready=lambda unfinished: calls.append("says so"))
    )
    cluster._leave_loop()
    assert calls == ["waits", "says so"]
    with ThreadPoolExecutor(1) as pool:  # the thread that pushes must not wait for itself
        pool.submit(cluster._leave_loop).result()
    assert calls[2:] == ["says so"]
