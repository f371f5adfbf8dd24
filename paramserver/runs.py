"""`make runs`, `python -m paramserver.runs`: a table of the runs in `run_dir`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from paramserver import terminal
from paramserver.output import metrics
from paramserver.output.runfolder import UNREADABLE, RunFolder, StepLine, run_folders
from paramserver.program import exit_on_user_error
from paramserver.typed import typed
from paramserver.words import printable

TAIL_BYTES = 2**16  # of metrics.jsonl, for its last step
FILE_BYTES_MAX = 2**24
NUMBER_MAX = 1e15
HEADS = ("run", "model", "data", "steps", "result", "samples/s", "how it ended")
RIGHT = {3, 4, 5}
END_CHARS = 60


@dataclass(frozen=True)
class Summary:
    """One run, as its folder tells; empty texts and None for what it does not tell."""

    name: str
    model: str = ""
    data: str = ""
    steps: int | None = None
    result: str = ""
    samples_per_s: float | None = None
    end: str = ""

    def row(self) -> tuple[str, ...]:
        steps = "" if self.steps is None else f"{self.steps:,}"
        rate = "" if self.samples_per_s is None else f"{self.samples_per_s:,.0f}"
        end = self.end if len(self.end) <= END_CHARS else f"{self.end[: END_CHARS - 4]} ..."
        texts = (self.name, self.model, self.data, steps, self.result, rate, end)
        return tuple(map(printable, texts))


def read(path: Path) -> Summary:
    """What the files of a run folder say. Never raises: a file may be missing or damaged."""
    folder = RunFolder(path)
    record = folder.read_record()
    settings = {} if record is None else record.settings
    model, data = _name(settings, "model", "type"), _name(settings, "dataset", "name")
    told = _json(folder.summary)
    if told:
        return Summary(
            path.name,
            model,
            data,
            _steps(told.get("steps")),
            _result(told),
            _number(told.get("samples_per_s")),
            _text(told.get("end")),
        )
    found = _last_step(folder.metrics)
    if found is None:
        end = "no step was made" if record is None or record.ended else "not ended: no step yet"
        return Summary(path.name, model, data, end=end)
    last, written = found
    end = "ended without a summary" if record is not None and record.ended else "not ended"
    when = datetime.fromtimestamp(written)
    loss = "" if last.loss is None else f"loss {last.loss:.4f}"
    return Summary(
        path.name, model, data, _steps(last.step), loss, end=f"{end}, last step {when:%d %b %H:%M}"
    )


def _name(settings: Mapping[str, Any], group: str, key: str) -> str:
    found = settings.get(group)
    return _text(found.get(key)) if isinstance(found, dict) else ""


def _text(told: Any) -> str:
    return told if isinstance(told, str) else ""


def _number(told: Any) -> float | None:
    """A number of a summary that can be shown, and sent to the page; None for anything else."""
    if not isinstance(told, int | float) or isinstance(told, bool) or not abs(told) < NUMBER_MAX:
        return None
    return float(told)


def _steps(told: Any) -> int | None:
    number = _number(told)
    return None if number is None else round(number)


def _result(told: Mapping[str, Any]) -> str:
    """The accuracy, or another metric, or the loss."""
    held = {n: v for n, v in metrics.held(told).items() if _number(v) is not None}
    shown = metrics.live(dict(list(held.items())[:1]))
    if shown:
        return shown[0].removeprefix("accuracy ")
    for key, form in (("val_loss", "loss {:.4f}"), ("train_loss", "training loss {:.4f}")):
        if (loss := _number(told.get(key))) is not None:
            return form.format(loss)
    return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return {}
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, *UNREADABLE):
        return {}


def _last_step(path: Path) -> tuple[StepLine, float] | None:
    """The last whole step in a file of metrics, and when that was written, since 1970."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines, written = file.read(TAIL_BYTES).splitlines(), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return msgspec.json.decode(line, type=StepLine), written
        except UNREADABLE:
            continue
    return None


def table(summaries: list[Summary]) -> list[str]:
    """The lines of the table, the newest run last; columns that say nothing are left out."""
    rows = [HEADS, *(summary.row() for summary in summaries)]
    shown = [i for i in range(len(HEADS)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in shown}
    lines = []
    for row in rows:
        cells = [row[i].rjust(widths[i]) if i in RIGHT else row[i].ljust(widths[i]) for i in shown]
        lines.append("  ".join(cells).rstrip())
    return lines


def main() -> None:
    """Print the table."""
    with exit_on_user_error():
        from paramserver.config.help import answer
        from paramserver.config.loading import load

        words = sys.argv[1:]
        answer(words, "runs")
        parent = Path(load(words, "server").settings.run_dir)
        summaries = [read(path) for path in run_folders(parent)]
        if not summaries:
            terminal.result(
                f"no runs in {re.sub(r'/+$', '', str(parent))}: {typed('demo')} makes one"
            )
            return
        terminal.result("\n".join(table(summaries)))


if __name__ == "__main__":
    main()
