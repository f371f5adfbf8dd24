"""The flat vector and its buckets: how the tensors of a layout become slices that are sent one by
one.

All tensors of a layout lie one after another in one flat vector. A **bucket** is a contiguous slice
of it, the unit of encoding, sending, averaging and publishing. Only tensors of one kind that are
sent as one dtype share a bucket, and where the layout has pairs only parameters of one, so that a
bucket has one rule: `grad` and `stat` are averaged,
`count` takes the maximum, and only `grad` in float32 goes through the run's codec. All tensors of
kind `whole` are in one bucket, of bytes, and only the written ones are sent
(`paramserver.tensors.whole`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

from paramserver.protocol.messages import ITEM_BYTES, Layout, Tensor
from paramserver.settings import PIECES

SENT_BYTES = {"float32": 4, "float64": 8, "int64": 8, "bytes": 1}
"""Bytes of an element, by the dtype in which it is sent."""


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
    """The dtype in which its elements travel."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements, without a codec."""
        return SENT_BYTES[self.sent] * self.size


@dataclass(frozen=True)
class BucketPlan:
    """The place of each tensor in the flat vector, and the buckets into which it is cut."""

    layout: Layout
    offsets: tuple[int, ...]
    """Start of each tensor, and the vector's whole size at the end; in elements."""
    buckets: tuple[Bucket, ...]
    buckets_of: tuple[tuple[int, ...], ...]
    """For each tensor, the buckets that it lies in."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buckets, without a codec."""
        return sum(b.nbytes for b in self.buckets)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each bucket, without a codec."""
        return tuple(b.nbytes for b in self.buckets)

    @property
    def whole(self) -> frozenset[int]:
        """The buckets of tensors that stay as they are, which no other shard than the server
        averages."""
        return frozenset(b.index for b in self.buckets if b.kind == "whole")

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest bucket of numbers, without a codec."""
        return max((b.nbytes for b in self.buckets if b.kind != "whole"), default=0)


def elements(tensor: Tensor) -> int:
    """Number of elements in the flat vector; for a tensor that is sent as bytes, its bytes."""
    count = math.prod(tensor.shape)
    return ITEM_BYTES[tensor.dtype] * count if tensor.sent == "bytes" else count


def plan(layout: Layout, bucket_mb: float, min_bucket_mb: float | None = None) -> BucketPlan:
    """Cut a layout into buckets of at most `bucket_mb` MiB, except the one of kind `whole`.

    With a `min_bucket_mb` less than that, the numbers of a round are cut into up to `PIECES`
    buckets about as large as each other, and not smaller than that where no tensor ends: while the
    average of one comes down, the next one goes up.

    A bucket ends between two tensors where it is at least a quarter full by then, so that it need
    not wait for a large neighbour; a tensor larger than a bucket is cut. The same layout gives the
    same plan on every machine.
    """
    limit, most_bytes = 1.0, _most_bytes(layout, bucket_mb, min_bucket_mb)
    offsets = [0]
    buckets: list[Bucket] = []
    buckets_of: list[list[int]] = [[] for _ in layout.tensors]
    start, inside = 0, list[int]()
    kind = sent = ""
    cuts = set(accumulate(count for _, count in layout.pairs))  # where the next pair begins

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
        if (tensor.kind, tensor.sent) != (kind, sent) or index in cuts:
            close(begin)
            kind, sent = tensor.kind, tensor.sent
            limit = math.inf if kind == "whole" else max(1, most_bytes // SENT_BYTES[sent])
        elif end - start > limit and 4 * (begin - start) >= limit:
            close(begin)
        if end > begin:
            inside.append(index)
        while end - start > limit:
            close(start + int(limit))
            inside = [index] if start < end else []
    close(offsets[-1])
    return BucketPlan(layout, tuple(offsets), tuple(buckets), tuple(map(tuple, buckets_of)))


def _most_bytes(layout: Layout, bucket_mb: float, min_bucket_mb: float | None) -> int:
    """Of a bucket of numbers."""
    most = int(bucket_mb * 2**20)
    if min_bucket_mb is None or min_bucket_mb >= bucket_mb:
        return most
    sizes = [
        0 if t.sent == "bytes" else SENT_BYTES[t.sent] * math.prod(t.shape) for t in layout.tensors
    ]
    ends = [0, *accumulate(count for _, count in layout.pairs), len(sizes)]
    in_a_round = max(sum(sizes[a:b]) for a, b in pairwise(ends))
    pieces = max(1, min(PIECES, int(in_a_round / (min_bucket_mb * 2**20))))
    widest = max(SENT_BYTES.values())
    return min(most, widest * math.ceil(in_a_round / (pieces * widest)))
