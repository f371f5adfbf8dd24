"""Draws a cluster: machines, and the best path of each pair, as text and as SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from paramserver.fleet.findings import Measured, Report

COLOURS = {"thunderbolt": "#7c3aed", "ethernet": "#0369a1", "wifi": "#d97706"}
GREY = 'font-size="12" fill="#374151"'
BOX_W, BOX_H, LABEL_H = 150, 54, 36
NAME_W, LETTER_W, SMALL_W = 10, 7, 6.2  # of a character, in the sizes of names and labels
FAINT = ' stroke-opacity="0.4"'  # a path that `make up` does not take
PLACES = sorted((n / 50 for n in range(8, 43)), key=lambda t: abs(t - 0.5))
"""Places of a label along its line: its middle first."""


def pairs(report: Report) -> Iterator[Measured]:
    """The best path of each pair that has one."""
    names = [host.name for host in report.hosts]
    for number, far in enumerate(names):
        for near in names[number + 1 :]:
            best = report.best(near, far)
            if best is not None:
                yield best


def is_taken(report: Report, m: Measured) -> bool:
    """Does `make up` take this path?"""
    server = report.server.name
    works = {host.name for host in report.hosts if host.works}
    return server in (m.near, m.far) and bool({m.near, m.far} & (works - {server}))


def text(report: Report) -> str:
    """Two lines for each pair: both ends, and between them what the path carries; the addresses,
    and whether `make up` takes the path."""
    lines = []
    width = max((len(host.name) for host in report.hosts), default=0)
    for m in pairs(report):
        line = {"thunderbolt": "═", "ethernet": "─", "wifi": "┄"}.get(m.path.kind, "·")
        rate = f" {m.kind} {m.gbits:.2f} Gbit/s {1000 * m.round_trip_s:.2f} ms "
        lines.append(f"{m.far:>{width}} {line * 3}{rate}{line * 3} {m.near}")
        taken = "  <- make up takes it" if is_taken(report, m) else ""
        lines.append(f"{'':>{width}}     {ends(m)}{taken}")
    return "\n".join(lines)


def ends(m: Measured) -> str:
    """The addresses of a path, in the order of its line."""
    near = m.path.near.address if m.path.near else "by its routes"
    return f"{m.path.far.address} - {near}"


def svg(report: Report) -> str:
    """The machines in a ring, the server on top; lines as thick as their logarithm of Gbit/s."""
    hosts = sorted(report.hosts, key=lambda host: not host.serves)
    box_w = max(BOX_W, NAME_W * max(len(host.name) for host in hosts) + 24)
    stretch = max(1.0, len(hosts) / 4)
    across, down = 300 * stretch, 200 * stretch
    width, top = 2 * across + box_w + 60, BOX_H / 2 + 30
    boxes = {}
    for number, host in enumerate(hosts):
        angle = 2 * math.pi * number / len(hosts) - math.pi / 2
        x, y = width / 2 + across * math.cos(angle), top + down * (1 + math.sin(angle))
        boxes[host.name] = Box(x, y, box_w, BOX_H)
    height = max(box.y for box in boxes.values()) + top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    taken, labels = list(boxes.values()), []
    # A label moves far on a flat line and little on a steep one: place those of flat lines first.
    for m in sorted(pairs(report), key=lambda m: abs(boxes[m.far].y - boxes[m.near].y)):
        far, near = boxes[m.far], boxes[m.near]
        colour = COLOURS.get(m.path.kind, "#6b7280")
        thick = 2 + 2 * max(0.0, math.log10(max(m.gbits, 0.01) * 10))
        dash = ' stroke-dasharray="8 6"' if m.path.kind == "wifi" else ""
        parts.append(
            f'<line x1="{far.x:.0f}" y1="{far.y:.0f}" x2="{near.x:.0f}" y2="{near.y:.0f}" '
            f'stroke="{colour}" stroke-width="{thick:.1f}"{dash}'
            f"{'' if is_taken(report, m) else FAINT}/>"
        )
        rate = f"{m.kind} {m.gbits:.2f} Gbit/s"
        more = f"{1000 * m.round_trip_s:.2f} ms, {ends(m)}"
        room = max(LETTER_W * len(rate), SMALL_W * len(more)) + 8
        label = _free_place(far, near, room, taken)
        taken.append(label)
        labels += [
            label.rect('fill="white" fill-opacity="0.9" rx="4"'),
            _line(label.x, label.y - 3, rate, f'font-size="13" fill="{colour}"'),
            _line(label.x, label.y + 13, more, GREY),
        ]
    parts += labels
    ill = {trouble.host for trouble in report.troubles}
    for host in hosts:
        box = boxes[host.name]
        fill = "#fee2e2" if host.name in ill else "#ede9fe" if host.serves else "#f3f4f6"
        said = host.role if host.role != "both" else "server, worker"
        parts += [
            box.rect(f'rx="8" fill="{fill}" stroke="#374151"'),
            _line(box.x, box.y - 4, host.name, 'font-size="16"'),
            _line(box.x, box.y + 16, "not reached" if host.name in ill else said, GREY),
        ]
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class Box:
    """A rectangle around a point."""

    x: float
    y: float
    width: float
    height: float

    def touches(self, other: Box) -> bool:
        return (
            2 * abs(self.x - other.x) < self.width + other.width
            and 2 * abs(self.y - other.y) < self.height + other.height
        )

    def rect(self, attributes: str) -> str:
        return (
            f'<rect x="{self.x - self.width / 2:.0f}" y="{self.y - self.height / 2:.0f}" '
            f'width="{self.width:.0f}" height="{self.height:.0f}" {attributes}/>'
        )


def _free_place(far: Box, near: Box, width: float, taken: Sequence[Box]) -> Box:
    """The place on the line between two boxes where a label hides nothing, as near to the middle as
    possible; the middle, if there is none."""
    places = [
        Box(far.x + t * (near.x - far.x), far.y + t * (near.y - far.y), width, LABEL_H)
        for t in PLACES
    ]
    free = (place for place in places if not any(map(place.touches, taken)))
    return next(free, places[0])


def _line(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {attributes}>{escape(text)}</text>'
