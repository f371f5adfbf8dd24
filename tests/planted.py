"""Looks for schedules of the simulation in which a planted fault shows."""

from __future__ import annotations

import re

import pytest
from simulation import Parts, simulate


def is_found(
    parts: Parts, symptom: str, first: int, searched: int, *, sharded: bool = False
) -> None:
    """`first` shows it today; where schedules have changed since, others are searched."""
    for seed in (first, *range(searched)):
        failure = simulate(seed, parts, sharded=sharded).failure
        if failure is not None:
            assert re.search(symptom, failure), f"seed {seed} {failure}"
            return
    pytest.fail(f"{searched} schedules did not show it")


def name(parts: object) -> str:
    """Of the planted fault, for a test's id; empty for anything else."""
    if not isinstance(parts, Parts):
        return ""
    usual = Parts()
    return next(
        getattr(parts, f).__name__
        for f in Parts.__dataclass_fields__
        if getattr(parts, f) is not getattr(usual, f)
    )
