"""`make watch` in tmux, a terminal that knows what is on its screen: at any width, resized, without
colour, and left with `q`.

Skipped where there is no tmux.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crew import Crew, Noise, perceptron
from whole import DEADLINE_S, ENDLESS, Served

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")

ROWS = 30
MARKS = "█▓▒░×"


class Tmux:
    """A tmux of its own, with one window in which people watch the run at this port."""

    def __init__(self, folder: Path, port: int, columns: int, **variables: str) -> None:
        self._socket = str(folder / "tmux")
        self._own = {k: v for k, v in os.environ.items() if k not in ("TMUX", "NO_COLOR")}
        self._own |= {"LC_ALL": "C.UTF-8", **variables}
        words = [sys.executable, "-m", "paramserver.watch", f"port={port}"]
        self.ask("new-session", "-d", "-x", str(columns), "-y", str(ROWS), *words)

    def ask(self, *words: str) -> str:
        told = subprocess.run(
            ["tmux", "-f", "/dev/null", "-S", self._socket, *words],
            capture_output=True,
            text=True,
            env=self._own,
            timeout=DEADLINE_S,
        )
        return told.stdout

    def screen(self, *, colours: bool = False) -> list[str]:
        """The rows on the screen."""
        return self.ask("capture-pane", "-p", *["-e"] * colours).split("\n")[:ROWS]

    def until(self, condition: Callable[[list[str]], object]) -> list[str]:
        """The screen, as soon as this is so."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            rows = self.screen()
            if len(rows) == ROWS and condition(rows):
                return rows
            time.sleep(0.05)
        pytest.fail("\n".join(self.screen()))

    def until_gone(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.ask("list-sessions") and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        self.ask("kill-server")


@pytest.fixture
def served() -> Iterator[Served]:
    """A run whose worker 2 holds up worker 1."""

    def hold(number: int, step: int) -> None:
        if number == 2:
            time.sleep(0.02)

    with Served(watched=True, num_workers=2, num_epochs=ENDLESS) as served:
        crew = Crew(served, perceptron, Noise(96), hold)
        futures = [crew.start(number, 8) for number in (1, 2)]
        yield served
        served.stop()
        served.wait(*futures)


def bar(rows: list[str], worker: int) -> str:
    """Where this worker's time went, as it is drawn."""
    found = (re.match(rf"{worker} \S+ +([{MARKS}]+) ", row) for row in rows)
    return next((match[1] for match in found if match), "")


SEEN = ("all wait for it", "samples/s", "step ")  # there is no speed before some rounds


def test_at_any_width_and_resized(tmp_path: Path, served: Served) -> None:
    tmux = Tmux(tmp_path, served.port, 140)
    try:
        for columns, others in ((140, 80), (60, 0), (80, 60)):
            tmux.ask("resize-window", "-x", str(columns), "-y", str(ROWS))
            rows = tmux.until(
                lambda rows, columns=columns, others=others: (  # type: ignore[misc]
                    others <= max(map(len, rows)) < columns
                    and all(words in " ".join(" ".join(rows).split()) for words in SEEN)
                    and bar(rows, 2)
                )
            )
            assert rows[0].startswith("folder") and rows[-1].startswith(" q  quit   l  log")
            told = " ".join(" ".join(rows).split())
            assert re.search(r"worker 2 \(.+\) computes .+ all wait for it", told), told
            one, two = bar(rows, 1), bar(rows, 2)
            assert one.count("░") > two.count("░") and two.count("█") > one.count("█")
            assert len(one) >= 6
        tmux.ask("send-keys", "l")
        rows = tmux.until(lambda rows: not bar(rows, 1))
        tmux.ask("send-keys", "/", "worker 2")
        rows = tmux.until(lambda rows: "filter: worker 2" in rows[-1])
        before = len(served.closes)
        tmux.ask("send-keys", "Enter", "q")
        tmux.until_gone()
        served.until(lambda: len(served.closes) > before + 5)
    finally:
        tmux.close()


@pytest.mark.parametrize("variable", ["", "1"])
def test_colours_where_they_are_wanted(tmp_path: Path, served: Served, variable: str) -> None:
    tmux = Tmux(tmp_path, served.port, 80, NO_COLOR=variable)
    try:
        rows = tmux.until(lambda rows: bar(rows, 2))
        text = "".join(tmux.screen(colours=True))
        assert bool(re.search(r"\x1b\[[\d;]*(3[0-7]|9[0-7])m", text)) == (not variable)
        assert set(bar(rows, 1)) & set("█░"), "the parts differ without colour, too"
    finally:
        tmux.close()
