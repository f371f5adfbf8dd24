"""Gradients leave while backward runs: hooks on the parameters fill buckets, a full one is sent.

A bucket is full when every parameter in it has its gradient of this step. What has none by the end
(unused branches, frozen for a step) is sent by `flush` as absent, with zeros in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paramserver.bucket import Bucket
from paramserver.errors import UserError
from workers.checks import sparse
from workers.replica import Replica

Make = Callable[[Bucket], Tensor]
Drop = Callable[[Tensor], None]
Send = Callable[[Bucket, Tensor, tuple[int, ...]], None]


class Gradients:
    """Watches a replica's backward and gives every full bucket to `send(bucket, values, absent)`.

    `values` is a flat float32 CPU tensor that `make(bucket)` made for it; one that is not sent
    after all goes to `drop(values)`. `absent` are the layout indexes of parameters without a
    gradient. `accumulate` backward passes make one step.
    """

    def __init__(
        self, replica: Replica, make: Make, send: Send, drop: Drop, accumulate: int = 1
    ) -> None:
        self._replica = replica
        self._make = make
        self._drop = drop
        self._send = send
        self._accumulate = accumulate
        self._plan = replica.plan
        self._open = False
        self._passes = [0] * len(replica.params)
        self._versions = [0] * len(replica.params)  # of the gradients as they were taken
        self._missing: list[int] = []
        self._values: dict[int, Tensor] = {}
        self._sent: set[int] = set()
        self._device = replica.params[0][1].device if replica.params else torch.device("cpu")
        for index, (name, p) in enumerate(replica.params):
            p.register_post_accumulate_grad_hook(self._hook(index, name))

    def begin(self) -> None:
        """A step begins: its buckets are all empty."""
        self._replica.reset_statistics()
        for _, p in self._replica.params:  # the last average, a view of where the next one goes
            p.grad = None
        self._open = True
        self._passes = [0] * len(self._passes)
        self._missing = [len(b.tensors) for b in self._plan.buckets]
        for values in self._values.values():  # of a step that was not carried through
            self._drop(values)
        self._values.clear()
        self._sent.clear()

    def flush(self) -> None:
        """Backward is over: send what has not been sent, gradient or not, and the statistics."""
        if not self._open:
            return
        self._replica.check_unchanged()
        self._check_untouched()
        for bucket in self._plan.buckets:
            if bucket.index in self._sent:
                continue
            absent = []
            if bucket.kind == "grad":
                for index in bucket.tensors:
                    passes = self._passes[index]
                    if passes and passes != self._accumulate:
                        # Fewer passes than stated reached it: what is there is its gradient.
                        self._fill(index, bucket, self._source(index))
                    elif not passes:
                        absent.append(index)
                        self._zero(index, bucket)
            else:
                for index in bucket.tensors:
                    self._fill(index, bucket, self._source(index))
            self._hand_over(bucket, tuple(absent))
        self._open = False

    def _check_untouched(self) -> None:
        """Clipped or scaled now, a gradient that has left would go on as it was before."""
        for index, (name, p) in enumerate(self._replica.params):
            if not self._passes[index]:
                continue
            if p.grad is None or p.grad._version != self._versions[index]:
                raise UserError(
                    f"the gradient of {name} was changed after backward, when it had left",
                    "what happens to the averaged gradient is given to attach(): clip_norm=, or "
                    "before_step=; scale the loss, not the gradient",
                )

    def _hook(self, index: int, name: str) -> Callable[[Tensor], None]:
        def on_gradient(p: Tensor) -> None:
            if not self._open:
                return
            if p.grad is None:  # frozen between forward and backward
                self._replica.check_unchanged()
                return
            if p.grad.is_sparse:
                raise sparse(name)
            self._passes[index] += 1
            if self._passes[index] > self._accumulate:
                raise UserError(
                    f"{name} got its gradient {self._passes[index]} times in one step, "
                    f"{self._accumulate} were stated",
                    "state the number of backward passes for each step: attach(accumulate=...)",
                )
            self._versions[index] = p.grad._version
            if self._passes[index] == self._accumulate:
                # One after another: the room of a bucket that has left is free for a later one.
                source = self._source(index)
                for number in self._plan.buckets_of[index]:
                    bucket = self._plan.buckets[number]
                    self._fill(index, bucket, source)
                    self._missing[number] -= 1
                    if self._missing[number] == 0:
                        self._hand_over(bucket, ())

        return on_gradient

    def _room(self, bucket: Bucket) -> Tensor:
        values = self._values.get(bucket.index)
        if values is None:
            values = self._values[bucket.index] = (
                self._make(bucket)
                if self._device.type == "cpu"
                else torch.empty(bucket.size, device=self._device)
            )
        return values

    def _span(self, index: int, bucket: Bucket) -> tuple[int, int, int]:
        """Where the part of a tensor that lies in a bucket starts and stops in the bucket, and
        where it starts in the tensor."""
        begin, end = self._plan.offsets[index], self._plan.offsets[index + 1]
        start, stop = max(begin, bucket.start), min(end, bucket.stop)
        return start - bucket.start, stop - bucket.start, start - begin

    def _fill(self, index: int, bucket: Bucket, source: Tensor) -> None:
        """Copy what a bucket holds of a tensor's gradient (or statistic) into it."""
        start, stop, offset = self._span(index, bucket)
        self._room(bucket)[start:stop].copy_(source[offset : offset + stop - start])

    def _source(self, index: int) -> Tensor:
        """A tensor's gradient (or statistic), flat."""
        params = self._replica.params
        if index < len(params):
            grad = params[index][1].grad
            assert grad is not None
            return grad.detach().reshape(-1)
        others = [*self._replica.stats, *self._replica.counts]
        return others[index - len(params)][1].detach().reshape(-1)

    def _zero(self, index: int, bucket: Bucket) -> None:
        start, stop, _ = self._span(index, bucket)
        self._room(bucket)[start:stop].zero_()

    def _hand_over(self, bucket: Bucket, absent: tuple[int, ...]) -> None:
        values = self._values.pop(bucket.index)
        self._sent.add(bucket.index)
        if values.device.type != "cpu":
            values = self._make(bucket).copy_(values)
        self._send(bucket, values, absent)
