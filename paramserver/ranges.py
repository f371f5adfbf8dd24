"""What a value that somebody set may be: each range is a check, and a sentence for who broke it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """`must` begins with "must" and stands behind the setting's name; null is in every range."""

    holds: Callable[[Any], object]
    must: str


def between(low: float, high: float) -> Range:
    return Range(lambda value: low <= value <= high, f"must be between {low:g} and {high:g}")


def at_least(low: float) -> Range:
    return Range(lambda value: value >= low, f"must be {low:g} or more")


def more_than(low: float) -> Range:
    return Range(lambda value: value > low, f"must be more than {low:g}")


def share_of(whole: float) -> Range:
    """Not nothing, and not more than `whole`."""
    return Range(lambda value: 0 < value <= whole, f"must be more than 0 and at most {whole:g}")


def inside(low: float, high: float) -> Range:
    """Neither of the two ends."""
    return Range(lambda value: low < value < high, f"must be more than {low:g} and below {high:g}")


def one_of(*names: str) -> Range:
    return Range(lambda value: value in names, f"must be one of {', '.join(names)}")


def is_import_path(text: object) -> bool:
    """Whether it is `package.module:Name`."""
    module, colon, name = str(text).partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


def _is_importable(entry: object) -> bool:
    """A package, a module, or one name of it."""
    return isinstance(entry, str) and is_import_path(entry if ":" in entry else f"{entry}:name")


FUNCTION = Range(
    is_import_path, "must be a function of yours, as package.module:name, annotated to return int"
)
FILLED = Range(lambda value: value.strip(), "must not be empty")
ADDRESS = Range(
    # one colon is host:port, several are an IPv6 address
    lambda value: re.fullmatch(r"[^\s/]+", value) and value.count(":") != 1,
    "must be an address alone, like 10.10.0.1 (the port is a setting of its own)",
)
DEVICE = Range(
    lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value),
    "must be auto, cpu, cuda, cuda:N or mps",
)
SEED = Range(lambda value: 0 <= value < 2**63, "must be 0 or more, and below 2**63")
IMPORTABLE = Range(
    lambda value: all(map(_is_importable, value)),
    "must be names like mypackage, mypackage.nets or mypackage.nets:Net",
)
SECONDS = (more_than(0), between(0, 1e9))  # what Python and ZeroMQ can wait for
