"""The running sums of the open round: gradients are added as they arrive, whoever sends them.

Memory does not grow with the number of workers: one float32 sum per bucket, made when the first
gradient of a round arrives and given away as the average when the last one has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paramserver.bucket import Bucket, Plan
from paramserver.codec import CODECS, Codec, Room, Wire, fresh
from paramserver.errors import PeerError
from paramserver.feedback import Feedback


class Mean:
    """Sums and averages of the buckets of one plan.

    Pushes come encoded with the codec `up`; averages are encoded with `down`, with error feedback
    where that codec is lossy. `ratio` is that of topk; `room` makes the averages' wire buffers.
    """

    def __init__(self, plan: Plan, up: str, down: str, ratio: float, room: Room = fresh) -> None:
        self._plan = plan
        self._up = CODECS[up]
        self._down = Feedback(plan, down, ratio, room)
        self._sums: dict[int, Tensor] = {}
        self._scratch = torch.empty(max(b.size for b in plan.buckets))
        self._decoded: tuple[Wire, Tensor] | None = None  # what lies in the scratch, and of what

    def check(self, bucket: int, buffers: Wire, scale: float) -> str | None:
        """What is wrong with the numbers of a push: None, or a reason to refuse it as bad.

        Raises `PeerError` for buffers that do not fit the layout.
        """
        b = self._plan.buckets[bucket]
        wrong = self._codec(b).fits(b.size, buffers)
        if wrong is None and not (0.0 < scale < math.inf):
            wrong = f"a scale of {scale}"
        if wrong is not None:
            raise PeerError(f"bucket {bucket}: {wrong}")
        values = self._decode(b, buffers, scale)
        # A sum is finite only if all of it is, and takes half the time of looking at each; where it
        # is not, finite numbers may have added up to infinity.
        if not math.isfinite(values.sum().item()) and not torch.isfinite(values).all():
            return f"not all of its numbers are finite (bucket {bucket}: {self._names(b)})"
        return None

    def add(self, bucket: int, buffers: Wire, scale: float, samples: int) -> None:
        """Add the numbers of a push, `samples` times (counters: take the maximum)."""
        b = self._plan.buckets[bucket]
        values = self._decode(b, buffers, scale)
        total = self._sums.get(bucket)
        if total is None:
            total = self._sums[bucket] = self._down.values(b)
            if b.kind == "count":
                total.copy_(values)
            else:
                torch.mul(values, samples, out=total)
        elif b.kind == "count":
            torch.maximum(total, values, out=total)
        else:
            total.add_(values, alpha=samples)

    def finish(self, bucket: int, samples: int, absent: tuple[int, ...]) -> tuple[list[Any], float]:
        """The average of all that was added, encoded; the sum is gone afterwards."""
        b = self._plan.buckets[bucket]
        total = self._sums.pop(bucket)
        if b.kind != "count":
            total.div_(samples)
        return self._down.encode(b, total, absent)

    def close(self, buckets: tuple[int, ...]) -> None:
        """The round is over: the averages of these buckets are part of an update, others are not
        (all of them, where the round is void)."""
        self._down.settled(buckets)
        self._sums.clear()
        self._decoded = None

    def _codec(self, b: Bucket) -> Codec:
        """Statistics and counters go as they are; only gradients go through the run's codec."""
        return self._up if b.kind == "grad" else CODECS["float32"]

    def _decode(self, b: Bucket, buffers: Wire, scale: float) -> Tensor:
        """The numbers of a push; checked first and then added, it is decoded once."""
        if self._decoded is None or self._decoded[0] is not buffers:
            values = self._codec(b).decode(buffers, scale, self._scratch[: b.size])
            self._decoded = (buffers, values)
        return self._decoded[1]

    def _names(self, b: Bucket) -> str:
        names = [self._plan.layout.tensors[i].name for i in b.tensors]
        return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
