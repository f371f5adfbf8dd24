"""Prints for people on a terminal, pipe or file that may be lost.

Where the terminal is closed, the reader of the pipe has ended, or the disk with the log is full,
the line is lost and nothing else happens. Lines bypass Python's buffer: there a line would stay,
fail again with each following one, and change the exit code at the end.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from contextlib import suppress
from typing import TextIO

from paramserver.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that may go away, unlike a closed pipe or terminal."""
STOPPED_BY = {
    signal.SIGINT: "stopped by Ctrl-C",
    signal.SIGTERM: "stopped from outside (SIGTERM)",
    signal.SIGHUP: "stopped: its terminal was closed (SIGHUP)",
}
"""What a signal means that ends a program in order."""


def say(line: str, *, error: bool = False) -> None:
    """Print a line on standard output, or standard error, if that takes it. Never raises."""
    write(f"{line}\n", error=error)


def write(text: str, *, error: bool = False) -> None:
    """`say` for text that has its line ends already."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: inside another write
        _write(text, sys.stderr if error else sys.stdout)


def result(text: str) -> None:
    """Print the result of a command. Where that fails the program ends: silently with exit code 1
    where the reader of a pipe has ended, else by a `UserError`."""
    try:
        _write(f"{text}\n", sys.stdout)
    except BrokenPipeError:
        raise SystemExit(1) from None
    except (OSError, ValueError) as e:
        reason = (isinstance(e, OSError) and e.strerror) or str(e)
        raise UserError(f"standard output cannot be written: {reason}") from None


def _write(text: str, stream: TextIO | None) -> None:
    """Raises OSError or ValueError where writing fails."""
    if stream is None:  # it was closed when Python started
        return
    file = _descriptor(stream)
    if file is None:
        stream.write(text)
        stream.flush()
        return
    with suppress(OSError, ValueError):
        stream.flush()  # text in its buffer comes first
    content = text.encode(stream.encoding, "replace")
    while content:
        content = content[os.write(file, content) :]


def _descriptor(stream: TextIO) -> int | None:
    """The descriptor of Python's own text file; None for an object that a notebook, a test or a
    script has put in its place."""
    if type(stream) is not io.TextIOWrapper:
        return None
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def settle() -> None:
    """At a program's end: drop text that standard output and error cannot take any more, or Python
    fails to write it again and changes the exit code to 120."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)


def silence(stream: TextIO) -> None:
    """From now on text that is written there is dropped, without an error."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def somebody_answers() -> bool:
    """Is there a person at a terminal?"""
    streams = (sys.stdin, sys.stdout)
    return all(s is not None and not s.closed and s.isatty() for s in streams) and not (
        os.environ.get("CI")
    )


def has_foreground() -> bool:
    """Does Ctrl-C at a terminal go to this process and those that it started in its own group?"""
    for descriptor in range(3):
        with suppress(OSError):
            return os.tcgetpgrp(descriptor) == os.getpgrp()
    return False


def asked(question: str, limit_s: float) -> bool:
    """Is the answer yes? No answer in time is none."""
    write(question)
    answer = ""
    with suppress(OSError, ValueError):
        if select.select([sys.stdin], [], [], limit_s)[0]:
            answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        write("\n")
    return answer.strip().lower() in ("y", "yes")


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a program to end in order. A closed terminal, or a broken ssh
    connection, sends SIGHUP, which programs started by `nohup` ignore."""
    usual = (signal.SIGINT, signal.SIGTERM)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return usual if ignored else (*usual, signal.SIGHUP)
