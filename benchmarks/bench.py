"""`python -m benchmarks.bench`, or `make bench`: measure, print, keep.

Everything runs on this machine, over loopback and, on Linux as root, between network namespaces.
Nothing here judges: it prints the figures beside what the bytes or the cores allow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from benchmarks import machine, parts, report, sharded
from benchmarks.report import Results, Row
from benchmarks.team import CLONE, kill, left_behind, prepare

RESULTS = CLONE / "benchmarks" / "results"
PAGE = CLONE / "docs" / "performance.md"
SHARES = {"exchange": 4, "training": 3, "links": 3, "shards": 3, "shares": 2, "local": 3,
          "exposed": 1, "scale": 1, "memory": 1, "accuracy": 2}  # fmt: skip
"""The parts in their order; where time is short, each may take so much of what is left."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 when something could not be measured; 2 for a wrong command line."""
    options = _parser().parse_args(argv)
    if options.write_docs is not None:
        return _write_docs(Path(options.write_docs) if options.write_docs else None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    os.environ.setdefault("WANDB_SILENT", "true")
    prepare()
    results = Results(machine.describe(), options.effort)
    print(results.machine)
    if results.machine.busy:
        print("this machine has other work to do: compare within this run only", flush=True)
    try:
        effort = parts.EFFORTS[options.effort]
        if options.minutes is not None:
            effort = replace(effort, minutes=options.minutes)
        measure(effort, options.only or tuple(SHARES), results)
    except KeyboardInterrupt:
        results.notes.append("interrupted")
    finally:
        for process in left_behind():
            results.notes.append(f"left running, now killed: {process}")
            kill(process.pid)
    print(f"\n{report.text(results)}\n")
    for note in results.notes:
        if note.partition(":")[0] not in SHARES:  # those are with their tables
            print(note)
    print(f"written: {report.save(results, Path(options.results))}")
    return 0 if not any("failed" in note or "left" in note for note in results.notes) else 1


def measure(effort: parts.Effort, chosen: Sequence[str], results: Results) -> None:
    """Measure these parts; rows and notes go into `results` as they come."""
    end = time.monotonic() + 60 * effort.minutes
    part_end = end

    def go_on() -> bool:
        return time.monotonic() < part_end

    def failed(row: Row, error: Exception) -> None:
        where = f"{row.part}: {row.what}, N = {row.workers}, {row.how}"
        results.notes.append(f"{where} failed: {str(error).splitlines()[0]}")
        print(f"{where} failed: {error}", flush=True)

    for index, part in enumerate(chosen):
        start = time.monotonic()
        part_end = start + (end - start) * SHARES[part] / sum(SHARES[p] for p in chosen[index:])
        try:
            with closing(_groups(part, effort, results)) as groups:
                for cases in groups:
                    if go_on():
                        _say_where(cases[0].row)
                        results.rows += [case.row for case in cases]
                        parts.alternate(cases, effort.repeats, go_on, failed)
        except parts.Skipped as reason:
            results.notes.append(f"{part}: not measured: {reason}")
        except Exception as error:
            results.notes.append(f"{part}: failed: {error}")
        if not go_on():
            results.notes.append(f"{part}: cut short, it took too long")
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)


def _groups(part: str, effort: parts.Effort, results: Results) -> parts.Groups:
    if part == "exchange":
        return parts.exchange(effort, results.machine)
    others: dict[str, Callable[[parts.Effort], parts.Groups]] = {
        "training": parts.training,
        "links": parts.links,
        "shards": sharded.shards,
        "exposed": parts.exposed,
        "shares": parts.shares,
        "local": parts.local,
        "memory": parts.memory,
        "accuracy": parts.accuracy,
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
    picture, link = path.with_suffix(".png"), None
    if picture.exists():
        link = shutil.copyfile(picture, PAGE.with_suffix(".png")).name
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
        "--only", action="append", choices=SHARES, metavar="PART",
        help=f"measure this part (may be given several times): {', '.join(SHARES)}",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float,
        help="take no longer: each part is cut short in proportion, and says so",
    )  # fmt: skip
    parser.add_argument("--results", default=RESULTS, help="folder for JSON and picture")
    parser.add_argument(
        "--write-docs", nargs="?", const="", metavar="FILE",
        help="measure nothing: put the tables of FILE (the newest full result) into the docs",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
