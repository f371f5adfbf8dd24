"""The metrics of an evaluation: one dict by name, how files hold it, and how each is written.

The loss is none of them. Files have had a field of its own for the accuracy from the beginning.
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
    """While the run goes on."""
    final: str = "{name} {value:.4g}"
    """In the summary, and above the picture."""
    mark: str = "{value:.4g}"
    """At the end of its curve."""
    axis: str = "{x:g}"
    best: float | None = None
    """The value that none can be better than, if it is known."""


FORMS = {
    ACCURACY: Form(
        scale=100.0,
        live="{name} {value:.1f} %",
        final="{value:.2f} % right",
        mark="{value:.2f} %",
        axis="{x:g} %",
        best=100.0,
    )
}
"""By name; of those that are not here:"""
USUAL = Form()


def form(name: str) -> Form:
    return FORMS.get(name, USUAL)


def reported(values: Mapping[str, float | None]) -> Values:
    """Those in what the observer reported: `val_` and their name."""
    return {name.removeprefix("val_"): v for name, v in values.items() if name != "val_loss"}


def fields(metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """As metrics.jsonl and summary.json hold them."""
    others = {name: value for name, value in metrics.items() if name != ACCURACY}
    return {"val_accuracy": metrics.get(ACCURACY), "metrics": others}


def held(fields: Mapping[str, Any]) -> Values:
    """Those that a line of metrics.jsonl or a summary holds; the accuracy first."""
    accuracy, others = fields.get("val_accuracy"), fields.get("metrics")
    first = {} if accuracy is None else {ACCURACY: accuracy}
    return first | others if isinstance(others, dict) else first


def live(metrics: Mapping[str, float | None]) -> list[str]:
    """Each that has a value, in words for a run that goes on."""
    return [_filled(form(name).live, name, v) for name, v in metrics.items() if v is not None]


def final(metrics: Mapping[str, float | None]) -> list[str]:
    """The same for a run that is over."""
    return [_filled(form(name).final, name, v) for name, v in metrics.items() if v is not None]


def _filled(template: str, name: str, value: float) -> str:
    return template.format(name=printable(name), value=form(name).scale * value)
