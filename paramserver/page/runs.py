"""Earlier runs, to lay beside this one: their folders in `run_dir`, read when somebody looks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from paramserver.output.curves import read
from paramserver.output.runfolder import run_folders
from paramserver.runs import Summary
from paramserver.runs import read as summary_of

RUNS = 100  # the newest
CACHED = 4

_cache: OrderedDict[Path, tuple[tuple[int, int], dict[str, Any]]] = OrderedDict()
_reading = threading.Lock()
"""For the cache: the process serves each of its sockets by a `Web` of its own, and all use it."""


def earlier(run_dir: Path, but: str) -> list[Summary]:
    """The newest runs in `run_dir` that have metrics, newest first, without `but`."""
    found = [
        path
        for path in reversed(run_folders(run_dir))
        if path.name != but and (path / "metrics.jsonl").is_file()
    ]
    return [summary_of(path) for path in found[:RUNS]]


def curves(run_dir: Path, name: str) -> dict[str, Any] | None:
    """The curves of a run; None where there is none of this name. The newest are kept in memory."""
    folder = next((path for path in run_folders(run_dir) if path.name == name), None)
    if folder is None:
        return None
    path = folder / "metrics.jsonl"
    with _reading:
        try:
            stat = path.stat()
            kept = _cache.get(path)
            mark = (stat.st_size, stat.st_mtime_ns)
            if kept is None or kept[0] != mark:
                kept = _cache[path] = (mark, read(path).part())
        except OSError:
            return None
        _cache.move_to_end(path)
        while len(_cache) > CACHED:
            _cache.popitem(last=False)
    return kept[1]
