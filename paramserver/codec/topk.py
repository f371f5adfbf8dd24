"""topk: only the numbers of largest magnitude, as positions and float16 values, 4 bytes each.

What is not sent is kept by error feedback (`paramserver.feedback`) and sent when it has grown; topk
without it does not train. Both together come from Aji and Heafield, "Sparse Communication for
Distributed Gradient Descent", EMNLP 2017, and Lin et al., "Deep Gradient Compression", ICLR 2018.

The largest are chosen in each row of 4096 numbers, not in the bucket as a whole. So layers with
small gradients get their turn, and nothing comes very late: it trains better. It is also faster: a
row stays in the cache, and is partitioned in a fraction of the time that sorting the bucket takes.

float16 suffices because feedback makes good for its error too, and positions take two bytes: they
count from the start of their section of 65,536 numbers.

One buffer: how many numbers each section has (int32), their positions (uint16, rising), their
values (float16, with the header's scale).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramserver.codec.float16 import grow, shrink
from paramserver.codec.lengths import Room, Wire, fresh, lengths

SECTION = 2**16
ROW = 2**12
MAGNITUDE = 0x7FFFFFFF
"""All bits of a float32 but its sign. As integers they rise with the magnitude, infinity and NaN on
top, so what is not finite is among the largest."""

BELOW_ZERO = -1 - np.random.default_rng(0).permutation(ROW).astype(np.int32)
"""What stands in for zeros. A sum of what topk has sent is mostly zeros, and among equal numbers a
partition takes ten times as long."""


class TopK:
    leaves_rest = True
    in_place = False

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

    def encode(
        self, values: Tensor, ratio: float = 0.01, room: Room = fresh
    ) -> tuple[list[Any], float]:
        found = [_largest(part, ratio) for part in values.split(SECTION)]
        counts = torch.tensor([len(positions) for positions in found])
        positions = torch.cat(found)
        where = _where(counts, positions)
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


def _largest(section: Tensor, ratio: float) -> Tensor:
    """Positions, rising, of the numbers of largest magnitude: of each row that share of them, at
    least one, but zeros are never taken."""
    # numpy, because it partitions, and finds what is set in a mask, several times as fast as torch.
    magnitude = section.numpy().view(np.int32) & MAGNITUDE
    whole = len(magnitude) // ROW * ROW
    mask = np.empty(len(magnitude), np.bool_)
    for part in (slice(0, whole), slice(whole, len(magnitude))):
        if part.start < part.stop:
            columns = min(ROW, part.stop - part.start)
            _mark(magnitude[part].reshape(-1, columns), ratio, mask[part].reshape(-1, columns))
    return torch.from_numpy(mask.nonzero()[0])


def _mark(rows: Any, ratio: float, mask: Any) -> None:
    """Set the mask [r, c] where the largest of each row of magnitudes [r, c] are; these are written
    to."""
    columns = rows.shape[1]
    np.copyto(rows, BELOW_ZERO[:columns], where=rows == 0)
    wanted = max(1, round(ratio * columns))
    last = columns - wanted
    threshold = np.maximum(np.partition(rows, last, axis=1)[:, last, None], 1)
    np.greater_equal(rows, threshold, out=mask)
    if np.count_nonzero(mask) > wanted * len(rows):  # several are equal to the threshold
        mask[:] = False
        np.put_along_axis(mask, np.argpartition(rows, last, axis=1)[:, last:], True, axis=1)
        mask &= rows > 0


def _sections(elements: int) -> int:
    return -(-elements // SECTION)


def _parts(buffer: Any, elements: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the counts, positions and values in the buffer of a bucket of so many elements."""
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
