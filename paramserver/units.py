"""Numbers with their units, as people read them. Pure."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """3:07 or 1:03:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def size(count: float) -> str:
    """Bytes: 812 B, 1.1 MB."""
    for unit, bytes_ in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count:.0f} B"


def bit_rate(bytes_per_s: float) -> str:
    """The rate of a link: 0.9 Gbit/s, 94 Mbit/s."""
    bits = 8 * bytes_per_s
    if bits >= 1e8:
        return f"{bits / 1e9:.1f} Gbit/s"
    return f"{bits / 1e6:.0f} Mbit/s" if bits >= 1e7 else f"{bits / 1e6:.1f} Mbit/s"


def per_second(rate: float) -> str:
    """298 or 0.25."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
