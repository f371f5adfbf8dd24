"""Local steps: how many optimizer steps workers make by themselves in a round, and what the mean of
them is taken for.

With more than one, workers do not push gradients. Each makes its steps with an optimizer of its
own, from the weights of the log (the anchor), and every replica moves the anchor by the mean of
what they came to: local SGD and FedAvg (McMahan et al., arXiv 1602.05629) with an outer rate of 1
and no momentum, DiLoCo (Douillard et al., arXiv 2311.08105) with 0.7 and Nesterov's momentum 0.9.

No clock, no socket: seconds come in, numbers of steps go out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from paramserver.rounds.shares import Cost
from paramserver.settings import Settings

AUTO = "auto"
FEW_STEPS = 10
"""For fewer, a large momentum costs accuracy: SlowMo's values hold there."""

LOSSY_SPARSE = "topk"
EXACT = "float32"

EXCHANGE_SHARE = 19
"""Times as long as its exchange a round's computing is to take: 5 % are left to the exchange."""

STEPS_MAX = 512
CHOSEN_FROM = 16  # rounds; the number changes at most once in so many
CHANGE_MIN = 1.5  # times as many, or as few
MOVE_MIN = 0.1  # of a worker's steps


class OuterStep(NamedTuple):
    """The outer step: `torch.optim.SGD` with the mean of (anchor - local weights) as gradient."""

    lr: float
    momentum: float
    nesterov: bool
    weights: bool
    """Workers push their weights, whose mean is the new anchor, where that is the same and nothing
    on the way rounds them: so a run of one worker has that worker's weights, to the bit."""


def outer_of(settings: Settings) -> OuterStep | None:
    """The outer step of a run; None where it has no local steps.

    Where `outer` is null: for fewer than ten local steps, and with auto, SlowMo's values (Wang et
    al., arXiv 1910.00643: rate 1, momentum by the number of workers); for more, DiLoCo's (Nesterov,
    0.9), with a rate that grows with the workers, as its scaling laws say (arXiv 2503.09799). One
    worker's steps are taken as they are; and the codec topk has no momentum beside its error
    feedback (SparseLoCo, arXiv 2508.15706).
    """
    steps, workers = settings.local_steps, settings.num_workers
    if steps == 1:
        return None
    if settings.outer is not None:
        lr = float(settings.outer.get("lr", 1.0))
        momentum = float(settings.outer.get("momentum", 0.0))
        nesterov = bool(settings.outer.get("nesterov", momentum > 0))
    elif workers == 1 or LOSSY_SPARSE in (settings.codec, settings.codec_of_averages):
        lr, momentum, nesterov = 1.0, 0.0, False
    elif not isinstance(steps, int) or steps < FEW_STEPS:
        lr, nesterov = 1.0, False
        momentum = 0.5 if workers >= 8 else 0.2 if workers >= 4 else 0.0
    else:
        lr, momentum, nesterov = 0.8 if workers >= 8 else 0.7 if workers >= 4 else 0.6, 0.9, True
    plain = lr == 1.0 and momentum == 0.0
    exact = {settings.codec, settings.codec_of_averages} == {EXACT}
    return OuterStep(lr, momentum, nesterov, plain and exact)


def described(settings: Settings) -> str:
    """The local steps of a run and its outer step, as words; empty where there are none."""
    outer = outer_of(settings)
    if outer is None:
        return ""
    number = "as many as suit" if settings.local_steps == AUTO else settings.local_steps
    moment = f"momentum {outer.momentum:g}" if outer.momentum else "no momentum"
    kind = " (Nesterov)" if outer.nesterov else ""
    first = settings.local_warmup_steps
    after = f", after {first} synchronous steps" if first else ""
    overlap = "; exchanged while the next ones are computed" if settings.overlap else ""
    return f"local steps: {number}{after}; outer step: rate {outer.lr:g}, {moment}{kind}{overlap}"


def suiting(step_s: float, exchange_s: float, *, overlap: bool) -> int:
    """The number of local steps for which the exchange takes 5 % of the time or, where it goes on
    while workers compute (`overlap`), no longer than these steps."""
    times = 1 if overlap else EXCHANGE_SHARE
    return min(STEPS_MAX, max(1, math.ceil(times * exchange_s / step_s)))


class LocalSteps:
    """Chooses the number of local steps of the next round: as set, after the warm-up, or from
    measured times."""

    def __init__(self, wanted: int | str, warmup: int = 0, overlap: bool = False) -> None:
        self.wanted, self._warmup, self._overlap = wanted, warmup, overlap
        self._chosen = 1 if wanted == AUTO else int(wanted)
        self._measured: deque[tuple[float, float]] = deque(maxlen=CHOSEN_FROM)
        self._of: dict[int, int] = {}  # by worker, where they follow its speed
        self.why = ""
        """The number that was chosen last, and from what, as words."""

    @property
    def used(self) -> bool:
        """May a round have more than one?"""
        return self.wanted != 1

    def of_next(self, steps_done: int, local: bool) -> int:
        """Those of the next round, after so many optimizer steps. `local`: rounds before had more
        than one. Then the workers' optimizers have parted, and auto does not go back to one."""
        if steps_done < self._warmup and not local:
            return 1
        if self.wanted == AUTO and local:
            return max(2, self._chosen)
        return self._chosen

    def took(self, steps: int, seconds: float, compute_s: float) -> bool:
        """A round of so many local steps took this long, in which the slowest worker computed for
        `compute_s`. Returns whether another number is chosen now."""
        if self.wanted != AUTO or not (0.0 < compute_s <= seconds < math.inf):
            return False
        self._measured.append((compute_s / steps, seconds - compute_s))
        if len(self._measured) < CHOSEN_FROM:
            return False
        step_s = median(step for step, _ in self._measured)
        exchange_s = median(exchange for _, exchange in self._measured)
        self._measured.clear()
        if self._overlap and self._chosen > 1:  # only what computing does not hide was measured
            if EXCHANGE_SHARE * exchange_s <= step_s * self._chosen:
                return False
            exchange_s += step_s * self._chosen
        wanted = suiting(step_s, exchange_s, overlap=self._overlap)
        if 1 / CHANGE_MIN < wanted / self._chosen < CHANGE_MIN:
            return False
        self._chosen = wanted
        self.why = (
            f"{wanted} from now on, as a step takes {1000 * step_s:.0f} ms and an exchange "
            f"{1000 * exchange_s:.0f} ms"
        )
        return True

    def by_speed(
        self, steps: int, asked: Mapping[int, int], costs: Mapping[int, Cost]
    ) -> dict[int, int]:
        """The local steps of each worker, so that all are done in the time in which the fastest
        makes `steps`: `floor(v / v_max * steps)` (DyLU, arXiv 2401.09135). `asked` are the samples
        of a step by worker; one whose cost is not known makes all. A number stays where it would
        change by less than `MOVE_MIN`, so that noise moves nothing."""
        seconds = {w: costs[w].of(steps * asked[w]) for w in asked if w in costs}
        fastest = min(seconds.values(), default=0.0)
        found = {}
        for w in asked:
            number = steps
            if w in seconds:
                exact, kept = steps * fastest / seconds[w], self._of.get(w, steps)
                steady = abs(exact - kept) <= max(0.5, MOVE_MIN * kept) and 1 <= kept <= steps
                number = kept if steady and exact >= 0.5 else math.floor(exact + 1e-9)
            found[w] = number
        self._of = found
        return found
