"""Sends gradients while backward runs: hooks on the parameters find out which buckets are complete.

A bucket is complete when every parameter in it has its gradient of this step. `flush` sends the
others: with gradients that were set without backward, and with zeros for parameters that have none
by the end (unused branches, frozen for a step), which it marks as absent.

Of several pairs (`workers.replica.several`) nothing leaves before the step of one, `send_pair`: a
backward makes gradients of all, and nobody knows whose step comes.

For small models the hook copies, encodes and sends itself. For large ones, and for gradients on a
device, a thread does so while backward goes on; the end of each backward waits for it. So this
thread owns the sockets during a backward, and the caller's thread otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from paramserver.errors import UserError
from paramserver.tensors import whole
from paramserver.tensors.bucket import Bucket

from .checks import sparse
from .device_copies import Gathering
from .outer import Outer
from .replica import Replica
from .state import as_bytes

THREAD_FROM_BYTES = 8 * 2**20
"""Bytes of gradients; for fewer, a thread costs more time than it saves."""

Make = Callable[[Bucket], Tensor]
Send = Callable[[Bucket, Tensor, tuple[int, ...], tuple[int, ...]], None]


class Gradients:
    """Watches a replica's backward and gives every full bucket to `send(bucket, values, absent,
    without)`.

    `values` is a flat CPU tensor that `make(bucket)` made for it. `absent` are the layout indexes
    of parameters without a gradient. `without` names buckets that are not pushed: that of buffers
    which no forward wrote, those of other pairs. `accumulate` backward passes make one step. While
    `holds()`, the last bucket waits for `flush`.
    """

    def __init__(
        self,
        replica: Replica,
        make: Make,
        send: Send,
        accumulate: int = 1,
        holds: Callable[[], bool] = lambda: False,
    ) -> None:
        self._replica = replica
        self._make = make
        self._send = send
        self._accumulate = accumulate
        self._holds = holds
        self._plan = plan = replica.plan
        self._several = bool(replica.layout.pairs)
        self._open = False
        self._parted = False  # the batch of this step comes in parts
        self._sums: dict[int, Tensor] = {}  # of the parts' gradients, by parameter
        self._passes = [0] * len(replica.params)
        self._seen: dict[int, tuple[Tensor, int]] = {}  # gradients as they were taken; versions
        self._missing: list[int] = []
        self._sent: set[int] = set()
        self._device = replica.params[0][1].device if replica.params else torch.device("cpu")
        on_cpu = self._device.type == "cpu"
        self._gathering = None if on_cpu else Gathering(self._device, plan.largest_bytes)
        self.threaded = self._device.type != "cpu" or plan.nbytes >= THREAD_FROM_BYTES
        self._thread = ThreadPoolExecutor(1, "gradients")
        self._under_way: list[Future[None]] = []
        self._waited_s = 0.0  # for them
        self._outer: Outer | None = None  # while what local steps came to is sent
        self._parts = [[self._part(index, b) for index in b.tensors] for b in plan.buckets]
        self._numbers = [b for b in plan.buckets if b.kind != "whole"]
        self._whole = next((b for b in plan.buckets if b.kind == "whole"), None)
        self._written_late = False  # forwards of this loop write to buffers after its backward
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(index, name))
            for index, (name, p) in enumerate(replica.params)
        ]

    def begin(self, *, parts: bool = False) -> None:
        """A step begins: its buckets are all empty. With `parts` its batch comes in several, each
        of which `add_part` ends: nothing leaves before the last one is done."""
        with suppress(Exception):  # of a step that was not finished
            self.finish()
        self._replica.reset_statistics()
        if not self._several:
            for _, p in self._replica.params:  # the last average: its memory takes the next one
                p.grad = None
        self._open, self._parted = True, parts
        self._sums.clear()
        self._passes = [0] * len(self._passes)
        self._missing = [len(b.tensors) for b in self._plan.buckets]
        self._sent.clear()
        self._seen.clear()

    def add_part(self, weight: float) -> None:
        """A part of the batch is done, which holds `weight` of its samples (all parts: 1). Parts
        are added in float32 at least."""
        if self._open:
            self._check_untouched()
        self._seen.clear()
        for index, (_, p) in enumerate(self._replica.params):
            if (grad := self._gradient(index)) is None:
                continue
            if index not in self._sums:
                wide = torch.promote_types(grad.dtype, torch.float32)
                self._sums[index] = torch.zeros_like(grad, dtype=wide)
            self._sums[index].add_(grad, alpha=weight)
            p.grad = None
        self._passes = [0] * len(self._passes)

    def flush(self) -> None:
        """Backward is over: send the remaining buckets, with or without gradients, and the
        statistics."""
        if not self._open:
            return
        self.gather()
        self._replica.check_unchanged()
        self._check_untouched()
        self._seen.clear()  # they need no memory any more
        unsent = [bucket for bucket in self._numbers if bucket.index not in self._sent]
        tensors = {index for bucket in unsent for index in bucket.tensors}
        # What is in `.grad` now is the gradient, after any number of passes.
        absent = {i for i in tensors if i < len(self._passes) and self._gradient(i) is None}
        for bucket in unsent:
            self._hand_over(bucket, tuple(i for i in bucket.tensors if i in absent))
        self._end_with_buffers()
        self._open = False

    def gather(self) -> None:
        """Make the sum of the parts' gradients the parameters' gradient, if there are parts."""
        for index, total in self._sums.items():
            p = self._replica.params[index][1]
            p.grad = total.to(p.dtype)
        self._sums.clear()

    def send_local(self, outer: Outer) -> None:
        """Send what this worker's local steps came to, as `outer` takes it, and the statistics.
        Buckets may not be sent before: `begin_local` begins such a round."""
        self._replica.check_unchanged()
        self._outer = outer
        self._sent.clear()
        for bucket in self._numbers:
            self._hand_over(bucket, ())
        self._end_with_buffers()
        self._outer = None

    def send_pair(self, start: int, stop: int) -> None:
        """Send the gradient of one of several pairs, which has these parameters, and the buffers.
        What other backward passes left in the gradients of other pairs stays there."""
        self._replica.check_unchanged()
        self._check_untouched(start, stop)
        mine = range(start, stop)
        others = [b for b in self._numbers if b.kind == "grad" and b.tensors[0] not in mine]
        unsent = tuple(b.index for b in others)  # it goes with the first push
        self._sent = set(unsent)
        for bucket in self._numbers:
            if bucket.index not in self._sent:
                absent = [i for i in bucket.tensors if i in mine and self._gradient(i) is None]
                self._hand_over(bucket, tuple(absent), unsent)
                unsent = ()
        for index in mine:
            self._seen.pop(index, None)
        self._end_with_buffers()

    def begin_local(self) -> None:
        """A round of local steps begins: nothing leaves before `send_local`."""
        self.begin()
        self._open = False

    def _end_with_buffers(self) -> None:
        """Send the buffers that were written, and wait for all that is under way."""
        if self._whole is not None:
            if self._whole.index not in self._sent:
                self._hand_over_buffers(self._whole)
            elif any(b.counted for b in self._replica.buffers.whole):
                self._written_late = True  # pushed at the end of later steps
        self.finish()

    def finish(self) -> None:
        """Wait until the thread has sent all complete buckets; the caller's thread owns the sockets
        again. Raises the thread's exception."""
        if self._under_way:
            start = time.perf_counter()
            wait(self._under_way)
            self._waited_s += time.perf_counter() - start
        ended, self._under_way = self._under_way, []
        for job in ended:
            job.result()

    def take_waited_s(self) -> float:
        """Seconds in which `finish` waited since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def close(self) -> None:
        """Remove the hooks, for the next training of this model."""
        self._open = False
        for hook in self._hooks:
            hook.remove()
        self._thread.shutdown(wait=False)

    def _check_untouched(self, start: int = 0, stop: int | None = None) -> None:
        """Raise `UserError` where a gradient was clipped, scaled, replaced or dropped after it was
        sent. Of several pairs, one that the loop has set to None since is no such one."""
        stop = len(self._passes) if stop is None else stop
        for index in sorted(self._seen):
            (name, p), (grad, version) = self._replica.params[index], self._seen[index]
            if not start <= index < stop or (self._several and p.grad is None):
                continue
            if p.grad is None:
                raise UserError(
                    f"the gradient of {name} was dropped after backward, when it may have left",
                    "zero_grad() goes before backward; backward(inputs=...) says what gets a "
                    "gradient; models that take turns, as in a GAN, are attached by name: "
                    "attach(generator=(G, opt_g), critic=(D, opt_d))",
                )
            if p.grad is not grad or grad._version != version:
                raise UserError(
                    f"the gradient of {name} was changed after backward, when it may have left",
                    "what happens to the averaged gradient is given to attach(): clip_norm=, or "
                    "before_step=; scale the loss, not the gradient",
                )

    def _hook(self, index: int, name: str) -> Callable[[Tensor], None]:
        def on_gradient(p: Tensor) -> None:
            if not self._open:
                return
            grad = self._gradient(index)
            if self._several:
                if grad is not None:
                    self._seen[index] = grad, grad._version
                return
            if grad is None:  # frozen between forward and backward
                self._replica.check_unchanged()
                return
            self._passes[index] = passes = self._passes[index] + 1
            if passes > self._accumulate:
                raise UserError(
                    f"{name} got its gradient {passes} times in one step, "
                    f"{self._accumulate} were stated",
                    "state the number of backward passes for each step: attach(accumulate=...)",
                )
            self._seen[index] = grad, grad._version
            if self._parted:
                return
            if passes == self._accumulate:
                for number in self._plan.buckets_of[index]:
                    bucket = self._plan.buckets[number]
                    self._missing[number] -= 1
                    if self._missing[number] == 0:
                        if len(self._sent) + 1 == len(self._numbers) and self._holds():
                            continue
                        if self.threaded and not self._under_way:  # the first of this backward
                            Variable._execution_engine.queue_callback(self.finish)
                        self._hand_over(bucket, ())

        return on_gradient

    def _part(self, index: int, bucket: Bucket) -> tuple[int, slice | None]:
        """A tensor's index, and the part of it that lies in a bucket; None for all of it."""
        begin, end = self._plan.offsets[index], self._plan.offsets[index + 1]
        start, stop = max(begin, bucket.start), min(end, bucket.stop)
        whole = (start, stop) == (begin, end)
        return index, None if whole else slice(start - begin, stop - begin)

    def _gradient(self, index: int) -> Tensor | None:
        """A parameter's gradient, as it is now; raises `UserError` where it is sparse."""
        name, p = self._replica.params[index]
        if p.grad is not None and p.grad.is_sparse:
            raise sparse(name)
        return p.grad

    def _source(self, index: int) -> Tensor:
        """A tensor's gradient (its weights, after local steps), or its statistic; flat."""
        params = self._replica.params
        if index < len(params):
            if self._outer is not None:
                return params[index][1].detach().reshape(-1)
            grad = params[index][1].grad
            assert grad is not None
            return grad.detach().reshape(-1)
        return self._replica.buffers.all[index - len(params)].now.detach().reshape(-1)

    def _hand_over(
        self, bucket: Bucket, absent: tuple[int, ...], others: tuple[int, ...] = ()
    ) -> None:
        self._sent.add(bucket.index)
        without = (*others, *self._without())
        mark = None if self._gathering is None else self._gathering.mark()
        if self.threaded:
            self._under_way.append(self._thread.submit(self._take, bucket, absent, without, mark))
        else:
            self._take(bucket, absent, without, mark)

    def _without(self) -> tuple[int, ...]:
        """The bucket of the buffers, where no forward wrote to any; it goes with the last bucket of
        numbers."""
        buffers = self._replica.buffers
        if not buffers.whole or len(self._sent) < len(self._numbers) or self._written_late:
            return ()
        if buffers.written() or self._whole is None:
            return ()
        self._sent.add(self._whole.index)
        return (self._whole.index,)

    def _hand_over_buffers(self, bucket: Bucket) -> None:
        """Send the buffers that were written, as they are; raises `UserError` where they are too
        large."""
        buffers = self._replica.buffers
        written = {id(b) for b in buffers.written()}
        first = len(self._replica.params)
        there = [i for i in bucket.tensors if id(buffers.all[i - first]) in written]
        if not there:
            values = torch.empty(0, dtype=torch.uint8)
        else:
            values = torch.cat([as_bytes(buffers.all[i - first].now) for i in there])
        if values.numel() > whole.BYTES_MAX:
            names = ", ".join(buffers.all[i - first].name for i in there)
            raise UserError(
                f"forward writes to {values.numel() >> 20} MiB of buffers in a step ({names})",
                f"at most {whole.BYTES_MAX >> 20} MiB are sent: register what may stay with each "
                "worker with persistent=False",
            )
        absent = tuple(i for i in bucket.tensors if i not in there)
        self._sent.add(bucket.index)
        if self.threaded:
            self._under_way.append(self._thread.submit(self._send, bucket, values, absent, ()))
        else:
            self._send(bucket, values, absent, ())

    def _take(
        self, bucket: Bucket, absent: tuple[int, ...], without: tuple[int, ...], mark: Any
    ) -> None:
        """Copy a bucket's gradients (or statistics), all in one call, and send them. `mark`: when
        the device has them, see `Gathering`."""
        values = self._make(bucket)

        def parts() -> list[Tensor]:
            found = []
            for index, part in self._parts[bucket.index]:
                source = self._nothing(index) if index in absent else self._source(index)
                found.append(source if part is None else source[part])
            return found

        if self._gathering is None:
            torch.cat(parts(), out=values)
        else:
            self._gathering.bring(parts, mark, values)
        if self._outer is not None and bucket.kind == "grad":
            self._outer.pushed(bucket, values)
        self._send(bucket, values, absent, without)

    def _nothing(self, index: int) -> Tensor:
        """Zeros, flat, for a tensor without a gradient."""
        size = self._plan.offsets[index + 1] - self._plan.offsets[index]
        return torch.zeros((), device=self._device).expand(size)
