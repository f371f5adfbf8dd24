"""Codecs: how the float32 numbers of a bucket look on the wire.

A codec is two verbs and a check. `encode` writes the numbers of a bucket into new wire buffers and
may return a scale that travels in the header; `decode` gives the numbers back; `fits` checks
buffers from another machine before they are decoded. Each codec is one file here and one row in
`CODECS`. Codecs hold no state: any thread may use them. What `CODECS` has decodes whatever comes;
who encodes takes the codec of its direction, `codec_of_pushes` or `codec_of_averages`.

========  ================  ===================================================  ==============
codec     bytes a number    what is lost                                         error feedback
========  ================  ===================================================  ==============
float32   4                 nothing                                              -
float16   2                 2^-11 of each number, 2^-34 of the largest           -
bfloat16  2                 2^-8 of each number                                  -
int8      1 (and 4 / 1024)  1/254 of the largest of 1024 neighbours              yes
topk      4 * its share     all but the largest; of these as float16             yes
========  ================  ===================================================  ==============

A codec never hides a number that is not finite: where a NaN or an infinity goes in, a number that
is not finite comes out. Above 2^127 rounding may lead to infinity.

Gradients of parameters in float64 are in buckets of their own, which travel as they are whatever
the codec (`codec_of`): float64 was chosen for its precision.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from paramserver.tensors.codec.bfloat16 import BFloat16
from paramserver.tensors.codec.float16 import Float16
from paramserver.tensors.codec.float32 import AsItIs
from paramserver.tensors.codec.int8 import Int8
from paramserver.tensors.codec.lengths import Room, Wire, fresh
from paramserver.tensors.codec.topk import TopK

__all__ = [
    "CODECS",
    "Codec",
    "Room",
    "Wire",
    "codec_of",
    "codec_of_averages",
    "codec_of_pushes",
    "fresh",
]

AVERAGE_SHARE = 2
"""An average in topk holds this multiple of a push's share: all numbers that two workers chose, and
most of those that more workers chose. With a single share, numbers that only one worker chose would
wait twice, on the way up and on the way down."""


class Codec(Protocol):
    """What a codec must offer; `values` and `out` are flat, contiguous float32 on the CPU, of at
    least one element."""

    leaves_residual: bool
    """Does `encode` leave in `values` what the buffers do not carry? See `error_feedback`."""

    in_place: bool
    """Does `encode` hand out the memory of `values` itself?"""

    def fits(self, elements: int, buffers: Wire) -> str | None:
        """What is wrong with these buffers for a bucket of that many elements; None when nothing
        is. `decode` may be called only with buffers that fit. Numbers may still be rubbish: not
        finite, or huge."""
        ...

    def encode(self, values: Tensor, room: Room = fresh) -> tuple[list[Any], float]:
        """New wire buffers, made by `room` (bytes -> uint8 tensor), and the scale for the header.

        The caller gives `values` away: it may live on in the buffers, is written to, or is left as
        the residual.
        """
        ...

    def decode(self, buffers: Wire, scale: float, out: Tensor) -> Tensor:
        """The numbers, in `out` or as a view of the buffers: read them, do not keep them."""
        ...


CODECS: dict[str, Codec] = {
    "float32": AsItIs(torch.float32),
    "float16": Float16(),
    "bfloat16": BFloat16(),
    "int8": Int8(),
    "topk": TopK(),
}

AS_THEY_ARE: dict[str, Codec] = {
    "float32": CODECS["float32"],
    "float64": AsItIs(torch.float64),
    "int64": AsItIs(torch.int64),
}


def codec_of_pushes(name: str, topk_ratio: float) -> Codec:
    """The codec of this name that encodes pushes; topk sends that share of the numbers."""
    return TopK(topk_ratio) if name == "topk" else CODECS[name]


def codec_of_averages(name: str, topk_ratio: float) -> Codec:
    """The codec of this name that encodes averages, where pushes have that `topk_ratio`."""
    return codec_of_pushes(name, min(1.0, AVERAGE_SHARE * topk_ratio))


def codec_of(kind: str, sent: str, codec: Codec) -> Codec:
    """The codec of a bucket in a run with this `codec`, which encodes gradients in float32: all
    other tensors travel as they are."""
    return codec if kind == "grad" and sent == "float32" else AS_THEY_ARE[sent]
