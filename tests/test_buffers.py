"""State that a forward writes: after each step it is the same in every replica.

Statistics of normalisation layers are averaged, what others write comes whole from one worker.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from crew import CLASSES, INPUTS, Crew, Noise, Setup, drawn, loss, train
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD
from whole import ENDLESS, Served, free_port

import workers
from paramserver.errors import PeerError, UserError
from paramserver.protocol import messages as wire
from paramserver.tensors import whole
from paramserver.tensors.bucket import plan
from paramserver.tensors.codec import CODECS
from paramserver.tensors.reducer import Reducer
from workers.replica.buffers import LOOKED_AT, Buffers
from workers.replica.replica import Replica


class Layer(nn.Module):
    """A linear layer that sees its input through something that it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, CLASSES)

    def remember(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.remember(x))


class Normaliser(Layer):
    """As observation normalisers of reinforcement learning: in place, and with a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(INPUTS))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def remember(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.seen += len(x)
        return x - self.mean


class Codebook(Layer):
    """As the codebooks that follow by moving averages: written through `.data`, and by assignment;
    beside them a queue with its pointer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, INPUTS, generator=torch.manual_seed(1)))
        self.register_buffer("weight", torch.zeros(5))
        self.register_buffer("queue", torch.zeros(7, INPUTS))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("full", torch.zeros((), dtype=torch.bool))

    def remember(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        if self.training:
            chosen = nn.functional.one_hot(nearest, 5).to(x.dtype)
            self.weight = 0.9 * self.weight + 0.1 * chosen.sum(0)
            mean = chosen.T @ x.detach() / chosen.sum(0).clamp(min=1)[:, None]
            self.codes.data.mul_(0.9).add_(0.1 * mean)
            at = int(self.at)
            self.queue[at] = x[0].detach()
            self.full |= at == 6
            self.at[0] = (at + 1) % 7
        return x + 0.1 * self.codes[nearest] + 0.1 * self.queue.mean(0)


class Branching(Layer):
    """Two modules that remember, of which a batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Normaliser(), Normaliser()

    def forward(self, x: Tensor) -> Tensor:
        out = (self.one if x[0, 0] > 0 else self.other)(x)
        return out + 0.0 * (self.one.linear.weight.sum() + self.other.linear.weight.sum())


class Extremes(Layer):
    """An observer's minimum and maximum, which begin at infinity; here by `attach(buffers=)`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("highest", torch.full((INPUTS,), -torch.inf))
        self.register_buffer("mean", torch.zeros(INPUTS))

    def remember(self, x: Tensor) -> Tensor:
        if self.training:
            self.highest.copy_(torch.maximum(self.highest, x.detach().amax(0)))
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return x - self.mean


def normed(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, INPUTS), layer, nn.Linear(INPUTS, CLASSES))


class Instances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True, affine=True)
        self.last = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x.view(len(x), 2, -1)).reshape(len(x), -1))


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(INPUTS, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "spectral_norm": (spectral, {}),
    "a running normaliser": (Normaliser, {}),
    "a codebook and a queue": (Codebook, {}),
    "a branch not always taken": (Branching, {}),
    "other rules": (Extremes, {"buffers": {"highest": "max", "mean": "mean"}}),
    "InstanceNorm": (Instances, {}),
    "BatchNorm without momentum": (lambda: normed(nn.BatchNorm1d(INPUTS, momentum=None)), {}),
    "accumulation": (Codebook, {"accumulate": 2}),
}


def make(name: str) -> Any:
    torch.manual_seed(3)
    model, attach = MODELS[name][0]().double(), MODELS[name][1]

    def made(seed: int) -> Setup:
        own = drawn(model, seed)
        return Setup(own, SGD(own.parameters(), lr=0.05, momentum=0.9), **attach)

    return made


@pytest.mark.parametrize("name", MODELS)
def test_what_a_forward_writes_is_the_same_everywhere(name: str) -> None:
    """And what the truth has; a newcomer gets it, and goes on as the others do."""
    data = Noise(96)
    data.x = data.x.double()
    crew = train(make(name), data, {1: 4, 2: 8}, num_epochs=2)
    crew.check()
    first, second = (dict(crew.setups[number].model.named_buffers()) for number in (1, 2))
    start = dict(crew.make(crew.origin()).model.named_buffers())
    for key in first:
        assert torch.equal(first[key], second[key])
        if name != "InstanceNorm":  # whose counter stays at zero
            assert not torch.equal(first[key], start[key]), f"nothing was written to {key}"


def test_alone_a_forward_keeps_what_it_writes() -> None:
    """As a plain loop does, bit by bit."""
    data, setup, plain = Noise(45), *(make("a codebook and a queue")(1) for _ in range(2))
    data.x = data.x.double()
    with workers.join(
        port=free_port(), say=lambda line: None, alone={"num_epochs": 1, "batch_size": 8}
    ) as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for x, y, indices in cluster.batches(data):
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
            plain.optimizer.zero_grad()
            loss(plain.model, data.x[indices], data.y[indices]).backward()
            plain.optimizer.step()
            theirs = plain.model.state_dict()
            assert all(torch.equal(v, theirs[key]) for key, v in model.state_dict().items())


def test_a_newcomer_gets_the_buffers_too() -> None:
    data = Noise(120)
    data.x = data.x.double()
    with Served(num_workers=1, num_epochs=ENDLESS) as served:
        crew = Crew(served, make("a codebook and a queue"), data)
        futures = [crew.start(1, 8)]
        served.until(lambda: len(served.closes) >= 5)
        futures.append(crew.start(2, 8))
        served.until_contributes(2)
        served.stop()
        served.wait(*futures)
    crew.check()


def test_a_forward_behind_the_last_update_leaves_no_trace_in_the_buffers() -> None:
    """The run is stopped between two rounds: the next one is void, but its forward was made."""

    def hold(number: int, step: int) -> None:
        if step == 5:
            served.stop()
            served.until(lambda: served.server.rounds.ending is not None)

    data = Noise(120)
    data.x = data.x.double()
    with Served(num_workers=1, num_epochs=ENDLESS) as served:
        crew = Crew(served, make("a codebook and a queue"), data, hold)
        served.wait(crew.start(1, 8))
    crew.check()


class Mask(Layer):
    """A buffer that no forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(INPUTS))
        self.register_buffer("cache", torch.zeros(INPUTS), persistent=False)

    def remember(self, x: Tensor) -> Tensor:
        self.cache = x.detach().mean(0)
        return x * self.mask


def test_what_nobody_writes_costs_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bucket of numbers tells it; what is not in the state stays where it is."""
    pushed: list[wire.Push] = []
    original = workers.link.client.Client.push

    def push(self: Any, message: wire.Push, buffers: list[Any]) -> None:
        pushed.append(message)
        original(self, message, buffers)

    monkeypatch.setattr("workers.link.client.Client.push", push)

    def made(seed: int) -> Setup:
        own = drawn(Mask(), seed)
        return Setup(own, SGD(own.parameters(), lr=0.05))

    crew = train(made, Noise(96), {1: 4, 2: 8}, num_epochs=1)
    crew.check()
    assert {(p.bucket, p.without) for p in pushed} == {(0, (1,))}
    assert all(close.buckets == (0,) for close in crew.served.closes)
    caches = [setup.model.cache for setup in crew.setups.values()]
    assert not torch.equal(*caches)


def test_a_buffer_written_behind_backward_is_sent_from_the_next_step_on() -> None:
    """It is in no replica's state until it is in an update."""
    setup = Setup(model := drawn(Normaliser(), 1), SGD(model.parameters(), lr=0.05))
    before = model.mean.clone()
    seen = []
    with workers.join(port=free_port(), say=lambda line: None, alone={"num_epochs": 9}) as cluster:
        _, optimizer = cluster.attach(setup.model, setup.optimizer)
        model.eval()
        for x, y, _ in cluster.batches(Noise(64), batch_size=8):
            loss(model, x, y).backward()
            if cluster.step > 0:  # in the first step the last bucket waits for step()
                model.train()
                model(x)
                model.eval()
            optimizer.step()
            seen.append(model.mean.clone())
            if cluster.step == 4:
                break
    assert torch.equal(seen[0], before) and torch.equal(seen[1], before)
    assert not torch.equal(seen[2], seen[1]) and not torch.equal(seen[3], seen[2])


# ------------------------------------------------------------------------------- what is told


class Grows(Layer):
    """A buffer whose shape is that of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(0, INPUTS))

    def remember(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return x


def test_a_buffer_that_changes_its_shape_is_named() -> None:
    model = Grows()
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        _, optimizer = cluster.attach(model, SGD(model.parameters(), lr=0.1))
        batches = cluster.batches(Noise(64), batch_size=8)
        x, y, _ = next(batches)
        loss(model, x, y).backward()
        with pytest.raises(UserError, match=r"last was 0x6 of float32 .* is 8x6 of float32"):
            optimizer.step()


WRONG_RULES = {
    "highst": ({"highst": "max"}, "names 'highst'.*\n.*did you mean highest"),
    "median": ({"mean": "median"}, "mean says 'median'"),
    "mean of integers": ({"seen": "mean"}, "seen is of int64, which has no mean"),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_rules_that_cannot_be(name: str) -> None:
    rules, sentence = WRONG_RULES[name]
    model = Normaliser() if "seen" in rules else Extremes()
    with pytest.raises(UserError, match=sentence):
        Replica(model, SGD(model.parameters(), lr=1), bucket_mb=1, codec="float32", buffers=rules)


# --------------------------------------------------------------------------- what is written


def write(model: Any, way: str) -> None:
    codes = model.codes
    with torch.no_grad():
        if way == "in place":
            codes[1, 1] += 1
        elif way == "through data":
            codes.data[0] += 1
        elif way == "data assigned":
            codes.data = codes.data + 1
        elif way == "assigned":
            model.codes = codes + 1
        elif way == "nan":
            codes.data[0, 0] = torch.nan


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "way", ["in place", "through data", "data assigned", "assigned", "nan", "not"]
)
def test_a_write_is_seen_and_undone(way: str, transposed: bool) -> None:
    model: Any = Codebook()
    if transposed:
        model.codes = torch.zeros(5, INPUTS).t()
    buffers = Buffers(model, {})
    there, values = model.codes, model.codes.clone()
    for _ in range(3):
        assert buffers.written() == []
        write(model, way)
        assert [b.name for b in buffers.written()] == ([] if way == "not" else ["codes"])
        buffers.reset()
        assert model.codes is there and torch.equal(there, values)


def test_a_large_buffer_is_looked_at_in_part() -> None:
    model: Any = Codebook()
    model.codes = torch.zeros(LOOKED_AT * 4)
    buffers = Buffers(model, {})
    model.codes.data.add_(1.0)
    assert [b.name for b in buffers.written()] == ["codes"]


# ------------------------------------------------------------------------------- on the server

WHOLE = wire.Layout(
    (
        wire.Tensor("weight", (3,), "float32"),
        wire.Tensor("a.queue", (5,), "int64", "whole", "bytes"),
        wire.Tensor("a.at", (), "int32", "whole", "bytes"),
        wire.Tensor("b.codes", (7,), "bool", "whole", "bytes"),
        wire.Tensor("nothing", (0,), "float16", "whole", "bytes"),
    )
)
WHOLE_PLAN = plan(WHOLE, 1.0)
SIZES = {1: 40, 2: 4, 3: 7}


def bytes_of(worker: int, indexes: list[int]) -> list[Any]:
    parts = [torch.full((SIZES[i],), 10 * worker + i, dtype=torch.uint8) for i in indexes]
    return whole.buffers(torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8))


@given(st.dictionaries(st.integers(1, 9), st.sets(st.sampled_from([1, 2, 3]))), st.randoms())
def test_of_each_module_the_lowest_worker_that_wrote_there(
    wrote: dict[int, set[int]], random: Any
) -> None:
    """In any order of the workers; what it did not write is absent, even if another worker wrote
    it."""
    assert [(b.kind, b.sent, b.size) for b in WHOLE_PLAN.buckets][1:] == [("whole", "bytes", 51)]
    reducer, released = Reducer(WHOLE_PLAN, CODECS["int8"], CODECS["int8"]), []
    for _ in range(2):
        order = list(wrote)
        random.shuffle(order)
        for worker in order:
            there = sorted(wrote[worker])
            absent = tuple({1, 2, 3} - wrote[worker])
            buffers = bytes_of(worker, there)
            assert reducer.check(1, buffers, 1.0, absent) == (None, None)
            reducer.add(1, buffers, 1.0, 5, lambda: released.append(0), worker, absent)
        buffers, scale, absent = reducer.finish(1, 5, ())
        reducer.close((1,))
        expected: dict[int, int] = {}
        for module in ({1, 2}, {3}):
            writers = [w for w in sorted(wrote) if wrote[w] & module]
            if writers:
                expected |= dict.fromkeys(wrote[writers[0]] & module, writers[0])
        assert set(absent) == {1, 2, 3} - expected.keys() and scale == 1.0
        came = whole.unpacked(WHOLE_PLAN, WHOLE_PLAN.buckets[1], buffers, set(absent))
        assert isinstance(came, dict)
        assert {i: set(v.tolist()) for i, v in came.items()} == {
            i: {10 * worker + i} for i, worker in expected.items()
        }
    assert len(released) == 2 * len(wrote)


@pytest.mark.parametrize(("indexes", "absent"), [([1], ()), ([1, 2, 3], (1,)), ([], (1, 2))])
def test_buffers_of_another_length_are_refused(indexes: list[int], absent: tuple[int, ...]) -> None:
    reducer = Reducer(WHOLE_PLAN, CODECS["float32"], CODECS["float32"])
    with pytest.raises(PeerError, match="bucket 1: buffers of"):
        reducer.check(1, bytes_of(1, indexes), 1.0, absent)


def test_much_travels_in_several_buffers() -> None:
    values = torch.arange(whole.BUFFER_BYTES + 5) % 251
    parts = whole.buffers(values.to(torch.uint8))
    assert [memoryview(p).nbytes for p in parts] == [whole.BUFFER_BYTES, 5]
    layout = wire.Layout((wire.Tensor("x", (len(values),), "int8", "whole", "bytes"),))
    own = plan(layout, 1.0)
    assert len(own.buckets) == 1
    came = whole.unpacked(own, own.buckets[0], parts, ())
    assert isinstance(came, dict) and torch.equal(came[0], values.to(torch.uint8))


# ---------------------------------------------------------------------------- void rounds


def test_a_refused_step_leaves_the_buffers_as_they_were() -> None:
    setup = Setup(model := drawn(Normaliser(), 1), SGD(model.parameters(), lr=0.05))
    with workers.join(port=free_port(), say=lambda line: None, alone={"num_epochs": 9}) as cluster:
        _, optimizer = cluster.attach(setup.model, setup.optimizer)
        for x, y, _ in cluster.batches(Noise(64), batch_size=8):
            before = copy.deepcopy(dict(model.named_buffers()))
            outcome = loss(model, x, y)
            if cluster.step == 2:
                outcome = outcome * torch.nan
            outcome.backward()
            optimizer.step()
            after = dict(model.named_buffers())
            same = all(torch.equal(after[key], before[key]) for key in before)
            assert same == (cluster.step == 3)
            if cluster.step == 5:
                break
