"""Handlers for the loggers `paramserver` and `workers` of the standard library.

A script that uses `workers` as a library silences or redirects them as usual. A program shows each
record as one line, printed as `terminal.say` prints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from paramserver import terminal


class Lines(logging.Handler):
    """Passes each record on as one line."""

    def __init__(self, say: Callable[[str], None] = terminal.say, prefix: str = "") -> None:
        super().__init__()
        self._say, self._prefix = say, prefix

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        self._say(f"{self._prefix}{mark}{record.getMessage()}")


def to(say: Callable[[str], None], name: str) -> logging.Logger:
    """A logger of that name whose lines go to `say`, and nowhere else: it stands outside the tree
    of loggers, so that each of several clusters in one process can have its own."""
    logger = logging.Logger(name, logging.INFO)
    logger.addHandler(Lines(say))
    return logger


def show(name: str, handler: logging.Handler) -> None:
    """Let this program show the records of the logger of that name by `handler` only."""
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def show_unless_told(name: str) -> None:
    """Print the records of this logger, for a script that has not configured it. A handler or a
    level of the script takes precedence."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(Lines())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
