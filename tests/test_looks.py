"""Two different data sets of one length are found to differ, and equal ones are not."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scripts import Run
from torch import Tensor
from torch.utils.data import TensorDataset, random_split

from paramserver.protocol import messages as wire
from paramserver.rounds.looks import Looks, shown
from workers.looks import SAMPLES, look
from workers.samples import Samples


class Files:
    """Files in the order in which a file system lists them; a sample is a picture and its label."""

    def __init__(self, names: list[int], draw: Any = lambda: 0.0) -> None:
        self.names, self.draw = names, draw
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(self.names[index])
        return torch.randn(3, 8, 8, generator=generator) + self.draw(), self.names[index]


def difference(first: Any, second: Any) -> Any:
    looks = Looks()
    looks.first("worker 1", look(Samples(first)))
    return looks.difference(look(Samples(second)))


def test_the_same_set_looks_the_same() -> None:
    assert look(Samples(Files(list(range(100)))))
    assert difference(Files(list(range(100))), Files(list(range(100)))) is None


def test_files_in_another_order_have_other_labels() -> None:
    theirs, ours, exact = difference(Files(list(range(100))), Files(list(range(100))[::-1]))
    assert exact and (theirs.leaf, int(theirs.exact)) == ("[1]", 99 - theirs.index)
    assert int(ours.exact) == ours.index == theirs.index


def test_other_pictures_without_labels_are_told() -> None:
    a, b = (torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    found = difference(TensorDataset(a), TensorDataset(b))
    assert found is not None and not found[2]
    assert "on average" in shown(found[0])
    assert difference(TensorDataset(a), TensorDataset(a * 1.001)) is None  # another library


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(3, 8, 8),
        lambda: torch.from_numpy(np.random.randn(3, 8, 8)).float(),
        lambda: random.random(),
    ],
)
def test_what_transforms_draw_is_no_difference(draw: Any) -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = Files(list(range(100)), draw)
    told = look(Samples(first))
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert look(Samples(Files(list(range(100)), draw))) == told
    assert {f.leaf for f in told} == {"[1]"}  # drawn anew each time: not compared


def test_the_generators_are_as_before() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    look(Samples(Files(list(range(100)), lambda: torch.randn(1) + random.random())))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_few_samples_are_read_twice_each() -> None:
    files = Files(list(range(100)))
    look(Samples(files))
    assert len(set(files.read)) == SAMPLES and len(files.read) == 2 * SAMPLES


def test_what_cannot_be_read_tells_nothing() -> None:
    class Broken(Files):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise OSError("no such file")

    assert look(Samples(Broken(list(range(10))))) == ()


@pytest.mark.parametrize(
    "sample",
    [
        "a sentence that is much longer than what is told of it, and so on and on and on and on",
        b"bytes" * 100,
        {"ids": torch.arange(700), "text": "yes", "none": None},
        (np.float64(2.0), np.arange(5, dtype=np.uint64), True),
        torch.tensor(float("nan")),
        torch.zeros(0),
        torch.zeros(3, dtype=torch.complex64),
        [{"boxes": torch.rand(k, 4)} for k in range(100)],
        object(),
    ],
    ids=lambda sample: type(sample).__name__,
)
def test_whatever_a_sample_is_what_is_told_of_it_travels(sample: Any) -> None:
    told = look(Samples([sample] * 20))
    ready = wire.Ready(samples=20, batch_size=1, looks=told)
    assert wire.from_frames(wire.to_frames(ready))[0] == ready


def test_a_split_that_another_seed_drew_is_refused() -> None:
    run = Run(num_workers=2)
    run.observer()
    data = Files(list(range(100)))
    sets = [random_split(data, [80, 20], torch.Generator().manual_seed(s))[0] for s in (1, 2)]
    told = []
    for who, part in enumerate(sets, 1):
        run.hello(who), run.join(who), run.snapshot(who)
        told += run.ready(who, samples=80, looks=look(Samples(part)))
    assert any("w2 <- reject" in line and "worker 1" in line for line in told), told
    assert not any("w1 <- reject" in line for line in told)


def test_other_numbers_are_told_once() -> None:
    run = Run(num_workers=1)
    run.observer()
    run.hello(1), run.join(1), run.snapshot(1)
    run.ready(1, samples=80, looks=(wire.Look(3, "", "", (1.0, 1.0)),))
    other = (wire.Look(3, "", "", (2.0, 2.0)),)
    told = [line for _ in range(2) for line in run.ready(1, samples=80, looks=other)]
    assert sum("sample 3 of worker 1" in line for line in told) == 1


def test_limits_of_what_is_told() -> None:
    too_long = wire.Look(0, "x" * 1000, "y")
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(msgspec.to_builtins(too_long), wire.Look)
