"""What the doctor measured last, for the next `make up` to compare with; kept on the server's
machine, so that every keyboard finds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paramserver import drafts

FILE = "figures.json"


@dataclass(frozen=True)
class Figure:
    """How much came up a path from a worker's machine, while no run was going on."""

    machine: str
    near: str  # its address
    far: str  # the server's
    bytes_per_s: float
    at: float  # seconds since the epoch


def to_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    return [asdict(figure) for figure in figures]


def from_json(data: Sequence[dict[str, Any]]) -> list[Figure]:
    return [Figure(**each) for each in data]


def write(folder: Path, figures: Sequence[Figure]) -> None:
    """In place of those before. Raises OSError."""
    drafts.sweep(folder)
    drafts.write(folder / FILE, json.dumps(to_json(figures)), synced=False)


def read(folder: Path) -> list[Figure]:
    """The newest; none where nothing was measured, or the file is another version's."""
    with suppress(OSError, ValueError, TypeError):
        return from_json(json.loads((folder / FILE).read_text()))
    return []
