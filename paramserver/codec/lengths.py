"""The first thing to know of buffers from elsewhere: how many there are, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Wire = Sequence[Any]
"""Buffers as they travel: anything with the buffer interface."""


def lengths(buffers: Wire) -> tuple[int, ...]:
    """Bytes of each buffer."""
    return tuple(memoryview(b).nbytes for b in buffers)


def unequal(buffers: Wire, *wanted: int) -> str | None:
    """What is wrong where the buffers must have these lengths."""
    got = lengths(buffers)
    return None if got == wanted else f"buffers of {got} bytes, expected {wanted}"
