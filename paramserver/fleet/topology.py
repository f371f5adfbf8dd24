"""The picture of a cluster: machines, and the best path of each pair, as text and as SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from paramserver.fleet.findings import Measured, Report

COLOURS = {"thunderbolt": "#7c3aed", "ethernet": "#0369a1", "wifi": "#d97706"}
WIDTH, HEIGHT, BOX_W, BOX_H = 760, 560, 150, 54


def pairs(report: Report) -> Iterator[Measured]:
    """The best path of each pair that has one."""
    names = [host.name for host in report.hosts]
    for number, far in enumerate(names):
        for near in names[number + 1 :]:
            best = report.best(near, far)
            if best is not None:
                yield best


def text(report: Report) -> str:
    """One line for each pair: both ends, and between them what the path carries."""
    lines = []
    width = max((len(host.name) for host in report.hosts), default=0)
    for m in pairs(report):
        line = {"thunderbolt": "═", "ethernet": "─", "wifi": "┄"}.get(m.path.kind, "·")
        rate = f" {m.kind} {m.gbits:.2f} Gbit/s {1000 * m.round_trip_s:.2f} ms "
        lines.append(f"{m.far:>{width}} {line * 3}{rate}{line * 3} {m.near}")
    return "\n".join(lines)


def svg(report: Report) -> str:
    """The machines in a ring, the server on top; lines as thick as their logarithm of Gbit/s."""
    hosts = sorted(report.hosts, key=lambda host: not host.serves)
    place = {}
    for number, host in enumerate(hosts):
        angle = 2 * math.pi * number / len(hosts) - math.pi / 2
        x, y = WIDTH / 2 + 270 * math.cos(angle), HEIGHT / 2 + 200 * math.sin(angle)
        place[host.name] = (x, y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    labels = []
    for m in pairs(report):
        (x1, y1), (x2, y2) = place[m.far], place[m.near]
        colour = COLOURS.get(m.path.kind, "#6b7280")
        thick = 2 + 2 * max(0.0, math.log10(max(m.gbits, 0.01) * 10))
        dash = ' stroke-dasharray="8 6"' if m.path.kind == "wifi" else ""
        parts.append(
            f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" '
            f'stroke="{colour}" stroke-width="{thick:.1f}"{dash}/>'
        )
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        rate = f"{escape(m.kind)} {m.gbits:.2f} Gbit/s"
        labels.append(f'<rect x="{x - 78:.0f}" y="{y - 17:.0f}" width="156" height="36" fill="white" fill-opacity="0.9" rx="4"/>')  # fmt: skip  # noqa: E501
        labels.append(f'<text x="{x:.0f}" y="{y - 2:.0f}" font-size="13" fill="{colour}">{rate}</text>')  # fmt: skip  # noqa: E501
        labels.append(f'<text x="{x:.0f}" y="{y + 14:.0f}" font-size="12" fill="#374151">{1000 * m.round_trip_s:.2f} ms</text>')  # fmt: skip  # noqa: E501
    parts += labels
    ill = {trouble.host for trouble in report.troubles}
    for host in hosts:
        x, y = place[host.name]
        fill = "#fee2e2" if host.name in ill else "#ede9fe" if host.serves else "#f3f4f6"
        said = "not reached" if host.name in ill else host.role if host.role != "both" else "server, worker"  # fmt: skip  # noqa: E501
        parts += [
            f'<rect x="{x - BOX_W / 2:.0f}" y="{y - BOX_H / 2:.0f}" width="{BOX_W}" '
            f'height="{BOX_H}" rx="8" fill="{fill}" stroke="#374151"/>',
            f'<text x="{x:.0f}" y="{y - 4:.0f}" font-size="16">{escape(host.name)}</text>',
            f'<text x="{x:.0f}" y="{y + 16:.0f}" font-size="12" fill="#374151">{said}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
