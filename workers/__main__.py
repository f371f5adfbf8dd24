"""`python -m workers id=2 join=TOKEN`: one worker."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from types import TracebackType
from typing import Any

from paramserver import logs, terminal
from paramserver.errors import UserError
from paramserver.program import exit_on_user_error
from paramserver.terminal import STOPPED_BY
from paramserver.typed import typed

LOST_S = 0.01
"""How soon a signal that was lost is raised again."""


class Leave(KeyboardInterrupt):
    """A SIGINT, SIGTERM or SIGHUP has come: this worker leaves, in order."""


def main() -> None:
    """The worker program; exits with 0 when the run ended well or the worker was asked to leave."""
    with exit_on_user_error():
        from paramserver.config.help import answer

        answer(sys.argv[1:], "worker")
        from paramserver.config.loading import load
        from paramserver.net import address
        from paramserver.transport import malloc

        malloc.keep_freed()
        loaded = load(sys.argv[1:], "worker")
        loaded.tell_twice()
        settings = _with_environment(loaded.settings)
        address.check(settings, loaded.given)
        if settings.id is None:
            settings = _with_id(settings)

        def leave(number: int, frame: Any) -> None:
            for ending in terminal.ending_signals():
                signal.signal(ending, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once
            if number == signal.SIGINT:  # a person pressed it
                terminal.say("  leaving the run; Ctrl-C again ends this worker at once")
            raise Leave(STOPPED_BY[signal.Signals(number)])

        for ending in terminal.ending_signals():
            signal.signal(ending, leave)
        _leave_in_any_place()

        logs.show("workers", logs.Lines(prefix=f"[worker {settings.id}] "))
        if "torch" not in sys.modules:
            logging.getLogger("workers").info("loading PyTorch")
        try:
            from .builtin.train import train  # torch takes seconds: signals are handled before

            train(settings, loaded.given)
        except Leave as e:
            logging.getLogger("workers").info(f"left the run: {e}")


def _leave_in_any_place() -> None:
    """See that no `Leave` is lost. A signal may come while Python frees an object; what is raised
    there ends nothing, it is only shown. Then it is raised again a moment later."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, Leave):  # compiled code shows also what it passes on to the other
            excepthook(kind, error, trace)

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Leave):
            unraisablehook(lost)
            return
        reason = str(lost.exc_value)

        def leave(number: int, frame: Any) -> None:
            raise Leave(reason)

        signal.signal(signal.SIGALRM, leave)
        signal.setitimer(signal.ITIMER_REAL, LOST_S)

    sys.excepthook, sys.unraisablehook = show, unraisable


def _with_environment(settings: Any) -> Any:
    """Take number and server's address from the environment, where the settings have none."""
    from .link.environment import read_environment

    here = read_environment(os.environ)
    return replace(
        settings,
        id=here.id if settings.id is None else settings.id,
        host_ip=settings.host_ip or here.host,
    )


def _with_id(settings: Any) -> Any:
    """Ask for the id, at a terminal."""
    if not sys.stdin.isatty():
        raise UserError("a worker needs its number", typed("worker", "id=2"))
    try:
        answer = input("This worker's number (1 for the first, 2 for the second ...): ").strip()
    except EOFError:  # Ctrl-D
        raise UserError("a worker needs its number", typed("worker", "id=2")) from None
    if not answer.isdecimal() or int(answer) < 1:
        raise UserError(f"a worker's number is 1 or more, not {answer!r}")
    return replace(settings, id=int(answer))


if __name__ == "__main__":
    main()
