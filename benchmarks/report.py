"""What comes out of a benchmark: results as JSON, as tables, as a picture, and in the docs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.machine import Machine

GLOO = "gloo float32"
DDP = "DDP, gloo float32"
ALONE = "no exchange"
REFERENCES = (GLOO, DDP)


class Row(msgspec.Struct):
    """One way of doing one thing, measured some times."""

    part: str
    what: str
    """The thing: a size, a place. Rows of one `what` and `workers` are compared."""
    workers: int
    how: str
    unit: str
    values: list[float] = []
    """One for each run: the median of its rounds."""
    limits: list[float] = []
    """What the bytes or the cores allow, in the same unit, where it can be told."""
    notes: list[str] = []
    observer: bool | None = None
    """Whether an observer follows; None where that is not told."""
    busy: list[float] = []
    """Percent of this machine's cores that were busy, one for each run."""

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def label(self) -> str:
        """Of a bar in the picture."""
        return f"{self.how}, observer" if self.observer else self.how

    @property
    def limit(self) -> float | None:
        return median(self.limits) if self.limits else None


class Results(msgspec.Struct):
    """One run of the benchmark."""

    machine: Machine
    effort: str
    rows: list[Row] = []
    notes: list[str] = []

    def of(self, part: str) -> list[Row]:
        return [row for row in self.rows if row.part == part and row.values]

    def reference(self, row: Row) -> Row | None:
        """The row that this one is compared with: gloo in float32, doing the same."""
        for other in self.of(row.part):
            same = (other.what, other.workers) == (row.what, row.workers)
            if same and other.how in REFERENCES and other is not row:
                return other
        return None

    def ratio(self, row: Row) -> float | None:
        """Our median to gloo's; None for gloo itself."""
        other = self.reference(row)
        return row.value / other.value if other is not None and other.value else None


# ------------------------------------------------------------------ tables

TITLES = {
    "exchange": "Exchange alone, on loopback",
    "training": "Whole training: SimpleNN, batch 32, Adam, on digits held as tensors",
    "links": "Exchange over links of 1 Gbit/s, one for each host",
    "shards": "Exchange that several hosts average together",
    "exposed": "Communication that compute does not hide, as a share of the exchange alone",
    "shares": "Machines of unlike speed",
    "local": "Local steps: optimizer steps of all workers together",
    "memory": "Resident memory of the server above an idle one",
    "accuracy": "Accuracy of SimpleNN on the validation set, averages and gradients encoded",
    "scale": "Rounds with few and with many simulated workers, time per worker and round",
}

HEADS = {
    "exchange": ("size", "limit of the bytes"),
    "training": ("model", "compute alone"),
    "links": ("size, server", "limit of the bytes"),
    "shards": ("size, cables", "limit of the bytes"),
    "exposed": ("size", ""),
    "shares": ("machines", "each at its own speed"),
    "local": ("model, link", "compute alone"),
    "memory": ("gradients", "3 G + history"),
    "accuracy": ("data", "points above float32, synchronous"),
    "scale": ("size", ""),
}


def table(results: Results, part: str) -> str:
    """The rows of a part as a Markdown table, with what could not be measured below it."""
    rows = results.of(part)
    limited = any(row.limit is not None for row in rows)
    compared = any(results.ratio(row) is not None for row in rows)
    what, limit = HEADS[part]
    unit = rows[0].unit if rows else ""
    observed = any(row.observer is not None for row in rows)
    busy = any(row.busy for row in rows)
    head = [what, "N", "how", *["observer"] * observed, unit, "lowest – highest"]
    head += (
        ["÷ DDP (more is better)" if part in ("training", "local") else "÷ gloo"]
        if compared
        else []
    )
    head += ["cores busy, %"] * busy + [limit] * limited
    words = (0, 2, 3) if observed else (0, 2)
    lines = [head, ["---" if i in words else "---:" for i in range(len(head))]]
    before: list[str] = []
    for row in rows:
        key = [row.what, str(row.workers)]
        line = key if key != before else ["", ""]
        before = key
        line = [*line, row.how]
        if observed:
            line.append({True: "yes", False: "no", None: ""}[row.observer])
        line += [number(row.value), spread(row.values)]
        if compared:
            line.append(_number_or_dash(results.ratio(row), ratio=True))
        if busy:
            line.append(number(median(row.busy)) if row.busy else "")
        if limited:
            line.append(_number_or_dash(row.limit))
        lines.append(line)
    text = [f"| {' | '.join(line)} |" for line in lines] if rows else []
    notes = [f"{row.what}, N = {row.workers}, {row.how}: {n}" for row in rows for n in row.notes]
    notes += [n.partition(": ")[2] for n in results.notes if n.startswith(f"{part}: ")]
    return "\n".join([*text, *(f"\n{note}" for note in notes)])


def number(value: float) -> str:
    """Three digits are what a noisy machine can tell."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    return f"{number(min(values))} – {number(max(values))}" if len(values) > 1 else ""


def _number_or_dash(value: float | None, ratio: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if ratio else number(value)


def text(results: Results) -> str:
    """All of it, for a terminal."""
    parts = [
        f"{TITLES[part]}\n\n{aligned(table(results, part))}"
        for part in TITLES
        if table(results, part)
    ]
    return "\n\n".join([str(results.machine), *parts])


def aligned(markdown: str) -> str:
    """The same table with columns of even width."""
    lines = markdown.splitlines()
    cells = [[c.strip() for c in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    if not cells:
        return markdown
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    left = [not cell.endswith(":") for cell in cells[1]]
    out = []
    for row in cells:
        padded = (
            ("-" * w if set(c) <= set("-:") and c else c.ljust(w) if is_left else c.rjust(w))
            for c, w, is_left in zip(row, widths, left, strict=True)
        )
        out.append("  ".join(padded).rstrip())
    return "\n".join([*out, *(line for line in lines if not line.startswith("|"))])


# ------------------------------------------------------------------ files


def save(results: Results, folder: Path) -> Path:
    """Write the JSON, and the picture beside it; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = results.machine.taken.replace(" ", "_").replace(":", "-")
    path = folder / f"{stamp}{'' if results.effort == 'full' else '-' + results.effort}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    draw(results, path.with_suffix(".png"))
    return path


def load(path: Path) -> Results:
    return msgspec.json.decode(path.read_bytes(), type=Results)


def newest(folder: Path) -> Path | None:
    """The newest full result, else the newest of all."""
    found = sorted(folder.glob("*.json"))
    full = [path for path in found if re.fullmatch(r"[\d_-]+", path.stem)]
    return next(reversed(full or found), None)


def write_docs(results: Results, page: Path, picture: str | None = None) -> list[str]:
    """Put the tables between their markers in a Markdown page; the parts that were written.

    A part that was not measured keeps what the page has.
    """
    content = page.read_text(encoding="utf-8")
    blocks = {part: table(results, part) for part in TITLES}
    blocks["machine"] = textwrap.fill(f"Measured {results.machine}.", 110)
    blocks["picture"] = f"![The same as a picture]({picture})" if picture else ""
    written = []
    for name, block in blocks.items():
        before, marker, rest = content.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if block and end:
            content = f"{before}{marker}\n{block}\n\n{end}{after}"
            written.append(name)
    page.write_text(content, encoding="utf-8")
    return written


def draw(results: Results, path: Path) -> None:
    """Bars: every `how` beside the others, for each size and number of workers."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = [
        (part, what)
        for part in TITLES
        if part != "accuracy"
        for what in _in_order(row.what for row in results.of(part))
    ]
    if not panels:
        return
    ways_of_all = [way for way in _in_order(r.label for r in results.rows) if way not in REFERENCES]
    palette = [color for color in matplotlib.colormaps["tab20"].colors if len(set(color)) > 1]
    colors = dict(zip(ways_of_all, cycle(palette[::2] + palette[1::2]), strict=False))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * lines), layout="constrained")
    for place, (part, what) in enumerate(panels, 1):
        rows = [row for row in results.of(part) if row.what == what]
        axes = figure.add_subplot(lines, columns, place)
        numbers = sorted({row.workers for row in rows})
        ways = _in_order(row.label for row in rows)
        width = 0.8 / len(ways)
        for index, way in enumerate(ways):
            bars = [row for row in rows if row.label == way]
            at = [
                numbers.index(row.workers) + (index - (len(ways) - 1) / 2) * width for row in bars
            ]
            values = [row.value for row in bars]
            error = [[row.value - min(row.values) for row in bars],
                     [max(row.values) - row.value for row in bars]]  # fmt: skip
            color = colors.get(way, "0.6")  # grey is what we are compared with
            axes.bar(at, values, width, label=way, yerr=error, color=color, error_kw={"lw": 0.7})
            for x, row in zip(at, bars, strict=True):
                if row.limit is not None:
                    axes.plot([x - width / 2, x + width / 2], [row.limit] * 2, "k-", lw=1.2)
        axes.set_xticks(range(len(numbers)), [f"N = {n}" for n in numbers])
        axes.set_title(f"{part}: {what}", fontsize=9)
        axes.set_ylabel(rows[0].unit, fontsize=8)
        axes.legend(fontsize=6)
    figure.suptitle(f"{results.machine}\nblack lines: limits", fontsize=6)
    figure.savefig(path, dpi=110)


def _in_order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
