"""The tables of `docs/settings.md`, read off `schema`: `make docs` writes them into the page.

The prose of that page is written by hand. What stands between its two markers is generated, and a
test fails when the page is older than the settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from paramserver.config.schema import (
    HEADINGS,
    KEYS,
    NAMED,
    SHORT,
    Key,
    default_of,
    must_be,
)
from paramserver.words import shown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"  # in a clone
BEGIN, END = "<!-- settings -->", "<!-- end -->"

_HEAD = """\
| setting | default | unit | whose | value | meaning |
|---|---|---|---|---|---|"""


def _rows() -> Iterator[Key]:
    """Every setting in the order of `Settings`; `model` and `dataset` as their parts."""
    for key in KEYS.values():
        if key.kind is dict and key.name not in SHORT:
            for part, default in key.default.items():
                name = f"{key.name}.{part}"
                meaning = f"argument of {key.default[NAMED[key.name]]}"
                yield KEYS.get(name) or Key(
                    name, type(default), False, default, meaning, "", key.scope
                )
        elif key.name.partition(".")[0] not in NAMED or key.name in NAMED:
            yield key


def _row(key: Key) -> str:
    meant = key.ranges[:1]  # a second one is what Python and ZeroMQ can count, beyond all sense
    value = "; ".join((must_be(key), *(allowed.must for allowed in meant)))
    meaning = re.sub(r"\bdocs/(\S+\.md)", r"[\1](\1)", key.help)
    cells = (
        f"`{key.name}`",
        f"`{shown(default_of(key))}`",
        key.unit,
        key.scope,
        re.sub(r"must (not )?be ", r"\1", value),
        meaning,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def tables() -> str:
    """All settings as Markdown: a heading and a table for each group."""
    lines: list[str] = []
    for key in _rows():
        first = key.name.partition(".")[0]
        heading = HEADINGS.get(key.name) or HEADINGS.get(first)
        if heading and f"### {heading}" not in lines:
            lines += ["", f"### {heading}", "", _HEAD]
        lines.append(_row(key))
    return "\n".join(lines).strip()


def written(page: str) -> str:
    """`page` with the tables of this version between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{begin}\n\n{tables()}\n\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
