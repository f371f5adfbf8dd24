"""Notices batches of samples that are not equally long: then a loss may be a mean over words or
pixels rather than over samples.

A round weighs each batch by its number of samples, unless `samples=` says another number. Whether a
loss is a mean over words cannot be seen from here. That batches differ in length can, or that some
of their labels do not count. So this is said once, and what to do if it is so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

LOOKS = 64  # batches that are looked at
IGNORED = (
    -100
)  # a label that torch's losses leave out of their mean, unless they are told otherwise
WAY = (
    "a batch weighs by its number of samples. If the loss is a mean over words or pixels, say of "
    "how many: samples=lambda batch: ... (see 'Your DataLoader' in docs/your-own-model.md)"
)


class Lengths:
    """Looks at the first batches of a loop that is given no `samples=`, and warns once."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._left = LOOKS
        self._first: list[tuple[int, ...]] = []  # shapes without the number of samples

    def look(self, batch: Any) -> None:
        """Look at one more batch."""
        if self._left == 0:
            return
        self._left -= 1
        uneven = self._uneven(list(_parts(batch)))
        if uneven:
            self._left = 0
            self._log.warning(f"{uneven}: {WAY}")

    def _uneven(self, parts: list[Any]) -> str:
        """What shows that the samples are not equally long; empty where nothing does."""
        for part in parts:
            if isinstance(part, PackedSequence) and part.batch_sizes[0] != part.batch_sizes[-1]:
                return "the sequences of a batch are not equally long"
            if isinstance(part, Tensor) and part.is_nested:
                return "the samples of a batch are not equally long"
            ignored = isinstance(part, Tensor) and part.device.type == "cpu"
            ignored = ignored and part.dtype == torch.int64 and part.dim() > 1
            if ignored and bool((part == IGNORED).any()):
                return f"some labels of a batch are {IGNORED}, and do not count"
        shapes = [tuple(p.shape[1:]) for p in parts if isinstance(p, Tensor) and p.dim() > 1]
        if not self._first:
            self._first = shapes
        for before, shape in zip(self._first, shapes, strict=False):
            if before != shape:
                return f"batches have samples of other sizes ({_told(before)}, then {_told(shape)})"
        return ""


def _parts(batch: Any) -> Iterable[Any]:
    """What a batch is made of. A list in it may hold samples of any size: it tells nothing."""
    if isinstance(batch, Tensor | PackedSequence):
        return (batch,)
    if isinstance(batch, Mapping):
        return batch.values()
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return batch if isinstance(batch, list | tuple) else ()


def _told(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
