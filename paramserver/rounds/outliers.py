"""Finds gradients whose norm is far above the usual one of their bucket."""

from __future__ import annotations

from collections import deque

KEPT = 64
NEEDED = 16  # norms, before a usual one is known
SMALLEST = 0.01  # the least usual norm


class Norms:
    """The newest norms of each bucket's accepted gradients, of all workers.

    The usual norm is the highest median so far, and at least `SMALLEST`: a model that fits its data
    has tiny gradients for most batches, and a larger one for a batch that it does not fit, or for
    all when a stage of its schedule begins. Such a gradient is not broken. `max_ratio`: how many
    times the usual a norm may be; None = any size.
    """

    def __init__(self, max_ratio: float | None) -> None:
        self._max_ratio = max_ratio
        self._newest: dict[int, deque[float]] = {}
        self._highest: dict[int, float] = {}  # the highest median, by bucket
        self._local = False  # they are those of rounds of several local steps

    def begin(self, *, local: bool) -> None:
        """A round begins, of several local steps or of one. What is pushed has another norm then:
        the norms are forgotten where this has changed."""
        if local != self._local:
            self._local = local
            self._newest.clear()
            self._highest.clear()

    def judge(self, bucket: int, norm: float) -> str | None:
        """Why a gradient of this norm is refused; None where it is accepted: then it is added to
        the norms."""
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
