"""Private folders of a running process, and the removal of those that a killed process left.

A process holds a lock on each of its folders while it lives. The kernel releases the lock when the
process ends in any way, so a folder whose lock is free has no owner.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from paramserver import locks

PREFIX = "paramserver-"


class PrivateFolder:
    """A new folder in `parent` that only this user may enter; `close` removes it.

    Making one removes folders of this user that have no owner any more. Raises OSError.
    """

    def __init__(self, parent: Path) -> None:
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
        new = self.path / "new"
        self._lock: int | None = None
        try:
            self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            locks.take(self._lock)
            new.rename(self.path / "lock")  # from now on its lock shows that it has an owner
        except OSError:  # a full disk, one without locks
            shutil.rmtree(self.path, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
            raise

    def close(self) -> None:
        """Safe to call twice."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def is_private(path: str) -> bool:
    """Whether a peer that names this folder means one that a process of this user made here: with
    such a name, no link, closed to others, and with its lock."""
    folder = Path(path)
    if not (hasattr(os, "getuid") and folder.is_absolute() and folder.name.startswith(PREFIX)):
        return False
    try:
        inside, lock = folder.lstat(), (folder / "lock").lstat()
    except (OSError, ValueError):
        return False
    return (
        stat.S_ISDIR(inside.st_mode)
        and stat.S_IMODE(inside.st_mode) == 0o700
        and stat.S_ISREG(lock.st_mode)
        and inside.st_uid == lock.st_uid == os.getuid()
    )


def sweep(parent: Path) -> None:
    """Remove the folders there whose owners are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        _sweep(folder)


def _sweep(folder: Path) -> None:
    with suppress(OSError):  # it is another user's, in use, or just being made or removed
        if folder.lstat().st_uid != os.getuid():
            return
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            if locks.take(lock):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
