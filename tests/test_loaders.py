"""A DataLoader given to `batches`: its parts are used, and what it decides by itself is refused."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from crew import Noise, drawn, in_float64, perceptron
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from whole import DEADLINE_S, Run, Served, children, free_port

import workers
from paramserver.errors import UserError
from paramserver.tensors.order import order
from workers.loaders import pack, unpack
from workers.samples import Samples

WORDS = 20


class Sequences(Dataset[Tensor]):
    """Sequences of unlike length, of a language of few words; 0 is padding."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(3, 15, (samples,), generator=generator).tolist()
        self.words = [torch.randint(1, WORDS, (n + 1,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> Tensor:
        return self.words[index]


def padded(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    words = pad_sequence(samples, batch_first=True)
    return words[:, :-1], words[:, 1:]


def tokens(batch: tuple[Tensor, Tensor]) -> int:
    return int((batch[1] > 0).sum())


LANGUAGE = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, WORDS))


def language() -> nn.Module:
    return drawn(LANGUAGE, 1).double()


def mean_over_tokens(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=0)


@pytest.mark.parametrize(
    "settings", [{}, {"num_workers": 3}, {"local_steps": 1, "deterministic": True}]
)
def test_padded_sequences_with_a_mean_over_tokens_are_those_of_one_process(settings: Any) -> None:
    count = settings.get("num_workers", 2)
    data, size = Sequences(48 * count), 8

    def work(number: int) -> None:
        model = language()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with served.join(number, served.say) as cluster:
            _, optimizer = cluster.attach(model, optimizer)
            batches = cluster.batches(
                DataLoader(data, size, shuffle=True, collate_fn=padded), samples=tokens
            )
            assert len(batches) == 6
            for x, y in batches:
                optimizer.zero_grad()
                mean_over_tokens(model, x, y).backward()
                optimizer.step()
        ends.append(model)

    ends = list[nn.Module]()
    with Served(num_epochs=2, **{"num_workers": 2, **settings}) as served:
        served.wait(*(served.start(work, n + 1) for n in range(count)), served.end)
    truth = language()
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.5)
    for epoch in range(2):
        for indices in order(len(data), 42, epoch).split(count * size):
            optimizer.zero_grad()
            mean_over_tokens(truth, *padded([data[i] for i in indices.tolist()])).backward()
            optimizer.step()
    for model in ends:
        torch.testing.assert_close(model.state_dict(), truth.state_dict(), rtol=0, atol=1e-9)


def test_samples_of_a_lease_come_from_all_processes_in_their_order() -> None:
    class Whose(Noise):
        def __getitem__(self, index: int) -> Any:
            return {"index": index, "who": os.getpid(), "x": self.x[index]}

    alone = Samples(DataLoader(Whose(40), 8))
    read = Samples(DataLoader(Whose(40), 8, num_workers=2))
    try:
        for lease in ((0, 0, 8), (0, 8, 16), (1, 3, 10)):
            (expected,), (got,) = alone.load(lease), read.load(lease)
            assert got.unread == () and got.samples == lease[2] - lease[1]
            assert torch.equal(got.data["index"], expected.data["index"])
            assert torch.equal(got.data["x"], expected.data["x"])
            assert os.getpid() not in got.data["who"] and len(got.data["who"].unique()) == 2
    finally:
        read.close()


def test_a_sample_that_a_process_cannot_read_is_left_out_and_named() -> None:
    class Broken(Noise):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise OSError("3.png is cut off")
            return super().__getitem__(index)

    read = Samples(DataLoader(Broken(200), 8, num_workers=2))
    try:
        (got,) = read.load((0, 0, 200))
        assert len(got.unread) == 1 and got.samples == 199 and len(got.data[0]) == 199
        assert read._broken == {3: "sample 3: OSError: 3.png is cut off"}
    finally:
        read.close()


def test_a_sample_that_ends_its_process_is_one_that_cannot_be_read() -> None:
    class Exits(Noise):
        def __getitem__(self, index: int) -> Any:
            return sys.exit(1) if index == 3 else super().__getitem__(index)

    read = Samples(DataLoader(Exits(200), 8, num_workers=2))
    try:
        (got,) = read.load((0, 0, 200))
        assert got.samples == 199
        assert read._broken == {3: "sample 3: RuntimeError: the data set called sys.exit(1)"}
    finally:
        read.close()


def test_with_deterministic_processes_draw_what_one_process_draws() -> None:
    class Drawn(Noise):
        def __getitem__(self, index: int) -> Any:
            return torch.randn(3), index

    alone = Samples(DataLoader(Drawn(20), 8), deterministic=True)
    read = Samples(DataLoader(Drawn(20), 8, num_workers=2), deterministic=True)
    try:
        assert torch.equal(alone.load((1, 0, 9))[0].data[0], read.load((1, 0, 9))[0].data[0])
    finally:
        read.close()


def test_what_goes_from_process_to_process_comes_back_as_it_was() -> None:
    sample = {
        "picture": torch.arange(12, dtype=torch.uint8).view(3, 4),
        "turned": torch.randn(4, 3).t(),
        "none": torch.zeros(0, 5),
        "scalar": torch.tensor(True),
        "half": torch.randn(3).bfloat16(),
        "wave": torch.randn(2, dtype=torch.complex64),
        "words": ["a", ("b", 3)],
        "sparse": torch.eye(3).to_sparse(),
    }
    (back, *_) = unpack(*pack([sample, sample]))
    assert back.keys() == sample.keys() and back["words"] == sample["words"]
    for name, value in sample.items():
        if isinstance(value, Tensor):
            assert back[name].dtype == value.dtype and back[name].shape == value.shape
            assert torch.equal(back[name].to_dense(), value.to_dense())


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield 1


SET = TensorDataset(torch.zeros(8, 1))


@pytest.mark.parametrize(
    ("loader", "problem", "way"),
    [
        (lambda: DataLoader(Stream(), 2), "over a stream", "own_batches"),
        (lambda: DataLoader(SET, batch_size=None), "batch_size=None", "batch_size=..."),
        (
            lambda: DataLoader(SET, batch_sampler=BatchSampler(SequentialSampler(SET), 2, False)),
            "batch_sampler",
            "own_batches",
        ),
        (
            lambda: DataLoader(SET, 2, sampler=DistributedSampler(SET, 2, 0)),
            "DistributedSampler",
            "leave it out",
        ),
        (lambda: DataLoader(SET, 2, sampler=SubsetRandomSampler([1, 2])), "Subset", "Subset("),
        (
            lambda: DataLoader(SET, 2, sampler=WeightedRandomSampler([1.0] * 8, 8)),
            "WeightedRandomSampler",
            "own_batches",
        ),
        (
            lambda: DataLoader(SET, 2, sampler=RandomSampler(SET, replacement=True)),
            "repeats",
            "own_batches",
        ),
    ],
)
def test_what_a_loader_decides_by_itself_is_refused_with_the_way_out(
    loader: Callable[[], DataLoader[Any]], problem: str, way: str
) -> None:
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        cluster.attach(setup.model, setup.optimizer)
        with pytest.raises(UserError, match=problem) as raised:
            cluster.batches(loader())
    assert way in raised.value.hint


DECODES = """
import torch
from torch.utils.data import DataLoader, TensorDataset

from paramserver import join

if __name__ == "__main__":
    model = torch.nn.Linear(4, 1)
    cluster = join(port=PORT, alone={"num_epochs": 10**6})
    model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = TensorDataset(torch.randn(64, 4))
    for (x,) in cluster.batches(DataLoader(data, 8, shuffle=True, num_workers=2)):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if cluster.step == 5:
            print("five steps")
"""


def test_ctrl_c_ends_the_processes_of_a_loader_too(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        (tmp_path / "train.py").write_text(DECODES.replace("PORT", str(run.port)))
        one = run.start("the script", "train.py")
        one.wait_for("five steps")
        readers = children(one)
        assert len(readers) == 2
        one.send(signal.SIGINT)
        assert one.end() != 0 and "KeyboardInterrupt" in one.output
        _, alive = psutil.wait_procs(readers, DEADLINE_S)
        assert not alive


def test_the_parts_of_a_loader_are_used() -> None:
    setup, said = in_float64(perceptron)(1), list[str]()
    loader = DataLoader(Noise(20), 8, drop_last=True, collate_fn=lambda samples: len(samples))
    with workers.join(port=free_port(), say=said.append, alone={"num_epochs": 1}) as cluster:
        cluster.attach(setup.model, setup.optimizer)
        batches = cluster.batches(loader)
        assert len(batches) == 3 and batches.batch_size == 8
        sizes = []
        for size in batches:
            sizes.append(size)
            for p in setup.model.parameters():
                p.grad = torch.zeros_like(p)
            cluster._step()
    assert sizes == [8, 8] and any("does not shuffle" in line for line in said)
