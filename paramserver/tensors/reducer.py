"""The running sums of the open round: gradients are added as they arrive, whoever sends them.

Memory does not grow with the number of workers: of each bucket the first payload is kept as it came
until the second one is there, from then on one sum in its dtype, which is given away as the average
when the last one has come. While all payloads have as many samples the sum counts in these, so
that none need be multiplied; one that differs makes it count in single samples. (A mean that is
kept up to date instead would save one more pass over memory, but it rounds at the size of its
terms, not of their sum: where gradients cancel, an optimizer like Adam makes whole steps of that.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paramserver.errors import PeerError
from paramserver.tensors.bucket import Bucket, BucketPlan
from paramserver.tensors.codec import Codec, Room, Wire, codec_of, fresh
from paramserver.tensors.error_feedback import ErrorFeedback
from paramserver.tensors.whole import Whole, unpacked

AVERAGE_SHARE = 2
"""An average in topk carries so many times the share of a push: all that two workers chose, and of
what more chose, most. With a single share, what they chose apart waits twice, on both ways."""

Release = Callable[[], None]


@dataclass
class Running:
    """What has been added to a bucket: `values` times `unit` samples is the sum."""

    values: Tensor
    unit: int
    release: Release | None
    """Of the payload whose memory `values` are; None where they are the sum's own."""


class Reducer:
    """Running sums and averages of the buckets of one plan.

    Pushes come encoded with the codec `up`; averages are encoded with `down`, with error feedback
    where that codec is lossy. `ratio` is the share that topk pushes; `room` makes the wire buffers
    of the averages.
    """

    def __init__(
        self, plan: BucketPlan, up: str, down: str, ratio: float, room: Room = fresh
    ) -> None:
        self._plan = plan
        self._up = up
        self._room = room
        self._down = ErrorFeedback(plan, down, min(1.0, AVERAGE_SHARE * ratio), room)
        self._running: dict[int, Running] = {}
        sizes: dict[str, int] = {}
        for b in plan.buckets:
            if b.kind != "whole":
                sizes[b.sent] = max(b.size, sizes.get(b.sent, 0))
        self._scratch = {
            sent: torch.empty(n, dtype=getattr(torch, sent)) for sent, n in sizes.items()
        }
        self._whole = {b.index: Whole(plan, b) for b in plan.buckets if b.kind == "whole"}
        self._came: tuple[Wire, dict[int, Tensor]] | None = None  # of a whole one, as checked
        self._decoded: tuple[Wire, Tensor] | None = None  # what lies in the scratch, and of what

    def check(
        self, bucket: int, buffers: Wire, scale: float, absent: tuple[int, ...] = ()
    ) -> tuple[str | None, float | None]:
        """What is wrong with the numbers of a push: None, or a reason to refuse it as bad; and the
        Euclidean norm of a gradient, None for anything else.

        Raises `PeerError` for buffers that do not fit the layout.
        """
        b = self._plan.buckets[bucket]
        if b.kind == "whole":
            self._unpacked(b, buffers, absent)
            return None, None
        wrong = self._codec(b).fits(b.size, buffers)
        if wrong is None and not (0.0 < scale < math.inf):
            wrong = f"a scale of {scale}"
        if wrong is not None:
            raise PeerError(f"bucket {bucket}: {wrong}")
        if b.kind == "count":  # a running extreme begins with an infinity, and is one number
            return None, None
        values = self._decode(b, buffers, scale)
        # It is finite only if all of them are, and takes a tenth of the time of looking at each;
        # where it is not, the squares of finite numbers may have added up to infinity.
        norm = math.sqrt(torch.dot(values, values).item())
        if not math.isfinite(norm):
            if not torch.isfinite(values).all():
                why = f"not all of its numbers are finite (bucket {bucket}: {self._names(b)})"
                return why, None
            norm = torch.linalg.vector_norm(values, dtype=torch.float64).item()
        return None, norm if b.kind == "grad" else None

    def add(
        self,
        bucket: int,
        buffers: Wire,
        scale: float,
        samples: int,
        release: Release,
        worker: int = 0,
        absent: tuple[int, ...] = (),
    ) -> None:
        """Add the numbers of a push, over so many samples (of counters, take the maximum; of what
        stays whole, that of the lowest `worker`).

        `release()` is called when its buffers are not read any more.
        """
        b = self._plan.buckets[bucket]
        if b.kind == "whole":
            self._whole[bucket].add(worker, self._unpacked(b, buffers, absent))
            release()
            return
        values = self._decode(b, buffers, scale)
        running = self._running.get(bucket)
        if running is None:
            self._running[bucket] = running = Running(values, samples, release)
            if values.data_ptr() == self._scratch[b.sent].data_ptr():
                self._own(b, running)
            return
        total, held = running.values, running.release
        out = total if held is None else self._down.values(b)
        if b.kind == "count":
            torch.maximum(total, values, out=out)
        else:
            if samples != running.unit != 1:  # whoever came first, the result shall be the same
                total = torch.mul(total, running.unit, out=out)
                running.unit = 1
            if samples != running.unit:  # rounded as the others are: `alpha` would not be
                values = torch.mul(values, samples, out=self._scratch[b.sent][: b.size])
                self._decoded = None
            torch.add(total, values, out=out)
        running.values, running.release = out, None
        if held is not None:
            held()
        release()

    def finish(
        self, bucket: int, samples: int, absent: tuple[int, ...]
    ) -> tuple[list[Any], float, tuple[int, ...]]:
        """The average over all `samples` that were added, encoded, its scale, and what is absent
        from it; the sum is gone afterwards.

        Where the sum's own memory travels, whoever reads it divides: by the scale.
        """
        b = self._plan.buckets[bucket]
        if b.kind == "whole":
            buffers, absent = self._whole[bucket].finish(self._room)
            return buffers, 1.0, absent
        running = self._running.pop(bucket)
        self._own(b, running)
        divisor = 1.0 if b.kind == "count" else samples / running.unit
        if divisor != 1.0 and not self._down.codec(b).in_place:
            running.values.div_(divisor)
            divisor = 1.0
        buffers, scale = self._down.encode(b, running.values, absent)
        return buffers, scale * divisor, absent

    def close(self, buckets: tuple[int, ...]) -> None:
        """The round is over: the averages of these buckets are part of an update, others are not
        (all of them, where the round is void)."""
        self._down.settled(buckets)
        for running in self._running.values():
            if running.release is not None:
                running.release()
        self._running.clear()
        self._decoded = self._came = None
        for whole in self._whole.values():
            whole.forget()

    def _own(self, b: Bucket, running: Running) -> None:
        """Let a sum have memory of its own, and its payload go."""
        if running.release is not None:
            running.values = self._down.values(b).copy_(running.values)
            running.release()
            running.release = None

    def _codec(self, b: Bucket) -> Codec:
        return codec_of(b.kind, b.sent, self._up)

    def _decode(self, b: Bucket, buffers: Wire, scale: float) -> Tensor:
        """The numbers of a push; checked first and then added, it is decoded once."""
        if self._decoded is None or self._decoded[0] is not buffers:
            values = self._codec(b).decode(buffers, scale, self._scratch[b.sent][: b.size])
            self._decoded = (buffers, values)
        return self._decoded[1]

    def _unpacked(self, b: Bucket, buffers: Wire, absent: tuple[int, ...]) -> dict[int, Tensor]:
        """What came of the buffers that stay whole; raises `PeerError` where they do not fit."""
        if self._came is None or self._came[0] is not buffers:
            came = unpacked(self._plan, b, buffers, set(absent))
            if isinstance(came, str):
                raise PeerError(f"bucket {b.index}: {came}")
            self._came = (buffers, came)
        return self._came[1]

    def _names(self, b: Bucket) -> str:
        names = [self._plan.layout.tensors[i].name for i in b.tensors]
        return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
