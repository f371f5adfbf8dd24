"""Decides from evaluations whether a run should stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping

from paramserver.errors import UserError
from paramserver.output import metrics
from paramserver.settings import Settings

PATIENCE = 3  # evaluations


class EarlyStop:
    """The setting `early_stop`: the run stops at the `patience`th evaluation in a row whose metric
    is not better than the best one before, by more than `min_delta`.

    `names` are those of what evaluations find. Raises `UserError` for another metric.
    """

    def __init__(self, settings: Settings, names: list[str]) -> None:
        wanted = {"patience": PATIENCE, "min_delta": 0.0, **(settings.early_stop or {})}
        name = str(wanted["metric"]).rpartition(":")[2].removeprefix("val_")
        if name not in names:
            raise UserError(
                f"early_stop.metric={name}: this run's evaluations have none of that name",
                f"there is: {', '.join(names)}",
            )
        if "mode" not in wanted and not name.lower().endswith(("loss", "accuracy")):
            raise UserError(
                f"early_stop.mode is missing: is more or less {name} better?",
                "early_stop.mode=max, or min",
            )
        mode = wanted.get("mode", "max" if name.endswith("accuracy") else "min")
        self._name, self._sign = name, 1 if mode == "max" else -1
        self._patience, self._least = int(wanted["patience"]), float(wanted["min_delta"])
        self._best, self._best_step = -math.inf, 0
        self._in_vain = 0

    def evaluated(self, step: int, values: Mapping[str, float | None]) -> str | None:
        """Take in an evaluation; returns why the run should stop, if it should, and the same after
        each further one that is no better."""
        value = values.get(f"val_{self._name}")
        told = -math.inf if value is None or math.isnan(value) else self._sign * value
        if told > self._best + self._least:
            self._best, self._best_step, self._in_vain = told, step, 0
            return None
        self._in_vain += 1
        if self._in_vain < self._patience:
            return None
        if self._best == -math.inf:
            return f"{self._name} was no number in {self._in_vain} evaluations"
        evaluations = "evaluation" if self._in_vain == 1 else f"{self._in_vain} evaluations"
        form = metrics.form(self._name)
        best = form.axis.format(x=form.scale * self._sign * self._best)
        return (
            f"{self._name} got no better in the last {evaluations}: the best was {best}, at step "
            f"{self._best_step}"
        )
