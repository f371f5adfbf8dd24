"""How large a bucket's gradient usually is, and whether one is out of all proportion."""

from __future__ import annotations

from collections import deque

KEPT = 64
NEEDED = 16  # before that nothing is known to be usual
SMALLEST = 0.01  # a usual norm, where there is one at all


class Norms:
    """The newest norms of each bucket's accepted gradients, whoever sent them.

    What is usual is the highest that their median has been, and no less than `SMALLEST`: a model
    that fits its data makes next to nothing of most batches, and something of the one that it does
    not know, or of all when a stage of its schedule begins. That is no broken gradient.
    `max_ratio`: how many times the usual a norm may be; None = any size.
    """

    def __init__(self, max_ratio: float | None) -> None:
        self._max_ratio = max_ratio
        self._newest: dict[int, deque[float]] = {}
        self._highest: dict[int, float] = {}  # median of each bucket's

    def judge(self, bucket: int, norm: float) -> str | None:
        """Why a gradient of this norm is refused; None when it is not: then it counts, too."""
        if self._max_ratio is None:
            return None
        newest = self._newest.setdefault(bucket, deque(maxlen=KEPT))
        if len(newest) >= NEEDED:
            median = sorted(newest)[len(newest) // 2]
            highest = self._highest[bucket] = max(median, self._highest.get(bucket, 0.0))
            usual = max(highest, SMALLEST) if highest else 0.0
            if norm > self._max_ratio * usual > 0:
                return (
                    f"its norm of {norm:.3g} is {norm / usual:.3g} times the usual "
                    f"{usual:.3g} (bucket {bucket}; max_norm_ratio {self._max_ratio:g})"
                )
        newest.append(norm)
        return None
