"""What others call themselves and say, made fit for terminals, logs, files and pages."""

from __future__ import annotations

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
