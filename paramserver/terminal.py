"""What programs print for people, and the terminal, pipe or file behind it, which may be lost.

The terminal is closed, the reader of the pipe has ended, the disk with the log is full: that costs
the line and nothing else. A line goes past Python's buffer, where it would stay, fail again with
each line that follows, and change the exit code at the end.
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
"""What may be over after a while, unlike a closed pipe or terminal."""


def say(line: str, *, error: bool = False) -> None:
    """Print a line on standard output, or standard error, if somebody takes it. Never raises."""
    write(f"{line}\n", error=error)


def write(text: str, *, error: bool = False) -> None:
    """`say` for text that has its line ends already."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: in the midst of another one
        _write(text, sys.stderr if error else sys.stdout)


def result(text: str) -> None:
    """Print what a command was run for. Where it is not taken the program ends: silently with
    exit code 1 where the reader of a pipe has had enough, else by a `UserError`."""
    try:
        _write(f"{text}\n", sys.stdout)
    except BrokenPipeError:
        raise SystemExit(1) from None
    except (OSError, ValueError) as e:
        reason = (isinstance(e, OSError) and e.strerror) or str(e)
        raise UserError(f"standard output cannot be written: {reason}") from None


def _write(text: str, stream: TextIO | None) -> None:
    """Raises OSError or ValueError where it is not taken."""
    if stream is None:  # it was closed when Python started
        return
    file = _descriptor(stream)
    if file is None:
        stream.write(text)
        stream.flush()
        return
    with suppress(OSError, ValueError):
        stream.flush()  # what somebody else left there came first
    content = text.encode(stream.encoding, "replace")
    while content:
        content = content[os.write(file, content) :]


def _descriptor(stream: TextIO) -> int | None:
    """Of Python's own text file; None for what a notebook, a test or a script put in its place."""
    if type(stream) is not io.TextIOWrapper:
        return None
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def settle() -> None:
    """At a program's end: drop what standard output and error cannot take any more, or Python
    fails to write it once more and turns the exit code into 120."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)


def silence(stream: TextIO) -> None:
    """From now on nothing that is written there goes anywhere, or fails."""
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
    """The signals that ask a program to end in order. A terminal that is closed, or an ssh
    connection that breaks, sends SIGHUP, but for what `nohup` started."""
    usual = (signal.SIGINT, signal.SIGTERM)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return usual if ignored else (*usual, signal.SIGHUP)
