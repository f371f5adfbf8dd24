"""float32: the numbers as they are, four bytes each, no copy on either side.

With a scale they are sums, which the reader divides by it. That saves a pass over memory on the
server, because the reader copies the numbers anyway.

float64 and int64, which no codec makes smaller, travel so too, eight bytes each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paramserver.tensors.codec.lengths import Room, Wire, fresh, unequal


class AsItIs:
    leaves_residual = False
    in_place = True

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def fits(self, elements: int, buffers: Wire) -> str | None:
        return unequal(buffers, self._dtype.itemsize * elements)

    def encode(self, values: Tensor, room: Room = fresh) -> tuple[list[Any], float]:
        return [values.view(torch.uint8).numpy().data], 1.0

    def decode(self, buffers: Wire, scale: float, out: Tensor) -> Tensor:
        numbers = torch.frombuffer(buffers[0], dtype=self._dtype)
        if scale == 1.0 or not self._dtype.is_floating_point:
            return numbers
        return torch.div(numbers, scale, out=out)
