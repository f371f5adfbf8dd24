"""Wire buffers: makes new ones, and checks the lengths of those from peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Wire = Sequence[Any]
"""Buffers as they travel: anything with the buffer interface."""

Room = Callable[[int], Tensor]
"""Makes the memory of a new wire buffer: that many bytes, as a uint8 tensor."""


def fresh(nbytes: int) -> Tensor:
    """New memory of this process, uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)


def lengths(buffers: Wire) -> tuple[int, ...]:
    """Bytes of each buffer."""
    return tuple(memoryview(b).nbytes for b in buffers)


def unequal(buffers: Wire, *wanted: int) -> str | None:
    """What is wrong, where the buffers must have these lengths; None if nothing."""
    got = lengths(buffers)
    return None if got == wanted else f"buffers of {got} bytes, expected {wanted}"
