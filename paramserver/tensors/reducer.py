"""The running sums of the open round: gradients are added as they arrive, in any order.

Memory does not grow with the number of workers: the reducer keeps the first payload of each bucket
until the second one comes, and from then on one sum in the bucket's dtype, whose memory becomes the
average's after the last payload. While all payloads have the same number of samples, that number is
the sum's unit, so that no payload need be multiplied; a payload with another number changes the
unit to one sample. (A running mean would save one more pass over memory, but its rounding error has
the size of the terms, not of their sum: where gradients cancel, an optimizer like Adam turns that
error into whole steps.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paramserver.errors import PeerError
from paramserver.tensors.bucket import Bucket, BucketPlan
from paramserver.tensors.codec import Codec, Room, Wire, codec_of, fresh
from paramserver.tensors.error_feedback import ErrorFeedback
from paramserver.tensors.whole import Whole, unpacked

Release = Callable[[], None]
FLOAT_BYTES = 4
LEFT_OUT_MAX = 2.0**100  # of a number; what a codec leaves out of one is not larger than that
RoomOf = Callable[[int, int], Tensor]
"""Makes the memory of a wire buffer of this bucket: that many bytes, as a uint8 tensor."""


def fresh_room(bucket: int, nbytes: int) -> Tensor:
    return fresh(nbytes)


@dataclass
class Running:
    """The sum of a bucket so far: `values` times `unit` samples."""

    values: Tensor
    unit: float
    release: Release | None
    """Releases the payload whose memory `values` use; None where the sum has its own."""


def _are_usable(left_out: Tensor) -> bool:
    """Can these numbers be added to averages? Sums of them have to be finite, too."""
    return bool((left_out.abs() <= LEFT_OUT_MAX).all())


class Reducer:
    """Running sums and averages of the buckets of one plan.

    Pushes come encoded with the codec `up`; averages are encoded with `down`, with error feedback
    where that codec is lossy. `room` makes the wire buffers of the averages: it is called with the
    bucket's index and the bytes of each of them, in their order.
    """

    def __init__(self, plan: BucketPlan, up: Codec, down: Codec, room: RoomOf = fresh_room) -> None:
        self._plan = plan
        self._up = up
        self._room = room
        self._down = ErrorFeedback(plan, down)
        self._running: dict[int, Running] = {}
        sizes: dict[str, int] = {}
        for b in plan.buckets:
            if b.kind != "whole":
                sizes[b.sent] = max(b.size, sizes.get(b.sent, 0))
        self._scratch = {
            sent: torch.empty(n, dtype=getattr(torch, sent)) for sent, n in sizes.items()
        }
        self._whole = {b.index: Whole(plan, b) for b in plan.buckets if b.kind == "whole"}
        self._came: tuple[Wire, dict[int, Tensor]] | None = None  # of kind `whole`
        self._decoded: tuple[Wire, Tensor] | None = None  # buffers, their numbers

    def check(
        self, bucket: int, buffers: Wire, scale: float, absent: tuple[int, ...] = ()
    ) -> tuple[str | None, float | None]:
        """The reason to refuse a push as bad, or None; and the Euclidean norm of a gradient, None
        for other kinds.

        Raises `PeerError` for buffers that do not fit the layout.
        """
        if not 0 <= bucket < len(self._plan.buckets):
            raise PeerError(f"there is no bucket {bucket}")
        b = self._plan.buckets[bucket]
        if b.kind == "whole":
            self._unpacked(b, buffers, absent)
            return None, None
        wrong = self._codec(b).fits(b.size, buffers)
        if wrong is None and not (0.0 < scale < math.inf):
            wrong = f"a scale of {scale}"
        if wrong is not None:
            raise PeerError(f"bucket {bucket}: {wrong}")
        if b.kind == "count":  # a running maximum begins with an infinity
            return None, None
        values = self._decode(b, buffers, scale)
        # The norm is finite only if all numbers are, and takes a tenth of the time of checking
        # each; where it is not, the squares of finite numbers may have overflowed.
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
        samples: float,
        release: Release,
        worker: int = 0,
        absent: tuple[int, ...] = (),
        *,
        late: bool = False,
    ) -> None:
        """Add the numbers of a push over `samples` samples (for counters take the maximum; for
        tensors of kind `whole` those of the lowest `worker`, of one that is `late` only where no
        other has them).

        Calls `release()` when the buffers are not read any more.
        """
        b = self._plan.buckets[bucket]
        if b.kind == "whole":
            self._whole[bucket].add((late, worker), self._unpacked(b, buffers, absent))
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
        out = total if held is None else self._down.values(b, self._room_of(b))
        if b.kind == "count":
            torch.maximum(total, values, out=out)
        else:
            if samples != running.unit != 1:  # the result must not depend on the order
                total = torch.mul(total, running.unit, out=out)
                running.unit = 1
            if samples != running.unit:  # rounded like the others; `alpha` rounds otherwise
                values = torch.mul(values, samples, out=self._scratch[b.sent][: b.size])
                self._decoded = None
            torch.add(total, values, out=out)
        running.values, running.release = out, None
        if held is not None:
            held()
        release()

    def finish(
        self, bucket: int, samples: float, absent: tuple[int, ...]
    ) -> tuple[list[Any], float, tuple[int, ...]]:
        """The average over all `samples` that were added: encoded buffers, scale, and absent
        tensors; the sum is gone afterwards.

        Where the sum's own memory travels, the reader divides by the scale.
        """
        b = self._plan.buckets[bucket]
        if b.kind == "whole":
            buffers, absent = self._whole[bucket].finish(self._room_of(b))
            return buffers, 1.0, absent
        running = self._running.pop(bucket)
        self._own(b, running)
        divisor = 1.0 if b.kind == "count" else samples / running.unit
        if divisor != 1.0 and not self._down.codec(b).in_place:
            running.values.div_(divisor)
            divisor = 1.0
        buffers, scale = self._down.encode(b, running.values, absent, self._room_of(b))
        return buffers, scale * divisor, absent

    def give_up(self, bucket: int) -> list[Any]:
        """What was left out here of the averages of a bucket that somebody else averages now: its
        numbers in float32, or nothing."""
        residual = self._down.give_up(bucket)
        if residual is None or not _are_usable(residual):
            return []
        return [residual.view(torch.uint8).numpy().data]

    def leaves_out(self, bucket: int) -> bool:
        """Does the codec leave something out of averages of this bucket?"""
        b = self._plan.buckets[bucket]
        return b.kind == "grad" and self._down.codec(b).leaves_residual

    def check_left_out(self, bucket: int, buffers: list[Any]) -> None:
        """Raise `PeerError` for what nobody can have left out of the averages of a bucket."""
        size = FLOAT_BYTES * self._plan.buckets[bucket].size
        if len(buffers) != 1 or memoryview(buffers[0]).nbytes != size:
            raise PeerError(f"what was left out of bucket {bucket} has another length")
        if not _are_usable(torch.frombuffer(buffers[0], dtype=torch.float32)):
            raise PeerError(f"what was left out of bucket {bucket} is not finite, or huge")

    def take_over(self, bucket: int, buffers: list[Any]) -> None:
        """Somebody else has left this out of averages of this bucket, see `give_up`: it goes into
        the next one that is made here."""
        residual = torch.frombuffer(bytearray(buffers[0]), dtype=torch.float32)
        self._down.take_over(bucket, residual)

    def close(self, buckets: tuple[int, ...]) -> None:
        """The round is over: the averages of these buckets are part of an update, the others are
        not (none is, where the round is void)."""
        self._down.settled(buckets)
        for running in self._running.values():
            if running.release is not None:
                running.release()
        self._running.clear()
        self._decoded = self._came = None
        for whole in self._whole.values():
            whole.forget()

    def _own(self, b: Bucket, running: Running) -> None:
        """Copy a sum to memory of its own, and release the payload."""
        if running.release is not None:
            running.values = self._down.values(b, self._room_of(b)).copy_(running.values)
            running.release()
            running.release = None

    def _room_of(self, b: Bucket) -> Room:
        return partial(self._room, b.index)

    def _codec(self, b: Bucket) -> Codec:
        return codec_of(b.kind, b.sent, self._up)

    def _decode(self, b: Bucket, buffers: Wire, scale: float) -> Tensor:
        """The numbers of a push; decoded once for `check` and `add`."""
        if self._decoded is None or self._decoded[0] is not buffers:
            values = self._codec(b).decode(buffers, scale, self._scratch[b.sent][: b.size])
            self._decoded = (buffers, values)
        return self._decoded[1]

    def _unpacked(self, b: Bucket, buffers: Wire, absent: tuple[int, ...]) -> dict[int, Tensor]:
        """The tensors of kind `whole` in a push; raises `PeerError` where the buffers do not
        fit."""
        if self._came is None or self._came[0] is not buffers:
            came = unpacked(self._plan, b, buffers, set(absent))
            if isinstance(came, str):
                raise PeerError(f"bucket {b.index}: {came}")
            self._came = (buffers, came)
        return self._came[1]

    def _names(self, b: Bucket) -> str:
        names = [self._plan.layout.tensors[i].name for i in b.tensors]
        return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
