"""What is said where a Python starts our programs that cannot run them: it is too old, or has not
the packages that they need.

Any Python 3 can read this file, and the `__init__` of the two packages.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

IN_CLONE = (Path(__file__).resolve().parents[1] / "Makefile").is_file()


def refuse(module: str) -> None:
    """End the program `python -m module` with an error for people, unless this Python is fit."""
    needed = ("msgspec", "torch") if module in ("paramserver", "workers") else ("msgspec",)
    missing = [name for name in needed if find_spec(name) is None]
    if sys.version_info < (3, 11):  # noqa: UP036 - older ones read this, too
        why = f"Python 3.11, 3.12 or 3.13 is needed; {sys.executable} is {sys.version.split()[0]}"
    elif missing:
        why = f"{sys.executable} has no {missing[0]}, which this program needs"
    else:
        return
    hint = "type the python of the environment in which paramserver is installed"
    if IN_CLONE:
        hint = f"type `.venv/bin/python -m {module} ...`, after `make setup`, or a command of make"
    sys.stderr.write(f"error: {why}\n  {hint}\n")
    raise SystemExit(2)
