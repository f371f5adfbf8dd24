"""What `Cluster.batches` returns, and how much a batch is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .samples import Loaded
from .weight import checked


class Batches(Iterator[Any]):
    """This worker's batches of the set that all share; see `Cluster.batches`.

    `len()` estimates those in an epoch, with `num_workers` workers of this `batch_size`; it is the
    same in all of them, so that a schedule may be made of it.
    """

    def __init__(
        self, begin: Callable[[], Iterator[Any]], dataset: Any, batch_size: int, length: int
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self._begin, self._length = begin, length
        self._begun: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self._begin()

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = self._begin()
        return next(self._begun)

    def __len__(self) -> int:
        return self._length


class Sizes(NamedTuple):
    """How much a batch is: samples, for the ledger, and its weight in the average."""

    samples: int
    weight: int


def weights_of(parts: list[Loaded], weight: Callable[[Any], int] | None) -> list[int]:
    """What the parts of a batch weigh: by the user's function, else their samples."""
    return [part.samples if weight is None else checked(weight(part.data)) for part in parts]


def sizes_of(parts: list[Loaded], weights: list[int]) -> Sizes:
    """Of a batch with these parts."""
    return Sizes(sum(part.samples for part in parts), sum(weights))
