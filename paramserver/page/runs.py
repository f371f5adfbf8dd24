"""Earlier runs, to lay beside this one: their folders in `run_dir`, read when somebody looks."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec

from paramserver.output import metrics
from paramserver.page.curves import read
from paramserver.words import printable

RUNS = 100  # the newest
FILE_BYTES = 4 * 2**20  # a larger summary is none of ours
CACHED = 4
NAME = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(?:-\d+)?")

_cache: OrderedDict[Path, tuple[tuple[int, int], dict[str, Any]]] = OrderedDict()


def earlier(run_dir: Path, but: str) -> list[dict[str, Any]]:
    """The newest runs in `run_dir` that have steps, newest first, without `but`."""
    try:
        names = sorted((p.name for p in run_dir.iterdir() if NAME.fullmatch(p.name)), reverse=True)
    except OSError:
        return []
    found = []
    for name in names:
        if name != but and (run_dir / name / "metrics.jsonl").is_file():
            found.append(_in_short(run_dir / name))
            if len(found) == RUNS:
                break
    return found


def _in_short(folder: Path) -> dict[str, Any]:
    summary, record = _read(folder / "summary.json"), _read(folder / "run.json")
    told = record.get("settings")
    model = told.get("model") if isinstance(told, dict) else None
    steps, rate = summary.get("steps"), summary.get("samples_per_s")
    held = metrics.held(summary)
    return {
        "name": folder.name,
        "model": _text(model.get("type") if isinstance(model, dict) else model),
        "steps": steps if isinstance(steps, int) else None,
        "samples_per_s": rate if isinstance(rate, (int, float)) else None,
        "metrics": {_text(k): v for k, v in held.items() if isinstance(v, (int, float))},
        "end": _text(summary.get("end")) or ("it has not ended" if record else ""),
    }


def _text(value: Any) -> str:
    return printable(value)[:200] if isinstance(value, str) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(FILE_BYTES), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return {}


def curves(run_dir: Path, name: str) -> dict[str, Any] | None:
    """The curves of a run; None where there is none of this name. The newest are kept in memory."""
    if not NAME.fullmatch(name):
        return None
    path = run_dir / name / "metrics.jsonl"
    try:
        stat = path.stat()
    except OSError:
        return None
    kept = _cache.get(path)
    mark = (stat.st_size, stat.st_mtime_ns)
    if kept is None or kept[0] != mark:
        kept = _cache[path] = (mark, read(path).part())
    _cache.move_to_end(path)
    while len(_cache) > CACHED:
        _cache.popitem(last=False)
    return kept[1]
