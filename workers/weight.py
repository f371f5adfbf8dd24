"""The number of samples in a batch: counted where the count is certain, else an error that asks for
`samples=`.

A batch may be read in more than one way. In a list of tensors each may be a part of one batch
(inputs, targets), whose first dimension counts the samples, or a sample of its own, as lists of
pictures and of sequences are. `readings` finds every number that some reading gives; only where all
of them agree is the number certain.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, default_collate

from paramserver.errors import UserError
from paramserver.protocol.messages import SAMPLES_MAX

HINT = "say it: own_batches(..., samples=lambda batch: ...)"
PARTS = (
    "say it: own_batches(..., samples=lambda batch: len(batch[0])) where these are parts of one "
    "batch, samples=len where each is a sample"
)

_ALONE = str | bytes | bool | int | float | complex | Enum | torch.dtype | torch.device | None
"""Types that say nothing about the number of samples beside them."""

_TOKENS = (torch.int32, torch.int64)


def samples_in(batch: Any, *, collated: bool = False) -> int:
    """The number of samples in this batch.

    `collated`: it comes from torch's `default_collate`, whose lists hold parts of samples, never
    samples. Raises `UserError` where the number is not certain.
    """
    found = _readings(batch, collated)
    if found is None and isinstance(batch, Tensor) and not collated:
        found = frozenset({1})  # a single number is a sample
    if not found or len(found) > 1:
        hint = PARTS if _may_be_parts(batch, found) else HINT
        raise UserError(f"how many samples are in {_told(batch)}? {_why(found)}", hint)
    return checked(next(iter(found)))


def _may_be_parts(batch: Any, found: Readings) -> bool:
    """Are these tensors that are either the parts of one batch, or samples?"""
    if not isinstance(batch, list | tuple) or not batch:
        return False
    if not all(isinstance(t, Tensor) and t.dim() > 0 for t in batch):
        return False
    return found == frozenset({len(batch), len(batch[0])})


def checked(count: Any) -> int:
    """A number of samples from the user. Raises `UserError` for an impossible one."""
    try:
        number = None if isinstance(count, bool | np.bool_) else operator.index(count)
    except TypeError:
        number = None
    if number is None:
        raise UserError(
            f"samples= gave {count!r}, a {type(count).__name__}: it must be a whole number",
            "the number of samples that the loss of this batch is the mean of",
        )
    if number < 1:
        raise UserError(f"a batch of {number} samples", "leave it out")
    if number > SAMPLES_MAX:
        raise UserError(f"a batch of {number} samples: no batch holds so many")
    return number


def check_function(samples: Any) -> None:
    """Raise `UserError` unless `samples=` is a function of a batch."""
    if samples is not None and not callable(samples):
        raise UserError(
            f"samples={samples!r}", "it is a function of the batch: samples=lambda batch: ..."
        )


def collates_by_default(batches: Any) -> bool:
    """Is this a DataLoader whose batches torch's `default_collate` makes?"""
    return (
        isinstance(batches, DataLoader)
        and batches.collate_fn is default_collate
        and batches.batch_sampler is not None
    )


Readings = frozenset[int] | None
"""Every possible number of samples; empty: the parts contradict each other, or the type is unknown;
None: the value says nothing about it."""

_UNKNOWN: Readings = frozenset()


def _readings(value: Any, collated: bool) -> Readings:
    if isinstance(value, Tensor):
        if value.is_nested:
            return frozenset({int(value.size(0))})
        return frozenset({int(value.shape[0])}) if value.dim() else None
    if isinstance(value, np.ndarray):
        return frozenset({int(value.shape[0])}) if value.ndim else None
    if isinstance(value, _ALONE | np.generic):
        return None
    if isinstance(value, PackedSequence):
        return frozenset({int(value.batch_sizes[0])})
    if isinstance(value, Mapping):
        return _agreed(list(value.values()), collated)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, f.name) for f in dataclasses.fields(value)]
        return _agreed(fields, collated)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _agreed(list(value), collated)
    if isinstance(value, range):
        return frozenset({len(value)})
    if isinstance(value, list | tuple):
        return _readings_of_list(value, collated)
    return _UNKNOWN


def _readings_of_list(items: list[Any] | tuple[Any, ...], collated: bool) -> Readings:
    """The items may be parts of one batch, or samples where they are all of one kind."""
    if items and all(isinstance(item, _ALONE | np.generic) for item in items):
        return frozenset({len(items)})
    parts = _agreed(items, collated)
    if collated or _are_tokens(items):
        return parts
    kinds = {_kind(item) for item in items}
    if len(kinds) != 1:
        return parts if items else frozenset({0})
    return frozenset({len(items)}) | (parts or frozenset())


def _agreed(parts: list[Any] | tuple[Any, ...], collated: bool) -> Readings:
    """The numbers that are possible for every part that has any. Where one part is a single number
    or word, the whole may be one sample."""
    told = [found for part in parts if (found := _readings(part, collated)) is not None]
    if not told:
        return None
    single = not collated and any(map(_is_single, parts))
    return frozenset.intersection(*told) | (frozenset({1}) if single else frozenset())


def _is_single(part: Any) -> bool:
    if isinstance(part, Tensor | np.ndarray):
        return part.ndim == 0
    single = str | bytes | int | float | complex | np.generic
    return isinstance(part, single) and not isinstance(part, bool | np.bool_)


def _are_tokens(items: list[Any] | tuple[Any, ...]) -> bool:
    """Inputs and targets of a language model, a pair of token numbers [n, length]: of one kind
    though they are parts. A sample of text has one dimension, not two."""
    return (
        isinstance(items, tuple)
        and len(items) == 2
        and all(isinstance(t, Tensor) and t.dim() == 2 and t.dtype in _TOKENS for t in items)
        and items[0].shape == items[1].shape
    )


def _kind(value: Any) -> Any:
    """A key that is equal for values which may be samples of one list."""
    if isinstance(value, Tensor | np.ndarray):
        return type(value).__name__, value.ndim, str(value.dtype)
    if isinstance(value, bool | int | float | complex | np.generic):
        return "number"
    if isinstance(value, Mapping):
        return "mapping", frozenset(map(str, value))
    if isinstance(value, tuple):
        kinds = tuple(map(_kind, value))
        return "tuple", kinds if len(kinds) < 10 else (len(kinds), frozenset(kinds))
    return type(value).__name__


def _told(batch: Any) -> str:
    if isinstance(batch, list | tuple) and 0 < len(batch) <= 4:
        return f"a {type(batch).__name__} of {', '.join(map(_told, batch))}"
    if isinstance(batch, Tensor | np.ndarray):
        return f"{type(batch).__name__} {list(batch.shape)}"
    name = f"a {type(batch).__name__}"
    return f"{name} of {len(batch)}" if isinstance(batch, list | tuple | Mapping) else name


def _why(found: Readings) -> str:
    if found is None:
        return "nothing in it tells"
    if not found:
        return "its parts do not agree, or are nothing that we can count"
    return "it may be " + " or ".join(map(str, sorted(found)[:4]))
