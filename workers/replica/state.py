"""Trees of tensors as JSON plus buffers, without pickle.

The state of a replica (model, optimizer, schedule) is a tree of dicts, lists, numbers and tensors.
`flatten` takes the tensors out and leaves a JSON text with their numbers in their places;
`unflatten` is its inverse. Snapshots send the two parts, checkpoints store them.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from paramserver.protocol.messages import ITEM_BYTES

TENSOR, TUPLE, PAIRS, FLOAT = "$tensor", "$tuple", "$dict", "$float"

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name)
}
"""The dtypes whose tensors consist of bytes, by name. Older versions of torch lack some of them."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def flatten(tree: Any) -> tuple[str, list[Tensor]]:
    """(JSON, tensors). The tensors are those of the tree, not copies; numpy's single numbers become
    Python's.

    Raises TypeError, with the path to it, for an entry that JSON cannot hold (a function, an object
    of a class), and for a tensor without bytes.
    """
    tensors: list[Tensor] = []

    def walk(value: Any, at: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            why = no_bytes(value)
            if why is not None:
                raise TypeError(f"{'.'.join(at)} {why}")
            tensors.append(value)
            return {TENSOR: len(tensors) - 1}
        if isinstance(value, dict):
            if all(isinstance(k, str) and not k.startswith("$") for k in value):
                return {k: walk(v, (*at, k)) for k, v in value.items()}
            return {PAIRS: [[walk(k, at), walk(v, (*at, str(k)))] for k, v in value.items()]}
        if isinstance(value, list):
            return [walk(v, (*at, str(i))) for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return {TUPLE: [walk(v, (*at, str(i))) for i, v in enumerate(value)]}
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return {FLOAT: repr(float(value))}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        what = type(value).__name__
        raise TypeError(f"{'.'.join(at)} is {_article(what)} {what}")

    return json.dumps(walk(tree, ())), tensors


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


def no_bytes(tensor: Tensor) -> str | None:
    """Why the numbers of this tensor cannot be sent or stored; None where they can."""
    if is_lazy(tensor):
        return "has no shape yet"
    if tensor.is_meta:
        return "is on the meta device, where tensors have no numbers"
    if tensor.layout != torch.strided:
        return f"is a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized or dtype_name(tensor.dtype) not in DTYPES:
        return f"is a tensor of {dtype_name(tensor.dtype)}"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"is a {type(tensor).__name__}, whose numbers lie in other tensors"
    return None


def unflatten(text: str, tensors: list[Tensor]) -> Any:
    """The tree that `flatten` was given. Raises ValueError for a text that `flatten` cannot have
    made."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(v) for v in value]
        if isinstance(value, dict):
            if TENSOR in value:
                return tensors[value[TENSOR]]
            if TUPLE in value:
                return tuple(walk(v) for v in value[TUPLE])
            if PAIRS in value:
                return {walk(k): walk(v) for k, v in value[PAIRS]}
            if FLOAT in value:
                return float(value[FLOAT])
            return {k: walk(v) for k, v in value.items()}
        return value

    try:
        return walk(json.loads(text))
    except (KeyError, IndexError, TypeError, RecursionError) as e:
        raise ValueError(f"not a saved state: {e}") from None


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as a flat uint8 CPU tensor: a view where that is possible."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def empty(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor of this dtype, by name; raises ValueError for an unknown one."""
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}")
    return torch.empty(shape, dtype=DTYPES[dtype])


def pieces(sizes: list[int], piece_bytes: int) -> list[tuple[int, int, int]]:
    """Cut tensors of these byte sizes into pieces (tensor, start, stop)."""
    return [
        (i, start, min(start + piece_bytes, size))
        for i, size in enumerate(sizes)
        for start in range(0, size, piece_bytes)
    ]
