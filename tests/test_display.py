"""What people see: drawn on a real pseudo-terminal, or as plain lines through a real pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pytest
from msgspec.structs import replace
from whole import DEADLINE_S

from paramserver import notify
from paramserver.output.display import Display
from paramserver.status.value import Evaluation, Machine, Status, from_json, to_json


def status_of(phase: str, **fields: Any) -> Status:
    return Status(run="r", made_at=0.0, phase=phase, **fields)


def evaluated(step: int, **metrics: float) -> tuple[Evaluation, ...]:
    return (Evaluation(step=step, metrics={"accuracy": 0.934, **metrics}),)


WORKERS = (
    Machine(id=1, host="mini1", samples_per_s=9540.0),
    Machine(id=2, host="mini2.local", samples_per_s=9400.0),
    Machine(id=3, host="pi", samples_per_s=100.0, trouble="late 0.41 s"),
)
STATUS = status_of(
    "training",
    step=812,
    total_steps=1120,
    epoch=3,
    num_epochs=5,
    loss=0.21339,
    evaluations=evaluated(812),
    steps_per_s=298.2,
    samples_per_s=19080.0,
    eta_s=63.0,
    machines=WORKERS,
    late="round 811 closed with 2 of 3: pi late",
    trains=True,
)
SUMMARY = {
    "steps": 1120,
    "samples": 35840,
    "samples_done": 35776,
    "samples_partly": 64,
    "samples_skipped": 0,
    "seconds": 8.31,
    "steps_per_s": 134.71,
    "samples_per_s": 4312.2,
    "train_loss": 0.12344,
    "val_loss": 0.2345,
    "val_accuracy": 0.9361,
    "sent_bytes": 1_234_567_890,
    "received_bytes": 98_765_432,
    "digest": "3fa2b4c5d6e7f8a9b0",
    "replicas_equal": True,
    "workers": [
        {"id": 1, "host": "mini1", "samples": 26880, "late": 0},
        {"id": 2, "host": "mini2.local", "samples": 8960, "late": 3},
    ],
}


def at_noon() -> datetime:
    return datetime(2026, 11, 22, 12, 0, 9)


class Terminal:
    """A pseudo-terminal with a person before it: `screen` is what they see, history included."""

    def __init__(self, columns: int = 100, rows: int = 30) -> None:
        self.master, slave = pty.openpty()
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self._lines, self._row, self._column = [""], 0, 0
        self.raw = ""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int = 30) -> None:
        """Like most terminals: lines that are too long now go on in the next row."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        below = len(self._lines) - self._row
        self._lines = [row for line in self._lines for row in _wrapped(line, columns)]
        self._row = len(self._lines) - below
        self._columns = columns

    def read(self) -> str:
        """What arrived since the last time, control codes included."""
        raw = b""
        while select.select([self.master], [], [], 0)[0]:
            raw += os.read(self.master, 65536)
        text = raw.decode()
        self.raw += text
        for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", text):
            self._obey(piece)
        return text

    @property
    def screen(self) -> list[str]:
        self.read()
        return [line.rstrip() for line in self._lines if line.strip()]

    def _obey(self, piece: str) -> None:
        if piece == "\r":
            self._column = 0
        elif piece == "\n":
            self._row += 1
            if self._row == len(self._lines):
                self._lines.append("")
        elif piece.startswith("\x1b"):
            number = int(piece[2:-1] or 1) if piece[2:-1].isdigit() or not piece[2:-1] else 0
            if piece[-1] == "A":
                self._row -= number
                assert self._row >= 0
            elif piece[-1] == "J":
                del self._lines[self._row + 1 :]
                self._lines[self._row] = self._lines[self._row][: self._column]
            else:
                assert piece[-1] == "m", f"unknown control code {piece!r}"
        else:
            if self._column == self._columns:
                self._column = 0
                self._obey("\n")
            line = self._lines[self._row].ljust(self._column)
            self._lines[self._row] = line[: self._column] + piece + line[self._column + 1 :]
            self._column += 1

    def close(self) -> None:
        self.stream.close()
        os.close(self.master)


def _wrapped(line: str, columns: int) -> list[str]:
    return [line[at : at + columns] for at in range(0, len(line), columns)] or [""]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_drawing_on_a_terminal(terminal: Terminal) -> None:
    display = Display(terminal.stream, clock=at_noon)
    display.update(STATUS, now=0.0)
    assert terminal.screen == [
        "━" * 43 + "╸" + "─" * 16 + "  step 812/1,120    72 %   1:03 left",
        "loss 0.2134   19,080 samples/s   epoch 3/5   accuracy 93.4 %   298 steps/s",
        "  worker 1  mini1         9,540 samples/s",
        "  worker 2  mini2.local   9,400 samples/s",
        "  worker 3  pi                late 0.41 s",
        "round 811 closed with 2 of 3: pi late",
    ]


def test_a_drawing_takes_the_place_of_the_last(terminal: Terminal) -> None:
    display = Display(terminal.stream, clock=at_noon)
    display.update(STATUS, now=0.0)
    display.say("worker 3 left")
    display.update(replace(STATUS, step=813, machines=(), late=""), now=1.0)
    display.say("worker 4 joined")
    assert len(terminal.screen) == 4
    assert terminal.screen[:2] == ["12:00:09  worker 3 left", "12:00:09  worker 4 joined"]
    assert "step 813/1,120" in terminal.screen[2]
    assert terminal.screen[3].startswith("loss 0.2134")


def test_four_drawings_a_second_at_most(terminal: Terminal) -> None:
    display = Display(terminal.stream)
    times = [number * 0.01 for number in range(100)]
    drawn = []
    for step, now in enumerate(times, 1):
        due = display.due(now)
        display.update(replace(STATUS, step=step), now)
        assert bool(terminal.read()) == due
        drawn += [now] * due
    assert drawn == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("columns", [10, 20, 40, 60, 80, 200])
@pytest.mark.parametrize("rows", [3, 5, 30])
def test_a_drawing_fits_its_window(terminal: Terminal, columns: int, rows: int) -> None:
    terminal.resize(columns, rows)
    display = Display(terminal.stream)
    many = tuple(
        Machine(id=number, host=f"host{number}", samples_per_s=100.0) for number in range(1, 50)
    )
    status = replace(STATUS, phase="paused: " + 20 * "waiting ", trains=False, machines=many)
    for now in range(3):
        display.update(status, float(now))
    assert 0 < len(terminal.screen) < rows
    assert all(len(line) < columns for line in terminal.screen)


def test_forty_columns_are_enough_for_what_matters(terminal: Terminal) -> None:
    terminal.resize(40)
    Display(terminal.stream).update(STATUS, 0.0)
    bar, figures, first, _, third, _ = terminal.screen
    assert re.fullmatch("━+╸─+  step 812/1,120    72 %", bar)
    assert figures == "loss 0.2134   19,080 samples/s"
    assert first == "  worker 1   9,540 samples/s"
    assert third == "  worker 3       late 0.41 s"


def test_those_in_trouble_are_shown_first_where_there_is_no_room(terminal: Terminal) -> None:
    terminal.resize(80, 7)
    Display(terminal.stream).update(STATUS, 0.0)
    assert terminal.screen[2:4] == ["  worker 3  pi       late 0.41 s", "  and 2 more workers"]


def test_nothing_is_left_behind_in_a_window_made_narrower(terminal: Terminal) -> None:
    display = Display(terminal.stream, clock=at_noon)
    display.say("hello")
    display.update(STATUS, 0.0)
    terminal.read()
    terminal.resize(33)
    display.update(replace(STATUS, machines=(), late=""), 1.0)
    assert len(terminal.screen) == 3
    assert terminal.screen[0] == "12:00:09  hello"
    assert "step 812" in terminal.screen[1]


def test_a_warning_is_marked_and_told_to_make_status(
    terminal: Terminal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "notify"))
    Display(terminal.stream, clock=at_noon).say("worker 3 is gone", warning=True)
    assert terminal.screen == ["12:00:09  warning: worker 3 is gone"]
    Display(plain=True, clock=at_noon).say("all is well")
    Display(plain=True, clock=at_noon).say("worker 2 is gone", warning=True)
    line = "12:00:09  warning: worker 2 is gone"
    assert capsys.readouterr().out.splitlines()[1] == line
    assert notify.read(tmp_path / "notify").warning == line


def test_waiting_before_the_first_step(terminal: Terminal) -> None:
    sentence = "waiting for 2 workers: worker 1 is here"
    status = status_of(sentence, machines=(Machine(id=1, host="mini1"),))
    Display(terminal.stream).update(status, 0.0)
    assert terminal.screen == [sentence, "  worker 1  mini1"]


def test_without_an_estimate_there_is_no_bar(terminal: Terminal) -> None:
    Display(terminal.stream).update(status_of("training", step=5, trains=True), 0.0)
    assert terminal.screen == ["step 5"]


def test_what_peers_send_is_shown_not_obeyed(terminal: Terminal) -> None:
    display = Display(terminal.stream, clock=at_noon)
    evil = "\x1b[2J\r\n\x07\x9b1A[bold]x[/bold]"
    display.say(f"{evil} joined")
    display.update(
        replace(STATUS, machines=(Machine(id=1, host=evil, trouble=evil),), late=evil), 0.0
    )
    display.summary({"steps": 1, "workers": [{"id": 1, "host": evil}]}, evil)
    text = terminal.read()
    assert not re.search(r"\x1b\[2J|\x07|\x9b", text)
    assert "[bold]x[/bold] joined" in text


def test_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def colours() -> set[str]:
        terminal.raw = ""
        Display(terminal.stream).update(STATUS, 0.0)
        terminal.read()
        return set(re.findall(r"\x1b\[(?:\d+;)*3\dm", terminal.raw))

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()


def test_the_summary_takes_the_drawings_place(terminal: Terminal) -> None:
    display = Display(terminal.stream, clock=at_noon)
    display.say("hello")
    display.update(STATUS, 0.0)
    display.summary(SUMMARY, "runs/2026-11-22_12-00-09")
    screen = terminal.screen
    display.close()
    display.close()
    assert terminal.screen == screen
    assert screen[0] == "12:00:09  hello"
    assert screen[1].startswith("╭")
    assert screen[-1] == "  runs/2026-11-22_12-00-09"
    assert not any("━" in line or "left" in line for line in screen)


def test_a_stopped_terminal_holds_nothing_up_and_loses_no_line(terminal: Terminal) -> None:
    display = Display(terminal.stream, clock=at_noon)
    display.update(STATUS, 0.0)
    terminal.read()
    termios.tcflow(terminal.stream.fileno(), termios.TCOOFF)  # what Ctrl-S does
    for step in range(1, 2000):
        display.update(replace(STATUS, step=step, machines=()), float(step))
    display.say("worker 3 left")
    assert terminal.read() == ""
    termios.tcflow(terminal.stream.fileno(), termios.TCOON)
    display.update(replace(STATUS, step=1000, machines=(), late=""), 5000.0)
    assert terminal.screen[0] == "12:00:09  worker 3 left"
    assert "step 1,000/" in terminal.screen[1]
    assert len(terminal.screen) == 3


def test_a_terminal_that_nobody_reads_holds_nothing_up(terminal: Terminal) -> None:
    # As behind an ssh connection whose cable was cut: its buffer fills up, at any byte.
    display = Display(terminal.stream, clock=at_noon)
    for step in range(1, 2000):
        display.update(replace(STATUS, step=step), float(step))
    display.say("worker 3 left")
    for now in (3000.0, 4000.0):
        terminal.read()
        display.update(replace(STATUS, step=1000, machines=(), late=""), now)
    assert terminal.screen[0] == "12:00:09  worker 3 left"
    assert "step 1,000/" in terminal.screen[1]
    assert len(terminal.screen) == 3


def test_a_terminal_that_hung_up_ends_the_drawing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    master, slave = pty.openpty()
    with open(slave, "w", encoding="utf-8") as stream:
        display = Display(stream)
        display.update(STATUS, 0.0)
        os.close(master)
        display.update(replace(STATUS, step=1), 1.0)
        display.say("hello")
        display.summary(SUMMARY)
        display.close()
        assert not display.due(99.0)


# Elsewhere: plain lines


class Pipe:
    """A pipe; what was written to it so far is `text`."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.stream: TextIO = os.fdopen(writer, "w", encoding="utf-8")

    @property
    def text(self) -> str:
        raw = b""
        while select.select([self.reader], [], [], 0)[0] and (more := os.read(self.reader, 65536)):
            raw += more
        return raw.decode()

    def fill(self) -> None:
        """Write until nothing more goes in."""
        while select.select([], [self.stream], [], 0)[1]:
            os.write(self.stream.fileno(), b"." * select.PIPE_BUF)

    def close(self) -> None:
        self.stream.close()
        os.close(self.reader)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_lines_of_progress_are_marked_for_those_who_draw_it(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "notify"))
    display = Display(pipe.stream, clock=at_noon)
    display.say("worker 1 is here")
    display.update(STATUS, 0.0)
    said, progress = pipe.text.splitlines()
    assert said == "12:00:09  worker 1 is here" and not notify.PROGRESS.match(said)
    assert progress.startswith("12:00:09 · training, step 812") and notify.PROGRESS.match(progress)


def test_a_status_comes_through_json_unharmed() -> None:
    assert from_json(to_json(STATUS)) == STATUS


def test_plain_lines_every_five_seconds_and_when_the_phase_changes(pipe: Pipe) -> None:
    display = Display(pipe.stream, clock=at_noon)
    waiting = status_of("waiting for 2 workers: worker 1 is here")
    told: list[tuple[float, str]] = []

    def update(now: float, status: Status) -> None:
        display.update(status, now)
        told.extend((now, line) for line in pipe.text.splitlines())

    for now in (0.0, 1.0, 10.0, 20.0):
        update(now, waiting)
    start = status_of("training", total_steps=1120, eta_s=3.0, trains=True)
    for step in range(1, 31):
        update(20 + step / 4, replace(start, step=step, loss=2 / step))
    update(40.0, replace(STATUS, phase="paused: no worker", trains=False))
    assert told == [
        (0.0, "12:00:09  waiting for 2 workers: worker 1 is here"),
        (20.25, "12:00:09  training, step 1/1,120, loss 2.0000, 0:03 left"),
        (25.25, "12:00:09  training, step 21/1,120, loss 0.0952, 0:03 left"),
        (
            40.0,
            "12:00:09  paused: no worker, step 812/1,120, loss 0.2134, 19,080 samples/s, "
            "epoch 3/5, accuracy 93.4 %, 298 steps/s, worker 3 late 0.41 s; "
            "round 811 closed with 2 of 3: pi late",
        ),
    ]


def test_what_is_waited_for_is_told_when_it_changes_and_not_every_few_seconds(pipe: Pipe) -> None:
    display = Display(pipe.stream, clock=at_noon)
    for now in range(31):
        display.update(status_of(f"waiting for 3 workers (starts in {60 - now} s)"), float(now))
    display.update(status_of("paused: nobody is here"), 32.0)
    display.update(status_of("waiting for 3 workers (starts in 27 s)"), 34.0)
    display.update(status_of("paused: nobody is here"), 36.0)  # it comes and goes
    display.update(replace(STATUS, late=""), 38.0)
    display.update(status_of("paused: nobody is here"), 40.0)
    told = [line[10:] for line in pipe.text.splitlines()]
    assert told[:3] == [
        "waiting for 3 workers (starts in 60 s)",
        "waiting for 3 workers (starts in 30 s)",
        "paused: nobody is here",
    ]
    assert told[3].startswith("training, step 812") and told[4:] == ["paused: nobody is here"]


def test_a_reason_is_told_once(pipe: Pipe) -> None:
    display = Display(pipe.stream)
    for now in range(0, 60, 5):
        display.update(replace(STATUS, step=now + 1), float(now))
    assert pipe.text.count("round 811 closed") == 1


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_pipe_gets_no_control_codes(
    pipe: Pipe, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    display = Display(pipe.stream)
    display.say("hello")
    display.update(STATUS, 0.0)
    display.summary(SUMMARY, "runs/x")
    display.close()
    text = pipe.text
    assert "hello" in text
    assert "step 812" in text
    assert "steps" in text
    assert "\x1b" not in text
    assert "\r" not in text


@pytest.mark.parametrize(
    ("name", "value", "plain"), [("CI", "true", False), ("TERM", "dumb", False), ("", "", True)]
)
def test_terminals_that_want_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str, plain: bool
) -> None:
    if name:
        monkeypatch.setenv(name, value)
    Display(terminal.stream, plain=plain, clock=at_noon).update(status_of("waiting"), 0.0)
    assert terminal.read() == "12:00:09  waiting\r\n"


def test_the_summary_in_a_pipe(pipe: Pipe) -> None:
    folder = "/a/very/long/path" * 12 + "/runs/2026-11-22_12-00-09"
    Display(pipe.stream).summary(SUMMARY, folder)
    assert pipe.text == textwrap.dedent(
        f"""\
        ╭────────────┬───────────────────────────────────────────────╮
        │ steps      │ 1,120, 134.7 a second                         │
        │ samples    │ 35,840, 4,312 a second                        │
        │            │ 35,776 done, 64 partly, 0 skipped             │
        │ time       │ 8.3 s                                         │
        │ training   │ loss 0.1234                                   │
        │ validation │ 93.61 % right, loss 0.2345                    │
        │ traffic    │ 1,234.6 MB sent, 98.8 MB received             │
        │ weights    │ 3fa2b4c5d6e7  the same on all replicas        │
        ├────────────┼───────────────────────────────────────────────┤
        │ worker 1   │ 26,880 samples   75.0 %  on time  mini1       │
        │ worker 2   │  8,960 samples   25.0 %  late 3x  mini2.local │
        ╰────────────┴───────────────────────────────────────────────╯
          {folder}
        """
    )


def test_an_evaluation_is_shown_with_its_step(pipe: Pipe) -> None:
    display = Display(pipe.stream, clock=at_noon)
    display.update(replace(STATUS, evaluations=evaluated(800, mood=2.0)), 0.0)
    display.update(replace(STATUS, step=812, late=""), 100.0)
    first, second = pipe.text.splitlines()
    assert "accuracy 93.4 % (step 800), mood 2 (step 800)," in first
    assert "accuracy 93.4 %," in second
    display.summary({"steps": 812, "last_evaluation": {"step": 800, "val_accuracy": 0.934}})
    assert "none of the last step; the newest is of step 800" in pipe.text


def test_a_summary_of_what_is_known(pipe: Pipe) -> None:
    none = dict.fromkeys(SUMMARY) | {"steps": 0, "replicas_equal": False, "digest": "ab"}
    Display(pipe.stream).summary(none)
    rows = [line for line in pipe.text.splitlines() if line.startswith("│")]
    assert [re.split(r" +│ +|│ +| +│", row)[1:3] for row in rows] == [
        ["steps", "0"],
        ["weights", "ab  replicas DIFFER"],
    ]


def test_the_summary_tells_what_went_wrong_on_the_way(pipe: Pipe) -> None:
    problems = ["the checkpoint of step 100 was not written: \x1b[2J", "W&B stopped"]
    Display(pipe.stream).summary({"steps": 1, "problems": problems})
    rows = [line for line in pipe.text.splitlines() if line.startswith("│")]
    assert [re.split(r" +│ +|│ +| +│", row)[1:3] for row in rows] == [
        ["steps", "1"],
        ["problems", "the checkpoint of step 100 was not written: \N{REPLACEMENT CHARACTER}[2J"],
        ["", "W&B stopped"],
    ]


def test_a_pipe_that_nobody_reads_holds_nothing_up(pipe: Pipe) -> None:
    pipe.fill()
    display = Display(pipe.stream)
    for number in range(5):
        display.say(f"line {number}")
    assert set(pipe.text) == {"."}
    display.say("line 5")
    assert [line[10:] for line in pipe.text.splitlines()] == [f"line {n}" for n in range(6)]


def test_a_line_longer_than_the_room_in_a_pipe(pipe: Pipe) -> None:
    pipe.fill()
    os.read(pipe.reader, 8192)
    display = Display(pipe.stream)
    display.say("x" * 50_000)
    assert pipe.text.count("x") < 50_000
    display.close()
    assert pipe.text.endswith("x\n")


def run_display(script: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A program that prints to its stdout through a Display, here a pipe."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from paramserver.output.display import *\n" + textwrap.dedent(script),
        ],
        capture_output=True,
        env={**os.environ, **variables},
        timeout=DEADLINE_S,
    )


def test_a_reader_that_went_away_is_no_error() -> None:
    done = run_display(
        """
        import os, sys
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(writer)
        os.close(reader)
        display = Display()
        display.say("hello")
        display.update(Status(run="r", made_at=0.0, phase="waiting"), 0.0)
        display.close()
        print("not even this")
        """
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closing", ["sys.stdout.close()", "sys.stdout = None"])
def test_a_closed_stdout_is_no_error(closing: str) -> None:
    done = run_display(
        f"""
        import sys
        {closing}
        display = Display()
        display.say("hello")
        display.summary({{"steps": 1}})
        display.close()
        """
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_stdout_that_knows_only_ascii() -> None:
    done = run_display(
        """
        display = Display()
        display.say("naïve.local joined")
        display.summary({"steps": 1, "workers": [{"id": 1, "host": "naïve"}]})
        """,
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"na?ve.local joined" in done.stdout
    assert b"| steps    | 1 " in done.stdout
