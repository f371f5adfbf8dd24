"""bfloat16: float32's range with 8 bits of precision, two bytes each; rounds to nearest even."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paramserver.tensors.codec.lengths import Room, Wire, fresh, unequal


class BFloat16:
    leaves_residual = False
    in_place = False

    def fits(self, elements: int, buffers: Wire) -> str | None:
        return unequal(buffers, 2 * elements)

    def encode(self, values: Tensor, room: Room = fresh) -> tuple[list[Any], float]:
        wire = room(2 * values.numel())
        wire.view(torch.bfloat16).copy_(values)
        return [wire.numpy().data], 1.0

    def decode(self, buffers: Wire, scale: float, out: Tensor) -> Tensor:
        return out.copy_(torch.frombuffer(buffers[0], dtype=torch.bfloat16))
