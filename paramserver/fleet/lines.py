"""Lines of several machines on one terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from paramserver import terminal
from paramserver.net.hosts import Host
from paramserver.output.display import Display, Paper
from paramserver.words import printable

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_red", "bright_cyan")


class Lines:
    """Lines of all machines on one terminal, each with its machine's name and colour."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._console = Console(
            file=Paper(sys.stdout or io.StringIO()), highlight=False, soft_wrap=True
        )
        self._width = max((len(host.name) for host in hosts), default=0)
        self._colours = {h.name: COLOURS[i % len(COLOURS)] for i, h in enumerate(hosts)}
        self.display: Display | None = None
        """Where a run is drawn, lines are above the drawing."""

    def say(self, host: str, line: str) -> None:
        head = Text(f"{host:<{self._width}} | ", style=self._colours.get(host, ""))
        self.print(head + Text(printable(line)))

    def tell(self, line: str) -> None:
        """Print a line of this program."""
        self.print(Text(printable(line)))

    def tell_as_it_is(self, text: str) -> None:
        """Print several lines of this program, unchanged."""
        self.print(Text("\n".join(printable(line) for line in text.split("\n"))))

    def print(self, renderable: Any) -> None:
        with self._console.capture() as drawn:
            self._console.print(renderable)
        if self.display is not None:
            self.display.above(drawn.get())
        else:
            terminal.write(drawn.get())
