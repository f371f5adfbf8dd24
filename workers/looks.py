"""Compares data sets by a few samples, because two sets of one length may be different.

A worker reads each of a few samples, chosen by the length alone, twice, with generators that have
the same seed on all machines and are restored afterwards. It reports what was equal both times to
the server, which compares it with the report of the first worker (`paramserver.rounds.looks`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramserver.protocol.messages import LOOK_CHARS, LOOKS_MAX, Look
from paramserver.tensors.order import permutation

from .generators import forked, seed_generators
from .samples import Samples

SAMPLES = 8
TIME_S = 1.0
LEAVES = LOOKS_MAX // SAMPLES  # of a sample; others are not compared
LARGE = 64  # more bytes than these are an image: decoders differ a little


def look(samples: Samples) -> tuple[Look, ...]:
    """Summaries of at most `SAMPLES` samples, in at most `TIME_S` (but at least one sample);
    samples that cannot be read are left out."""
    until = time.monotonic() + TIME_S
    found: list[Look] = []
    random: set[str] = set()  # leaves that differ between two reads
    chosen = permutation(samples.length, "samples that are compared")[:SAMPLES].tolist()
    with forked():
        for index in chosen:
            first, second = (_read(samples, index, again) for again in (0, 1))
            for leaf, value in first.items():
                if second.get(leaf) != value:
                    random.add(leaf)
                else:
                    found.append(value)
            random |= second.keys() - first.keys()
            if time.monotonic() > until:
                break
    return tuple(f for f in found if f.leaf not in random)


def _read(samples: Samples, index: int, again: int) -> dict[str, Look]:
    seed_generators(f"look {again} at sample {index}")
    try:
        sample = samples.one(index)
        leaves = _leaves(sample, "")
        return {f.leaf: f for _, f in zip(range(LEAVES), _looks(index, leaves), strict=False)}
    except Exception:  # the error is reported when a lease holds this sample
        return {}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{path}.{key}" if path else str(key))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list | tuple) and not _is_numbers(value):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}[{i}]")
    else:
        yield path, value


def _is_numbers(value: Any) -> bool:
    return len(value) > 8 and all(isinstance(v, int | float) for v in value)


def _looks(index: int, leaves: Iterator[tuple[str, Any]]) -> Iterator[Look]:
    for path, value in leaves:
        if isinstance(value, str | bytes):
            yield _exact(index, path, repr(value), value if isinstance(value, bytes) else None)
            continue
        try:
            array = _array(value)
        except (TypeError, ValueError, RuntimeError):
            continue
        if array is None or not array.size:
            continue
        kind = array.dtype.kind
        if kind in "biu" and not (array.dtype.itemsize == 1 and array.size > LARGE):
            if array.size == 1:
                yield _exact(index, path, str(int(array.reshape(()))))
            else:
                shape = "x".join(map(str, array.shape))
                content = np.ascontiguousarray(array.astype("<i8")).tobytes()
                yield _exact(index, path, f"{shape} whole numbers", content)
        elif kind in "fbiu":
            yield from _rough(index, path, array.astype(np.float64).reshape(-1))


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    if isinstance(value, Tensor):
        if value.is_sparse or value.is_nested or value.is_quantized or value.is_complex():
            return None
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.float()
        return np.asarray(value.numpy())
    if isinstance(value, np.ndarray | np.generic | bool | int | float | list | tuple):
        return np.asarray(value)
    if hasattr(value, "__array_interface__"):  # a picture of PIL
        return np.asarray(value)
    return None


def _exact(index: int, path: str, shown: str, content: bytes | None = None) -> Look:
    """A summary that must be equal to the bit: the content, or its hash where that is long."""
    if content is not None or len(shown) > LOOK_CHARS // 2:
        digest = hashlib.sha256(content if content is not None else shown.encode()).hexdigest()
        shown = f"{shown[: LOOK_CHARS // 2]} ({digest[:12]})"
    return Look(index, path[:LOOK_CHARS], shown)


def _rough(index: int, path: str, values: np.ndarray[Any, Any]) -> Iterator[Look]:
    """Mean, root of the mean square and some values: other libraries round another way."""
    n = len(values)
    picks = [values[int(share * (n - 1))] for share in (0.0, 0.31, 0.57, 1.0)]
    with np.errstate(all="ignore"):
        told = [values.mean(), np.sqrt(np.square(values).mean()), *picks]
    if np.isfinite(told).all():
        yield Look(index, path[:LOOK_CHARS], "", tuple(map(float, told)))
