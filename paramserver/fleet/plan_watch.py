"""Compares a run with what `make plan` predicted for it, and says why it is slower.

`plan` leaves a file beside the runs. The server looks in it for a plan with its model, settings and
number of workers; `PlanWatch` gets the pushes and the updates of the run and returns a sentence,
once. No clock: times are passed in.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from paramserver.fleet.plan import Plan
from paramserver.settings import Settings
from paramserver.typed import typed

FILE = "plan.json"
AFTER_S = 30.0
FAR_BELOW = 0.7  # of the predicted speed
LONGER = 1.2  # than predicted: the likeliest cause
AGAIN = f"{typed('plan')} measures again"
KEPT = 20  # rounds of a worker


class Expected(msgspec.Struct, frozen=True):
    """What was predicted for a run with these settings."""

    workers: int
    codec: str
    local_steps: int | str
    shares: str
    samples_per_s: float
    compute_s: float
    """Of the slowest worker in a round."""
    exchange_s: float
    """What computing does not hide."""
    overlap: bool = False
    steps: int = 1
    """Local steps of a round; with auto, those that the server is taken to choose."""


class Kept(msgspec.Struct, frozen=True):
    """The file: the plans of one model and batch size."""

    about: dict[str, Any]
    plans: list[Expected]


def kept(settings: Settings, plans: Sequence[Plan]) -> str:
    """The content of the file for these plans, which were made with these settings."""
    found = [
        Expected(
            p.workers, *p.choice[:3], p.samples_per_s, p.compute_s, p.exchange_s, p.choice.overlap,
            p.steps,
        )
        for p in plans
    ]  # fmt: skip
    return json.dumps(msgspec.to_builtins(Kept(_about(settings), found)))


def read(settings: Settings) -> PlanWatch | None:
    """What the newest plan predicted for a run with these settings; None where it has nothing for
    them. Of several sets of as many machines the slowest one counts."""
    with suppress(OSError, msgspec.MsgspecError):
        content = msgspec.json.decode((Path(settings.run_dir) / FILE).read_bytes(), type=Kept)
        s = settings
        wanted = (s.num_workers, s.codec, s.local_steps, s.shares, s.overlap)
        found = [
            p
            for p in content.plans
            if (p.workers, p.codec, p.local_steps, p.shares, p.overlap) == wanted
        ]
        if found and content.about == _about(settings):
            return PlanWatch(min(found, key=lambda p: p.samples_per_s))
    return None


def _about(settings: Settings) -> dict[str, Any]:
    about = {
        "model": settings.model,
        "dataset": {k: v for k, v in settings.dataset.items() if k != "root"},
        "batch_size": settings.batch_size,
        "codec_down": settings.codec_down,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


class PlanWatch:
    """One run beside its plan."""

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self._compute: dict[str, deque[float]] = {}
        self._rounds: deque[float] = deque(maxlen=KEPT)
        self._since: float | None = None
        self._samples = 0
        self._told = False

    def pushed(self, worker: str, compute_s: float | None) -> None:
        """A worker has pushed the last bucket of a round, for which it computed so long."""
        if compute_s is not None:
            self._compute.setdefault(worker, deque(maxlen=KEPT)).append(compute_s)

    def closed(
        self, contributors: int, samples: int, seconds: float, now: float, local_steps: int = 1
    ) -> str | None:
        """A round of so many workers and local steps was closed that took so many seconds. Returns
        the sentence where the last half minute was far slower than predicted. Synchronous rounds in
        which auto still measures do not count."""
        other = contributors != self.expected.workers
        if self._told or other or (local_steps == 1 < self.expected.steps):
            self._since = None
            return None
        if self._since is None:
            self._since, self._samples = now, 0
            self._compute.clear()
            self._rounds.clear()
            return None
        self._samples += samples
        self._rounds.append(seconds)
        if now - self._since < AFTER_S:
            return None
        speed, self._since = self._samples / (now - self._since), None
        if speed >= FAR_BELOW * self.expected.samples_per_s:
            return None
        self._told = True
        return (
            f"{speed:,.0f} samples/s, where the plan had predicted "
            f"{self.expected.samples_per_s:,.0f}: {self._why()}"
        )

    def _why(self) -> str:
        computed = {worker: median(times) for worker, times in self._compute.items() if times}
        if not computed:
            return AGAIN
        slowest = max(computed, key=lambda worker: computed[worker])
        compute_s, planned = computed[slowest], self.expected
        rest_s = max(0.0, median(self._rounds) - compute_s)
        more_compute, more_rest = compute_s - planned.compute_s, rest_s - planned.exchange_s
        if more_compute > more_rest and compute_s > LONGER * planned.compute_s:
            return (
                f"{slowest} computes {_ms(compute_s)} in a round, {_ms(planned.compute_s)} were "
                "measured: does something else run there?"
            )
        if rest_s > LONGER * planned.exchange_s:
            return (
                f"a round takes {_ms(rest_s)} beside computing, {_ms(planned.exchange_s)} were "
                f"predicted: a cable, a busy network? {typed('doctor')} looks closer"
            )
        return AGAIN


def _ms(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
