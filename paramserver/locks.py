"""Locks on open files, which the kernel releases when their process ends, however it ends.

A lock belongs to an open descriptor: closing the descriptor releases it, and a forked child that
keeps the descriptor keeps the lock. No file is made for a lock, so none is left behind.

The locks of `filelock` are for a path that is nothing but a lock; `workers.builtin.data` takes one
while it downloads. They are none for the files here, which already are something else:

- a draft, a number or a process id is in the file, and filelock empties it when it opens it (up to
  version 3.29, which also removes it at the end);
- a run folder is a folder, which filelock cannot open for writing;
- a missing file means that nobody holds the lock, and filelock makes it;
- those who only ask whether somebody holds a lock must not look like holders to each other, so
  they share it for a moment, and filelock's locks are exclusive;
- where a file system has no locks, each user here does something else, and filelock leaves a
  marker that outlives a killed process.
"""

from __future__ import annotations

import fcntl
import time

LOOK_S = 0.005  # at a lock that is held for a moment


def take(fd: int, patience_s: float = 0.0) -> bool:
    """Lock an open file or folder for whoever has this descriptor; False where somebody else still
    holds the lock after `patience_s`. Raises OSError where the file system has no locks."""
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
        time.sleep(LOOK_S)


def is_held(fd: int) -> bool:
    """Whether somebody holds the lock of this file, asked through a descriptor of one's own, which
    the caller closes afterwards. Raises OSError where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
