"""Batches of samples that are not equally long are noticed where nobody has said `samples=`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader
from whole import Served

from workers.lengths import LOOKS, Lengths

WORDS = torch.int64


def batch(samples: int = 4, length: int = 9) -> torch.Tensor:
    return torch.zeros(samples, length, dtype=WORDS)


def labels(*ignored: int) -> torch.Tensor:
    found = batch()
    found[:, list(ignored)] = -100
    return found


def packed(*lengths: int) -> Any:
    return pack_sequence([torch.zeros(n, 2) for n in lengths])


UNEVEN: dict[str, tuple[list[Any], str]] = {
    "padded": ([(batch(), batch()), (batch(), batch(4, 7))], r"of other sizes \(9, then 7\)"),
    "a mapping": ([{"x": batch()}, {"x": batch(4, 7)}], "of other sizes"),
    "one tensor": ([batch(), batch(4, 7)], "of other sizes"),
    "pictures": ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 8)], "3 x 8 x 8, then 3 x 9 x 8"),
    "packed": ([(packed(3, 2), batch())], "the sequences of a batch are not equally long"),
    "ignored labels": ([(batch(), labels(3))], "labels of a batch are -100"),
}
EVEN: dict[str, list[Any]] = {
    "fewer samples": [(batch(8), batch(8)), (batch(3), batch(3))],
    "equally long": [(packed(3, 3), batch()), (packed(3, 3), batch())],
    "lists of samples": [([torch.zeros(3), torch.zeros(4)], batch()), ([torch.zeros(5)], batch())],
    "classes": [(torch.zeros(4, 2), torch.full((4,), -100))],
    "numbers": [(torch.zeros(4), torch.zeros(4)), 7, None, "words"],
}


def said(batches: list[Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    looks = Lengths(logging.getLogger("test"))
    for one in batches:
        looks.look(one)
    return caplog.messages


@pytest.mark.parametrize("name", UNEVEN)
def test_samples_that_are_not_equally_long_are_told_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    batches, why = UNEVEN[name]
    found = said(batches * 3, caplog)
    assert len(found) == 1 and "samples=lambda batch" in found[0]
    assert re.search(why, found[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_samples_are_not_equally_long(caplog: pytest.LogCaptureFixture) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    assert "not equally long" in said([(nested, torch.zeros(2))], caplog)[0]


@pytest.mark.parametrize("name", EVEN)
def test_of_others_nothing_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert said(EVEN[name] * 3, caplog) == []


def test_only_the_first_batches_are_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    assert said([batch()] * LOOKS + [batch(4, 7)], caplog) == []


def pad(samples: list[torch.Tensor]) -> Any:
    words = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return words, (words != 0).sum(1)


@pytest.mark.parametrize("way", ["batches", "own_batches"])
@pytest.mark.parametrize("weighs", [False, True])
def test_a_loop_is_told_unless_it_weighs_its_batches(way: str, weighs: bool) -> None:
    data = [torch.ones(1 + number % 5, dtype=WORDS) for number in range(15)]
    lines: list[str] = []

    def work() -> None:
        model = nn.Embedding(2, 2)
        with served.join(1, lines.append) as cluster:
            _, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
            loader = DataLoader(data, 2, collate_fn=pad)  # type: ignore[arg-type]
            count = {"samples": lambda pair: int(pair[1].sum())} if weighs else {}
            for words, _ in loop(cluster, loader, count):
                model(words).sum().backward()
                optimizer.step()

    def loop(cluster: Any, loader: Any, count: Any) -> Iterator[Any]:
        yield from getattr(cluster, way)(loader, **count)

    with Served(num_workers=1, num_epochs=1) as served:
        served.wait(served.start(work), served.end)
    assert sum("mean over words" in line for line in lines) == (not weighs)
