"""float16: 11 bits of precision, two bytes each, with one power-of-two scale for each bucket.

float16 ends at 65504 and gets coarse below 6e-5. Gradients of one bucket span far less than that,
so the bucket is scaled by a power of two (exact in float32) that puts its largest magnitude near
1024: no overflow, and small numbers keep their bits. Zeros, infinities and NaN pass through as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TARGET = 2.0**10


class Float16:
    def sizes(self, elements: int) -> tuple[int, ...]:
        return (2 * elements,)

    def encode(self, values: Tensor) -> tuple[list[Any], float]:
        largest = float(torch.linalg.vector_norm(values, ord=math.inf)) if values.numel() else 0.0
        scale = 1.0
        if 0.0 < largest < math.inf:
            # At most 2^126, so that scale and 1/scale are both normal float32 numbers.
            scale = 2.0 ** max(-126, min(126, math.floor(math.log2(TARGET / largest))))
        half = torch.empty(values.numel(), dtype=torch.float16)
        half.copy_(values if scale == 1.0 else values * scale)
        return [half.view(torch.uint8).numpy().data], scale

    def decode(self, buffers: Sequence[Any], scale: float, out: Tensor) -> Tensor:
        out.copy_(torch.frombuffer(buffers[0], dtype=torch.float16))
        return out if scale == 1.0 else out.mul_(1.0 / scale)
