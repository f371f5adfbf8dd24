"""The order of samples in an epoch: the same on every machine, and with every version of torch.

Workers find the samples of a lease in it, and the server the samples that it names.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from paramserver.protocol.messages import Lease

NAMED = 8  # samples of a range that are named; of the others only the number


@lru_cache(maxsize=4)
def order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of `n` samples in an epoch: a permutation, int64 [n]. Callers share it: do not
    write to it."""
    return permutation(n, f"order of epoch {epoch}, seed {seed}")


def permutation(n: int, purpose: str) -> Tensor:
    """Sort 0..n-1 by pseudo-random numbers that depend on nothing but `purpose`.

    The numbers are the output of SHAKE-128, a standard, and the sort is stable. `torch.randperm`
    and numpy's `permutation` promise no equal results from one version to the next, and machines
    of one run may well have different versions.
    """
    keys = np.frombuffer(hashlib.shake_128(purpose.encode()).digest(8 * n), dtype="<u8")
    return torch.from_numpy(np.argsort(keys, kind="stable").astype(np.int64))


def name_samples(n: int, lease: Lease, *, seed: int) -> str:
    """The samples of a range in a set of `n`, as text: their indices, of many the first ones."""
    epoch, start, stop = lease
    found = sorted(order(n, seed, epoch)[start:stop].tolist())
    if len(found) == 1:
        return f"sample {found[0]}"
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"samples {', '.join(map(str, found[:NAMED]))}{more}"


def places(n: int, lease: Lease, epoch: int, *, seed: int) -> list[int]:
    """The positions of a range's samples in the order of another epoch, in a set of `n`."""
    of, start, stop = lease
    here = torch.argsort(order(n, seed, epoch))
    return sorted(here[order(n, seed, of)[start:stop]].tolist())
