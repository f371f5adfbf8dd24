"""Drafts: a file is written beside its place first, then put there, so there is never half of it.

Who writes a draft holds a lock on it, which ends with the process in any way. So drafts that nobody
will finish are known, whatever their writer was called and whoever has its process id now.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paramserver import locks

FULL = (errno.ENOSPC, errno.EDQUOT)
RESERVE_BYTES = 2**20  # that a large file leaves to others: metrics, the summary
CHUNK_BYTES = 64 * 2**20
_NAME = re.compile(r"\.?.*\.tmp|\.tmp[A-Za-z0-9]{6}")  # the second: of safetensors' own writer


class Draft:
    """The file that is being written."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def write(self, content: Any) -> None:
        """All of it. Raises OSError."""
        view = memoryview(content).cast("B")
        while view:
            view = view[self._file.write(view[:CHUNK_BYTES]) :]


def write(path: Path, content: str | bytes, *, synced: bool = True) -> None:
    """Write a file such that under its name there is never half of it. Raises OSError."""
    with draft(path, synced=synced) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def draft(path: Path, size: int = 0, *, synced: bool = True) -> Iterator[Draft]:
    """Write `path`: what is written in the block takes its place at the end.

    `size`: bytes that will be written. `synced`: they are on the disk by then, which may take
    seconds; without it a machine that loses its power may lose them. Raises OSError, at once where
    there is no room for so many; then what was there is as it was, and no draft is left.
    """
    _look_for_room(path.parent, size)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    file = _open(temporary)
    try:
        yield Draft(file)
        if synced:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):
            file.close()


def sweep(folder: Path) -> None:
    """Remove the drafts in a folder that nobody writes any more."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name) and path.is_file():
                with suppress(OSError):
                    _remove_if_dead(path)


def _open(path: Path) -> io.FileIO:
    """A new file that is locked. Should somebody have swept it in between, another one."""
    while True:
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        try:
            with suppress(OSError):  # a file system without locks
                locks.take(file.fileno(), math.inf)  # somebody may be sweeping
            if os.fstat(file.fileno()).st_nlink:
                os.ftruncate(file.fileno(), 0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _remove_if_dead(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            lives = not locks.take(fd)
        except OSError:  # a file system without locks: its writer may live where its number does
            import psutil

            writer = path.name.split(".")[-2]
            lives = writer.isdigit() and psutil.pid_exists(int(writer))
        if not lives:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _look_for_room(folder: Path, size: int) -> None:
    """A large file that cannot be finished would take the room of small ones for a while."""
    if size < RESERVE_BYTES:
        return
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < size + RESERVE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
