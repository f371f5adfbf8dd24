"""The flat vector and its buckets: how the tensors of a layout become slices that travel alone.

All tensors of a layout lie one after another in one flat vector. A **bucket** is a contiguous slice
of it, the unit of encoding, sending, averaging and publishing. Only tensors of one kind that are
sent as one dtype share a bucket, so that a bucket has one rule: `grad` and `stat` are averaged,
`count` takes the maximum, and only `grad` in float32 goes through the run's codec. All tensors of
kind `whole` are in one bucket, of bytes, of which only those are sent that were written
(`paramserver.tensors.whole`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paramserver.protocol.messages import ITEM_BYTES, Layout, Tensor

SENT_BYTES = {"float32": 4, "float64": 8, "int64": 8, "bytes": 1}
"""Of an element, by what it is sent as."""


@dataclass(frozen=True)
class Bucket:
    """A slice of the flat vector."""

    index: int
    kind: str
    start: int
    stop: int
    tensors: tuple[int, ...]
    """Indexes into the layout of the tensors that lie in it, wholly or in part."""
    sent: str = "float32"
    """As what its elements travel."""

    @property
    def size(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Of all its elements as they are, without a codec."""
        return SENT_BYTES[self.sent] * self.size


@dataclass(frozen=True)
class BucketPlan:
    """Where each tensor lies in the flat vector, and how that is cut into buckets."""

    layout: Layout
    offsets: tuple[int, ...]
    """Start of each tensor, and the vector's whole size at the end; in elements."""
    buckets: tuple[Bucket, ...]
    buckets_of: tuple[tuple[int, ...], ...]
    """For each tensor the buckets it lies in."""

    @property
    def nbytes(self) -> int:
        """Of all buckets as they are, without a codec."""
        return sum(b.nbytes for b in self.buckets)

    @property
    def largest_bytes(self) -> int:
        """Of the largest bucket of numbers."""
        return max((b.nbytes for b in self.buckets if b.kind != "whole"), default=0)


def elements(tensor: Tensor) -> int:
    """How many elements of the flat vector a tensor takes: of one that is sent as bytes, these."""
    count = math.prod(tensor.shape)
    return ITEM_BYTES[tensor.dtype] * count if tensor.sent == "bytes" else count


def plan(layout: Layout, bucket_mb: float) -> BucketPlan:
    """Cut a layout into buckets of at most `bucket_mb` MiB, but for the one of kind `whole`.

    A bucket ends between two tensors where it is at least a quarter full by then, so that it need
    not wait for a large neighbour; a tensor larger than a bucket is cut. Same layout, same plan,
    on every machine.
    """
    limit = 1.0
    offsets = [0]
    buckets: list[Bucket] = []
    buckets_of: list[list[int]] = [[] for _ in layout.tensors]
    start, inside = 0, list[int]()
    kind = sent = ""

    def close(stop: int) -> None:
        nonlocal start, inside
        if stop > start:
            for i in inside:
                buckets_of[i].append(len(buckets))
            buckets.append(Bucket(len(buckets), kind, start, stop, tuple(inside), sent))
        start, inside = stop, []

    for index, tensor in enumerate(layout.tensors):
        begin = offsets[-1]
        end = begin + elements(tensor)
        offsets.append(end)
        if (tensor.kind, tensor.sent) != (kind, sent):
            close(begin)
            kind, sent = tensor.kind, tensor.sent
            limit = math.inf if kind == "whole" else _limit(bucket_mb, sent)
        elif end - start > limit and 4 * (begin - start) >= limit:
            close(begin)
        if end > begin:
            inside.append(index)
        while end - start > limit:
            close(start + int(limit))
            inside = [index] if start < end else []
    close(offsets[-1])
    return BucketPlan(layout, tuple(offsets), tuple(buckets), tuple(map(tuple, buckets_of)))


def _limit(bucket_mb: float, sent: str) -> int:
    """Elements of a bucket."""
    return max(1, int(bucket_mb * 2**20) // SENT_BYTES[sent])
