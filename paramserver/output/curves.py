"""The curves of a run in bounded memory, read from metrics.jsonl as it grows.

The page, the report and the picture show them. Where there are more than `BINS` lines, neighbours
become one bin: a million steps take as much memory, and as many bytes in the browser, as some
thousands.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from paramserver.output import metrics
from paramserver.output.thinned import Thinned

BINS = 4096
EVALUATIONS = 2048
NAMES = 9  # of metrics, the loss among them
READ_BYTES = 2**20  # at once
LINE_BYTES = 2**16  # a longer line is none of ours


class Line(msgspec.Struct, gc=False):
    """A line of metrics.jsonl, of a step or an evaluation, as far as curves need it."""

    step: Annotated[int, msgspec.Meta(ge=0, le=10**15)]
    seconds: float = 0.0
    samples: Annotated[int, msgspec.Meta(ge=0, le=10**12)] | None = None
    loss: float | None = None
    step_s: float = 0.0
    late: tuple[int, ...] = ()
    val_loss: float | None = None
    val_accuracy: float | None = None
    metrics: dict[str, float | None] = {}


_decode = msgspec.json.Decoder(Line).decode


class Bin(msgspec.Struct, gc=False):
    """Neighbouring lines of steps."""

    step: int
    """The last one."""
    began: float
    seconds: float
    """At its end; both since the run's first round was opened."""
    samples: int
    late: int
    """Rounds that closed without a member."""
    loss: float | None
    """Mean, weighted by samples."""
    low: float | None
    high: float | None
    weight: int
    """Samples that have a loss."""
    lines: int = 1

    @classmethod
    def of(cls, line: Line) -> Bin:
        loss, samples = _finite(line.loss), line.samples or 0
        weight = 0 if loss is None else samples
        late = int(bool(line.late))
        began = line.seconds - line.step_s
        return cls(line.step, began, line.seconds, samples, late, loss, loss, loss, weight)

    def with_next(self, later: Bin) -> Bin:
        """This bin, with the next one in it."""
        self.step, self.seconds = later.step, later.seconds
        self.samples += later.samples
        self.late += later.late
        self.lines += later.lines
        if later.loss is None or later.low is None or later.high is None:
            return self
        weight = self.weight + later.weight
        if self.loss is None or self.low is None or self.high is None or not weight:
            self.loss, self.low, self.high = later.loss, later.low, later.high
        else:
            self.loss = (self.loss * self.weight + later.loss * later.weight) / weight
            self.low, self.high = min(self.low, later.low), max(self.high, later.high)
        self.weight = weight
        return self


class Evaluation(NamedTuple):
    """One evaluation: its loss as "loss", and its metrics."""

    step: int
    seconds: float
    values: dict[str, float | None]


class Curves:
    """Losses, metrics, samples and late rounds by step.

    `changed` counts what a reader must take anew as a whole: bins became fewer, or steps went back.
    """

    def __init__(self, bins: int = BINS, evaluations: int = EVALUATIONS) -> None:
        self._bins: Thinned[Bin] = Thinned(bins, Bin.with_next)
        self._evaluations: Thinned[Evaluation] = Thinned(evaluations, lambda _, newer: newer)

    @property
    def bins(self) -> list[Bin]:
        return self._bins.items

    @property
    def evaluations(self) -> list[Evaluation]:
        return self._evaluations.items

    @property
    def changed(self) -> int:
        return self._bins.changed + self._evaluations.changed

    def clear(self) -> None:
        self._bins.clear()
        self._evaluations.clear()

    def add(self, line: Line) -> None:
        """Take in the next line."""
        # A server that was killed goes on from an earlier step: what was after it is void.
        if line.samples is not None:
            if self.bins and line.step <= self.bins[-1].step:
                self._bins.drop_last(lambda found: found.step >= line.step)
            self._bins.add(Bin.of(line))
            return
        self._evaluations.drop_last(lambda found: found.step >= line.step)
        told = {"val_accuracy": line.val_accuracy, "metrics": line.metrics}
        values = {"loss": line.val_loss, **metrics.held(told)}
        first = dict(list(values.items())[:NAMES])
        self._evaluations.add(Evaluation(line.step, line.seconds, first))

    # ------------------------------------------------------------------ for the browser

    def part(self, bins: int = 0, evaluations: int = 0) -> dict[str, Any]:
        """What there is from these places on, as columns."""
        new, judged = self.bins[bins:], self.evaluations[evaluations:]
        names = dict.fromkeys(name for each in self.evaluations for name in each.values)
        return {
            "changed": self.changed,
            "from": bins,
            "evals_from": evaluations,
            "step": [b.step for b in new],
            "seconds": [round(b.seconds, 3) for b in new],
            "loss": [_short(b.loss) for b in new],
            "low": [_short(b.low) for b in new],
            "high": [_short(b.high) for b in new],
            "samples": [b.samples for b in new],
            "late": [b.late for b in new],
            "eval_step": [e.step for e in judged],
            "eval_seconds": [round(e.seconds, 3) for e in judged],
            "evals": {
                name: [_short(_finite(e.values.get(name))) for e in judged]
                for name in list(names)[:NAMES]
            },
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short(value: float | None) -> float | None:
    """Six digits are more than a screen shows."""
    return None if value is None else float(f"{value:.6g}")


class Tail:
    """Follows a file of lines that another process writes, a piece at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self._rest = b""
        self._file: tuple[int, int] | None = None  # device and inode
        self.again = False
        """The last `lines` began at the file's start: it is new, or was cut off."""

    def lines(self) -> list[bytes]:
        """The next whole lines; none where there are none yet."""
        self.again = False
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._at:
                    self._file, self._at, self._rest = (stat.st_dev, stat.st_ino), 0, b""
                    self.again = True
                file.seek(self._at)
                piece = file.read(READ_BYTES)
        except OSError:
            return []
        self._at += len(piece)
        *whole, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > LINE_BYTES:
            self._rest = b""
        return whole


def follow(curves: Curves, tail: Tail) -> bool:
    """Take in the next piece of a metrics.jsonl; is there more?"""
    lines = tail.lines()
    if tail.again and curves.bins:
        curves.clear()
    for text in lines:
        try:
            curves.add(_decode(text))
        except (msgspec.DecodeError, ValueError, RecursionError, OverflowError):
            continue  # spoilt
    return bool(lines)


def read(path: Path) -> Curves:
    """The curves of a whole file. Raises OSError where it cannot be read."""
    with path.open("rb"):
        curves, tail = Curves(), Tail(path)
    while follow(curves, tail):
        pass
    return curves
