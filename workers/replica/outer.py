"""The outer step of a run with local steps: the anchor, and how what workers came to moves it.

The **anchor** holds the weights of the log while each worker makes steps of its own with the model.
It lies in float32 on the CPU (float64 for parameters of that dtype), one vector for all, whatever
device the model is on: then replicas on unlike machines compute the same bits. The outer step is
torch's SGD, with the mean of (anchor - local weights) as its gradient (Douillard et al., DiLoCo,
arXiv 2311.08105); where that is the same, the mean of the weights themselves is the new anchor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paramserver.rounds.local_steps import OuterStep
from paramserver.tensors.bucket import Bucket

from .state import as_bytes

BLOCK = 2**16  # numbers


class Outer:
    """Anchor and outer optimizer of one replica.

    `averages` are the flat vectors of the parameters' averages, which each step reads, by the dtype
    in which they are sent, and `views` each parameter with its place in them: dtype, begin, end.
    The anchor begins with the parameters as they are.
    """

    def __init__(
        self,
        step: OuterStep,
        averages: Mapping[str, Tensor],
        views: list[tuple[nn.Parameter, str, int, int]],
        starts: Mapping[str, int],
    ) -> None:
        """`starts`: where, in the bucket plan's vector, that of each dtype begins."""
        self.rule = step
        self._starts = starts
        self._anchors = {d: torch.empty_like(a) for d, a in averages.items()}
        self._momentum: dict[str, Tensor] = {}  # once a step has been made
        self._views = [(p, self._anchors[d][a:b].view(p.shape)) for p, d, a, b in views]
        # A block of the anchor and of its average stay in the cache while the optimizer works on
        # them, which takes it several passes.
        self._blocks = {
            d: [nn.Parameter(b) for b in a.split(BLOCK)] for d, a in self._anchors.items()
        }
        for dtype, blocks in self._blocks.items():
            for block, average in zip(blocks, averages[dtype].split(BLOCK), strict=True):
                block.grad = average
        self._optimizer = torch.optim.SGD(
            [block for blocks in self._blocks.values() for block in blocks],
            lr=step.lr,
            momentum=step.momentum,
            nesterov=step.nesterov,
            foreach=False,
        )
        with torch.no_grad():
            for p, view in self._views:
                view.copy_(p)

    def of(self, bucket: Bucket) -> Tensor:
        """The anchor's part in a bucket of parameters, flat."""
        start = self._starts[bucket.sent]
        return self._anchors[bucket.sent][bucket.start - start : bucket.stop - start]

    def pushed(self, bucket: Bucket, local: Tensor) -> None:
        """Make of a bucket of local weights what a worker pushes, in place."""
        if not self.rule.weights:
            torch.sub(self.of(bucket), local, out=local)

    @torch.no_grad()
    def step(self, buckets: Collection[Bucket], averaged: Mapping[int, Tensor]) -> None:
        """Move the anchor by the averages of these buckets, which lie in `averages`; the others'
        numbers there must be zero."""
        if self.rule.weights:
            for bucket in buckets:
                self.of(bucket).copy_(averaged[bucket.index])
            return
        if self.rule.momentum and not self._momentum:
            self._have_momentum({d: torch.zeros_like(a) for d, a in self._anchors.items()})
        self._optimizer.step()

    @torch.no_grad()
    def write(self) -> None:
        """Give the model the anchor's weights."""
        for p, view in self._views:
            p.copy_(view)

    @torch.no_grad()
    def carry(self, taken: Sequence[Tensor]) -> None:
        """The model has gone on from `taken`, the parameters' values in their order, while the
        anchor's step was under way: give it the anchor's weights with what it did since."""
        for (p, view), there in zip(self._views, taken, strict=True):
            p.add_(view.to(device=p.device, dtype=p.dtype) - there)

    def in_place_of(self, tensor: Tensor) -> Tensor | None:
        """The anchor's weights for a parameter's tensor; None for any other one."""
        for p, view in self._views:
            if p.data_ptr() == tensor.data_ptr() and p.shape == tensor.shape:
                return view.to(dtype=p.dtype)
        return None

    def digest(self, h: Any) -> None:
        """Add the anchor's bytes to a hash."""
        for anchor in self._anchors.values():
            h.update(as_bytes(anchor).numpy().data)

    # ------------------------------------------------------------------ its state

    def state(self) -> dict[str, Any]:
        """The momentum, by dtype, and the anchor where the model holds it rounded. The tensors are
        not copies."""
        exact = all(p.dtype == view.dtype for p, view in self._views)
        return {
            "momentum": dict(self._momentum),
            "anchor": {} if exact else dict(self._anchors),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take these. Raises ValueError where they do not fit."""
        momentum, anchors = state.get("momentum"), state.get("anchor")
        if not isinstance(momentum, Mapping) or not isinstance(anchors, Mapping):
            raise ValueError("its outer momentum cannot be read")
        for dtype, anchor in self._anchors.items():
            for vector in (momentum.get(dtype), anchors.get(dtype)):
                if vector is not None and (
                    not isinstance(vector, Tensor)
                    or (vector.shape, vector.dtype) != (anchor.shape, anchor.dtype)
                ):
                    raise ValueError("its outer momentum is of another model")
            if dtype in anchors:
                anchor.copy_(anchors[dtype])
        if momentum and self.rule.momentum:
            self._have_momentum(
                {
                    d: momentum[d].clone() if d in momentum else torch.zeros_like(a)
                    for d, a in self._anchors.items()
                }
            )

    def _have_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Let the optimizer work on these vectors."""
        self._momentum = momentum
        for dtype, blocks in self._blocks.items():
            for block, buffer in zip(blocks, momentum[dtype].split(BLOCK), strict=True):
                self._optimizer.state[block]["momentum_buffer"] = buffer
