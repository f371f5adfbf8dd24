"""Which versions may train together: of this program, PyTorch and Python. Checked at the greeting.

Numbers travel as raw float32 and states in a format of our own, so PyTorch and Python may differ
from machine to machine: an older Mac has no newer PyTorch. This program's own messages and settings
change from one minor version to the next, as long as there is no 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

OWN, TORCH, PYTHON = "paramserver", "torch", "python"
RANGES = {TORCH: ((2, 6), (3, 0)), PYTHON: ((3, 11), (3, 14))}
"""From the first, up to, but without the second; pyproject.toml requires the same."""
SHOWN = {OWN: "paramserver", TORCH: "PyTorch", PYTHON: "Python"}


def misfit(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[str, str] | None:
    """Why a machine with `theirs` cannot take part in a run of a server with `ours`, as a phrase
    behind the name of that machine, and what to do there. None where it can: also where a version
    is missing, or no number that can be compared, or the server's own."""
    for what, name in SHOWN.items():
        version, own = theirs.get(what, ""), ours.get(what, "")
        number = _number(version)
        if number is None or version == own:
            continue
        has = f"has {name} {version}, the server's machine {own or 'another one'}"
        if what == OWN:
            if (mine := _number(own)) is not None and _series(number) != _series(mine):
                return has, f"install {name} {_told(mine)} on both machines"
        else:
            low, high = RANGES[what]
            if not low <= number < high:
                take = f"{_told(low)} or newer, below {_told(high)}"
                return f"{has}: a run takes {take}", f"install {name} {own or take} there"
    return None


def _number(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version like 2.15.0+cpu."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?!\d)", version, re.ASCII)
    return (int(found[1]), int(found[2])) if found else None


def _series(number: tuple[int, int]) -> tuple[int, ...]:
    """What two versions of this program must have in common."""
    return number if number[0] == 0 else number[:1]


def _told(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"
