"""How a round's pushes become one average: the names of the rules, and what they can do."""

from __future__ import annotations

import math

from paramserver.settings import AGGREGATES, Settings

MEAN, TRIMMED, MEDIAN, CLIPPED = AGGREGATES
BY_COORDINATE = (TRIMMED, MEDIAN)
"""The rules that look at each number of a gradient by itself."""

CLOSE = 1e-9  # by which a product of decimals may miss a whole number


def trimmed_of(trim: float, count: int) -> int:
    """How many of `count` workers each side loses: the share `trim`, at least one, and never half
    of them; none of one or two."""
    return min(max(1, math.floor(trim * count + CLOSE)), (count - 1) // 2)


def described(settings: Settings) -> str:
    """The rule of a run as words, with what it can do for so few workers; empty for the mean."""
    rule, count = settings.aggregate, settings.num_workers
    scaled = ", each worker's local steps scaled to their median norm" * settings.scale_to_median
    if rule == MEAN:
        return scaled and f"aggregate: mean{scaled}"
    if rule == CLIPPED:
        told = "a worker pulls the average only so far"
        few = ", and with two nobody can tell which one is wrong" if count == 2 else ""
    else:
        told, few = "the middle of the workers' numbers", ""
        if rule == TRIMMED:
            lost = trimmed_of(settings.trim, count)
            told = f"of {count} workers each side loses {lost}"
        if count < 3:
            told = f"it needs three workers: of fewer it is the mean{' of two' * (count == 2)}"
            few = "; aggregate=clipped limits what one of two can do" if count == 2 else ""
    if count == 1:
        told, few = "one worker's gradient is the average, whatever the rule", ""
    return f"aggregate: {rule}{scaled}; {told}{few}"
