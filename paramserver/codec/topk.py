"""topk: only the numbers of largest magnitude, as positions and float16 values, 4 bytes each.

What is not sent is kept by error feedback (`paramserver.feedback`) and sent when it has grown; topk
without it does not train. The largest are chosen in each section of 65,536 numbers, so that a layer
with small gradients gets its turn too. Sorting them takes far longer than sending them, so the
magnitude from which numbers are sent is read off a sample, as in Lin et al., "Deep Gradient
Compression", ICLR 2018. The count that follows is near the ratio, not equal to it; above `SLACK`
times that, the largest of the candidates are chosen.

float16 suffices because feedback makes good for its error too, and positions take two bytes: they
count from the start of their section.

One buffer: how many numbers each section has (int32), their positions (uint16, rising), their
values (float16, with the header's scale).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramserver.codec.float16 import grow, shrink
from paramserver.codec.lengths import Room, Wire, fresh, lengths

SECTION = 2**16
SAMPLE = 2**12
SLACK = 1.3
MAGNITUDE = 0x7FFFFFFF
"""All bits of a float32 but its sign. As integers they rise with the magnitude, infinity and NaN on
top, so what is not finite is among the largest."""


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
    """Positions, rising, of about that share of the numbers, those of largest magnitude; at least
    one, but zeros are never taken."""
    # numpy, because it finds what is set in a mask five times as fast as torch.
    magnitude = section.numpy().view(np.int32) & MAGNITUDE
    n = len(magnitude)
    wanted = max(1, math.ceil(ratio * n))
    # An odd stride, so that a sample of a matrix is not from a few of its columns.
    sample = magnitude[:: n // SAMPLE | 1]
    last = len(sample) - max(1, round(len(sample) * wanted / n))
    threshold = max(1, int(np.partition(sample, last)[last]))
    found = (magnitude >= threshold).nonzero()[0]
    if len(found) > max(wanted, SLACK * wanted):
        best = np.argpartition(magnitude[found], len(found) - wanted)[-wanted:]
        found = found[np.sort(best)]
    return torch.from_numpy(found)


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
