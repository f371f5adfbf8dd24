"""Buffers that a forward writes and that must not be averaged: each comes whole from one worker.

The mean of two unit vectors is no unit vector, and a queue fits only the pointer that was moved
with it. So all written buffers of a module (the name of a tensor, up to its last dot) come from the
same worker: of those that wrote to it, the one with the lowest id, in any order of the pushes. All
these tensors are in one bucket, whose buffers hold the bytes of those that are not absent, one
after another in the layout's order.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from paramserver.protocol.messages import BUFFERS_MAX
from paramserver.tensors.bucket import Bucket, BucketPlan

BUFFER_BYTES = 4 * 2**20
BYTES_MAX = BUFFERS_MAX * BUFFER_BYTES
"""Bytes of one buffer of a message, and of all that one worker may write in a step."""


def buffers(values: Tensor) -> list[Any]:
    """The bytes of a bucket as they travel."""
    return [part.numpy().data for part in values.split(BUFFER_BYTES)] if len(values) else []


def present(bucket: Bucket, absent: Container[int]) -> list[int]:
    """Layout indexes of the tensors in these buffers."""
    return [index for index in bucket.tensors if index not in absent]


def unpacked(
    plan: BucketPlan, bucket: Bucket, buffers: Sequence[Any], absent: Container[int]
) -> dict[int, Tensor] | str:
    """The bytes of each tensor in the buffers, as a copy, or what is wrong with the buffers."""
    there = present(bucket, absent)
    sizes = [plan.offsets[index + 1] - plan.offsets[index] for index in there]
    got = sum(memoryview(b).nbytes for b in buffers)
    if got != sum(sizes):
        return f"buffers of {got} bytes for {len(there)} tensors of {sum(sizes)}"
    if not there:
        return {}
    parts = [torch.frombuffer(b, dtype=torch.uint8) for b in buffers]
    return dict(zip(there, torch.cat(parts).split(sizes), strict=True))


class Whole:
    """Collects the bucket's tensors in the open round, and chooses those for the update."""

    def __init__(self, plan: BucketPlan, bucket: Bucket) -> None:
        self._plan, self._bucket = plan, bucket
        self._chosen: dict[str, tuple[tuple[bool, int], dict[int, Tensor]]] = {}  # by module

    def add(self, whose: tuple[bool, int], came: dict[int, Tensor]) -> None:
        """Add the tensors of a worker: whether it is late, and its number."""
        modules: dict[str, dict[int, Tensor]] = {}
        for index, values in came.items():
            name = self._plan.layout.tensors[index].name
            modules.setdefault(name.rpartition(".")[0], {})[index] = values
        for module, tensors in modules.items():
            if module not in self._chosen or whose < self._chosen[module][0]:
                self._chosen[module] = whose, tensors

    def finish(self, room: Callable[[int], Tensor]) -> tuple[list[Any], tuple[int, ...]]:
        """The buffers of the update, in memory from `room`, and which tensors are absent."""
        chosen: dict[int, Tensor] = {}
        for _, tensors in self._chosen.values():
            chosen |= tensors
        self._chosen.clear()
        if not chosen:
            return [], self._bucket.tensors
        values = torch.cat([chosen[index] for index in self._bucket.tensors if index in chosen])
        parts = [room(len(part)).copy_(part) for part in values.split(BUFFER_BYTES)]
        absent = tuple(index for index in self._bucket.tensors if index not in chosen)
        return [part.numpy().data for part in parts], absent

    def forget(self) -> None:
        self._chosen.clear()
