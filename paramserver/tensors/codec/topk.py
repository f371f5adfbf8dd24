"""topk: only the numbers of largest magnitude, as positions and float16 values, 4 bytes each.

Error feedback keeps what is not sent (`paramserver.tensors.error_feedback`) until it has grown;
topk without it does not train. Both together come from Aji and Heafield, "Sparse Communication for
Distributed Gradient Descent", EMNLP 2017, and Lin et al., "Deep Gradient Compression", ICLR 2018.

The largest are chosen in each section of 65,536 numbers, not in the bucket as a whole, so that
layers with small gradients send some, and not in smaller sections, where the same share holds less
of what matters. `_of_rows` finds a threshold among the maxima of groups, which are a fraction of
the section, and partitions only the numbers above it. That takes half the time of partitioning the
whole section. (A threshold that is guessed from a sample lets an unknown number pass.)

float16 suffices because error feedback corrects its error too. Positions take two bytes: they count
from the start of their section of 65,536 numbers.

One buffer: how many numbers each section has (int32), their positions (uint16, rising), their
values (float16, with the header's scale).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramserver.tensors.codec.float16 import grow, shrink
from paramserver.tensors.codec.lengths import Room, Wire, fresh, lengths

SECTION = 2**16
SLAB = 2**3 * SECTION
"""Numbers that one pass looks at: few calls, and their memory stays in the cache."""

MAGNITUDE = 0x7FFFFFFF
"""All bits of a float32 but its sign. As integers they rise with the magnitude, infinity and NaN on
top, so what is not finite is among the largest."""

GROUPS = 4
"""Groups for each number that is wanted, at least: then few of the largest share a group."""


class TopK:
    """`ratio` is the share of the numbers that are sent."""

    leaves_residual = True
    in_place = False

    def __init__(self, ratio: float = 0.01) -> None:
        self._ratio = ratio

    def fits(self, elements: int, buffers: Wire) -> str | None:
        head, got = 4 * _sections(elements), lengths(buffers)
        if len(got) != 1 or not 0 <= got[0] - head <= 4 * elements or (got[0] - head) % 4:
            return f"buffers of {got} bytes, expected one of {head} and 4 for each number"
        counts, positions, values = _parts(buffers[0], elements)
        if int(counts.min()) < 0 or int(counts.sum()) != len(values):
            return f"{len(values)} numbers came, their counts say otherwise"
        where = _where(counts, positions)
        if bool((where[1:] <= where[:-1]).any()):
            return "positions that do not rise"
        if len(where) and int(where[-1]) >= elements:
            return f"a number at position {int(where[-1])} of {elements}"
        return None

    def encode(self, values: Tensor, room: Room = fresh) -> tuple[list[Any], float]:
        slabs = values.split(SLAB)
        where = torch.cat([_largest(slab, self._ratio) + SLAB * i for i, slab in enumerate(slabs)])
        counts = torch.bincount(where // SECTION, minlength=_sections(values.numel()))
        positions = where % SECTION
        chosen = values.index_select(0, where)
        half = torch.empty(len(where), dtype=torch.float16)
        scale = shrink(chosen.clone(), half) if len(where) else 1.0
        unsent = chosen.sub_(grow(half, scale, torch.empty(len(where))))
        values.index_copy_(0, where, unsent)

        wire = room(4 * len(counts) + 4 * len(where)).numpy().data
        parts = _parts(wire, values.numel())
        for part, content in zip(parts, (counts, positions, half), strict=True):
            part.copy_(content)
        return [wire], scale

    def decode(self, buffers: Wire, scale: float, out: Tensor) -> Tensor:
        counts, positions, values = _parts(buffers[0], out.numel())
        out.zero_()[_where(counts, positions)] = grow(values, scale, torch.empty(len(values)))
        return out


def _largest(slab: Tensor, ratio: float) -> Tensor:
    """Positions, rising, of the numbers of largest magnitude: of each section that share, at least
    one, but zeros are never taken."""
    # numpy, because it partitions, and finds what is set in a mask, several times as fast as torch.
    magnitude = slab.numpy().view(np.int32) & MAGNITUDE
    whole = len(magnitude) // SECTION * SECTION
    found = []
    for start, stop in ((0, whole), (whole, len(magnitude))):
        if start < stop:
            rows = magnitude[start:stop].reshape(-1, min(SECTION, stop - start))
            found.append(_of_rows(rows, max(1, round(ratio * rows.shape[1]))) + start)
    return torch.from_numpy(np.concatenate(found))


def _of_rows(rows: Any, wanted: int) -> Any:
    """Positions, rising, in all of `rows` [r, c], of the `wanted` largest of each; no zeros."""
    count, columns = rows.shape
    groups = columns
    while groups % 2 == 0 and groups >= 2 * GROUPS * wanted:
        groups //= 2
    # At least `wanted` maxima reach this threshold, and so do at least as many numbers.
    maxima = rows.reshape(count, -1, groups).max(axis=1)
    threshold = np.partition(maxima, groups - wanted, axis=1)[:, groups - wanted, None]
    passed = np.flatnonzero(rows >= np.maximum(threshold, 1))
    row = passed // columns
    of_row = np.bincount(row, minlength=count)
    most = of_row.max()
    if most <= wanted:
        return passed
    nth = np.arange(len(passed)) - (np.cumsum(of_row) - of_row)[row]
    close = np.zeros((count, most), np.int32)
    close[row, nth] = rows.reshape(-1)[passed]
    largest = np.zeros(close.shape, np.bool_)
    best = np.argpartition(close, most - wanted, axis=1)[:, most - wanted :]
    np.put_along_axis(largest, best, True, axis=1)
    return passed[largest[row, nth]]


def _sections(elements: int) -> int:
    return -(-elements // SECTION)


def _parts(buffer: Any, elements: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the counts, positions and values in the buffer of a bucket of that many elements."""
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    head = 4 * _sections(elements)
    middle = head + (len(whole) - head) // 2
    return (
        whole[:head].view(torch.int32),
        whole[head:middle].view(torch.uint16),
        whole[middle:].view(torch.float16),
    )


def _where(counts: Tensor, positions: Tensor) -> Tensor:
    """Positions in the bucket, from those in the sections."""
    starts = torch.arange(len(counts)).mul_(SECTION).repeat_interleave(counts)
    return starts.add_(positions.to(torch.int64))
