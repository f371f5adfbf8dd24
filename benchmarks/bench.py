"""`python -m benchmarks.bench`, or `make bench`: measure, print, keep.

Everything runs on this machine, over loopback and, on Linux as root, between network namespaces.
Nothing here judges: it prints the figures beside what the bytes or the cores allow.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import machine, parts, report
from benchmarks.report import Results, Row
from benchmarks.team import CLONE, kill, left_behind

RESULTS = CLONE / "benchmarks" / "results"
PAGE = CLONE / "docs" / "performance.md"
IN_ORDER = ("exchange", "training", "links", "exposed", "scale", "memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 when something could not be measured; 2 for a wrong command line."""
    options = _parser().parse_args(argv)
    if options.write_docs is not None:
        return _write_docs(Path(options.write_docs) if options.write_docs else None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    os.environ.setdefault("WANDB_SILENT", "true")
    results = Results(machine.describe(), options.effort)
    print(results.machine)
    if results.machine.busy:
        print("this machine has other work to do: compare within this run only", flush=True)
    try:
        measure(parts.EFFORTS[options.effort], options.only or IN_ORDER, results)
    except KeyboardInterrupt:
        results.notes.append("interrupted")
    finally:
        for process in left_behind():
            results.notes.append(f"left running, now killed: {process}")
            kill(process.pid)
    print(f"\n{report.text(results)}\n")
    for note in results.notes:
        print(note)
    print(f"written: {report.save(results, Path(options.results))}")
    return 0 if not any("failed" in note or "left" in note for note in results.notes) else 1


def measure(effort: parts.Effort, chosen: Sequence[str], results: Results) -> None:
    """Measure these parts; rows and notes go into `results` as they come."""
    deadline = time.monotonic() + 60 * effort.minutes

    def go_on() -> bool:
        return time.monotonic() < deadline

    def failed(row: Row, error: Exception) -> None:
        results.notes.append(
            f"{row.part}: {row.what}, N = {row.workers}, {row.how} failed: {error}"
        )
        print(results.notes[-1], flush=True)

    for part in chosen:
        groups: Iterator[list[parts.Case]] = _groups(part, effort, results)
        start = time.monotonic()
        try:
            for cases in groups:
                if go_on():
                    _say_where(cases[0].row)
                    results.rows += [case.row for case in cases]
                    parts.alternate(cases, effort.repeats, go_on, failed)
        except parts.Skipped as reason:
            results.notes.append(f"{part}: not measured: {reason}")
        if not go_on():
            results.notes.append(f"{part}: cut short, {effort.minutes:g} minutes are over")
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)


def _groups(part: str, effort: parts.Effort, results: Results) -> Iterator[list[parts.Case]]:
    if part == "exchange":
        return parts.exchange(effort, results.machine)
    others: dict[str, Callable[[parts.Effort], Iterator[list[parts.Case]]]] = {
        "training": parts.training,
        "links": parts.links,
        "exposed": parts.exposed,
        "memory": parts.memory,
        "scale": parts.scale,
    }
    return others[part](effort)


def _say_where(row: Row) -> None:
    print(f"measuring {row.part}: {row.what}, N = {row.workers}", flush=True)


def _write_docs(path: Path | None) -> int:
    path = path or report.newest(RESULTS)
    if path is None:
        print("there are no results yet: make bench", file=sys.stderr)
        return 2
    picture = path.with_suffix(".png")
    link = os.path.relpath(picture, PAGE.parent) if picture.exists() else None
    written = report.write_docs(report.load(path), PAGE, link)
    print(f"{PAGE.relative_to(CLONE)}: {', '.join(written)} from {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.set_defaults(effort="full")
    for name, help in (
        ("quick", "less of everything, in under 3 minutes"),
        ("tiny", "to see whether it works; the figures mean nothing"),
    ):
        parser.add_argument(f"--{name}", action="store_const", const=name, dest="effort", help=help)
    parser.add_argument(
        "--only", action="append", choices=IN_ORDER, metavar="PART",
        help=f"measure this part (may be given several times): {', '.join(IN_ORDER)}",
    )  # fmt: skip
    parser.add_argument("--results", default=RESULTS, help="folder for JSON and picture")
    parser.add_argument(
        "--write-docs", nargs="?", const="", metavar="FILE",
        help="measure nothing: put the tables of FILE (the newest full result) into the docs",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
