"""Trees of tensors as JSON plus buffers, without pickle.

The state of a replica (model, optimizer, schedule) is a tree of dicts, lists, numbers and tensors.
`flatten` takes the tensors out and leaves a JSON text with their numbers in their places;
`unflatten` is its inverse. Snapshots send the two parts, checkpoints store them.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, PAIRS, FLOAT = "$tensor", "$tuple", "$dict", "$float"

DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def flatten(tree: Any) -> tuple[str, list[Tensor]]:
    """(JSON, tensors). The tensors are those of the tree, not copies.

    Raises TypeError for what has no place in JSON (a function, an object of a class).
    """
    tensors: list[Tensor] = []

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {TENSOR: len(tensors) - 1}
        if isinstance(value, dict):
            if all(isinstance(k, str) and not k.startswith("$") for k in value):
                return {k: walk(v) for k, v in value.items()}
            return {PAIRS: [[walk(k), walk(v)] for k, v in value.items()]}
        if isinstance(value, list):
            return [walk(v) for v in value]
        if isinstance(value, tuple):
            return {TUPLE: [walk(v) for v in value]}
        if isinstance(value, float) and not math.isfinite(value):
            return {FLOAT: repr(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} cannot be part of a saved state")

    return json.dumps(walk(tree)), tensors


def unflatten(text: str, tensors: list[Tensor]) -> Any:
    """The tree that `flatten` was given. Raises ValueError for a text that it cannot have made."""

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
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def empty(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Room for a tensor told of by name; raises ValueError for an unknown dtype."""
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
