"""How large a bucket's gradient usually is, and whether one is out of all proportion."""

from __future__ import annotations

from collections import deque

KEPT = 64
NEEDED = 16  # before that nothing is known to be usual


class Norms:
    """The newest norms of each bucket's accepted gradients, whoever sent them.

    `max_ratio`: how many times their median a norm may be; None = any size.
    """

    def __init__(self, max_ratio: float | None) -> None:
        self._max_ratio = max_ratio
        self._newest: dict[int, deque[float]] = {}

    def judge(self, bucket: int, norm: float) -> str | None:
        """Why a gradient of this norm is refused; None when it is not: then it counts, too."""
        if self._max_ratio is None:
            return None
        newest = self._newest.setdefault(bucket, deque(maxlen=KEPT))
        if len(newest) >= NEEDED:
            median = sorted(newest)[len(newest) // 2]
            if norm > self._max_ratio * median > 0:
                return (
                    f"its norm of {norm:.3g} is {norm / median:.3g} times the usual "
                    f"{median:.3g} (bucket {bucket}; max_norm_ratio {self._max_ratio:g})"
                )
        newest.append(norm)
        return None
