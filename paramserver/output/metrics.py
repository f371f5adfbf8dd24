"""The metrics of an evaluation: one dict by name, its form in files, and how each is shown.

The loss is not among them. Files have a separate field for the accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from paramserver.words import printable

Values = dict[str, float | None]
ACCURACY = "accuracy"


class Form(NamedTuple):
    """How the values of a metric are shown: times `scale`, in these templates."""

    scale: float = 1.0
    live: str = "{name} {value:.4g}"
    """The template while the run goes on."""
    final: str = "{name} {value:.4g}"
    """The template in the summary, and above the picture."""
    mark: str = "{value:.4g}"
    """The template at the end of its curve."""
    axis: str = "{x:g}"
    best: float | None = None
    """The best possible value, if it is known."""


FORMS = {
    ACCURACY: Form(
        scale=100.0,
        live="{name} {value:.1f} %",
        final="{value:.2f} % right",
        mark="{value:.2f} %",
        axis="{x:g} %",
        best=100.0,
    ),
    "ema_accuracy": Form(
        scale=100.0,
        live="{name} {value:.1f} %",
        final="{name} {value:.2f} %",
        mark="{value:.2f} %",
        axis="{x:g} %",
        best=100.0,
    ),
}
"""Forms by name; the form of other metrics:"""
USUAL = Form()


def form(name: str) -> Form:
    return FORMS.get(name, USUAL)


def reported(values: Mapping[str, float | None]) -> Values:
    """The metrics in a report of the observer, where their names begin with `val_`."""
    return {name.removeprefix("val_"): v for name, v in values.items() if name != "val_loss"}


def fields(metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """The fields of metrics.jsonl and summary.json for these metrics."""
    others = {name: value for name, value in metrics.items() if name != ACCURACY}
    return {"val_accuracy": metrics.get(ACCURACY), "metrics": others}


def held(fields: Mapping[str, Any]) -> Values:
    """The metrics in a line of metrics.jsonl or in a summary; the accuracy first."""
    accuracy, others = fields.get("val_accuracy"), fields.get("metrics")
    first = {} if accuracy is None else {ACCURACY: accuracy}
    return first | others if isinstance(others, dict) else first


def live(metrics: Mapping[str, float | None]) -> list[str]:
    """Each metric that has a value, as words for a run that goes on."""
    return [_filled(form(name).live, name, v) for name, v in metrics.items() if v is not None]


def final(metrics: Mapping[str, float | None]) -> list[str]:
    """The same for a run that is over."""
    return [_filled(form(name).final, name, v) for name, v in metrics.items() if v is not None]


def _filled(template: str, name: str, value: float) -> str:
    return template.format(name=printable(name), value=form(name).scale * value)
