"""Words of other programs and people: makes them printable, names signals, and finds what a
misspelt one means."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Mapping

from paramserver.errors import UserError

MARK = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """`text` on one line, with a mark for each character that moves the cursor, reorders or hides
    others: controls and escapes, bidirectional overrides, zero-width ones, halves of pairs."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else MARK for c in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def shown(value: object, most: int = 60) -> str:
    """A value as a person writes it in YAML, not longer than half a line."""
    text = printable(_written(value, most))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def quoted(value: object) -> str:
    """The same, with quotes around a text."""
    return shown(repr(value) if isinstance(value, str) else value)


def _written(value: object, most: int) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping | list):  # perhaps a stranger's: no more of it than is shown
        if most <= 0:
            return "..."
        inner, size = [], 0
        for each in value.items() if isinstance(value, Mapping) else value:
            pair = each if isinstance(value, Mapping) else (each,)
            inner.append(": ".join(_written(part, most - 4) for part in pair))
            size += len(inner[-1]) + 2
            if size > most:
                break
        text = ", ".join(inner)
        return f"{{{text}}}" if isinstance(value, Mapping) else f"[{text}]"
    return str(value)


def host_port(host: str, port: int) -> str:
    """Host and port as people write them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def signal_name(number: int) -> str:
    """The name of a signal. Those between SIGRTMIN and SIGRTMAX have none of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def nearest(word: str, known: Iterable[str], *, alike: float = 0.6) -> str:
    """The known name that a misspelt `word` may mean, in upper or lower case: the one most like it,
    if it is at least that much `alike` (0 to 1); else empty."""
    spelled = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=alike)
    return spelled[found[0]] if found else ""


def no_such(setting: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that the value of this setting must not be, with the nearest that it may
    be."""
    what = "data set" if setting.startswith("dataset") else setting.partition(".")[0]
    near = nearest(name, known, alike=0.5)
    return UserError(
        f"there is no {what} {name!r} ({setting})",
        (f"did you mean {near}? " if near else "")
        + f"known: {', '.join(known)}, or package.module:Name for your own",
    )
