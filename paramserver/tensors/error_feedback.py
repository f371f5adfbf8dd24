"""Error feedback: what a lossy codec did not send goes with the next gradient of that bucket.

Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, add the error of a quantised
gradient to the next one; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes", ICML 2019, show that training then converges as it does without compression.
The server does the same with the averages that it sends, as in Tang et al., "DoubleSqueeze", ICML
2019, so a number is late on its way, up or down, but never lost.

What was not sent is the bucket's **rest**. It lives in the memory of the gradient itself, which the
codec leaves behind (`Codec.leaves_rest`), so feedback takes one addition and no copy.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from paramserver.tensors import whole
from paramserver.tensors.bucket import Bucket, Plan
from paramserver.tensors.codec import Codec, Room, codec_of, fresh


class Feedback:
    """Encodes the buckets of one sender, and keeps their rests: one for each bucket of gradients,
    and while a bucket is under way also the one before. Nothing is kept for a codec that leaves no
    rest. `ratio` is that of topk; `room` makes the wire buffers, where a call names no other.
    """

    def __init__(self, plan: Plan, codec: str, ratio: float, room: Room = fresh) -> None:
        self._plan = plan
        self._codec = codec
        self._ratio = ratio
        self._room = room
        self._rests: dict[int, Tensor] = {}
        self._under_way: dict[int, Tensor | None] = {}  # the rest as it was before

    def codec(self, bucket: Bucket) -> Codec:
        return codec_of(bucket.kind, bucket.sent, self._codec)

    def values(self, bucket: Bucket, room: Room | None = None) -> Tensor:
        """Memory for the numbers of a bucket, to be filled and given to `encode`: where the codec
        sends them as they are, in the room that they are sent from."""
        if self.codec(bucket).in_place:
            return (room or self._room)(bucket.nbytes).view(getattr(torch, bucket.sent))
        return torch.empty(bucket.size)

    def encode(
        self,
        bucket: Bucket,
        values: Tensor,
        absent: Sequence[int] = (),
        room: Room | None = None,
    ) -> tuple[list[Any], float]:
        """The wire buffers of these numbers and of the bucket's rest; `values` are given away.

        `absent` are the layout indexes of tensors that nobody will take from this bucket, where
        `values` must be zero: their part of the rest waits.
        """
        if bucket.kind == "whole":
            return whole.buffers(values), 1.0
        codec, room = self.codec(bucket), room or self._room
        if not codec.leaves_rest:
            return codec.encode(values, self._ratio, room)
        before = self._rests.get(bucket.index)
        waiting = [self._span(bucket, index) for index in absent]
        if before is not None:
            values.add_(before)
            for span in waiting:
                values[span] = 0.0
        encoded = codec.encode(values, self._ratio, room)
        if before is not None:
            for span in waiting:
                values[span] = before[span]
        self._rests[bucket.index] = values
        self._under_way[bucket.index] = before
        return encoded

    def settled(self, taken: Container[int]) -> None:
        """The round is over: of the buckets under way, those in `taken` are part of an update.

        The others get back the rest that they had before. Not the gradient that was sent: where a
        push is refused its samples return to the ledger, and would count twice.
        """
        for bucket, before in self._under_way.items():
            if bucket in taken:
                continue
            if before is None:
                del self._rests[bucket]
            else:
                self._rests[bucket] = before
        self._under_way.clear()

    def _span(self, bucket: Bucket, index: int) -> slice:
        """Where in the bucket this tensor, or its part, lies."""
        begin, end = self._plan.offsets[index], self._plan.offsets[index + 1]
        return slice(max(begin, bucket.start) - bucket.start, min(end, bucket.stop) - bucket.start)
