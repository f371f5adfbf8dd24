"""What the doctor measured last, for the next `make up` to compare with. The file is on the
server's machine, so that every machine finds it from which `make up` is called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paramserver import drafts
from paramserver.fleet.findings import Measurement as Measurement

FILE = "figures.json"


def to_json(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [asdict(each) for each in measured]


def from_json(data: Sequence[dict[str, Any]]) -> list[Measurement]:
    return [Measurement(**each) for each in data]


def write(folder: Path, measured: Sequence[Measurement]) -> None:
    """Replace the file. Raises OSError."""
    drafts.sweep(folder)
    drafts.write(folder / FILE, json.dumps(to_json(measured)), synced=False)


def read(folder: Path) -> list[Measurement]:
    """The newest; none where nothing was measured, or another version wrote the file."""
    with suppress(OSError, ValueError, TypeError):
        return from_json(json.loads((folder / FILE).read_text()))
    return []
