"""Copies between this machine's memory and a device (CUDA, MPS): few of them, and few waits.

Each copy from or to ordinary memory makes this thread wait for the device. So averages go there in
one copy for each vector, not for each parameter, and gradients come from there in one for each
bucket. With CUDA, memory is pinned: averages are copied while this thread goes on, and gradients
while backward goes on, on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Averages:
    """Gives vectors of averages to `devices`, those of the parameters."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.pinned = any(device.type == "cuda" for device in devices)
        """Should the vectors lie in pinned memory?"""
        self._there: dict[tuple[torch.device, int], Tensor] = {}  # copies of one update's vectors
        self._copied: list[Any] = []  # events of CUDA: the vectors may be written again

    def on(self, device: torch.device, vector: Tensor) -> Tensor:
        """The copy of a vector on a device, made at the first call since `forget`."""
        key = device, vector.data_ptr()
        if key not in self._there:
            self._there[key] = vector.to(device, non_blocking=vector.is_pinned())
            if device.type == "cuda":
                self._copied.append(torch.cuda.current_stream(device).record_event())
        return self._there[key]

    def wait(self) -> None:
        """Call this before the vectors are written: they may still be on their way."""
        for event in self._copied:
            event.synchronize()
        self._copied.clear()

    def forget(self) -> None:
        """The update is applied, or void; gradients keep of the copies what they need."""
        self._there.clear()


class Gathering:
    """Brings buckets from a device. `mark` says where the device stands when a bucket's gradients
    are complete; `bring`, perhaps in another thread, waits until it has come there, no longer."""

    def __init__(self, device: torch.device, largest_bytes: int) -> None:
        """`largest_bytes`: of a bucket."""
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._pinned = torch.empty(largest_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        """What the device has been given to do so far by this thread."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def bring(self, parts: Callable[[], list[Tensor]], mark: Any, out: Tensor) -> None:
        """Copy the flat tensors that `parts` gives, one behind the other, into `out` on the CPU."""
        if self._stream is None:
            out.copy_(self._together(parts, out))
            return
        held = self._pinned[: out.nbytes].view(out.dtype)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            held.copy_(self._together(parts, out), non_blocking=True)
        self._stream.synchronize()
        out.copy_(held)

    def _together(self, parts: Callable[[], list[Tensor]], out: Tensor) -> Tensor:
        values = torch.empty(out.numel(), dtype=out.dtype, device=self._device)
        return torch.cat(parts(), out=values)
