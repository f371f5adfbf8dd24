"""The diagrams of states in `docs/architecture.md`, drawn from the tables by `make docs`.

What stands between two markers of that page is generated, and a test fails when the page is older
than the tables.
"""

from __future__ import annotations

from pathlib import Path

from paramserver.rounds import states

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"  # in a clone
END = "<!-- end -->"

_PEER = [("[*]", states.GREETED, "Hello")]
_RUN = [
    ("[*]", states.STARTING, states.STARTED),
    ("[*]", states.RETURNING, states.RESTARTED),
    (states.RETURNING, "[*]", "nobody came back, a new run begins"),
]


def _drawn(arrows: list[tuple[str, str, str]], table: states.Table) -> str:
    """These arrows and those of the table, as Mermaid, but for what leaves a state as it is."""
    rows = [(state, to, cause) for state, row in table.items() for cause, to in row.items()]
    lines = [f"    {state} --> {to}: {cause}" for state, to, cause in arrows + rows if state != to]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def drawings() -> dict[str, str]:
    """By the marker before it: each diagram."""
    return {
        "<!-- states of a peer -->": _drawn(_PEER, states.PEER),
        "<!-- states of a run -->": _drawn(_RUN, states.RUN),
    }


def written(page: str) -> str:
    """`page` with the diagrams of this version between their markers."""
    for marker, drawing in drawings().items():
        before, begin, rest = page.partition(marker)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"the page has no {marker} ... {END}")
        page = f"{before}{begin}\n\n{drawing}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
