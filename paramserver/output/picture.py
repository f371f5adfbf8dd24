"""Draws a run: curves.png.

Above, training and validation loss; below, a metric of the validation, and throughput with the
rounds that closed without a member. matplotlib is imported when a picture is drawn, not before.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paramserver import drafts
from paramserver.output import metrics
from paramserver.output.curves import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e9edf2"
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#f08c2e", "#1f9d72", "#d64545"
MAX_POINTS = 1500  # about one per pixel; more are drawn as a band
SMOOTH_POINTS = 400
RATE_BINS = 150


class Columns:
    """The curves of a run as columns; NaN where there is no number."""

    def __init__(self, curves: Curves) -> None:
        bins, evaluations = curves.bins, curves.evaluations
        self.step = _column(b.step for b in bins)
        self.began = _column(b.began for b in bins)
        self.seconds = _column(b.seconds for b in bins)
        self.loss = _column(b.loss for b in bins)
        self.low = _column(b.low for b in bins)
        self.high = _column(b.high for b in bins)
        self.samples = _column(b.samples for b in bins)
        self.late_step = _column(b.step for b in bins if b.late)
        self.steps = sum(b.lines for b in bins)
        self.late = sum(b.late for b in bins)
        self.eval_step = _column(e.step for e in evaluations)
        self.val_loss = _column(e.values.get("loss") for e in evaluations)
        names = dict.fromkeys(name for e in evaluations for name in e.values if name != "loss")
        self.metric = metrics.ACCURACY if metrics.ACCURACY in names else next(iter(names), "")
        """The name of the metric that is drawn; empty: there is none."""
        self.val_metric = _column(e.values.get(self.metric) for e in evaluations)


def draw(curves: Curves, out_path: Path, title: str) -> str | None:
    """Draw a run, 1200 x 800 pixels, whole or not at all.

    Returns a sentence where the file could not be written.
    """
    try:
        drafts.write(out_path, _png(Columns(curves), title))
    except OSError as error:
        return f"{out_path} was not drawn: {error.strerror or error}"
    return None


def _png(run: Columns, title: str) -> bytes:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs about its font cache
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "text.usetex": False,
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.facecolor": "white",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 8), dpi=100, facecolor="white")
        grid = figure.add_gridspec(
            2,
            2,
            height_ratios=(1.45, 1),
            left=0.065,
            right=0.975,
            top=0.85,
            bottom=0.075,
            hspace=0.4,
            wspace=0.16,
        )
        figure.text(0.065, 0.945, title, fontsize=17, fontweight="bold")
        figure.text(0.065, 0.912, _subtitle(run), fontsize=11, color=MUTED)
        _draw_losses(figure.add_subplot(grid[0, :]), run)
        beside = bool(np.isfinite(run.val_metric).any())
        if beside:
            _draw_metric(figure.add_subplot(grid[1, 0]), run)
        _draw_rate(figure.add_subplot(grid[1, 1] if beside else grid[1, :]), run)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def _subtitle(run: Columns) -> str:
    if not len(run.step):
        return "no steps"
    count, seconds = run.steps, run.seconds[-1]
    parts = [f"{count:,} step{'s' if count > 1 else ''}"]
    if seconds > 0:
        parts[0] += f" in {seconds:,.1f} s"
        parts.append(f"{np.nansum(run.samples) / seconds:,.0f} samples/s")
    value = run.val_metric[np.isfinite(run.val_metric)]
    if len(value):
        parts += metrics.final({run.metric: float(value[-1])})
    if run.late:
        parts.append(f"{run.late:,} rounds with a late worker")
    return "   ·   ".join(parts)


def _draw_losses(axes: Axes, run: Columns) -> None:
    _prepare(axes, run, "Loss")
    step, loss = _finite(run.step, run.loss)
    at, smooth = _smoothed(step, loss)
    if len(step):
        if run.steps > MAX_POINTS:
            starts = _bin_starts(len(step), MAX_POINTS)
            low = np.minimum.reduceat(_finite(run.low, run.loss)[0], starts)
            high = np.maximum.reduceat(_finite(run.high, run.loss)[0], starts)
            axes.fill_between(step[starts], low, high, color=BLUE, alpha=0.16, linewidth=0)
        else:
            axes.plot(step, loss, color=BLUE, alpha=0.22, linewidth=1)
        axes.plot(at, smooth, color=BLUE, linewidth=2, label="training", marker=_dot(at))
    eval_step, val_loss = _finite(run.eval_step, run.val_loss)
    if len(eval_step):
        axes.plot(
            _thinned(eval_step),
            _thinned(val_loss),
            color=ORANGE,
            linewidth=2,
            marker=_dot(eval_step, 60),
            markersize=5,
            label="validation",
        )
    shown = np.concatenate((smooth, val_loss))
    if len(shown):  # outliers of single steps may be cut off, the curves may not
        usual = np.quantile(loss, 0.995) if len(loss) else 0.0
        top = max(float(shown.max()), float(usual))
        axes.set_ylim(min(0.0, float(shown.min())), 1.06 * top if top > 0 else 1.0)
        _legend(axes)


def _draw_metric(axes: Axes, run: Columns) -> None:
    _prepare(axes, run, f"Validation {run.metric}")
    form = metrics.form(run.metric)
    step, value = _finite(run.eval_step, form.scale * run.val_metric)
    dot = _dot(step, 60)
    axes.plot(_thinned(step), _thinned(value), color=GREEN, linewidth=2, marker=dot, markersize=5)
    if form.best is None:
        axes.margins(y=0.2)
        below = value[-1] < value[0]  # the curve falls
    else:
        low = float(value.min())
        span = max(form.best - low, 1.0)
        axes.set_ylim(max(low - 0.12 * span, -2), form.best + 0.04 * span)
        axes.yaxis.set_major_formatter(form.axis)
        below = value[-1] > (low + form.best) / 2
    axes.annotate(
        form.mark.format(value=value[-1]),
        (step[-1], value[-1]),
        xytext=(0, -17 if below else 9),
        textcoords="offset points",
        ha="right" if len(step) > 1 else "center",
        color=GREEN,
        fontweight="bold",
    )


def _draw_rate(axes: Axes, run: Columns) -> None:
    _prepare(axes, run, "Samples per second")
    step, rate = _rates(run)
    if len(step):
        axes.fill_between(step, rate, color=INK, alpha=0.07, linewidth=0)
        axes.plot(step, rate, color=INK, linewidth=1.4, marker=_dot(step))
        axes.set_ylim(0, 1.15 * float(rate.max()) or 1.0)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    if len(run.late_step):
        first, last = axes.get_xlim()
        marks = np.unique(np.round((run.late_step - first) / (last - first) * 600))
        axes.plot(
            first + marks / 600 * (last - first),
            np.full(len(marks), 0.02),
            transform=axes.get_xaxis_transform(),
            linestyle="none",
            marker="|",
            markersize=10,
            color=RED,
            label="a worker was late",
        )
        _legend(axes)


def _prepare(axes: Axes, run: Columns, title: str) -> None:
    """Set the style of a panel, and the x axis: steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.grid(True, color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step", color=MUTED)
    steps = np.concatenate((run.step, run.eval_step))
    if len(steps):
        first, last = float(steps.min()), float(steps.max())
        if first <= 0.1 * last:
            first = 0.0
        margin = 0.012 * (last - first) or 1.0
        axes.set_xlim(first - margin, last + margin)
    else:
        axes.set_xlim(0, 1)
        axes.text(0.5, 0.5, "no steps", transform=axes.transAxes, ha="center", color=MUTED)


def _legend(axes: Axes) -> None:
    """Put the legend beside the title, where no curve can be."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)


def _rates(run: Columns) -> tuple[Floats, Floats]:
    """Samples per second by the clock, pauses included, in at most RATE_BINS stretches of steps."""
    if not len(run.step):
        return run.step, run.step
    starts = _bin_starts(len(run.step), RATE_BINS)
    ends = np.append(starts[1:], len(run.step)) - 1
    # The clock is read at the end of a step: a stretch begins where the one before it ended.
    before = np.append(run.began[0], run.seconds[ends[:-1]])
    taken = run.seconds[ends] - before
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.add.reduceat(run.samples, starts) / taken
    return _finite(run.step[ends], rate)


def _smoothed(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Means of y over about a thirtieth of the run, without the lowest and highest tenth of each.

    They are centred, except the last ones, which have no later half. At most SMOOTH_POINTS.
    """
    count = len(y)
    widest = max(count // 60, min(count // 8, 8))
    at = _thinned(np.arange(count), SMOOTH_POINTS)
    means = np.empty(len(at))
    for index, centre in enumerate(at):
        reach = min(int(centre), widest)
        window = np.sort(y[centre - reach : centre + reach + 1])
        cut = len(window) // 10
        means[index] = window[cut : len(window) - cut].mean()
    return x[at], means


def _column(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _finite(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def _bin_starts(count: int, bins: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, count, min(bins, count), endpoint=False).astype(np.intp))


def _thinned(values: NDArray[Any], most: int = MAX_POINTS) -> NDArray[Any]:
    """At most `most` of the values, the first and the last among them."""
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).astype(np.intp)]


def _dot(points: Floats, most: int = 1) -> str:
    """A marker while the points are few: a line through one point shows nothing."""
    return "o" if len(points) <= most else ""
