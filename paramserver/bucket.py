"""The flat vector and its buckets: how the tensors of a layout become slices that travel alone.

All tensors of a layout lie one after another in one flat float32 vector. A **bucket** is a
contiguous slice of it, the unit of encoding, sending, averaging and publishing. Tensors of one
kind only share a bucket, so that a bucket has one rule: `grad` and `stat` are averaged, `count`
takes the maximum, and only `grad` goes through the run's codec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paramserver.wire import Layout

BUCKET_MB, LINKED_BUCKET_MB = 4.0, 2.0
"""By default, where all processes share a host, and where some are reached over links. On one host
each message costs more than its bytes; over a link the first average may come sooner."""

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Bucket:
    """A slice of the flat vector."""

    index: int
    kind: str
    start: int
    stop: int
    tensors: tuple[int, ...]
    """Indexes into the layout of the tensors that lie in it, wholly or in part."""

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Where each tensor lies in the flat vector, and how that is cut into buckets."""

    layout: Layout
    offsets: tuple[int, ...]
    """Start of each tensor, and the vector's whole size at the end; in elements."""
    buckets: tuple[Bucket, ...]
    buckets_of: tuple[tuple[int, ...], ...]
    """For each tensor the buckets it lies in."""

    @property
    def size(self) -> int:
        return self.offsets[-1]


def plan(layout: Layout, bucket_mb: float) -> Plan:
    """Cut a layout into buckets of at most `bucket_mb` MiB of float32.

    A bucket ends between two tensors where it is at least a quarter full by then, so that it need
    not wait for a large neighbour; a tensor larger than a bucket is cut. Same layout, same plan,
    on every machine.
    """
    limit = max(1, int(bucket_mb * 2**20) // FLOAT32_BYTES)
    offsets = [0]
    buckets: list[Bucket] = []
    buckets_of: list[list[int]] = [[] for _ in layout.tensors]
    start, inside = 0, list[int]()

    def close(stop: int, kind: str) -> None:
        nonlocal start, inside
        if stop > start:
            for i in inside:
                buckets_of[i].append(len(buckets))
            buckets.append(Bucket(len(buckets), kind, start, stop, tuple(inside)))
        start, inside = stop, []

    kind = ""
    for index, tensor in enumerate(layout.tensors):
        begin = offsets[-1]
        end = begin + math.prod(tensor.shape)
        offsets.append(end)
        if tensor.kind != kind or (end - start > limit and 4 * (begin - start) >= limit):
            close(begin, kind)
            kind = tensor.kind
        if end > begin:
            inside.append(index)
        while end - start > limit:
            close(start + limit, kind)
            inside = [index] if start < end else []
    close(offsets[-1], kind)
    return Plan(layout, tuple(offsets), tuple(buckets), tuple(map(tuple, buckets_of)))
