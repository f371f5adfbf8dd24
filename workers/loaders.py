"""A torch DataLoader given to `batches`: what it is made of, and reading samples in its processes.

The server decides which samples come, so a loader's own order has no place in a run. Its data set,
batch size, `collate_fn`, processes and pinning do. `parts_of` takes them, and refuses what a loader
decides by itself: a sampler of its own, batches without a size, a stream.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from paramserver.errors import UserError

from .draws import Draws
from .generators import seed_generators

OWN = "each worker's own loader goes to cluster.own_batches(loader)"
ALIGNED = 16  # bytes; no number of a tensor is larger


class Parts(NamedTuple):
    """What a run takes of a loader."""

    dataset: Any
    batch_size: int
    drop_last: bool
    collate: Callable[[list[Any]], Any]
    pin: bool
    """Move batches to pinned memory, from which a GPU reads faster."""
    shuffles: bool
    """Does the loader itself draw an order?"""


def parts_of(loader: Any, draws: Draws | None = None) -> Parts | None:
    """The parts of a DataLoader; None for anything else. Raises `UserError` where it decides what
    the server decides in a run, unless that is what the run `draws`."""
    if not isinstance(loader, DataLoader):
        return None
    if isinstance(loader.dataset, IterableDataset):
        raise UserError(
            f"a DataLoader over a stream ({type(loader.dataset).__name__}): batches() takes a data "
            "set whose samples have numbers",
            f"one with __len__ and __getitem__; or {OWN}",
        )
    sampler = loader.sampler
    if loader.batch_size is None or loader.batch_sampler is None:
        if loader.batch_sampler is not None:
            raise _refused("a batch_sampler of its own", OWN)
        raise _refused("batch_size=None", f"DataLoader(dataset, batch_size=...); or {OWN}")
    if type(loader.batch_sampler) is not BatchSampler:
        raise _refused("a batch_sampler of its own", OWN)
    if isinstance(sampler, DistributedSampler):
        raise _refused("a DistributedSampler", "leave it out: the server divides the samples")
    if isinstance(sampler, SubsetRandomSampler):
        raise _refused(
            "a SubsetRandomSampler", "batches(torch.utils.data.Subset(dataset, indices))"
        )
    if type(sampler) is WeightedRandomSampler:
        _check_drawn(sampler, draws, len(loader.dataset))  # type: ignore[arg-type]
    elif type(sampler) is RandomSampler:
        if sampler.replacement or sampler.num_samples != len(loader.dataset):  # type: ignore[arg-type]
            raise _refused("a RandomSampler that repeats or leaves out samples", OWN)
    elif type(sampler) is not SequentialSampler:
        raise _refused(f"a sampler of its own ({type(sampler).__name__})", OWN)
    return Parts(
        loader.dataset,
        loader.batch_size,
        loader.drop_last,
        loader.collate_fn,
        loader.pin_memory and torch.cuda.is_available(),
        type(sampler) is RandomSampler,
    )


def _check_drawn(sampler: WeightedRandomSampler, draws: Draws | None, samples: int) -> None:
    """Raise `UserError` unless the run draws what this sampler does."""
    hint = "batches(loader, weights=loader.sampler): the run draws by its weights"
    if draws is None:
        raise _refused("a WeightedRandomSampler", f"{hint}; or {OWN}")
    if draws.digest() != Draws(sampler, samples).digest():
        raise UserError(
            "weights= are others than those of the loader's WeightedRandomSampler", hint
        )


def _refused(what: str, hint: str) -> UserError:
    return UserError(
        f"a DataLoader with {what}: in a run of workers the server decides which samples come", hint
    )


# ------------------------------------------------------------------------- its processes


class Failed(NamedTuple):
    """A sample that cannot be read, and why."""

    error: Exception


class Processes:
    """Reads samples in the processes of a loader, each lease in as many parts as there are
    processes. They start with the first lease, and live until `close`.

    Each process has generators of its own, which `start_seed` begins.
    """

    def __init__(self, loader: DataLoader[Any], *, start_seed: int) -> None:
        self._given, self._start_seed = loader, start_seed
        self._places = _Places()
        self._loader: DataLoader[Any] | None = None
        self._lock = threading.Lock()

    def read(self, wanted: list[tuple[str, int]]) -> list[Any]:
        """The samples of these indices in this order, each with what seeds the generators for it
        (empty: nothing); a `Failed` for one that cannot be read. Several threads may call it: one
        is served after the other."""
        count = min(self._given.num_workers, len(wanted))
        ends = [len(wanted) * i // count for i in range(count + 1)]
        with self._lock:
            if self._loader is None:
                self._loader = self._start()
            loader = self._loader
            self._places.now = [wanted[a:b] for a, b in pairwise(ends)]
            return [sample for packed in loader for sample in unpack(*packed)]

    def _start(self) -> DataLoader[Any]:
        """A loader whose processes go on from lease to lease."""
        return DataLoader(
            _Reader(self._given.dataset),
            batch_sampler=self._places,
            num_workers=self._given.num_workers,
            collate_fn=pack,
            timeout=self._given.timeout,
            worker_init_fn=self._given.worker_init_fn,
            multiprocessing_context=self._given.multiprocessing_context,
            generator=torch.Generator().manual_seed(self._start_seed),
            persistent_workers=True,
        )

    def close(self) -> None:
        """End the processes. Reading starts them again."""
        self._loader = None


class _Places(Sampler[list[tuple[str, int]]]):
    """Seeds and indices of the samples of one lease, by process."""

    def __init__(self) -> None:
        self.now: list[list[tuple[str, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[str, int]]]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


class _Reader(Dataset[Any]):
    """The loader's data set in its processes: an error is a value, so that the samples beside it
    are read."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, place: tuple[str, int]) -> Any:
        purpose, index = place
        if purpose:
            seed_generators(purpose)
        try:
            return self._dataset[index]
        except Exception as e:
            return Failed(_sendable(e))
        except SystemExit as e:
            return Failed(exits(e))


def exits(error: SystemExit) -> Exception:
    """The error that stands for a `sys.exit` in a data set: it would end one worker after the
    other, each in order, and nobody would know of which sample. Raises the one that it gets in a
    main thread, where it may be that of a signal's handler."""
    if threading.current_thread() is threading.main_thread() and get_worker_info() is None:
        raise error
    return RuntimeError(f"the data set called sys.exit({error.code!r})")


def _sendable(error: Exception) -> Exception:
    """The error as it can be sent from process to process, with its traceback as a note."""
    where = traceback.format_exc()
    plain = all(isinstance(a, str | int | float | bytes | None) for a in error.args)
    if type(error).__module__ != "builtins" or not plain:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a process of the loader:\n{where}")
    return error


class _Place(NamedTuple):
    """Where the numbers of a tensor lie."""

    at: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.at + self.shape.numel() * self.dtype.itemsize


def pack(samples: list[Any]) -> tuple[list[Any], Tensor]:
    """Samples with their tensors replaced by places in one tensor (uint8), which holds all their
    numbers. A tensor that goes from process to process holds a file open; there are few of them."""
    tensors: list[tuple[_Place, Tensor]] = []
    end = 0

    def placed(t: Any) -> Any:
        nonlocal end
        if type(t) is not Tensor or not _is_plain(t):
            return t
        place = _Place(end, t.dtype, t.shape)
        end = -(-place.stop // ALIGNED) * ALIGNED
        tensors.append((place, t))
        return place

    skeleton = [_mapped(sample, placed) for sample in samples]
    numbers = torch.empty(end, dtype=torch.uint8)
    for place, t in tensors:
        _at(place, numbers).copy_(t)
    return skeleton, numbers


def unpack(skeleton: list[Any], numbers: Tensor) -> list[Any]:
    """The samples that `pack` packed."""
    return [
        _mapped(sample, lambda v: _at(v, numbers) if isinstance(v, _Place) else v)
        for sample in skeleton
    ]


def _at(place: _Place, numbers: Tensor) -> Tensor:
    return numbers[place.at : place.stop].view(place.dtype).view(place.shape)


def _is_plain(t: Tensor) -> bool:
    strided = t.layout is torch.strided and t.device.type == "cpu" and not t.is_quantized
    return strided and not (t.requires_grad or t.is_conj() or t.is_neg())


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A sample with each of its leaves replaced; what is no plain dict, list or tuple is one."""
    if isinstance(value, _Place):
        return leaf(value)
    if type(value) is dict:
        return {k: _mapped(v, leaf) for k, v in value.items()}
    if type(value) is list:
        return [_mapped(v, leaf) for v in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, leaf) for v in value))
    if type(value) is tuple:
        return tuple(_mapped(v, leaf) for v in value)
    return leaf(value)
