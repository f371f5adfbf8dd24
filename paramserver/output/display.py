"""The server's display while a run goes on, and the table at its end.

On a terminal a few lines are drawn anew, about four times a second, below the log lines:

    ━━━━━━━━━━━━━━━━━━━━━━━━━━╸───────────  step 812/1,120   72 %   0:03 left
    loss 0.2134   19,080 samples/s   epoch 3/5   accuracy 93.4 % (step 800)   298 steps/s
      worker 1  mini1   9,540 samples/s
      worker 2  mini2       late 0.41 s

Elsewhere (a pipe, CI, `plain=true`) there are plain lines without control codes, about every five
seconds and where the phase changes.

There is no thread: the server's loop calls `update`, which does nothing until a drawing is due. A
terminal that takes no output (Ctrl-S) misses drawings, a closed one ends them, and a log on a full
disk lacks lines; none of these stops the run.
"""

from __future__ import annotations

import io
import math
import os
import re
import select
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from paramserver import notify, terminal
from paramserver.output import figures, metrics
from paramserver.status.value import Machine, Status
from paramserver.units import clock
from paramserver.words import printable

DRAW_S = 0.25
PLAIN_S = 5.0  # between plain lines
PHASE_S = 1.0  # the same where the phase has changed
REPEAT_S = 30.0  # between lines that say what the run waits for, as long as that is the same
LAST_WAIT_S = 5.0  # how long the final table waits for a stopped terminal
WARNING = "warning: "
"""The mark before a warning; `make status` shows the newest one."""


class Display:
    """Progress on `stream` (default: stdout), as long as that takes output."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        plain: bool = False,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`clock` tells the time of day, for the stamps of lines."""
        wanted = stream or sys.stdout  # None where it was closed when Python started
        self._gone = wanted is None or wanted.closed  # there is no stream
        self._stream: TextIO = io.StringIO() if self._gone else wanted
        self._clock = clock
        self._live = not plain and _is_terminal(self._stream)
        self._due = float("-inf")
        self._pending: deque[str] = deque(maxlen=1000)  # lines above the drawing, not yet written
        # Live
        self._drawing = ""  # ends with a new line, or is empty
        self._widths: tuple[int, ...] = ()  # of its lines
        self._drawn = ""  # the drawing on the screen
        self._on_screen: tuple[int, ...] = ()  # the widths of its lines
        # Plain
        self._line_at = float("-inf")  # when the last line was printed
        self._line = ""
        self._phase = ""
        self._phases: dict[str, float] = {}  # when each was printed, since it trained last
        self._late = ""
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._bar = "━╸─" if self._encoding.lower().startswith("utf") else "=>-"
        self._file = _descriptor(self._stream, self._live)
        self._unsent = b""  # of the newest piece
        self._console = Console(
            file=Paper(self._stream),
            force_terminal=self._live,
            legacy_windows=False,
            markup=False,
            highlight=False,
            emoji=False,
        )

    @property
    def live(self) -> bool:
        """Is it drawn anew, and not printed as lines?"""
        return self._live

    def clear(self) -> None:
        """Remove the drawing, until the next `update`."""
        self._drawing = ""
        self._emit()

    def above(self, text: str) -> None:
        """Print whole lines above the drawing, as they are."""
        self._pending.append(text)
        self._emit()

    def due(self, now: float) -> bool:
        """Would `update` use a status now? Saves the caller making one."""
        return now >= self._due and not self._gone

    def update(self, status: Status, now: float) -> None:
        """Show `status`, if that is due; `now` in seconds of any steady clock."""
        if now < self._due or self._gone:
            return
        self._due = now + DRAW_S
        if self._live:
            self._draw(status)
        else:
            self._print_plain(status, now)
        self._emit()

    def say(self, line: str, warning: bool = False) -> None:
        """Print a line with a time stamp, above the drawing."""
        self._say(line, warning, "  ")

    def _say(self, line: str, warning: bool, between: str) -> None:
        stamp = self._clock().strftime("%H:%M:%S")
        if warning:
            notify.warning(f"{stamp}  {WARNING}{printable(line)}")
        mark = (WARNING, "yellow") if warning else ""
        text = Text.assemble((stamp, "dim"), between, mark, printable(line))
        self._pending.append(self._rendered(text, soft_wrap=True))
        self._emit()

    def summary(self, summary: Mapping[str, Any], run_folder: str = "") -> None:
        """Print the final table in place of the drawing.

        Shows those of these keys that are there: steps, samples, samples_done, samples_partly,
        samples_skipped, seconds, steps_per_s, samples_per_s, train_loss, val_loss, val_accuracy (0
        to 1), metrics, last_evaluation (with its step, where the last step was not evaluated),
        sent_bytes, received_bytes, digest, replicas_equal (None: not compared), problems: a
        sequence of sentences, and workers: a sequence of mappings with id, host, samples, late
        (rounds missed).
        """
        self._drawing = ""
        self._pending.append(self._rendered(_summary_table(summary)))
        if run_folder:
            self._pending.append(self._rendered(Text(f"  {printable(run_folder)}"), soft_wrap=True))
        self._emit(LAST_WAIT_S)

    def close(self) -> None:
        """Remove the drawing and write pending lines; may be called twice."""
        self._drawing = ""
        self._emit(LAST_WAIT_S)
        self._gone = True
        if self._live and self._file is not None:
            os.close(self._file)
            self._file = None

    # Making text

    def _rendered(self, thing: RenderableType, soft_wrap: bool = False) -> str:
        """Render for the stream; with `soft_wrap` the terminal breaks long lines."""
        self._console.width = self._size()[0]
        with self._console.capture() as capture:
            self._console.print(thing, soft_wrap=soft_wrap)
        return capture.get()

    def _draw(self, status: Status) -> None:
        columns, rows = self._size()
        width = max(columns - 1, 1)  # a character in the last column wraps on some terminals
        lines = _drawn_lines(status, width, rows - 2, self._bar)
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        self._drawing = self._rendered(Text("\n").join(lines), soft_wrap=True) if lines else ""
        self._widths = tuple(line.cell_len for line in lines)

    def _print_plain(self, status: Status, now: float) -> None:
        phase = re.sub(r"\d+", "", status.phase)  # a phase that counts down is still the same
        pause_s = PLAIN_S if phase == self._phase else PHASE_S
        if now < self._line_at + pause_s:
            return
        if not status.trains and now < self._phases.get(phase, -math.inf) + REPEAT_S:
            return  # it was said, and nothing moves
        parts = [printable(status.phase)]
        if status.step:
            step, *_ = made = figures.progress(status)
            left = made[2:]  # without the percentage
            parts += [step, *figures.figures(status), *left]
        parts += [f"worker {w.id} {printable(w.trouble)}" for w in status.workers if w.trouble]
        line = ", ".join(parts)
        if status.late and status.late != self._late:
            line += f"; {printable(status.late)}"
        if line != self._line:
            self._line_at, self._line = now, line
            self._phase, self._late = phase, status.late
            self._phases = {**self._phases, phase: now} if not status.trains else {}
            self._say(line, False, f" {notify.mark() or ' '}")

    # Writing text

    def _emit(self, wait_s: float = 0.0) -> None:
        """Send pending lines and the drawing in one piece, as far as the stream takes it now."""
        try:
            if self._gone or not self._sent(wait_s):
                return
            if not self._pending and self._drawing == self._drawn:
                return
            piece = self._erasing() + "".join(self._pending) + self._drawing
            self._pending.clear()
            self._drawn, self._on_screen = self._drawing, self._widths if self._drawing else ()
            self._unsent = piece.encode(self._encoding, "replace")  # a host may have any name
            self._sent(wait_s)
        except (OSError, ValueError) as e:
            self._unsent = b""
            if not (isinstance(e, OSError) and e.errno in terminal.FULL):
                self._give_up()  # a closed pipe, a terminal that hung up, a closed file

    def _sent(self, wait_s: float) -> bool:
        """Go on sending `_unsent` without blocking; returns whether all of it is sent."""
        file = self._file
        if file is None:
            self._stream.write(self._unsent.decode(self._encoding))
            self._unsent = b""
            return True
        while self._unsent:
            if not select.select([], [file], [], wait_s)[1]:
                return False
            try:
                # A pipe that is ready takes this much without blocking.
                count = os.write(file, self._unsent[: select.PIPE_BUF])
            except BlockingIOError:
                return False
            self._unsent = self._unsent[count:]
        return True

    def _erasing(self) -> str:
        """Control codes that remove the last drawing, even if the window is narrower now."""
        width = self._size()[0]
        rows = sum(max(1, -(-line // width)) for line in self._on_screen)
        return f"\x1b[{rows}A\r\x1b[J" if rows else ""

    def _size(self) -> tuple[int, int]:
        """Columns and rows of the terminal, or what suits a file."""
        if self._live:
            with suppress(OSError, ValueError):
                columns, rows = os.get_terminal_size(self._stream.fileno())
                if columns > 0 and rows > 0:  # both are 0 on some serial lines
                    return columns, rows
            return 80, 24
        return 100, 24

    def _give_up(self) -> None:
        """The stream is gone: write nothing more, also when Python flushes it at exit."""
        self._gone = True
        terminal.silence(self._stream)


class Paper(io.StringIO):
    """The file of a rich console that only renders for `stream`. While it captures, rich writes
    empty strings to its file, which fails on a terminal that is gone."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()


def _is_terminal(stream: TextIO) -> bool:
    """Can lines be drawn again? (FORCE_COLOR changes rich's own answer.)"""
    clever = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return stream.isatty() and clever and not os.environ.get("CI")


def _descriptor(stream: TextIO, live: bool) -> int | None:
    """The descriptor to write to; for a terminal a new one, which the caller closes; None where the
    stream is no file.

    A terminal may stop taking output at any byte, and a write would wait: behind a cut ssh
    connection, for ever. This descriptor does not block. That mode belongs to the open file, and
    the shell and its programs share stdout's, so this opens the terminal again.
    """
    try:
        stream.flush()
        if not live:
            return stream.fileno()
        flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(os.ttyname(stream.fileno()), flags)
        except OSError:  # it has no name in this container, or belongs to another user
            return os.dup(stream.fileno())
    except (OSError, ValueError):
        return None


def _drawn_lines(status: Status, width: int, height: int, bar: str) -> list[Text]:
    """The drawing, one Text a line and at most `height` of them; a line may exceed `width`."""
    lines = []
    if not status.trains:
        lines.append(Text(printable(status.phase), style="bold yellow"))
    if status.step:
        lines.append(_bar_line(status, width, bar))
        lines.append(Text("   ".join(figures.fitting(figures.figures(status), width))))
    late = [Text(printable(status.late), style="yellow")] if status.late else []
    workers = _worker_lines(status, width, height - len(lines) - len(late))
    return (lines + workers + late)[: max(height, 1)]


def _bar_line(status: Status, width: int, bar: str) -> Text:
    words, room = figures.beside_a_bar(figures.progress(status), width)
    text, made = "   ".join(words), figures.made(status)
    if made is None or not room:
        return Text(text)
    done, tip, left = bar[0], bar[1], bar[2]
    filled = int(made * room)
    if filled in (0, room):
        tip = ""
    todo = left * (room - filled - len(tip))
    return Text.assemble((done * filled + tip, "green"), (todo, "dim"), "  ", text)


def _worker_lines(status: Status, width: int, room: int) -> list[Text]:
    """A line for each worker; where they are too many, for those in trouble first."""
    workers: Sequence[Machine] = status.workers
    hidden = 0
    if len(workers) > room:
        shown = max(room - 1, 0)
        hidden = len(workers) - shown
        workers = sorted(workers, key=lambda worker: not worker.trouble)[:shown]
    ids = max((len(str(worker.id)) for worker in workers), default=0)
    hosts = [printable(worker.host) if width >= 60 else "" for worker in workers]
    widest = max(map(cell_len, hosts), default=0)
    lines = []
    for worker, host in zip(workers, hosts, strict=True):
        share = figures.share(worker, status)
        lines.append(
            Text.assemble(
                f"  worker {worker.id:>{ids}}  ",
                (host + " " * (widest - cell_len(host) + 2), "dim") if widest else "",
                (f"{printable(worker.trouble):>16}", "yellow")
                if worker.trouble
                else f"{figures.rate(worker):>16}",
                (f"  {share:>12}" if share else "", "dim"),
            )
        )
    if hidden and room > 0:
        lines.append(Text(f"  and {hidden} more workers", "dim"))
    return lines


def _summary_table(summary: Mapping[str, Any]) -> Table:
    def known(*forms: tuple[str, str]) -> str:
        """The values of the keys that have one, each in its form."""
        return ", ".join(f.format(summary[k]) for k, f in forms if summary.get(k) is not None)

    table = Table(box=box.ROUNDED, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    seconds = summary.get("seconds")
    validation = [*metrics.final(metrics.held(summary)), known(("val_loss", "loss {:.4f}"))]
    last = summary.get("last_evaluation") or {}
    if not any(validation) and last:
        validation = [f"none of the last step; the newest is of step {last['step']:,}"]
    traffic = [
        f"{summary[key] / 1e6:,.1f} MB {word}"
        for key, word in (("sent_bytes", "sent"), ("received_bytes", "received"))
        if summary.get(key) is not None
    ]
    ledger = known(
        ("samples_done", "{:,} done"),
        ("samples_partly", "{:,} partly"),
        ("samples_skipped", "{:,} skipped"),
    )
    facts: list[tuple[str, str | Text]] = [
        ("steps", known(("steps", "{:,}"), ("steps_per_s", "{:,.1f} a second"))),
        ("samples", known(("samples", "{:,}"), ("samples_per_s", "{:,.0f} a second"))),
        ("", ledger),
        ("time", "" if seconds is None else _duration(seconds)),
        ("training", known(("train_loss", "loss {:.4f}"))),
        ("validation", ", ".join(filter(None, validation))),
        ("traffic", ", ".join(traffic)),
        ("weights", _digest(summary)),
    ]
    for name, value in facts:
        if value:
            table.add_row(name, value)
    for number, problem in enumerate(summary.get("problems") or ()):
        table.add_row("" if number else "problems", Text(printable(problem), style="yellow"))
    table.add_section()
    workers = summary.get("workers") or ()
    total = sum(worker.get("samples") or 0 for worker in workers) or 1
    for worker in workers:
        samples, late = worker.get("samples") or 0, worker.get("late") or 0
        figures = f"{samples:>{len(f'{total:,}')},} samples  {100 * samples / total:5.1f} %  "
        table.add_row(
            f"worker {worker['id']}",
            Text.assemble(
                figures,
                (f"late {late:,}x" if late else "on time", "yellow" if late else ""),
                (f"  {printable(str(worker.get('host') or ''))}", "dim"),
            ),
        )
    return table


def _digest(summary: Mapping[str, Any]) -> Text:
    equal = summary.get("replicas_equal")
    return Text.assemble(
        str(summary.get("digest") or "")[:12],
        ("  the same on all replicas", "green") if equal else "",
        ("  replicas DIFFER", "bold red") if equal is False else "",
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
