"""The generators of random numbers that data sets draw from: torch's, numpy's and Python's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def forked() -> Iterator[None]:
    """Restore the global generators of torch (of the CPU), numpy and random after the block."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seed_generators(purpose: str) -> None:
    """Seed these generators from this text alone."""
    number = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    torch.default_generator.manual_seed(number >> 1)
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)
