"""Measures where time is spent: spans of named work of one process, for `make profile`.

Off unless the environment names a folder in PARAMSERVER_TRACE; then each process writes its spans
there when it ends, as events of Chrome's trace format (chrome://tracing, ui.perfetto.dev). The
clock is the host's, so the processes of one host line up.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

VARIABLE = "PARAMSERVER_TRACE"
EVENTS_MAX = 400_000  # some 100 MB of JSON; a profile is a short run
_OFF = nullcontext()
_events: list[dict[str, Any]] | None = None


class _Span:
    __slots__ = ("_arguments", "_name", "_start")

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self._name, self._arguments = name, arguments

    def __enter__(self) -> None:
        self._start = time.monotonic_ns()

    def __exit__(self, *error: object) -> None:
        done(self._name, self._start, **self._arguments)


def begin(process: str) -> None:
    """Trace this process under that name, if the environment asks for it."""
    global _events
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    _events = [{"ph": "M", "pid": os.getpid(), "name": "process_name", "args": {"name": process}}]
    path = Path(folder) / f"{process.replace(' ', '-')}-{os.getpid()}.json"
    atexit.register(_write, path)


def _write(path: Path) -> None:
    with suppress(OSError):  # the folder of a profile may be gone
        path.write_text(json.dumps(_events))


def span(name: str, **arguments: Any) -> AbstractContextManager[None]:
    """A context manager around work of that name; almost free when tracing is off."""
    return _OFF if _events is None else _Span(name, arguments)


def now() -> int:
    """The start time for `done`, where a span does not fit around the work."""
    return 0 if _events is None else time.monotonic_ns()


def done(name: str, start: int, **arguments: Any) -> None:
    """Note that work of that name began at `start` and ends now."""
    if _events is not None and len(_events) < EVENTS_MAX:
        end = time.monotonic_ns()
        _events.append(
            {
                "ph": "X",
                "pid": os.getpid(),
                "tid": threading.get_native_id(),
                "name": name,
                "ts": start / 1000,
                "dur": (end - start) / 1000,
                "args": arguments,
            }
        )


def own_times(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by name, each span without those inside it. Spans of one thread are nested or
    separate."""
    totals: dict[str, float] = {}
    of_thread: dict[int, list[tuple[float, str]]] = {}  # (end, name) of the spans that are open
    for e in sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["ts"], -e["dur"])):
        inside = of_thread.setdefault(e["tid"], [])
        while inside and inside[-1][0] <= e["ts"]:
            inside.pop()
        if inside:
            totals[inside[-1][1]] -= e["dur"] / 1e6
        totals[e["name"]] = totals.get(e["name"], 0.0) + e["dur"] / 1e6
        inside.append((e["ts"] + e["dur"], e["name"]))
    return totals
