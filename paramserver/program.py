"""How each program begins and ends, whatever it does: the folders it imports from, signals, errors.

A module that is a program imports little before it is inside `exit_on_user_error`: from there on no
signal makes Python print a traceback. From the first line of our package on Ctrl-C does not either,
where `python -m` starts it. Before it, while Python itself starts, only make can hold Ctrl-C back.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paramserver import notify, terminal
from paramserver.errors import UserError
from paramserver.words import printable_lines

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds this package, and `workers`."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around a program's main, or as its decorator: errors for people exit with code 2, and Ctrl-C
    with 130, without a traceback. A signal that comes before the program has handlers of its own,
    or after they have done their work, ends it at once."""
    _leave_current_folder()
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        _handle(signal.SIGINT, end_now)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # make has held it back until now
    try:
        yield
    except UserError as error:
        notify.error(error.problem, error.hint)
        terminal.say(printable_lines(f"error: {error.problem}"), error=True)
        if error.hint:
            terminal.say(textwrap.indent(printable_lines(error.hint), "  "), error=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except RuntimeError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 makes it of one in a class
            raise SystemExit(130) from None
        raise
    finally:
        for number in ENDING:
            if callable(signal.getsignal(number)):
                _handle(number, end_now)
        terminal.settle()


def interrupt(times: int = 1, at_once: Callable[[], None] = lambda: None) -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, this many `times`. One more calls
    `at_once` and ends the program; a second SIGHUP, which a shell and the system may both send,
    does nothing."""
    left = times

    def handler(number: int, frame: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            for ending in ENDING:
                _handle(ending, _ignore)
            at_once()
            end_now(number, frame)
        if number == signal.SIGHUP:
            _handle(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt

    for ending in terminal.ending_signals():
        if signal.getsignal(ending) != signal.SIG_IGN:
            _handle(ending, handler)


def end_now(number: int, frame: Any) -> None:
    """A handler of signals: end this process as the signal itself would, but with an exit code."""
    os._exit(128 + number)


def _ignore(number: int, frame: Any) -> None:
    """A handler that does nothing. With SIG_IGN in its place Python prints a traceback where a
    signal has come just before."""


def _handle(number: signal.Signals, handler: Any) -> None:
    with suppress(ValueError):  # not in the main thread, which has no handlers to set
        signal.signal(number, handler)


def _leave_current_folder() -> None:
    """Take the current folder, where `python -m` looks first, out of the places for imports: a
    `workers`, `torch.py` or `queue.py` in it is not what we mean."""
    with suppress(OSError):  # it may be gone
        here = os.getcwd()
        is_first = not sys.flags.safe_path and sys.path[:1] in ([""], [here])
        if is_first and Path(here).resolve() != ROOT:
            del sys.path[0]


def command(module: str, *words: str) -> list[str]:
    """The command line that runs a module of this installation, whatever folder it is started in:
    see `paramserver.run_module`."""
    return [sys.executable, "-P", str(ROOT / "paramserver" / "run_module.py"), module, *words]
