"""int8: one byte each, in blocks of 1024 numbers, each block with a float32 scale of its own.

A block's largest magnitude becomes 127, the others are rounded to the nearest of 255 equal steps.
So a number is off by half a step at most, and a smaller one is sent as zero: use it with
`paramserver.tensors.error_feedback`. Small blocks keep one large number from taking the bits of all
others; at 1024 the scales are 0.4 % of the bytes. Blocks with scales of their own come from
Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015, and Alistarh et al.,
"QSGD", 2017.

A block with a NaN or an infinity in it is not finite in any of its numbers when it is decoded.

One buffer: the scales (float32), then the numbers (int8).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from paramserver.tensors.codec.lengths import Room, Wire, fresh, unequal

BLOCK = 1024
STEPS = 127
SMALLEST = 2.0**-119  # magnitude that still gets all steps: a step is no subnormal number
PIECE = 256  # blocks at a time: 1 MiB, which stays in the cache


class Int8:
    leaves_residual = True
    in_place = False

    def fits(self, elements: int, buffers: Wire) -> str | None:
        return unequal(buffers, 4 * _blocks(elements) + elements)

    def encode(self, values: Tensor, room: Room = fresh) -> tuple[list[Any], float]:
        n, blocks = values.numel(), _blocks(values.numel())
        wire = room(4 * blocks + n)
        scales, numbers = (
            wire[: 4 * blocks].view(torch.float32),
            wire[4 * blocks :].view(torch.int8),
        )
        rounded = torch.empty(min(n, PIECE * BLOCK))
        for rows, scale, out in zip(
            _rows(values), _columns(scales, n), _rows(numbers), strict=True
        ):
            # Of the two reductions each is vectorised; aminmax along a dimension is not.
            torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_(), out=scale)
            scale.clamp_(min=SMALLEST).div_(STEPS)
            steps = rounded[: rows.numel()].view_as(rows)
            out.copy_(torch.div(rows, scale, out=steps).round_())
            rows.addcmul_(steps, scale, value=-1)
        return [wire.numpy().data], 1.0

    def decode(self, buffers: Wire, scale: float, out: Tensor) -> Tensor:
        n, blocks = out.numel(), _blocks(out.numel())
        scales = torch.frombuffer(buffers[0], dtype=torch.float32, count=blocks)
        numbers = torch.frombuffer(buffers[0], dtype=torch.int8, offset=4 * blocks)
        for rows, step, coded in zip(_rows(out), _columns(scales, n), _rows(numbers), strict=True):
            rows.copy_(coded).mul_(step)
        return out


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def _rows(flat: Tensor) -> Iterator[Tensor]:
    """Views [blocks, BLOCK] of a flat tensor, piece by piece; the end may be one short block."""
    whole = flat.numel() // BLOCK * BLOCK
    yield from flat[:whole].view(-1, BLOCK).split(PIECE) if whole else ()
    if whole < flat.numel():
        yield flat[whole:].view(1, -1)


def _columns(scales: Tensor, elements: int) -> Iterator[Tensor]:
    """The scales [blocks, 1] that belong to `_rows` of that many elements."""
    whole = elements // BLOCK
    yield from scales[:whole].view(-1, 1).split(PIECE) if whole else ()
    if whole < len(scales):
        yield scales[whole:].view(1, 1)
