"""Draws a run on the whole terminal, and takes keys; or prints plain lines where there is none.

It shows what the server knows, and can do nothing to the run: `q` ends the watching only.
"""

from __future__ import annotations

import math
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from paramserver import terminal
from paramserver.config.loading import load
from paramserver.net.address import AUTO, to_watch
from paramserver.output.display import Display, Paper
from paramserver.status.chrome import Recorder
from paramserver.status.value import Status
from paramserver.watch.connection import Connection
from paramserver.watch.screen import View, drawn, gone_on, waiting

POLL_S = 0.1  # for a status, between two looks at the keys
REDRAW_S = 1.0  # without anything new: seconds of silence go on
SAID_AFTER_S = 3.0
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # another screen, no cursor, no wrapping
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
ESCAPE, BACKSPACES, RETURNS = "\x1b", "\x08\x7f", "\r\n"
FILTER_CHARS = 60


def watch(words: list[str]) -> None:
    """Watch the run that these settings name, or the join or watch token in them."""
    settings = load(words, "worker").settings
    ways = to_watch(
        None if settings.host_ip == AUTO else settings.host_ip,
        settings.port,
        settings.watch_port,
        settings.join,
        security=settings.security,
    )
    with Connection(*ways) as connection:
        if settings.plain or not _draws():
            print_lines(connection)
        else:
            Screen(connection).run()


def _draws() -> bool:
    """Is there a person at a terminal that can be drawn on?"""
    clever = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return clever and all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))


def print_lines(connection: Connection) -> None:
    """A line from time to time, until the run is over."""
    display, began, said = Display(plain=True), time.monotonic(), False
    over = ""  # the run whose end was told
    while True:
        status = connection.poll(1.0)
        if status is None:
            silent_s = min(connection.silent_s, time.monotonic() - began)
            if silent_s > SAID_AFTER_S and not said:
                said = True
                display.say(f"no run answers at {connection}")
            continue
        said = False
        if status.run == over:
            continue  # the next one follows
        if over:
            display, over = Display(plain=True), ""
        display.update(status, time.monotonic())
        if status.end:
            what = f"the run is over at step {status.step:,}: {status.end}"
            display.say(f"{status.place}: {what}" if status.place else what)
            display.close()
            if not status.more:
                return
            over = status.run


class Screen:
    """The whole terminal, drawn anew whenever a status or a key comes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._recorder = Recorder()
        self._view = View()
        self._status: Status | None = None
        encoding = sys.stdout.encoding or "utf-8"
        self._utf8 = encoding.lower().startswith("utf")
        self._console = Console(
            file=Paper(sys.stdout),
            force_terminal=True,
            legacy_windows=False,
            markup=False,
            highlight=False,
            emoji=False,
        )
        self._drawn = ""
        self._over = False

    def run(self) -> None:
        """Until `q` or Ctrl-C, which leave the run as it is."""
        with _keys(), suppress(KeyboardInterrupt):
            redraw_at = 0.0
            while not self._over:
                status = self._connection.poll(POLL_S)
                typed = _typed()
                if status is not None:
                    if self._status is not None and status.run != self._status.run:
                        self._recorder = Recorder()
                        self._view = replace(self._view, lines=())
                    self._status = status
                    self._recorder.add(status)
                    if status.lines[-1:] != self._view.lines[-1:]:
                        lines = gone_on(self._view.lines, status.lines)
                        self._view = replace(self._view, lines=lines)
                for key in typed:
                    self._press(key)
                if status is not None or typed or time.monotonic() >= redraw_at:
                    self._draw()
                    redraw_at = time.monotonic() + REDRAW_S

    def _press(self, key: str) -> None:
        view = replace(self._view, note="")
        if view.typing:
            if key == ESCAPE:
                view = replace(view, typing=False, filter="")
            elif key in RETURNS:
                view = replace(view, typing=False)
            elif key in BACKSPACES:
                view = replace(view, filter=view.filter[:-1])
            elif key.isprintable() and len(view.filter) < FILTER_CHARS:
                view = replace(view, filter=view.filter + key)
        elif key == "q":
            self._over = True
        elif key == "l":
            view = replace(view, log=not view.log)
        elif key == "w":
            view = replace(view, warnings=not view.warnings)
        elif key == "/":
            view = replace(view, log=True, typing=True, filter="")
        elif key == ESCAPE:
            view = replace(view, log=False, warnings=False, filter="")
        elif key == "t":
            view = replace(view, note=self._save_trace())
        self._view = view

    def _save_trace(self) -> str:
        """Write the last minute as a trace into the current folder; what came of that."""
        path = Path(f"trace-{datetime.now():%H-%M-%S}.json")
        try:
            path.write_text(self._recorder.to_json())
        except OSError as e:
            return f"{path} cannot be written: {e.strerror or e}"
        return f"{path}: open it at ui.perfetto.dev"

    def _draw(self) -> None:
        with suppress(OSError, ValueError):  # a terminal of no size, or none any more
            columns, rows = os.get_terminal_size(sys.stdout.fileno())
            width, height = max(columns - 1, 1), max(rows, 1)  # the last column wraps on some
            if self._status is None:
                lines = waiting(str(self._connection), width, height)
            else:
                silent_s = self._connection.silent_s
                view = replace(self._view, silent_s=0.0 if math.isinf(silent_s) else silent_s)
                lines = drawn(self._status, view, width, height, utf8=self._utf8)
            self._show(lines, width)

    def _show(self, lines: list[Text], width: int) -> None:
        self._console.width = width + 1
        with self._console.capture() as capture:
            self._console.print(Text("\n").join(lines), soft_wrap=True, end="")
        text = capture.get().replace("\n", "\x1b[K\r\n")
        terminal.write(f"\x1b[H{text}\x1b[K\x1b[J")


@contextmanager
def _keys() -> Iterator[None]:
    """Another screen, and keys one by one, until the end of the block."""
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file)
        terminal.write(ENTER)
        yield
    finally:
        terminal.write(LEAVE)
        with suppress(termios.error):
            termios.tcsetattr(file, termios.TCSADRAIN, before)


def _typed() -> str:
    """The keys that were pressed since the last call, without waiting. Of the keys that send
    several characters, the arrows say, nothing is left."""
    typed = b""
    with suppress(OSError):
        while select.select([sys.stdin], [], [], 0)[0]:
            more = os.read(sys.stdin.fileno(), 1024)
            if not more:  # the terminal is gone
                raise KeyboardInterrupt
            typed += more
    text = typed.decode(errors="ignore")
    return text if not (text.startswith(ESCAPE) and len(text) > 1) else ""
