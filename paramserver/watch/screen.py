"""Draws the status of a run as lines for a terminal of any width from 60 columns. Pure.

`drawn` returns at most so many lines as the terminal has rows; what matters most comes first, and
what does not fit is left out.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from paramserver.output import figures
from paramserver.status.value import (
    LINES_KEPT,
    PARTS,
    Cause,
    Link,
    LogLine,
    Machine,
    State,
    Status,
    Times,
)
from paramserver.typed import typed
from paramserver.units import bit_rate, size

BLOCKS = " ▁▂▃▄▅▆▇█"
COLOURS = {
    "compute": "green",
    "encode": "blue",
    "cable": "yellow",
    "wait": "bright_black",
    "late": "red",
}
MARKS = {"compute": "█", "encode": "▓", "cable": "▒", "wait": "░", "late": "×"}
"""They tell the parts of a bar apart where there is no colour, too."""
ASCII_MARKS = {"compute": "#", "encode": "e", "cable": "~", "wait": ".", "late": "x"}
STATE_COLOURS = {
    State.LATE: "red",
    State.SILENT: "red",
    State.GONE: "bright_black",
    State.TRAINING: "green",
}
KEYS = (("q", "quit"), ("l", "log"), ("/", "filter"), ("w", "warnings"), ("t", "trace"))
LINKS_MAX, LOG_LINES = 8, 3
LOSS_MAX = 1e30  # that is drawn
CURVE_ROWS_MIN, CURVE_ROWS_MAX = 3, 8


@dataclass(frozen=True)
class View:
    """What somebody chose to see."""

    log: bool = False
    """The log fills the screen."""
    warnings: bool = False
    """Of the log, warnings only."""
    filter: str = ""
    """Of the log, lines with this text."""
    typing: bool = False
    """The filter is being typed."""
    lines: tuple[LogLine, ...] = ()
    """Of the log, as far as it was seen; none: those of the status."""
    note: str = ""
    """A sentence about the last key."""
    silent_s: float = 0.0
    """Since the last status came."""


def waiting(where: str, width: int, height: int) -> list[Text]:
    """Nothing has come yet."""
    lines = [Text(f"waiting for a run at {where}", style="bold yellow"), Text("")]
    lines += [
        Text(
            f"({typed('server')} starts one; a token for other machines: "
            f"{typed('keys', 'host_ip=...')})",
            "dim",
        )
    ]
    return _fitted([*lines, *[Text("")] * max(0, height - 4), _footer(View())], width, height)


def drawn(status: Status, view: View, width: int, height: int, *, utf8: bool = True) -> list[Text]:
    """The screen, one Text a row, at most `height` rows of at most `width` cells."""
    foot = [_footer(view)]
    head = [_headline(status, view), *_progress(status, width, utf8)]
    if view.log:
        head += [] if status.trains or status.end else _sentence(status, width)
        room = height - len(head) - len(foot) - 1
        lines = _log(status, view, room)
        return _fitted([*head, Text(""), *lines, *_blank(room - len(lines)), *foot], width, height)
    head += _sentence(status, width)
    room = height - len(head) - len(foot)
    machines = _machines(status, width, utf8, max(3, room // 2))
    rest = room - len(machines) - 1 - LOG_LINES  # for links and the curve
    links = _links(status)
    if len(links) > rest:
        links = []
    curve_rows = min(CURVE_ROWS_MAX, rest - len(links) - 1)
    curve = _curve(status, width, curve_rows, utf8) if curve_rows >= CURVE_ROWS_MIN else []
    body = [*machines, *curve, *links]
    if (left := room - len(body) - 1) > 0:
        body += [Text(""), *_newest(status, view, left)]
    return _fitted([*head, *body, *_blank(room - len(body)), *foot], width, height)


# ------------------------------------------------------------------------------ the head


def _headline(status: Status, view: View) -> Text:
    line = Text(status.folder or status.run, style="bold")
    line.append(f"  {status.model}", "dim")
    if status.end:
        line.append(f"  over: {status.end}", "bold red" if status.error else "bold green")
    elif view.silent_s > 3:
        line.append(f"  the server has been silent for {view.silent_s:.0f} s", "bold red")
    return line


def _progress(status: Status, width: int, utf8: bool) -> list[Text]:
    values = [*figures.figures(status), *figures.more_figures(status)] if status.step else []
    second = Text((" " * figures.BETWEEN).join(figures.fitting(values, width)))
    words, room = figures.beside_a_bar(figures.progress(status), width)
    text, made = (" " * figures.BETWEEN).join(words), figures.made(status)
    if made is None or not room:
        return [Text(text), second]
    full = round(made * room)
    on, off = ("━", "─") if utf8 else ("=", "-")
    bar = Text.assemble((on * full, "green"), (off * (room - full), "dim"), f"  {text}")
    return [bar, second]


def _sentence(status: Status, width: int) -> list[Text]:
    """What the run waits for, or what the last minute waited for, in at most three lines; and who
    averages, in at most two."""
    sentence, style = status.diagnosis.sentence, "bold cyan"
    if not status.trains:
        sentence, style = "" if status.end else status.phase, "bold yellow"
    elif status.diagnosis.cause in (Cause.NOTHING, Cause.UNKNOWN):
        style = "green"
    lines = textwrap.wrap(sentence, max(10, width))[:3]
    averaging = textwrap.wrap(status.averaging, max(10, width))[:2]
    return [Text(line, style=style) for line in lines or [""]] + [
        Text(line, style="dim") for line in averaging
    ]


# ------------------------------------------------------------------------------ machines


def _machines(status: Status, width: int, utf8: bool, room: int) -> list[Text]:
    """A line for each worker: its bar is where its time of the last minute went; those in trouble
    first where they are too many, then the server and the observer in one line."""
    marks = MARKS if utf8 else ASCII_MARKS
    legend = Text("time of the last minute: ", style="dim")
    if width < 70:
        legend = Text()
    for part in PARTS:
        legend.append(marks[part], COLOURS[part])
        legend.append(f" {part}  ", "dim")
    workers = [m for m in status.machines if m.id > 0]
    hidden = 0
    if len(workers) > room - 2:
        workers.sort(key=lambda m: (m.state == State.GONE, not m.trouble, m.id))
        hidden = len(workers) - max(1, room - 3)
        workers = sorted(workers[: max(1, room - 3)], key=lambda m: m.id)
    names = max((min(20, cell_len(m.host)) for m in workers), default=0)
    ids = max((len(str(m.id)) for m in workers), default=1)
    lines = [Text(""), legend]
    for m in workers:
        head = Text(f"{m.id:>{ids}} ", style=STATE_COLOURS.get(m.state, ""))
        head.append(f"{set_cell_size(m.host, names)} ")
        tail = _tail(m, status, width)
        bar_cells = min(60, width - cell_len(head.plain) - cell_len(tail.plain) - 1)
        if bar_cells >= 6:
            head.append_text(_bar(m.minute, bar_cells, marks))
            head.append(" ")
        lines.append(head.append_text(tail))
    if hidden > 0:
        lines.append(Text(f"and {hidden} more workers", style="dim"))
    return lines


def _tail(m: Machine, status: Status, width: int) -> Text:
    """What stands after a machine's bar, as far as it fits."""
    if m.trouble or m.state in (State.SNAPSHOT, State.LATE):
        style = STATE_COLOURS.get(m.state, "yellow")
        return Text(f"{(m.trouble or m.state.value)[: width // 3]:>16}", style=style)
    tail = Text(f"{figures.rate(m):>16}")
    if width >= 79 and m.share is not None:
        tail.append(f"  {figures.share(m, status)}", "dim")
    if width >= 100:
        tail.append(f"  {size(m.memory_bytes):>8}" if m.memory_bytes is not None else "", "dim")
        if m.temperature_c is not None:
            tail.append(f"  {m.temperature_c:.0f} °C", "dim")
    if width >= 120:
        tail.append(f"  {size(m.sent_bytes_per_s):>9}/s up", "dim")
    if m.late_rounds and width >= 70:
        tail.append(f"  late {m.late_rounds:,}x", "yellow")
    return tail


def _bar(times: Times, cells: int, marks: dict[str, str]) -> Text:
    """The parts of the time as a bar of so many cells."""
    bar = Text()
    if times.total <= 0:
        return Text(" " * cells)
    edge, used = 0.0, 0
    for part in PARTS:
        edge += getattr(times, part) / times.total
        end = min(cells, round(edge * cells))
        bar.append(marks[part] * (end - used), COLOURS[part])
        used = end
    return bar


# ------------------------------------------------------------------------------ curve, links, log


def _curve(status: Status, width: int, rows: int, utf8: bool) -> list[Text]:
    """The loss over the run, in blocks; the newest value at its end."""
    points = [min(max(loss, -LOSS_MAX), LOSS_MAX) for _, loss in status.losses]
    if len(points) < 2:
        return []
    low, high = min(points), max(points)
    cells = max(10, min(width - 10, 120))
    columns = [points[i * len(points) // cells] for i in range(cells)]
    blocks = BLOCKS if utf8 else " ..::ii##"
    span = (high - low) or 1.0
    heights = [round((value - low) / span * (8 * rows - 1)) + 1 for value in columns]
    lines = [Text(f"loss, steps {status.losses[0][0]:,} to {status.losses[-1][0]:,}", style="dim")]
    for row in range(rows - 1, -1, -1):
        label = f"{high:8.4g} " if row == rows - 1 else f"{low:8.4g} " if row == 0 else " " * 9
        text = "".join(blocks[max(0, min(8, h - 8 * row))] for h in heights)
        lines.append(Text.assemble((label, "dim"), (text.rstrip(), "cyan")))
    return lines


def _links(status: Status) -> list[Text]:
    """The links to other machines."""
    found = [link for link in status.links if link.address and link.machine != 0]
    lines = []
    for link in found[:LINKS_MAX]:
        machine = status.machine(link.machine)
        name = link.address if machine is None else machine.host or machine.role
        line = Text(f"{name} ", style="dim")
        line.append(f"{link.address}  {link.kind}  " if link.address != name else f"{link.kind}  ")
        line.append(_rates(link))
        lines.append(line)
    if len(found) > LINKS_MAX:
        lines.append(Text(f"and {len(found) - LINKS_MAX} more links", style="dim"))
    return [Text(""), *lines] if lines else []


def _rates(link: Link) -> str:
    measured, expected = link.measured_bytes_per_s, link.expected_bytes_per_s
    told = "" if measured is None else bit_rate(measured)
    if expected is not None:
        told += f" (measured before: {bit_rate(expected)})"
    return told.strip()


def _newest(status: Status, view: View, room: int) -> list[Text]:
    """The newest warning, wherever it is in the log, and the newest lines."""
    newest = status.warnings[-1] if status.warnings else None
    lines = _log(status, view, room)
    if newest is None or view.warnings or newest in status.lines[-len(lines) :]:
        return lines
    return [_line(newest), *_log(status, view, room - 1)]


def _log(status: Status, view: View, room: int) -> list[Text]:
    """The newest lines that the filter lets through."""
    lines: Sequence[LogLine] = view.lines or status.lines
    if view.warnings:
        lines = [line for line in lines if line.warning]
        lines = lines if len(lines) > len(status.warnings) else status.warnings
    wanted = view.filter.lower()
    found = [line for line in lines if wanted in line.text.lower()]
    if not found and (wanted or view.warnings):
        return [Text("no such lines", style="dim")][: max(0, room)]
    return [_line(line) for line in found[-room:]] if room > 0 else []


def _line(line: LogLine) -> Text:
    stamp = time.strftime("%H:%M:%S", time.localtime(line.at))
    return Text.assemble((f"{stamp} ", "dim"), (line.text, "yellow" if line.warning else ""))


def _footer(view: View) -> Text:
    if view.typing:
        return Text.assemble(("filter: ", "bold"), view.filter, "_  (Enter keeps it, Esc clears)")
    if view.note:
        return Text(view.note, style="cyan")
    line = Text()
    for key, does in KEYS:
        line.append(f" {key} ", "reverse")
        line.append(f" {does}  ")
    if view.filter:
        line.append(f"filter: {view.filter}  ", "yellow")
    return line


def gone_on(before: tuple[LogLine, ...], newest: Sequence[LogLine]) -> tuple[LogLine, ...]:
    """The log as far as it was seen, with its newest lines, of which the first may be known."""
    last = before[-1] if before else None
    known = next((n for n in range(len(newest), 0, -1) if newest[n - 1] == last), 0)
    return (*before, *newest[known:])[-LINES_KEPT:]


# ------------------------------------------------------------------------------ small things


def _fitted(lines: Sequence[Text], width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` cells; the footer, which is the last, stays."""
    kept = list(lines) if len(lines) <= height else [*lines[: max(0, height - 1)], lines[-1]]
    for line in kept:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return kept[:height]


def _blank(count: int) -> list[Text]:
    return [Text("") for _ in range(count)]
