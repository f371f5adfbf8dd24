"""Error feedback: what a lossy codec did not send goes with the next gradient of that bucket.

Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, add the error of a quantised
gradient to the next one; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes", ICML 2019, show that training then converges as it does without compression.
The server does the same with the averages that it sends, as in Tang et al., "DoubleSqueeze", ICML
2019, so the codec delays a number, on the way up or down, but never loses it.

What the codec did not send is the bucket's **residual**. It lives in the memory of the gradient
itself, where the codec leaves it (`Codec.leaves_residual`), so error feedback takes one addition
and no copy.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from paramserver.tensors import whole
from paramserver.tensors.bucket import Bucket, BucketPlan
from paramserver.tensors.codec import Codec, Room, codec_of, fresh


class ErrorFeedback:
    """Encodes the buckets of one sender, and keeps their residuals: one for each bucket of
    gradients, and while a bucket is under way also the one before. It keeps nothing for a codec
    that leaves no residual.
    """

    def __init__(self, plan: BucketPlan, codec: Codec) -> None:
        self._plan = plan
        self._codec = codec
        self._residuals: dict[int, Tensor] = {}
        self._samples: dict[int, float] = {}  # of the mean that a residual belongs to
        self._under_way: dict[int, tuple[Tensor | None, float]] = {}  # both as they were before

    def codec(self, bucket: Bucket) -> Codec:
        return codec_of(bucket.kind, bucket.sent, self._codec)

    def values(self, bucket: Bucket, room: Room = fresh) -> Tensor:
        """Memory for the numbers of a bucket; the caller fills it and gives it to `encode`. Where
        the codec sends numbers as they are, it is the memory of the wire buffer."""
        if self.codec(bucket).in_place:
            return room(bucket.nbytes).view(getattr(torch, bucket.sent))
        return torch.empty(bucket.size)

    def encode(
        self,
        bucket: Bucket,
        values: Tensor,
        absent: Sequence[int] = (),
        room: Room = fresh,
        samples: int = 1,
    ) -> tuple[list[Any], float]:
        """The wire buffers of these numbers with the bucket's residual added, and their scale;
        `values` belong to this object from now on. They are a mean over `samples`, which weighs so
        much in the average: a residual of a mean over more, or fewer, is scaled accordingly.

        `absent` are the layout indexes of the tensors that this bucket leaves out, where `values`
        must be zero: their part of the residual waits.
        """
        if bucket.kind == "whole":
            return whole.buffers(values), 1.0
        codec = self.codec(bucket)
        if not codec.leaves_residual:
            return codec.encode(values, room)
        before = self._residuals.get(bucket.index)
        samples_before = self._samples.get(bucket.index, samples)
        ratio = samples_before / samples
        waiting = [self._span(bucket, index) for index in absent]
        if before is not None:
            values.add_(before, alpha=ratio)
            for span in waiting:
                values[span] = 0.0
        encoded = codec.encode(values, room)
        if before is not None:
            for span in waiting:
                values[span] = before[span] * ratio
        self._residuals[bucket.index] = values
        self._samples[bucket.index] = samples
        self._under_way[bucket.index] = before, samples_before
        return encoded

    def settled(self, taken: Container[int], share: float = 1.0) -> None:
        """The round is over: of the buckets under way, those in `taken` are part of an update, with
        this share of their weight, and so are their residuals.

        The others get back the residual that they had before, without the gradient that was sent:
        where the server refuses a push its samples return to the ledger, and would count twice.
        """
        for bucket, (before, samples) in self._under_way.items():
            if bucket in taken:
                self._samples[bucket] *= share
                continue
            self._samples[bucket] = samples
            if before is None:
                del self._residuals[bucket]
            else:
                self._residuals[bucket] = before
        self._under_way.clear()

    def give_up(self, bucket: int) -> Tensor | None:
        """The residual of a bucket that another sender encodes from now on, where there is one.
        What is under way of that bucket becomes no part of an update."""
        self._samples.pop(bucket, None)
        residual = self._residuals.pop(bucket, None)
        before, _ = self._under_way.pop(bucket, (residual, 1))
        return before

    def take_over(self, bucket: int, residual: Tensor) -> None:
        """Add another sender's residual, of a mean over as many samples, to that of this bucket:
        also to the one that it gets back where what is under way becomes no part of an update."""
        own = self._residuals.get(bucket)
        self._residuals[bucket] = residual if own is None else own + residual
        if bucket in self._under_way:
            before, samples = self._under_way[bucket]
            self._under_way[bucket] = (residual if before is None else before + residual), samples

    def _span(self, bucket: Bucket, index: int) -> slice:
        """Where in the bucket this tensor, or its part, lies."""
        begin, end = self._plan.offsets[index], self._plan.offsets[index + 1]
        return slice(max(begin, bucket.start) - bucket.start, min(end, bucket.stop) - bucket.start)
