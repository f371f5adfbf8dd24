"""A replica: model, optimizer, schedule and step, and how an update of the log is applied to them.

Every replica runs the same code on the same bytes, so replicas of one kind stay equal bit by bit.
What is exchanged is told by the layout: parameters that require a gradient, last layer first (the
order in which backward makes them), then the running statistics of normalisation layers, then
their counters. Frozen parameters and other buffers travel in snapshots only.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from paramserver import wire
from paramserver.bucket import Bucket, plan
from paramserver.codec import CODECS
from paramserver.errors import PeerError, UserError
from workers.state import as_bytes, dtype_name

NORM_LAYERS = (nn.modules.batchnorm._NormBase,)


class Replica:
    """A model and all that turns an averaged gradient into its next step.

    `before_step(model)` runs on the averaged gradients of every update, before the optimizer;
    `clip_norm` clips their total norm. Both run in every replica alike.
    `codec` is that of the averages. Raises `UserError` for what cannot be the same everywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        bucket_mb: float,
        codec: str,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        before_step: Callable[[nn.Module], None] | None = None,
    ) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError(
                "ReduceLROnPlateau follows a metric that differs between replicas",
                "use a schedule that is a function of the step",
            )
        # The first optimizer step imports this, for a second or more: not in the middle of a round.
        importlib.import_module("torch._dynamo")
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        self.before_step = before_step
        self.step = 0
        self.lineage = uuid.uuid4().hex  # a state of its own: only the origin's is the run's
        self.ledger: dict[str, Any] | None = None
        """The samples' ledger as of this step, as closes tell it."""
        self.contributors: tuple[int, ...] = ()
        """Ids of those whose gradients are in the last update; none where that is not known."""
        self.params: list[tuple[str, nn.Parameter]] = [
            (name, p) for name, p in reversed(list(model.named_parameters())) if p.requires_grad
        ]
        self.stats = _norm_buffers(model, counters=False)
        self.counts = _norm_buffers(model, counters=True)
        self.layout = wire.Layout(
            tuple(
                wire.Tensor(name, tuple(t.shape), dtype_name(t.dtype), kind)
                for kind, tensors in (
                    ("grad", self.params),
                    ("stat", self.stats),
                    ("count", self.counts),
                )
                for name, t in tensors
            )
        )
        self.plan = plan(self.layout, bucket_mb)
        self._codec = codec
        self._flat = torch.zeros(self.plan.size)  # the averages of the next update
        self._views = [
            self._flat[start:stop].view(t.shape)
            for t, start, stop in zip(
                self.layout.tensors, self.plan.offsets, self.plan.offsets[1:], strict=False
            )
        ]
        self._present: list[int] = [0] * len(self.layout.tensors)  # buckets with a gradient for it
        self._exchanged = [b for _, b in (*self.stats, *self.counts)]
        self._held = [b.detach().clone() for b in self._exchanged]  # as of this step
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        """The optimizer must own every parameter that is exchanged (and may own frozen ones)."""
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.params if id(p) not in owned]
        if missing:
            raise UserError(
                f"{missing[0]} requires a gradient, but the optimizer does not have it",
                "give it to the optimizer, or set requires_grad = False",
            )

    # ------------------------------------------------------------------ the log

    def take(self, average: wire.Average, buffers: Sequence[Any]) -> None:
        """Decode the average of one bucket into its place; nothing is applied yet."""
        b = self.bucket(average.bucket)
        codec = CODECS[self._codec if b.kind == "grad" else "float32"]
        wrong = codec.fits(b.size, buffers)
        if wrong is not None:
            raise PeerError(f"bucket {b.index}: {wrong}")
        out = self._flat[b.start : b.stop]
        values = codec.decode(buffers, average.scale, out)
        if values.data_ptr() != out.data_ptr():
            out.copy_(values)
        absent = set(average.absent)
        for index in b.tensors:
            self._present[index] += index not in absent

    def apply(self, close: wire.Close) -> None:
        """The update is complete: gradients in, one optimizer step, statistics in."""
        missing = set(range(len(self.plan.buckets))).difference(close.buckets)
        for index in missing:
            b = self.plan.buckets[index]
            self._flat[b.start : b.stop].zero_()
        for index, (_, p) in enumerate(self.params):
            view = self._views[index]
            if not self._present[index]:
                p.grad = None
            elif p.dtype == torch.float32 and p.device.type == "cpu":
                p.grad = view
            else:
                p.grad = view.to(device=p.device, dtype=p.dtype)
        with torch.no_grad():
            first = len(self.params)
            for offset, held in enumerate(self._held):
                if self._present[first + offset]:
                    held.copy_(self._views[first + offset])
        self.reset_statistics()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for _, p in self.params], self.clip_norm)
        if self.before_step is not None:
            self.before_step(self.model)
        if self.params:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step, self.lineage, self.ledger = close.step, close.lineage, close.ledger
        self.contributors = tuple(close.contributors)
        self.forget_averages()

    def forget_averages(self) -> None:
        """What was taken belongs to a void round."""
        self._present = [0] * len(self._present)

    def bucket(self, index: int) -> Bucket:
        if not 0 <= index < len(self.plan.buckets):
            raise PeerError(f"there is no bucket {index}")
        return self.plan.buckets[index]

    # ------------------------------------------------------------------ its state

    def state(self) -> dict[str, Any]:
        """Everything another process needs to be this replica. The tensors are not copies."""
        model = dict(self.model.state_dict())
        held = dict(zip([n for n, _ in (*self.stats, *self.counts)], self._held, strict=True))
        for name in model:
            if name in held:
                model[name] = held[name]
        return {
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "ledger": self.ledger,
        }

    def load(self, state: dict[str, Any], step: int, lineage: str) -> None:
        """Become the replica that `state` was taken from. Raises ValueError if it does not fit."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None and state["scheduler"] is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.ledger = state["ledger"]
        except (KeyError, RuntimeError, TypeError, AttributeError) as e:
            raise ValueError(str(e)) from None
        with torch.no_grad():
            for buffer, held in zip(self._exchanged, self._held, strict=True):
                held.copy_(buffer)
        self.step, self.lineage, self.contributors = step, lineage, ()
        self.forget_averages()

    def kind(self) -> str:
        """What rounds as this replica does, in words: equal kinds must have equal digests."""
        device = next((p.device for _, p in self.params), torch.device("cpu"))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return f"{name}, {processor}, torch {torch.__version__}"

    def recipe(self) -> str:
        """What turns an averaged gradient into weights here, in words. Replicas must agree on it;
        values that a schedule may change are left out."""
        groups = self.optimizer.param_groups
        owned = {id(p) for _, p in self.params}
        sizes = "+".join(str(sum(id(p) in owned for p in g["params"])) for g in groups)
        schedule = "no schedule" if self.scheduler is None else type(self.scheduler).__name__
        clip = "no clipping" if self.clip_norm is None else f"clip_norm {self.clip_norm:g}"
        hook = getattr(self.before_step, "__name__", str(type(self.before_step).__name__))
        before = "no before_step" if self.before_step is None else f"before_step {hook}"
        kind = type(self.optimizer).__name__
        return f"{kind} of {sizes} parameters, {schedule}, {clip}, {before}"

    def reset_statistics(self) -> None:
        """Put running statistics back to those of this step: a forward may have changed them
        whose round came to nothing."""
        with torch.no_grad():
            for buffer, held in zip(self._exchanged, self._held, strict=True):
                buffer.copy_(held)

    def digest(self) -> str:
        """SHA-256 over the bytes of what is exchanged, in the layout's order."""
        h = hashlib.sha256()
        for tensor in (*[p for _, p in self.params], *self._held):
            h.update(as_bytes(tensor).numpy().data)
        return h.hexdigest()


def _norm_buffers(model: nn.Module, *, counters: bool) -> list[tuple[str, Tensor]]:
    """Running statistics (or counters) of the model's normalisation layers, in model order."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, NORM_LAYERS):
            for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
                if buffer.is_floating_point() != counters:
                    found.setdefault(id(buffer), (name, buffer))
    return list(found.values())
