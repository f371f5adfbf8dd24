"""bfloat16: float32's range with 8 bits of precision, two bytes each; rounds to nearest even."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BFloat16:
    def sizes(self, elements: int) -> tuple[int, ...]:
        return (2 * elements,)

    def encode(self, values: Tensor) -> tuple[list[Any], float]:
        half = torch.empty(values.numel(), dtype=torch.bfloat16).copy_(values)
        return [half.view(torch.uint8).numpy().data], 1.0

    def decode(self, buffers: Sequence[Any], scale: float, out: Tensor) -> Tensor:
        return out.copy_(torch.frombuffer(buffers[0], dtype=torch.bfloat16))
