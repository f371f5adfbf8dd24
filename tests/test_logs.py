"""Where log records go: a script's own logging takes precedence, programs show all as lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime

import pytest
from whole import free_port

import workers
from paramserver import logs
from paramserver.output.display import Display
from paramserver.server.overview import Overview
from paramserver.server.show import Above
from paramserver.settings import Settings

ALONE = "training alone"


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Both loggers as a new process has them, and afterwards as they were."""
    loggers = [logging.getLogger(name) for name in ("paramserver", "workers")]
    before = [(each.handlers, each.level, each.propagate) for each in loggers]
    for logger in loggers:
        logger.handlers, logger.level, logger.propagate = [], logging.NOTSET, True
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


class Kept(logging.Handler):
    """A script's own handler."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def alone(**words: object) -> None:
    workers.join(port=free_port(), **words).leave()  # type: ignore[arg-type]


def test_a_script_that_says_nothing_of_it_has_it_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone()
    alone()
    assert capsys.readouterr().out.count(ALONE) == 2  # each line once


def test_a_script_that_wants_to_hear_nothing_hears_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logging.getLogger("workers").setLevel(logging.ERROR)
    alone()
    assert capsys.readouterr() == ("", "")


def test_a_script_takes_it_where_it_likes(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Kept()
    logging.getLogger("workers").addHandler(kept)
    alone()
    (line,) = kept.lines
    assert line.startswith("INFO ") and ALONE in line
    assert capsys.readouterr() == ("", "")


def test_a_script_may_leave_it_to_the_root_logger(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("workers").addHandler(logging.NullHandler())
    with caplog.at_level(logging.INFO):
        alone()
    assert [ALONE in message for message in caplog.messages] == [True]
    assert capsys.readouterr() == ("", "")


def test_what_is_given_to_join_hears_all_alone(capsys: pytest.CaptureFixture[str]) -> None:
    kept, said = Kept(), list[str]()
    logging.getLogger("workers").addHandler(kept)
    alone(say=said.append)
    assert len(said) == 1 and ALONE in said[0]
    assert kept.lines == [] and capsys.readouterr() == ("", "")


def test_a_program_shows_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    logs.show("workers", logs.Lines(prefix="[worker 3] "))
    logs.show("workers", logs.Lines(prefix="[worker 3] "))
    log = logging.getLogger("workers.builtin.data")
    log.debug("unheard")
    log.info("100 % of the digits are here")
    log.warning("none is left")
    assert capsys.readouterr().out == (
        "[worker 3] 100 % of the digits are here\n[worker 3] warning: none is left\n"
    )


def test_the_server_shows_them_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(plain=True, clock=lambda: datetime(2026, 1, 1, 12, 0, 9))
    overview = Overview(Settings(), "run-1", "runs/run-1", "here")
    logs.show("paramserver", Above(display, overview))
    logging.getLogger("paramserver").info("server at 127.0.0.1:65432")
    logging.getLogger("paramserver").warning("worker 3 is gone")
    assert capsys.readouterr().out == (
        "12:00:09  server at 127.0.0.1:65432\n12:00:09  warning: worker 3 is gone\n"
    )
