"""What `Cluster.batches` returns, and how much a batch is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .samples import Loaded, Loading, Samples
from .weight import checked


class Batches(Iterator[Any]):
    """This worker's batches of the set that all share; see `Cluster.batches`.

    `len()` estimates those in an epoch, with `num_workers` workers of this `batch_size`; it is the
    same in all of them, so that a schedule may be made of it.
    """

    def __init__(
        self,
        begin: Callable[[Batches], Iterator[Any]],
        dataset: Any,
        samples: Samples,
        wanted: Any,
        batch_size: int,
        length: int,
    ) -> None:
        """`begin` begins a pass: to the end of the run, or of an epoch in a loop over epochs.
        `wanted`: the arguments it was made of."""
        self.dataset = dataset
        self.batch_size = batch_size
        self.samples = samples
        self.wanted = wanted
        self.loading: Loading | None = None
        """Loads leases ahead, from pass to pass."""
        self._begin, self._length = begin, length
        self._begun: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self._begin(self)

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = self._begin(self)
        try:
            return next(self._begun)
        except StopIteration:
            self._begun = None
            raise

    def __len__(self) -> int:
        return self._length

    def loads(self) -> Loading:
        """What loads its leases, begun or begun anew."""
        if self.loading is None:
            self.loading = Loading(self.samples)
        return self.loading

    def close(self) -> None:
        """Load no more, and end the processes that do; another pass begins them again."""
        if self.loading is not None:
            self.loading.close()
            self.loading = None


class Epochs:
    """Where a script is in its loop over epochs, see `Cluster.epochs`."""

    def __init__(self, first: int, count: int) -> None:
        self.now, self._count = first, count
        self.begun = False
        """Was there a pass over batches in it?"""
        self.batches: Batches | None = None
        """Those of the last pass."""
        self._following: int | None = None

    @property
    def limit(self) -> int | None:
        """The last epoch whose samples belong to this pass; None: those to the run's end."""
        return None if self.now >= self._count - 1 else self.now

    def over(self, following: int | None = None) -> None:
        """Its samples are done, and the next ones are of the epoch `following`."""
        self._following = self.now + 1 if following is None else following

    def next(self, done: int) -> int:
        """The next epoch, of which `done` are done; the same one where its pass was broken off."""
        self.now = max(self.now, done) if self._following is None else self._following
        self.begun, self._following = False, None
        return self.now


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
