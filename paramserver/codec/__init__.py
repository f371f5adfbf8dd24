"""Codecs: how the float32 numbers of a bucket look on the wire.

A codec is two verbs. `encode` writes the numbers of a bucket into new wire buffers and may return a
scale that travels in the header; `decode` gives the numbers back. Each codec is one file here and
one row in `CODECS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from paramserver.codec.bfloat16 import BFloat16
from paramserver.codec.float16 import Float16
from paramserver.codec.float32 import Float32

Wire = Sequence[Any]
"""Buffers as they travel: anything with the buffer interface."""


class Codec(Protocol):
    """What a codec must offer; `values` and `out` are flat, contiguous float32 on the CPU."""

    def sizes(self, elements: int) -> tuple[int, ...]:
        """Bytes of each wire buffer of a bucket of that many elements."""
        ...

    def encode(self, values: Tensor) -> tuple[list[Any], float]:
        """New wire buffers, and the scale for the header. `values` may live on in the buffers:
        the caller gives them away."""
        ...

    def decode(self, buffers: Wire, scale: float, out: Tensor) -> Tensor:
        """The numbers, in `out` or as a view of the buffers: read them, do not keep them."""
        ...


CODECS: dict[str, Codec] = {
    "float32": Float32(),
    "float16": Float16(),
    "bfloat16": BFloat16(),
}


def check_sizes(codec: Codec, elements: int, buffers: Wire) -> str | None:
    """What is wrong with the number or the length of these wire buffers; None when nothing is."""
    wanted = codec.sizes(elements)
    got = tuple(memoryview(b).nbytes for b in buffers)
    return None if got == wanted else f"buffers of {got} bytes, expected {wanted}"
