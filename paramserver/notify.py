"""What a program tells the program that started it, beside its log, which is for people.

As with systemd's `sd_notify`, an environment variable tells whether and where: it names a file that
holds, as JSON, that the program is ready, its newest warning, and the error that ended it. The file
is replaced as a whole, so there is never half of it, and it does not grow. It belongs to one
process: whoever starts further ones gives each a file of its own, or takes the variable away.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from paramserver import drafts

VARIABLE = "PARAMSERVER_NOTIFY"


@dataclass
class Notice:
    """What was told, as far as anything was."""

    ready: str = ""
    """It is ready: where it can be reached."""
    warning: str = ""
    """Its newest warning, as it stands in its log."""
    warned_at: float = 0.0
    """Seconds since the epoch."""
    problem: str = ""
    """Of the `UserError` that ended it."""
    hint: str = ""


_told, _lock = Notice(), threading.Lock()


def ready(where: str) -> None:
    """This program does its work now, and can be reached there."""
    _tell(ready=where)


def warning(line: str) -> None:
    """This line, which is in the log, is one that somebody should look at."""
    _tell(warning=line, warned_at=time.time())


def error(problem: str, hint: str) -> None:
    """This program ends, since a person has to do something."""
    line = f"error: {problem}".splitlines()[0]
    _tell(problem=problem, hint=hint, warning=line, warned_at=time.time())


def read(path: Path) -> Notice:
    """What a program has told in this file; empty where it has told nothing, or cannot."""
    try:
        return Notice(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Notice()


def _tell(**news: str | float) -> None:
    """Never raises: a full disk costs this line of its log, too, and not the program."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    with _lock, suppress(OSError):
        for name, value in news.items():
            setattr(_told, name, value)
        # Not synced: a warning may come from between two rounds, which do not wait for a disk.
        drafts.write(Path(path), json.dumps(asdict(_told)), synced=False)
