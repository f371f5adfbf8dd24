"""Averages that a broken worker cannot spoil: the statistics, over the pushes of one bucket.

`middle` is the weighted trimmed mean of each number, and with the largest trim its weighted median
(Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018).
`clipped` is centered clipping (Karimireddy et al., "Learning from History for Byzantine Robust
Optimization", ICML 2021). docs/robust.md says which statistic exactly.

All arrays are flat and contiguous, float32 or float64, and finite; rows are those of the workers,
and are not written to. They are worked off in blocks that fit the processor's cache: from memory,
each number is read once, or twice for `clipped`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

BLOCK_BYTES = 2**20  # of all rows of a block together: half of what a core's cache may hold
EXACT = 2**24  # sums of weights that float32 holds exactly are below it
COUNTED = 40  # bits of a sum of weights: a worker may tell any weight
SAMPLED = 4096  # numbers of a bucket that are compared


def lost_weight(weights: Sequence[int], count: int) -> float:
    """The weight that each side loses where it is to lose `count` workers: that of the `count`
    heaviest, so that any `count` workers are cut away whole; at most what leaves the median."""
    return min(float(sum(sorted(weights)[len(weights) - count :])), most_lost(weights))


def most_lost(weights: Sequence[int]) -> float:
    """The weight that each side loses where only the median is left: with whole numbers as weights,
    the half weight above and the half weight below the middle are of its one or two values."""
    return (sum(weights) - 1) / 2


def middle(rows: Sequence[Array], weights: Sequence[int], lost: float, out: Array) -> None:
    """The weighted mean of each number without the lowest and the highest values, as many as weigh
    `lost`; a value at the edge counts with the part of its weight that is inside."""
    unit = math.gcd(*weights)
    unit <<= max(0, (sum(weights) // unit).bit_length() - COUNTED)
    weights, lost = [max(1, w // unit) for w in weights], lost / unit
    size = max(1, BLOCK_BYTES // (out.itemsize * (len(rows) + 2)))
    if max(weights) == 1:
        _network_middle(rows, min(math.floor(lost), (len(rows) - 1) // 2), out, size)
    else:
        _ranked_middle(rows, weights, min(lost, most_lost(weights)), out, size)


def _network_middle(rows: Sequence[Array], lost: int, out: Array, size: int) -> None:
    """For equal weights: the mean without the `lost` lowest and highest values, which a sorting
    network finds."""
    count = len(rows)
    network = _network(count, lost)
    scratch = [np.empty(size, out.dtype) for _ in range(count + 2)]
    for start in range(0, out.size, size):
        into = out[start : start + size]
        free = [each[: into.size] for each in scratch]
        wires = [row[start : start + size] for row in rows]
        own = [False] * count  # is the wire in scratch memory?
        for a, b, low, high in network:
            before = [wires[i] for i in (a, b) if own[i]]
            x, y = wires[a], wires[b]
            if low:
                wires[a] = np.minimum(x, y, out=free.pop())
            if high:
                wires[b] = np.maximum(x, y, out=free.pop())
            own[a], own[b] = low, high  # what is not computed is not read any more
            free += before
        kept = wires[lost : count - lost]
        if len(kept) == 1:
            into[:] = kept[0]
            continue
        np.add(kept[0], kept[1], out=into)
        for wire in kept[2:]:
            np.add(into, wire, out=into)
        np.divide(into, len(kept), out=into)


@lru_cache(maxsize=256)
def _network(count: int, lost: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Batcher's odd-even merge sort of `count` wires, without what is only needed for the `lost`
    lowest and highest: for each comparison its two wires, and which of them get a new value."""
    comparisons = []
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                for i in range(j, min(j + k, count - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        comparisons.append((i, i + k))
            k //= 2
        p *= 2
    needed = set(range(lost, count - lost))
    if lost == 0:
        return ()  # nothing is left out, so the order does not matter
    network = []
    for a, b in reversed(comparisons):
        low, high = a in needed, b in needed
        if low or high:
            network.append((a, b, low, high))
            needed |= {a, b}
    return tuple(reversed(network))


def _ranked_middle(
    rows: Sequence[Array], weights: Sequence[int], lost: float, out: Array, size: int
) -> None:
    """For any weights: comparing each two workers gives the weight that lies below each value, and
    so the part of its own weight that is inside. Of equal values one comes first, whichever."""
    total = sum(weights)
    kind = np.float32 if total < EXACT and out.dtype == np.float32 else np.float64
    size = max(1, size // 3)
    count = len(rows)
    below = np.empty((count, size), kind)
    apart, part = np.empty(size, out.dtype), np.empty(size, kind)
    half = out.dtype.type(0.5)
    for start in range(0, out.size, size):
        into = out[start : start + size]
        n = into.size
        block = [row[start : start + size] for row in rows]
        for j in range(count):  # half of the others' weight, and more or less for each of them
            below[j, :n] = (total - weights[j]) / 2
        for j in range(count):
            for i in range(j):
                np.subtract(block[j], block[i], out=apart[:n])
                sign = np.copysign(half, apart[:n], out=apart[:n])
                below[j, :n] += np.multiply(sign, kind(weights[i]), out=part[:n])
                below[i, :n] -= np.multiply(sign, kind(weights[j]), out=part[:n])
        into[:] = 0.0
        for i in range(count):
            low = below[i, :n]
            np.add(low, kind(weights[i]), out=part[:n])
            np.clip(part[:n], lost, total - lost, out=part[:n])
            np.clip(low, lost, total - lost, out=low)
            np.subtract(part[:n], low, out=part[:n])
            into += np.multiply(part[:n], block[i], out=part[:n])
        into /= total - 2 * lost


def upper_median(rows: Sequence[Array], weights: Sequence[int]) -> Array:
    """The weighted median of whole numbers: of the two values in the middle the higher one, so that
    it is one of the workers' own, and of two workers the maximum."""
    values = np.stack(rows)
    order = np.argsort(values, axis=0, kind="stable")
    weight = np.cumsum(np.asarray(weights, np.float64)[order], axis=0)
    place = np.argmax(weight > sum(weights) / 2, axis=0)[None]
    return np.asarray(np.take_along_axis(values, np.take_along_axis(order, place, 0), 0)[0])


def clipped(
    rows: Sequence[Array], weights: Sequence[int], centre: Array, tau: float | None, out: Array
) -> list[float]:
    """The `centre`, moved by the weighted mean of the workers' differences from it, none of which
    is longer than `tau` (None: than their median). Returns by which factor each was shortened; 1
    where it was not.

    With their median a broken worker pulls no harder than the others do. With more, one of three
    would pull as hard as both others together, and the centre would drift with it. Honest gradients
    have nearly equal distances, since they have many numbers, and so they lose next to nothing.
    """
    distances = _distances(rows, centre)
    longest = tau if tau is not None else _lower_median([d for d in distances if d > 0])
    factors = [1.0 if d <= longest else longest / d for d in distances]
    total = sum(weights)
    pulls = [w * factor / total for w, factor in zip(weights, factors, strict=True)]
    if len(rows) == 1 and factors == [1.0]:
        out[:] = rows[0]
        return factors
    rest = math.fsum(w * (1.0 - f) for w, f in zip(weights, factors, strict=True)) / total
    combine([centre, *rows] if rest else rows, [rest, *pulls] if rest else pulls, out)
    return factors


def _lower_median(lengths: Sequence[float]) -> float:
    """Of two in the middle the lower one: where one of two workers is far off, that one must not
    say how far is usual."""
    return sorted(lengths)[(len(lengths) - 1) // 2] if lengths else 0.0


def _distances(rows: Sequence[Array], centre: Array) -> list[float]:
    size = max(1, BLOCK_BYTES // (4 * centre.itemsize))
    distances = [0.0] * len(rows)
    scratch = np.empty(size, centre.dtype)
    for start in range(0, centre.size, size):
        there = centre[start : start + size]
        for i, row in enumerate(rows):
            apart = np.subtract(row[start : start + size], there, out=scratch[: there.size])
            distances[i] = math.hypot(distances[i], norm(apart))
    return distances


def norm(values: Array) -> float:
    """The Euclidean norm. torch uses the threads that this process allows."""
    flat = torch.from_numpy(values)
    square = torch.dot(flat, flat).item()
    if math.isfinite(square):
        return math.sqrt(square)
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64).item())


def combine(rows: Sequence[Array], factors: Sequence[float], out: Array) -> None:
    """The sum of the rows, each times its factor."""
    size = max(1, BLOCK_BYTES // (4 * out.itemsize))
    scratch = np.empty(size, out.dtype)
    for start in range(0, out.size, size):
        into = out[start : start + size]
        np.multiply(rows[0][start : start + size], out.dtype.type(factors[0]), out=into)
        for row, factor in zip(rows[1:], factors[1:], strict=True):
            part = scratch[: into.size]
            np.multiply(row[start : start + size], out.dtype.type(factor), out=part)
            np.add(into, part, out=into)


def sampled(size: int) -> slice:
    """A sample of a bucket of that many numbers, for `outermost` and `along`: every so many."""
    return slice(0, size, max(1, size // SAMPLED))


def outermost(rows: Sequence[Array]) -> list[float]:
    """For each worker the share of its numbers that are lower, or higher, than all others'. Where
    several are equally low nobody is, and where all are equal the number says nothing."""
    values = np.stack(rows)
    low, high = values.min(axis=0), values.max(axis=0)
    differs = int((low < high).sum())
    if not differs:
        return [0.0] * len(rows)
    counts = np.zeros(len(rows))
    for end in (low, high):
        at = (values == end) & (low < high)
        counts += (at & (at.sum(axis=0) == 1)).sum(axis=1)
    return [float(count) / differs for count in counts]


def along(rows: Sequence[Array], average: Array) -> list[float]:
    """The scalar products of the rows with the average, in float64."""
    wide = average.astype(np.float64)
    return [float(np.einsum("i,i->", row, wide, dtype=np.float64)) for row in rows]
