"""Weighted draws: the samples of an epoch where `batches` is given weights.

A draw takes the place of a sample in the ledger: each draw of an epoch is used once. What is drawn
depends on weights, seed and epoch alone, and on nothing that differs between machines or versions:
uniform numbers come from SHAKE-128, and the rest is arithmetic that IEEE 754 defines to the bit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from paramserver.errors import UserError

HINT = "one number for each sample, 0 or more, or torch's WeightedRandomSampler of such numbers"
TERMS = 12  # of the series of a logarithm: as exact as float64 is


class Draws:
    """What `weights` mean for a data set of so many samples: a number for each of them, drawn with
    replacement, as many as there are; or a `WeightedRandomSampler`, which says by itself how many
    are drawn, and whether with replacement. Raises `UserError` for what is neither."""

    def __init__(self, weights: Any, samples: int) -> None:
        sampler = weights if isinstance(weights, WeightedRandomSampler) else None
        self._weights = _checked(weights if sampler is None else sampler.weights, samples)
        self.count = samples if sampler is None else sampler.num_samples
        """Draws in an epoch."""
        self.replacement = sampler is None or sampler.replacement
        possible = int(np.count_nonzero(self._weights))
        if not self.replacement and self.count > possible:
            raise UserError(
                f"weights= of {possible} samples that can be drawn: {self.count} of them without "
                "replacement are too many",
                "draw fewer, or with replacement",
            )

    def digest(self) -> str:
        """Names what is drawn in any epoch, but for the seed."""
        text = f"{self.count} draws, replacement {self.replacement}: ".encode()
        return hashlib.sha256(text + self._weights.astype("<f8").tobytes()).hexdigest()[:32]

    def order(self, seed: int, epoch: int) -> Tensor:
        """The samples that are drawn in an epoch, in their order: indices, int64 [count]."""
        purpose = f"draws of epoch {epoch}, seed {seed}"
        if self.replacement:
            sums = np.cumsum(self._weights)
            found = np.searchsorted(sums, _uniform(self.count, purpose) * sums[-1], side="right")
            last = int(np.flatnonzero(self._weights)[-1])  # a product may be rounded up to the sum
            return torch.from_numpy(np.minimum(found, last).astype(np.int64))
        # Each sample waits for an exponential time, by its weight; those that come first are drawn.
        # (Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006)
        can = np.flatnonzero(self._weights)
        times = -_log(_uniform(len(can), purpose)) / self._weights[can]
        return torch.from_numpy(
            can[np.argsort(times, kind="stable")[: self.count]].astype(np.int64)
        )


def _checked(weights: Any, samples: int) -> np.ndarray[Any, Any]:
    try:
        if isinstance(weights, Tensor):
            weights = weights.detach().cpu().to(torch.float64).numpy()
        values = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"weights= of a {type(weights).__name__} are no numbers", HINT) from None
    if values.shape != (samples,):
        shape = "x".join(map(str, values.shape)) or "one number"
        raise UserError(f"weights= {shape}, the data set has {samples} samples", HINT)
    if not np.isfinite(values).all() or (values < 0).any():
        wrong = int(np.flatnonzero(~(np.isfinite(values) & (values >= 0)))[0])
        raise UserError(f"weights= has {values[wrong]:g} for sample {wrong}", HINT)
    with np.errstate(over="ignore"):
        total = float(np.cumsum(values)[-1])
    if not 0 < total < float("inf"):
        raise UserError(f"the sum of weights= is {total:g}: nothing can be drawn so", HINT)
    return values


def _uniform(n: int, purpose: str) -> np.ndarray[Any, Any]:
    """`n` numbers above 0 and below 1."""
    numbers = np.frombuffer(hashlib.shake_128(purpose.encode()).digest(8 * n), dtype="<u8")
    return ((numbers >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _log(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The natural logarithm, the same to the bit everywhere; those of C libraries differ in their
    last bits, and so would the order of two machines.

    With x = m * 2**e, and z = (m - 1) / (m + 1), ln m is 2 * (z + z**3 / 3 + z**5 / 5 ...).
    """
    m, e = np.frexp(x)
    low = m < 0.75  # so that m lies around 1, and the series ends soon
    m, e = np.where(low, 2 * m, m), e - low
    z = (m - 1) / (m + 1)
    square, total = z * z, np.zeros_like(z)
    for power in range(2 * TERMS - 1, 0, -2):
        total = total * square + 1 / power
    found: np.ndarray[Any, Any] = e * 0.6931471805599453 + 2 * z * total
    return found
