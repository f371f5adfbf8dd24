"""Looks for schedules of the simulation in which a planted fault shows."""

from __future__ import annotations

import inspect
import re
from types import ModuleType

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


def misfits(module: ModuleType) -> list[str]:
    """The methods of a module's planted faults that cannot be called as those that they replace.

    Such a method ends a schedule with an error of its own, and only where something calls it."""
    found = []
    for fault in vars(module).values():
        if not isinstance(fault, type) or fault.__module__ != module.__name__:
            continue
        for name, method in vars(fault).items():
            replaced = getattr(fault.__base__, name, None)
            if inspect.isfunction(method) and inspect.isfunction(replaced):
                parameters = inspect.signature(replaced).parameters.values()
                places = [None for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
                words = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
                try:
                    inspect.signature(method).bind(*places, **words)
                except TypeError as error:
                    found.append(f"{fault.__name__}.{name}: {error}")
    return found
