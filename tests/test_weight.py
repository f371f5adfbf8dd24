"""The weight of a batch is its number of samples or an error, never another number."""

from __future__ import annotations

import dataclasses
from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate

from paramserver.errors import UserError
from paramserver.protocol.messages import SAMPLES_MAX
from workers.weight import checked, collates_by_default, samples_in

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Graphs:
    nodes: torch.Tensor
    labels: torch.Tensor


class Encoding(UserDict[str, Any]):
    """As a tokenizer's is."""


N = 6
X, Y = torch.zeros(N, 2), torch.zeros(N)
PICTURES = tuple(torch.zeros(3, 4, 4) for _ in range(N))

SURE: dict[str, Any] = {
    "a tensor": X,
    "inputs and targets": (X, Y),
    "a mapping": {"x": X, "y": Y},
    "a mapping and labels": ({"x": X, "mask": Y}, Y),
    "an encoding": Encoding(input_ids=X, attention_mask=X),
    "detection": (PICTURES, tuple({"boxes": torch.zeros(k, 4)} for k in range(N))),
    "detection with as many boxes": (
        PICTURES,
        tuple({"boxes": torch.zeros(N, 4)} for _ in PICTURES),
    ),
    "sequences and labels": ([torch.zeros(5, 1) for _ in range(N)], Y),
    "numpy": [np.zeros((N, 1), np.float32), np.zeros(N)],
    "words": ["a"] * N,
    "numbers": list(range(N)),
    "tokens of a language model": (torch.zeros(N, 9, dtype=torch.int64),) * 2,
    "named": Pair(X, X),
    "a dataclass": Graphs(X, X),
    "packed": pack_sequence([torch.zeros(k) for k in range(N, 0, -1)]),
    "scalars": [torch.tensor(1.0)] * N,
    "nothing beside it": (X, None),
}


@pytest.mark.parametrize("name", SURE)
def test_what_is_sure_is_counted(name: str) -> None:
    assert samples_in(SURE[name]) == N


@pytest.mark.parametrize(
    "batch",
    [
        7,
        None,
        object(),
        (torch.zeros(5, 2), torch.zeros(7)),
        [torch.zeros(5, 1) for _ in range(2)],
        PICTURES,
        [X, X],
        [{"x": Y}, {"x": Y}],
        (torch.zeros(3, 4, 4), 5),
        (X, object()),
        {"x": torch.zeros(5, 2), "weights": torch.zeros(3)},
    ],
)
def test_what_is_not_sure_asks_for_it(batch: Any) -> None:
    with pytest.raises(UserError, match=r"how many samples(?s:.*)samples="):
        samples_in(batch)


def test_of_two_readings_both_are_offered() -> None:
    with pytest.raises(UserError, match=r"len\(batch\[0\]\)\) where .*, samples=len where"):
        samples_in((torch.zeros(N, 2), torch.zeros(N, 4)))


def test_a_loader_that_collates_as_torch_does_makes_parts() -> None:
    loader = DataLoader(TensorDataset(X, X), batch_size=4)
    assert collates_by_default(loader)
    assert [samples_in(batch, collated=True) for batch in loader] == [4, 2]
    for other in (
        DataLoader(TensorDataset(X, X), batch_size=4, collate_fn=list),
        DataLoader(TensorDataset(X, X), batch_size=None),
        iter(loader),
    ):
        assert not collates_by_default(other)


@pytest.mark.parametrize("count", [True, 2.0, "3", None, np.float32(1), SAMPLES_MAX + 1, 0, -7])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(UserError):
        checked(count)


@pytest.mark.parametrize("count", [3, np.int64(3), torch.tensor(3)])
def test_a_count_may_be_any_whole_number(count: Any) -> None:
    assert checked(count) == 3


# ----------------------------------------------------------------------- random structures

SIZES = st.integers(1, 4)  # small, so that numbers that mean different things are often equal


@st.composite
def samples(draw: st.DrawFn, depth: int = 2) -> st.SearchStrategy[Any]:
    """What one sample of a made-up data set is like: a strategy for its samples."""
    kind = draw(
        st.sampled_from(
            ["number", "word", "tensor", "sequence", "array", *(["mapping", "tuple"] * bool(depth))]
        )
    )
    if kind == "number":
        return st.integers(0, 3)
    if kind == "word":
        return st.sampled_from(["a", "b"])
    if kind in ("tensor", "array"):
        shape = tuple(draw(st.lists(SIZES, max_size=2)))
        return st.just(torch.zeros(shape) if kind == "tensor" else np.zeros(shape))
    if kind == "sequence":
        width = draw(st.lists(SIZES, max_size=1))
        return SIZES.map(lambda length: torch.zeros(length, *width))
    inner = draw(st.lists(samples(depth - 1), min_size=1, max_size=3))
    if kind == "tuple":
        return st.tuples(*inner)
    return st.fixed_dictionaries({f"k{i}": s for i, s in enumerate(inner)})


def by_hand(items: list[Any], data: st.DataObject) -> Any:
    """A batch of these samples, as collate functions make them."""
    first = items[0]
    if isinstance(first, torch.Tensor | np.ndarray) and len({i.shape for i in items}) == 1:
        if data.draw(st.booleans()):
            return torch.stack(items) if isinstance(first, torch.Tensor) else np.stack(items)
    elif isinstance(first, tuple) and data.draw(st.booleans()):
        return tuple(by_hand(list(column), data) for column in zip(*items, strict=True))
    elif isinstance(first, dict) and data.draw(st.booleans()):
        return {k: by_hand([i[k] for i in items], data) for k in first}
    elif isinstance(first, int) and data.draw(st.booleans()):
        return torch.tensor(items)
    return data.draw(st.sampled_from([list, tuple]))(items)


@given(st.data())
def test_the_answer_is_the_true_count_or_the_question(data: st.DataObject) -> None:
    items = data.draw(st.lists(data.draw(samples()), min_size=1, max_size=4))
    try:
        count = samples_in(by_hand(items, data))
    except UserError as question:
        count = len(items) if "samples=" in question.hint else 0
    assert count == len(items)


@given(st.data())
def test_what_torch_collates_is_counted_wherever_it_has_a_tensor(data: st.DataObject) -> None:
    items = data.draw(st.lists(data.draw(samples()), min_size=1, max_size=4))
    try:
        batch = default_collate(items)
    except (RuntimeError, TypeError):
        return  # of samples of unequal shape
    assert samples_in(batch, collated=True) == len(items)
