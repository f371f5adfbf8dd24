"""The buffers of a model that workers exchange: a forward's writes to them are part of the update.

A replica holds the value of each buffer as of its step. What a forward writes is pushed, and
becomes that value only when it comes back with an update. The running statistics of normalisation
layers are averaged; each buffer of another layer comes whole from one worker
(`paramserver.tensors.whole`). A buffer may be written in place, through `.data`, or by assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from paramserver.errors import UserError
from paramserver.words import nearest

from .names import own_names
from .state import as_bytes, dtype_name

NORM_LAYERS = (nn.modules.batchnorm._NormBase,)
AVERAGED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RULES = {"mean": "stat", "max": "count"}
LOOKED_AT = 2**17
"""Words of a buffer that are compared with the held value, at most; of a larger buffer a sample.
This finds writes through `.data`; torch counts all others."""
SAMPLE = 2**12


@dataclass
class Buffer:
    """One buffer: its module and name, the tensor that the model has there between two steps, and
    its value as of this step."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor
    kind: str
    sent: str
    held: Tensor = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.held = self.tensor.detach().clone(memory_format=torch.contiguous_format)
        self._words: Tensor | None = None
        self._held_words = _words(self.held)
        self.settled()

    def settled(self) -> None:
        """The model's tensor holds the value as of this step."""
        self.version = _version(self.tensor)
        if self._words is None or self._words.data_ptr() != self.tensor.data_ptr():
            self._words = _words(self.tensor)

    @property
    def now(self) -> Tensor:
        """The tensor that the model has there at the moment."""
        there = self.module._buffers.get(self.key)
        if there is None:
            raise UserError(f"{self.name} is gone: it was taken from the model after attach()")
        held = self.held
        if (there.shape, there.dtype, there.device) != (held.shape, held.dtype, held.device):
            raise UserError(
                f"{self.name} was {_look(held)} at attach() and is {_look(there)} now",
                "what is exchanged was fixed by attach(): give it its last shape, dtype and device "
                "before (by a first batch, say), or register it with persistent=False, and it "
                "stays this worker's own",
            )
        return there

    @property
    def counted(self) -> bool:
        """Was it assigned, or written in a way that torch counts?"""
        return self.module._buffers.get(self.key) is not self.tensor or (
            _version(self.tensor) != self.version
        )

    def differs(self) -> bool | Tensor:
        """Does it differ from the held value? On a device: a tensor with the answer."""
        if self.tensor.shape != self.held.shape:
            return True
        if self._words is None or self._held_words is None:
            return not torch.equal(self.tensor, self.held)
        if self.tensor.data_ptr() != self._words.data_ptr():
            return True  # its `.data` was assigned
        if self.tensor.device.type == "cpu":
            return not torch.equal(self._words, self._held_words)
        return (self._words != self._held_words).any()

    def reset(self) -> None:
        self.module._buffers[self.key] = self.tensor
        self.tensor.copy_(self.held)
        if self.kind == "whole":
            self.settled()


class Buffers:
    """A model's exchanged buffers in the layout's order: averaged ones, counters, whole ones.

    `rules` gives by name the buffers with another rule than the usual one: "mean" or "max". Raises
    `UserError` for an impossible rule.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, str]) -> None:
        found: dict[int, Buffer] = {}
        own = own_names(model)
        self.by_name: dict[str, Buffer] = {}
        """The buffers by name; one that lies in several modules has several names."""
        for prefix, module in model.named_modules(remove_duplicate=False):
            for key, tensor in module._buffers.items():
                if tensor is None or key in module._non_persistent_buffers_set:
                    continue
                name = own(f"{prefix}.{key}" if prefix else key)
                if id(tensor) not in found:
                    kind = _kind(name, module, tensor, rules)
                    found[id(tensor)] = Buffer(name, module, key, tensor, kind, sent(tensor, kind))
                self.by_name[name] = found[id(tensor)]
        for name in rules:
            if name not in self.by_name:
                near = nearest(name, self.by_name)
                raise UserError(
                    f"attach(buffers=...) names {name!r}, which is no buffer of the model's state",
                    f"did you mean {near}?" if near else f"it has {', '.join(self.by_name)}",
                )
        kinds = ("stat", "count", "whole")
        self.all = sorted(found.values(), key=lambda b: (kinds.index(b.kind), b.sent))
        self.whole = [b for b in self.all if b.kind == "whole"]
        self._averaged = [b for b in self.all if b.kind != "whole"]
        self._written: list[Buffer] = []

    def written(self) -> list[Buffer]:
        """The whole buffers that a forward has written since the last reset. Raises `UserError` for
        one that has another shape now."""
        on_device = []
        self._written = []
        for buffer in self.whole:
            differs = buffer.counted or buffer.differs()
            if isinstance(differs, Tensor):
                on_device.append((buffer, differs))
            elif differs and buffer.now.numel():
                self._written.append(buffer)
        if on_device:  # wait for the device once for all of them
            told = torch.stack([differs for _, differs in on_device]).tolist()
            self._written += [b for (b, _), d in zip(on_device, told, strict=True) if d]
        return self._written

    def reset(self) -> None:
        """Put the held values back into the model: the round of a forward that changed them may
        have been void."""
        for buffer in self._averaged:
            buffer.reset()
        for buffer in self.whole:
            if buffer.counted or any(buffer is b for b in self._written):
                buffer.reset()
        self._written = []

    def reset_all(self) -> None:
        """`reset` for all buffers, also those whose writes torch does not count."""
        self._written = list(self.whole)
        self.reset()

    def update(self, buffer: Buffer, values: Tensor) -> None:
        """Hold these values as of the next step; the model gets them with the next `reset`."""
        if buffer.kind == "whole":
            as_bytes_of(buffer.held, values)
            self._written.append(buffer)
        else:
            buffer.held.copy_(values)

    def give_back(self) -> None:
        """Give the model its first tensors back, which loading a whole state needs."""
        for buffer in self.all:
            buffer.module._buffers[buffer.key] = buffer.tensor

    def hold(self) -> None:
        """Hold what the model has now as the value of this step."""
        for buffer in self.all:
            buffer.held.copy_(buffer.tensor)
            buffer.settled()


def as_bytes_of(tensor: Tensor, values: Tensor) -> None:
    """Write these bytes, flat uint8 on the CPU, as the numbers of a tensor."""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype)
    as_bytes(flat).copy_(values)
    tensor.copy_(flat)


def sent(tensor: Tensor, kind: str) -> str:
    """The dtype in which a tensor of this kind travels, or "bytes"."""
    if kind == "whole":
        return "bytes"
    if kind == "count" and not tensor.is_floating_point():
        return "int64"
    return "float64" if tensor.dtype == torch.float64 else "float32"


def _kind(name: str, module: nn.Module, tensor: Tensor, rules: Mapping[str, str]) -> str:
    rule = rules.get(name)
    if rule is None:
        if isinstance(module, NORM_LAYERS):
            return "stat" if tensor.is_floating_point() else "count"
        return "whole"
    if rule not in RULES:
        raise UserError(f"buffers of attach() are taken by mean or max, {name} says {rule!r}")
    numbers = tensor.dtype in AVERAGED
    if not (numbers or (rule == "max" and not tensor.dtype.is_floating_point)) or (
        tensor.is_complex()
    ):
        raise UserError(
            f"{name} is of {dtype_name(tensor.dtype)}, which has no {rule} that is one of its kind",
            "leave it out of attach(buffers=...): it comes whole from one worker",
        )
    return RULES[rule]


def _version(tensor: Tensor) -> int:
    """How many writes torch has counted; 0 for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _words(tensor: Tensor) -> Tensor | None:
    """A view of the words that are compared: all, or a sample; None where the numbers are not
    contiguous."""
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    bits = tensor.detach().view(-1).view(torch.uint8)
    if bits.numel() % 8 == 0 and bits.storage_offset() % 8 == 0:
        bits = bits.view(torch.int64)
    return bits if bits.numel() <= LOOKED_AT else bits[:: bits.numel() // SAMPLE]


def _look(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "a single number"
    return f"{shape} of {dtype_name(tensor.dtype)} on {tensor.device}"
