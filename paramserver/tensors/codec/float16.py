"""float16: 11 bits of precision, two bytes each, with one power-of-two scale for each bucket.

float16 ends at 65504 and loses precision below 6e-5. Gradients of one bucket span far less than
that, so the bucket is scaled by a power of two (exact in float32) that puts its largest magnitude
near 1024: no overflow, and small numbers keep their bits. Zeros, infinities and NaN pass through as
they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paramserver.tensors.codec.lengths import Room, Wire, fresh, unequal

TARGET = 2.0**10


class Float16:
    leaves_residual = False
    in_place = False

    def fits(self, elements: int, buffers: Wire) -> str | None:
        return unequal(buffers, 2 * elements)

    def encode(self, values: Tensor, room: Room = fresh) -> tuple[list[Any], float]:
        wire = room(2 * values.numel())
        scale = shrink(values, wire.view(torch.float16))
        return [wire.numpy().data], scale

    def decode(self, buffers: Wire, scale: float, out: Tensor) -> Tensor:
        return grow(torch.frombuffer(buffers[0], dtype=torch.float16), scale, out)


def shrink(values: Tensor, out: Tensor) -> float:
    """Multiply `values` by a scale and write them to `out` as float16; returns the scale."""
    # aminmax takes one pass at the speed of memory; vector_norm(ord=inf) ten times as long.
    low, high = torch.aminmax(values)
    largest = max(-low.item(), high.item())
    scale = 1.0
    if 0.0 < largest < math.inf:
        # At most 2^126, so that scale and 1/scale are both normal float32 numbers.
        scale = 2.0 ** max(-126, min(126, math.floor(math.log2(TARGET / largest))))
    # In place: at the size of a bucket, memory for a copy costs more than a pass.
    out.copy_(values.mul_(scale))
    return scale


def grow(half: Tensor, scale: float, out: Tensor) -> Tensor:
    """The inverse of `shrink`, in `out`."""
    out.copy_(half)
    return out if scale == 1.0 else out.mul_(1.0 / scale)
