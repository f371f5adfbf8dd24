"""How a program reports to the program that started it, beside its log, which is for people.

As with systemd's `sd_notify`, an environment variable names the place: a file that holds, as JSON,
that the program is ready, its newest warning, and the error that ended it. The file is replaced as
a whole, so there is never half of it, and it does not grow. It belongs to one process: a program
that starts further ones gives each a file of its own, or removes the variable. As long as somebody
watches, a second file has its status, a few times a second.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from paramserver import drafts

VARIABLE = "PARAMSERVER_NOTIFY"
WATCHED, SHOWN = ".watched", ".shown"  # beside that file: touched by who watches, and what it sees
WATCHED_S = 5.0  # after the last touch nobody watches
LOOK_S = 0.05  # for an answer
PROGRESS = re.compile(r"(\d\d:\d\d:\d\d|\[worker \d+\]) · ")
"""How a line with `mark` begins, behind the time or the name of its worker."""


@dataclass
class Notice:
    """The contents of the file; empty fields were not reported."""

    ready: str = ""
    """The address at which it can be reached, once it is ready."""
    warning: str = ""
    """Its newest warning, as it stands in its log."""
    warned_at: float = 0.0
    """Seconds since the epoch."""
    problem: str = ""
    """Problem and hint of the `UserError` that ended it."""
    hint: str = ""
    folder: str = ""
    """The run folder of a server, as seen from where it was started."""


_told, _lock = Notice(), threading.Lock()


def ready(where: str, folder: str = "") -> None:
    """Report that this program is ready, and can be reached at `where`."""
    _tell(ready=where, folder=folder)


def mark() -> str:
    """Stands before a line of mere progress, where a supervisor keeps the log: who watches the run
    on a display leaves such lines out (`PROGRESS`)."""
    return "· " if os.environ.get(VARIABLE) else ""


def is_watched() -> bool:
    """Does somebody want to see what `show` writes?"""
    path = os.environ.get(VARIABLE)
    if not path:
        return False
    with suppress(OSError):
        return abs(time.time() - os.stat(path + WATCHED).st_mtime) < WATCHED_S
    return False


def show(content: bytes) -> None:
    """Write the status of this program, one line, for those who watch. Never raises."""
    path = os.environ.get(VARIABLE)
    if path:
        with suppress(OSError):
            drafts.write(Path(path + SHOWN), content.decode(), synced=False)


def watch(path: Path) -> bytes:
    """Ask the program with this file to go on with `show`, and read what it wrote last. Raises
    OSError where its folder cannot be written to."""
    Path(f"{path}{WATCHED}").touch()
    with suppress(FileNotFoundError):
        return Path(f"{path}{SHOWN}").read_bytes()
    return b""


def newest(path: Path, limit_s: float) -> bytes:
    """What the program with this file shows now: asks it, and waits up to `limit_s` for an answer;
    empty where none comes."""
    watch(path)
    asked = os.stat(f"{path}{WATCHED}").st_mtime_ns
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if os.stat(f"{path}{SHOWN}").st_mtime_ns >= asked:
                return Path(f"{path}{SHOWN}").read_bytes()
        time.sleep(LOOK_S)
    return b""


def warning(line: str) -> None:
    """Report this line of the log as a warning."""
    _tell(warning=line, warned_at=time.time())


def error(problem: str, hint: str) -> None:
    """Report the error that ends this program, which a person has to correct."""
    line = f"error: {problem}".splitlines()[0]
    _tell(problem=problem, hint=hint, warning=line, warned_at=time.time())


def read(path: Path) -> Notice:
    """What a program has reported in this file; empty where there is none, or it cannot be read."""
    try:
        return Notice(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Notice()


def _tell(**news: str | float) -> None:
    """Write the file. Never raises: a full disk must not end the program."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    with _lock, suppress(OSError):
        for name, value in news.items():
            setattr(_told, name, value)
        # Not synced: a warning may come between two rounds, which must not wait for a disk.
        drafts.write(Path(path), json.dumps(asdict(_told)), synced=False)
