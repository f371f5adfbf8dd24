"""A data set as `batches` takes it: reads its samples, and reports those that cannot be read.

Samples that cannot be read are left out of their batch and named; more than one in a hundred are an
error. With `deterministic` each sample is read with generators that were seeded for it, so that
what a transform draws does not depend on the worker, nor on the time.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from paramserver import trace
from paramserver.errors import UserError
from paramserver.protocol.messages import Lease
from paramserver.rounds.ledger import SHARE_MAX
from paramserver.tensors.order import order

from .draws import Draws
from .generators import forked, seed_generators
from .loaders import Failed, Processes, exits, parts_of

log = logging.getLogger(__name__)

NAMED = 10  # unreadable samples that are named one by one


class Unusable(UserError):
    """Too much of this data set cannot be read: the run must not go on with it."""


class Loaded(NamedTuple):
    """Samples of a lease. `data` is None where none of them can be read."""

    data: Any
    unread: tuple[int, ...]
    """Places in the lease of the samples that cannot be read."""
    samples: int
    """The number of samples in `data`."""


class Samples:
    """The samples of one data set, by leases, in parts of at most `limit` samples and at least
    `least`, which goes first.

    It has a length and `batch(indices, device)` or `dataset[i]`; samples read one by one are
    collated as torch's DataLoader does, and moved to the device. A DataLoader stands for its data
    set, which is read as it says (`workers.loaders`). With `draws` an epoch is what these are
    (`workers.draws`), and so are leases. Raises `UserError` for an unsuitable one.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | str | None = None,
        *,
        limit: int | None = None,
        least: int = 1,
        seed: int = 0,
        deterministic: bool = False,
        worker: int = 0,
        draws: Draws | None = None,
        log: logging.Logger = log,
    ) -> None:
        given = dataset if isinstance(dataset, DataLoader) else None
        if given is not None:
            dataset = given.dataset
        self.length = _length(dataset)
        self.draws = draws
        """What an epoch draws, where it is not each sample once."""
        self.parts = parts_of(dataset if given is None else given, draws)
        """Of the loader that was given instead of a data set."""
        self._processes: Processes | None = None
        if given is not None and given.num_workers:
            self._processes = Processes(given, start_seed=seed + worker)
        self._collate = default_collate if self.parts is None else self.parts.collate
        self.has_batch = self.parts is None and takes_indices(dataset)
        self.in_loop = self.has_batch or deterministic
        """Is it read in the thread of the loop? Its own `batch` is too quick for another thread,
        and `deterministic` needs it."""
        self.dataset, self._device = dataset, device
        self._limit, self._least = limit, least
        self._seed, self._deterministic, self._log = seed, deterministic, log
        self._reading = threading.RLock()
        """Held while the set is read. A pass that was left may still load ahead when the next one
        begins, and few data sets can be read by two threads."""
        self._orders: dict[int, Tensor] = {}
        self._read_any = False
        self._broken: dict[int, str] = {}
        if self.parts is not None and not self.parts.shuffles and self.draws is None:
            log.info("this DataLoader does not shuffle; a run draws a new order in each epoch")

    @property
    def leased(self) -> int:
        """The samples of an epoch, as leases count them: those of the set, or what is drawn."""
        return self.length if self.draws is None else self.draws.count

    def load(self, lease: Lease) -> list[Loaded]:
        """The samples of a lease, in parts. Raises the data set's exception where no sample could
        be read so far, and `Unusable` where too many cannot."""
        with self._reading, forked() if self._deterministic else nullcontext():
            indices = self._indices(lease)
            return [self._load_part(indices, part, lease) for part in self._parts(len(indices))]

    def _parts(self, samples: int) -> list[range]:
        """Places of a lease of so many samples, by parts."""
        limit = samples if self._limit is None else self._limit
        return [range(a, b) for _, a, b in cut((0, 0, samples), limit, self._least)]

    def _load_part(self, indices: list[int], part: range, lease: Lease) -> Loaded:
        epoch, start, _ = lease
        loaded = self._load(indices[part.start : part.stop], epoch, start + part.start)
        count = len(part) - len(loaded.unread)
        if loaded.unread and count < self._least:  # what is left makes no batch
            return Loaded(None, tuple(part), 0)
        return Loaded(loaded.data, tuple(part.start + place for place in loaded.unread), count)

    def _indices(self, lease: Lease) -> list[int]:
        epoch, start, stop = lease
        if epoch not in self._orders:  # the newest two are in use
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            if self.draws is None:
                self._orders[epoch] = order(self.length, self._seed, epoch)
            else:
                self._orders[epoch] = self.draws.order(self._seed, epoch)
        indices: list[int] = self._orders[epoch][start:stop].tolist()
        return indices

    def _load(self, indices: list[int], epoch: int, place: int) -> Loaded:
        """These samples, the first of which is at this place of the epoch."""
        if self.has_batch:
            try:
                return Loaded(self._batch(indices, epoch, place), (), len(indices))
            except (UserError, MemoryError):
                raise
            except Exception:
                if len(indices) == 1 and not self._read_any:
                    raise
        values, errors = list[Any](), dict[int, Exception]()
        for number, sample in enumerate(self._each(indices, epoch, place)):
            if not isinstance(sample, Failed):
                values.append(sample)
            elif isinstance(sample.error, UserError | MemoryError):
                raise sample.error
            else:
                errors[number] = sample.error
        if not values and not self._read_any:
            raise errors[0]  # a mistake in the data set, rather than in one of its samples
        self._read_any = True
        for number, error in errors.items():
            self._cannot_read(indices[number], error)
        unread = tuple(errors)
        if not values:
            return Loaded(None, unread, 0)
        if self.has_batch:
            kept = [index for number, index in enumerate(indices) if number not in errors]
            return Loaded(self._batch(kept, epoch, place), unread, len(kept))
        return Loaded(self._collated(values, indices), unread, len(values))

    def _collated(self, values: list[Any], indices: list[int]) -> Any:
        try:
            batch = self._collate(values)
        except (RuntimeError, TypeError, KeyError, ValueError) as e:
            if self._collate is not default_collate:
                raise  # a mistake in the user's function, which its traceback shows
            raise UserError(
                f"samples {', '.join(map(str, indices[:8]))} cannot be put into one batch: {e}",
                "give them one shape and kind, or batches() a loader that makes batches of them: "
                "batches(DataLoader(dataset, batch_size, collate_fn=...))",
            ) from e
        if self.parts is not None and self.parts.pin:
            batch = _each_tensor(batch, "pin_memory")
        return _moved(batch, self._device)

    def _purpose(self, index: int, epoch: int, place: int) -> str:
        """What seeds the generators for this sample, or for its draw, if anything does."""
        what = f"sample {index}" if self.draws is None else f"draw {place}"
        return f"{self._seed}, epoch {epoch}, {what}" if self._deterministic else ""

    def _batch(self, indices: list[int], epoch: int, place: int) -> Any:
        if self._deterministic:
            seed_generators(self._purpose(indices[0], epoch, place))
        batch = self.dataset.batch(torch.tensor(indices), self._device or "cpu")
        self._read_any = True
        return batch

    def _each(self, indices: list[int], epoch: int, place: int) -> Iterator[Any]:
        """These samples; a `Failed` for one that cannot be read."""
        wanted = [(self._purpose(i, epoch, at), i) for at, i in enumerate(indices, place)]
        if self._processes is not None:
            yield from self._processes.read(wanted)
            return
        for purpose, index in wanted:
            try:
                if purpose:
                    seed_generators(purpose)
                yield self.one(index)
            except Exception as e:
                yield Failed(e)
            except SystemExit as e:
                yield Failed(exits(e))

    def one(self, index: int) -> Any:
        """One sample as it is, on the CPU; a batch of one where the set makes batches."""
        with self._reading:
            if self.has_batch:
                return self.dataset.batch(torch.tensor([index]), "cpu")
            return self.dataset[index]

    def close(self) -> None:
        """End the processes that read, if there are any."""
        if self._processes is not None:
            self._processes.close()

    def _cannot_read(self, index: int, error: Exception) -> None:
        if index in self._broken:
            return
        self._broken[index] = f"sample {index}: {type(error).__name__}: {error}"
        if len(self._broken) <= NAMED:
            self._log.warning(f"cannot be read, and is skipped: {self._broken[index]}")
        if len(self._broken) > max(1, self.length // SHARE_MAX):
            first = "; ".join(list(self._broken.values())[:3])
            raise Unusable(
                f"{len(self._broken)} of {self.length} samples cannot be read, more than one in "
                f"{SHARE_MAX}: {first}",
                "mend them, or leave them out of the data set",
            ) from error


class Loading:
    """Loads leases of a data set ahead: in a thread while the loop computes, or in the loop at
    once, where the set is read there, or was as quick lately as the change of threads is."""

    QUICK_S = 0.0005

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._quick = False
        self._thread = ThreadPoolExecutor(1, "loader")
        self._ahead: dict[Lease, Future[list[Loaded]] | list[Loaded] | Exception] = {}

    @property
    def in_loop(self) -> bool:
        """Is it read in the thread of the loop?"""
        return self._samples.in_loop or self._quick

    def begin(self, lease: Lease) -> None:
        """This lease will probably come next. What goes wrong is raised by `result`."""
        if lease in self._ahead:
            return
        if not self.in_loop:
            self._ahead[lease] = self._thread.submit(self._load, lease)
            return
        try:
            self._ahead[lease] = self._load(lease)
        except Exception as e:
            self._ahead[lease] = e

    def keep(self, lease: Lease) -> None:
        """Forget what was loaded of others: they did not come."""
        self._ahead = {ahead: loaded for ahead, loaded in self._ahead.items() if ahead == lease}

    def result(self, lease: Lease) -> list[Loaded]:
        """The samples of this lease, in parts; see `Samples.load`."""
        with trace.span("load"):
            loaded = self._ahead.pop(lease, None)
            if loaded is None:
                return self._load(lease)
            if isinstance(loaded, Future):
                return loaded.result()
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

    def _load(self, lease: Lease) -> list[Loaded]:
        start = time.perf_counter()
        loaded = self._samples.load(lease)
        self._quick = time.perf_counter() - start < self.QUICK_S
        return loaded

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._samples.close()


def cut(lease: Lease, most: int, least: int = 1) -> list[Lease]:
    """A lease in pieces of at most `most` samples, as alike as can be, and of at least `least`,
    which goes first."""
    epoch, start, stop = lease
    samples = stop - start
    count = max(1, min(-(-samples // max(1, most)), samples // max(1, least)))
    ends = [start + samples * i // count for i in range(count + 1)]
    return [(epoch, a, b) for a, b in pairwise(ends)]


def drawn_from(dataset: Any, weights: Any) -> Draws | None:
    """What these weights draw from a data set, or from that of a loader; None without weights.
    Raises `UserError` for an unsuitable set, and for unsuitable weights."""
    if weights is None:
        return None
    return Draws(weights, _length(dataset.dataset if isinstance(dataset, DataLoader) else dataset))


def takes_indices(dataset: Any) -> bool:
    """Has it a method `batch(indices, device)`? Other data sets have a different method of that
    name (Hugging Face's takes a size)."""
    method = getattr(dataset, "batch", None)
    if not callable(method):
        return False
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return True
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind < p.KEYWORD_ONLY]
    many = any(p.kind == p.VAR_POSITIONAL for p in parameters.values())
    return "device" in parameters or many or len(needed) == 2


def _length(dataset: Any) -> int:
    """The number of its samples; raises `UserError` where it is no data set with numbered
    samples."""
    kind = type(dataset).__name__
    own = "a loop over what each worker has of its own: cluster.own_batches(...)"
    if isinstance(dataset, IterableDataset | Iterator):
        raise UserError(
            f"a {kind} is a stream: batches() takes a data set whose samples have numbers",
            f"one with __len__ and __getitem__, or {own}",
        )
    if isinstance(dataset, Mapping | str | bytes | int | float | None | type):
        raise UserError(
            f"batches() takes a data set, not a {kind}",
            "one with __len__ and __getitem__(number), as torch.utils.data.TensorDataset is",
        )
    if not takes_indices(dataset) and not hasattr(type(dataset), "__getitem__"):
        raise UserError(
            f"a {kind} has no numbered samples: neither __getitem__ nor batch(indices, device)",
            f"batches() takes what has one of them and a length; or {own}",
        )
    try:
        length = len(dataset)
    except TypeError:
        raise UserError(
            f"a {kind} has no length: batches() takes a data set whose samples have numbers", own
        ) from None
    if length < 1:
        raise UserError("a data set without samples", "give batches() a longer one")
    return length


def loader(dataset: Any, device: torch.device | str | None) -> Callable[[Tensor], Any]:
    """A function that gives the samples at some indices of a data set: by its own `batch`, or one
    by one, collated as torch's DataLoader does, and moved to the device."""
    if takes_indices(dataset):
        return lambda indices: dataset.batch(indices, device or "cpu")
    return lambda indices: _moved(default_collate([dataset[int(i)] for i in indices]), device)


def _moved(value: Any, device: torch.device | str | None) -> Any:
    return value if device is None else _each_tensor(value, "to", device)


def _each_tensor(value: Any, method: str, *arguments: Any) -> Any:
    """A batch with this method called on each of its tensors, and on what has it as tensors do."""
    if hasattr(value, method):
        return getattr(value, method)(*arguments)
    if isinstance(value, Mapping):
        moved = {k: _each_tensor(v, method, *arguments) for k, v in value.items()}
        return moved if type(value) is dict else _remade(value, moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each_tensor(v, method, *arguments) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_each_tensor(v, method, *arguments) for v in value)
    return value


def _remade(value: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """A mapping of the same kind, where that can be made of a dict."""
    try:
        return type(value)(moved)  # type: ignore[call-arg]
    except TypeError:
        return moved
