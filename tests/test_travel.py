"""`attach` names state that cannot travel; other state arrives as it was, and a training that
follows another in one process begins like the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crew import INPUTS, PERCEPTRON, Crew, Noise, Setup, drawn, loss, perceptron
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from whole import ENDLESS, Served, free_port

import workers
from paramserver.errors import UserError
from workers.replica import checkpoint
from workers.replica.replica import Replica
from workers.replica.state import DTYPES, as_bytes, flatten, unflatten
from workers.replica.travel import TEXT_BYTES_MAX


def replica(model: nn.Module, optimizer: Optimizer | None = None, **more: Any) -> Replica:
    optimizer = optimizer or SGD(model.parameters(), lr=0.1)
    return Replica(model, optimizer, bucket_mb=1.0, codec="float32", **more)


# ------------------------------------------------------------------------------ told by attach


class Remembers(nn.Linear):
    """A layer with state that is no tensor."""

    def __init__(self, state: Any) -> None:
        super().__init__(INPUTS, 4)
        self.kept = state

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


class Warm(LRScheduler):
    """A schedule of one's own that keeps its function."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]


class Forgetful(nn.Linear):
    """It gives what it does not take."""

    def get_extra_state(self) -> Any:
        return {"labels": [1, 2]}

    def set_extra_state(self, state: Any) -> None:
        raise LookupError("no such thing")


def with_buffer(buffer: Any) -> Replica:
    model = nn.Linear(2, 2)
    model.register_buffer("kept", buffer)
    return replica(model)


def scheduled() -> Replica:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    return replica(model, optimizer, scheduler=Warm(optimizer, lambda step: 1.0))


def odd_group() -> Replica:
    model = nn.Linear(2, 2)
    return replica(model, SGD([{"params": model.parameters(), "tag": object()}], lr=0.1))


def on_meta() -> Replica:
    with torch.device("meta"):
        return replica(nn.Linear(2, 2))


REFUSED: dict[str, tuple[Callable[[], Replica], str]] = {
    "a set": (lambda: replica(Remembers({"labels": {1}})), r"model\._extra_state\.labels is a set"),
    "a function of a schedule": (scheduled, r"scheduler\.factor is a function"),
    "an object of a group": (odd_group, r"optimizer\.param_groups\.0\.tag is an object"),
    "a generator": (
        lambda: replica(Remembers([torch.Generator()])),
        r"model\._extra_state\.0 is a Generator",
    ),
    "too much text": (lambda: replica(Remembers("x" * TEXT_BYTES_MAX)), "bytes beside its tensors"),
    "what is not taken back": (
        lambda: replica(Forgetful(2, 2)),
        "its own state cannot be loaded again: LookupError: no such thing",
    ),
    "a lazy layer": (
        lambda: replica(nn.Sequential(nn.LazyLinear(3))),
        r"0\.weight has no shape yet(.|\n)*pass one batch through the model",
    ),
    "a lazy buffer": (
        lambda: replica(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False))),
        r"1\.running_mean has no shape yet",
    ),
    "no memory": (on_meta, r"weight is on the meta device"),
    "a sparse buffer": (
        lambda: with_buffer(torch.eye(3).to_sparse()),
        r"model\.kept is a tensor of layout sparse_coo",
    ),
    "a quantised buffer": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)),
        r"model\.kept is a tensor of qint8",
    ),
    "a float8 parameter": (
        lambda: replica(nn.Linear(2, 2).to(torch.float8_e5m2)),
        r"weight is trained in float8_e5m2",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_travel_is_named(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence) as told:
        make()
    assert told.value.hint


class KeepsAnObject(SGD):
    """What it keeps is known after its first step."""

    def step(self, closure: None = None) -> None:
        self.state[self.param_groups[0]["params"][0]]["seen"] = object()


def test_what_an_optimizer_keeps_is_looked_at_after_its_first_step() -> None:
    model = drawn(PERCEPTRON, 1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        _, optimizer = cluster.attach(model, KeepsAnObject(model.parameters(), lr=0.1))
        batches = cluster.batches(Noise(64), batch_size=8)
        x, y, _ = next(batches)
        loss(model, x, y).backward()
        with pytest.raises(UserError, match=r"optimizer\.state\.0\.seen is an object"):
            optimizer.step()


# ------------------------------------------------------------------------------- what travels


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_any_dtype_travels_and_is_stored(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    def made(fill: int) -> Replica:
        kept = torch.empty(shape, dtype=DTYPES[name])
        as_bytes(kept).fill_(fill)
        return with_buffer(kept)

    giver, joiner = made(1), made(0)
    text, tensors = flatten(giver.state())
    joiner.load(unflatten(text, [t.clone() for t in tensors]), 3, "there")
    path = tmp_path / checkpoint.name(0)
    checkpoint.save(path, giver, "run", {})
    stored = made(0)
    stored.load(checkpoint.load(path).state, 3, "there")
    for other in (joiner, stored):
        theirs = other.model.state_dict()["kept"]
        assert theirs.shape == shape and theirs.dtype == DTYPES[name]
        assert torch.equal(as_bytes(theirs), as_bytes(giver.model.state_dict()["kept"]))


def test_numbers_of_numpy_become_the_same_in_every_replica() -> None:
    """A learning rate in float32 would round otherwise where it was computed with than where it
    came with a snapshot."""

    def made(rate: Any) -> Setup:
        model = drawn(PERCEPTRON, 1)
        optimizer = Adam(model.parameters(), lr=rate)
        return Setup(model, optimizer, scheduler=StepLR(optimizer, 1, gamma=np.float32(0.9)))

    setup, plain = made(np.float32(0.05)), made(float(np.float32(0.05)))
    plain.attach["scheduler"].gamma = float(np.float32(0.9))
    giver = replica(setup.model, setup.optimizer, **setup.attach)
    assert type(setup.optimizer.param_groups[0]["lr"]) is float
    assert type(setup.attach["scheduler"].gamma) is float
    text, tensors = flatten(giver.state())
    late = made(np.float32(1.0))
    joiner = replica(late.model, late.optimizer, **late.attach)
    joiner.load(unflatten(text, [t.clone() for t in tensors]), 0, "there")
    for _ in range(5):
        for s, step in ((setup, giver._schedule), (late, joiner._schedule)):
            s.optimizer.zero_grad()
            loss(s.model, Noise(8).x, Noise(8).y).backward()
            s.optimizer.step()
            step()
    assert setup.optimizer.param_groups[0]["lr"] == late.optimizer.param_groups[0]["lr"]
    theirs = late.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in setup.model.state_dict().items())


def test_plain_extra_state_travels_and_the_weights_are_written_without_it(tmp_path: Path) -> None:
    giver = replica(Remembers({"labels": [1, 2], "table": torch.ones(2), 3: (None, float("inf"))}))
    text, tensors = flatten(giver.state())
    joiner = replica(Remembers({}))
    joiner.load(unflatten(text, tensors), 3, "there")
    assert joiner.model.kept["labels"] == [1, 2]
    assert joiner.model.kept[3] == (None, float("inf"))
    checkpoint.save_model(tmp_path / "model.safetensors", giver.state()["model"], 3)
    with checkpoint.safe_open(tmp_path / "model.safetensors", framework="pt") as f:
        assert sorted(f.keys()) == ["bias", "weight"]
        assert f.metadata()["left_out"] == '["_extra_state"]'


def test_a_state_that_cannot_be_given_costs_the_newcomer_only() -> None:
    """It became so after `attach` had looked."""

    def hold(number: int, step: int) -> None:
        if (number, step) == (1, 3):
            crew.setups[1].optimizer.param_groups[0]["tag"] = object()

    with Served(num_workers=1, num_epochs=ENDLESS) as served:
        crew = Crew(served, perceptron, Noise(160), hold)
        first = crew.start(1, 8)
        served.until(lambda: len(served.closes) > 5)
        with pytest.raises(UserError, match=r"state did not arrive(.|\n)*tag is an object"):
            served.wait(crew.start(2, 8))
        served.stop()
        served.wait(first)
    assert served.closes[-1].contributors.keys() == {1}
    assert any(r"optimizer.param_groups.0.tag is an object" in line for line in crew.said)


# ------------------------------------------------------------------------- one after another


@pytest.mark.parametrize("way", ["the same optimizer", "a new optimizer"])
def test_a_second_training_in_one_process(way: str) -> None:
    """With what `attach` returned, the schedule too; it does what a plain loop does."""
    data, setup, plain = Noise(64), perceptron(1), perceptron(1)
    scheduler = StepLR(setup.optimizer, 3)
    of_plain = StepLR(plain.optimizer, 3)
    model, optimizer = setup.model, setup.optimizer
    for _ in range(2):
        with workers.join(
            port=free_port(), say=lambda line: None, alone={"num_epochs": 1, "batch_size": 8}
        ) as cluster:
            model, optimizer = cluster.attach(model, optimizer, scheduler=scheduler)
            for x, y, indices in cluster.batches(data):
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
                plain.optimizer.zero_grad()
                loss(plain.model, data.x[indices], data.y[indices]).backward()
                plain.optimizer.step()
                of_plain.step()
            assert cluster.step == 8
        scheduler.step()  # it is the script's again
        of_plain.step()
        if way == "a new optimizer":
            optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
            plain.optimizer = SGD(plain.model.parameters(), lr=0.1, momentum=0.9)
            scheduler, of_plain = StepLR(optimizer, 3), StepLR(plain.optimizer, 3)
    theirs = plain.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
