"""What `weights=` of `batches` draws is what torch's sampler draws, alike on every machine, and
each draw of an epoch is used once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from crew import Crew, Noise, perceptron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from whole import Served, free_port

import workers
from paramserver.errors import UserError
from workers.draws import Draws
from workers.samples import Samples

WEIGHTS = [0.0, 1.0, 0.5, 4.0, 2.0, 0.0, 0.5, 8.0, 0.0]
LIKELY = 6.0  # deviations from its mean within which a sum of squares lies, but for one in 10**5


def sampled(count: int, replacement: bool, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return list(WeightedRandomSampler(WEIGHTS, count, replacement, generator))


def distance(ours: Counter[Any], theirs: Counter[Any]) -> float:
    """The chi-square statistic of two samples of equal size, in deviations from its mean where both
    have one distribution."""
    both = [k for k in ours | theirs if ours[k] + theirs[k] >= 20]
    value = sum((ours[k] - theirs[k]) ** 2 / (ours[k] + theirs[k]) for k in both)
    return (value - len(both)) / (2 * len(both)) ** 0.5


def test_with_replacement_it_draws_as_the_weights_say_and_as_torch_does() -> None:
    count = 20_000
    ours = Counter(Draws(WeightedRandomSampler(WEIGHTS, count), 9).order(42, 0).tolist())
    wanted = {i: count * w / sum(WEIGHTS) for i, w in enumerate(WEIGHTS) if w}
    assert ours.keys() == wanted.keys()
    value = sum((ours[i] - n) ** 2 / n for i, n in wanted.items())
    assert value < 5 + LIKELY * 10**0.5  # of five degrees of freedom
    assert distance(ours, Counter(sampled(count, True, 1))) < LIKELY


def test_without_replacement_it_draws_as_torch_does() -> None:
    sampler = WeightedRandomSampler(WEIGHTS, 3, replacement=False)
    draws, epochs = Draws(sampler, 9), 4000
    ours = Counter(tuple(draws.order(42, epoch).tolist()) for epoch in range(epochs))
    assert all(len({*drawn}) == 3 and all(WEIGHTS[i] for i in drawn) for drawn in ours)
    assert distance(ours, Counter(tuple(sampled(3, False, s)) for s in range(epochs))) < LIKELY
    skewed = Draws(WeightedRandomSampler([1.0] * 9, 3, replacement=False), 9)
    others = Counter(tuple(skewed.order(42, epoch).tolist()) for epoch in range(epochs))
    assert distance(ours, others) > 10 * LIKELY  # the measure sees another distribution


def test_it_draws_the_same_on_every_machine_and_with_every_version() -> None:
    draws = Draws(WEIGHTS, 9)
    assert draws.count == 9 and draws.order(42, 0).dtype == torch.int64
    assert draws.order(42, 0).tolist() == [3, 4, 7, 7, 7, 3, 3, 2, 3]
    assert draws.order(42, 1).tolist() == [7, 3, 7, 4, 4, 3, 4, 7, 7]
    once = Draws(WeightedRandomSampler(WEIGHTS, 6, replacement=False), 9)
    assert once.order(42, 0).tolist() == [3, 4, 7, 6, 1, 2]
    assert once.order(7, 3).tolist() == [2, 7, 3, 1, 4, 6]
    assert draws.digest() == "1d4ac50e175e24958d425ad5f467017b" != once.digest()


def test_what_is_drawn_with_weights_far_apart_has_some() -> None:
    one = Draws([0.0, 1e-300, 0.0], 3)
    assert one.order(42, 0).tolist() == [1, 1, 1]
    far = np.array([1e300, 1e-300, 0.0])
    assert 2 not in Draws(far, 3).order(42, 0)
    both = Draws(WeightedRandomSampler(far.tolist(), 2, replacement=False), 3)
    assert all(both.order(42, epoch).tolist() == [0, 1] for epoch in range(50))


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ([1.0] * 8, "weights= 8, the data set has 9 samples"),
        (3.0, "weights= one number, the data set has 9"),
        ([1.0] * 8 + [-1.0], "has -1 for sample 8"),
        ([float("nan")] + [1.0] * 8, "has nan for sample 0"),
        ([0.0] * 9, "the sum of weights= is 0"),
        ([1e308] * 9, "the sum of weights= is inf"),
        ("heavy", "are no numbers"),
        (["a"] * 9, "are no numbers"),
        (WeightedRandomSampler(WEIGHTS, 7, replacement=False), "7 of them without replacement"),
    ],
)
def test_what_are_no_weights_of_this_set_is_told(weights: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Draws(weights, 9)


SET = TensorDataset(torch.arange(9.0).view(9, 1), torch.zeros(9, 1))


def loader(**given: Any) -> DataLoader[Any]:
    return DataLoader(SET, 2, sampler=WeightedRandomSampler(WEIGHTS, 20), **given)


def test_a_loader_that_draws_is_taken_with_the_weights_of_its_sampler() -> None:
    drawn: list[int] = []
    with workers.join(port=free_port(), say=lambda line: None, alone={"num_epochs": 2}) as cluster:
        model = nn.Linear(1, 1)
        _, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
        given = loader()
        with pytest.raises(UserError, match="WeightedRandomSampler") as raised:
            cluster.batches(given)
        assert "weights=loader.sampler" in raised.value.hint
        with pytest.raises(UserError, match="others than those of the loader's"):
            cluster.batches(given, weights=WEIGHTS)  # 9 draws, not 20
        batches = cluster.batches(given, weights=given.sampler)
        assert len(batches) == 10
        for x, y in batches:
            drawn += map(int, x.view(-1))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    draws = Draws(given.sampler, 9)
    assert drawn == [*draws.order(42, 0).tolist(), *draws.order(42, 1).tolist()]


@pytest.mark.parametrize("settings", [{}, {"epoch_barrier": True, "num_workers": 3}])
def test_workers_use_each_draw_of_an_epoch_once(settings: dict[str, Any]) -> None:
    weights = WeightedRandomSampler([1.0 + i % 5 for i in range(24)], 50)
    with Served(num_epochs=2, batch_size=4, **{"num_workers": 2, **settings}) as served:
        crew = Crew(served, perceptron, Noise(24), weights=weights)
        served.wait(*(crew.start(n + 1) for n in range(settings.get("num_workers", 2))), served.end)
    crew.check()
    draws = Draws(weights, 24)
    assert crew.applied() == Counter([i for e in (0, 1) for i in draws.order(42, e).tolist()])
    assert served.closes[-1].ledger["done"] == 100


@pytest.mark.parametrize("processes", [0, 2])
def test_with_deterministic_two_draws_of_one_sample_are_not_read_alike(processes: int) -> None:
    class Drawn(Noise):
        def __getitem__(self, index: int) -> Any:
            return torch.randn(3), index

    draws = Draws([0.0, 1.0, 0.0], 3)  # one sample, three times in an epoch
    given = DataLoader(Drawn(3), 3, num_workers=processes)
    read = Samples(given, draws=draws, deterministic=True)
    try:
        (whole,) = read.load((0, 0, 3))
        (rest,) = read.load((0, 1, 3))
    finally:
        read.close()
    values, indices = whole.data
    assert indices.tolist() == [1, 1, 1] and len({*map(tuple, values.tolist())}) == 3
    assert torch.equal(rest.data[0], values[1:])  # whoever reads it, and whatever beside it


def test_samples_are_compared_by_their_places_in_the_set_not_by_draws() -> None:
    read = Samples(SET, draws=Draws(WeightedRandomSampler(WEIGHTS, 100), 9))
    assert (read.length, read.leased) == (9, 100)
    assert read.one(7)[0].item() == 7.0
