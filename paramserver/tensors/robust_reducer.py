"""The open round's pushes where averages are robust: kept until their bucket is complete.

A statistic needs the pushes of all members at once, so `RobustReducer` keeps each payload as it
came, in the memory that it came in, from its push until its bucket's average: as many as there are
members, of the few buckets under way (`paramserver.protocol.pacing`; of more where somebody is late
and the others send all they have). Beside them it has memory for
the decoded numbers of one bucket from each member where the codec needs that, and for `clipped` the
average before of each bucket. It works through the pushes in the order of the workers' numbers, so
the result does not depend on the order in which they came.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paramserver.rounds.aggregate import CLIPPED, MEAN, TRIMMED, trimmed_of
from paramserver.rounds.disagreement import Comparison
from paramserver.tensors import robust
from paramserver.tensors.bucket import Bucket, BucketPlan
from paramserver.tensors.codec import Codec, Wire
from paramserver.tensors.reducer import Reducer, Release, RoomOf, fresh_room
from paramserver.tensors.robust import Array

COMPARED_SHARE = 0.5
"""Of the usual number of samples: a gradient of fewer is not compared. It is noisier by right."""


LATE_UNITS = 256
"""Of a sample: what late gradients weigh is rounded to these."""


@dataclass(frozen=True)
class Rule:
    """What is made of the pushes; see the settings of these names."""

    aggregate: str
    trim: float = 0.25
    clip_tau: float | None = None
    scale_to_median: bool = False


@dataclass(frozen=True)
class Held:
    """A push that waits for the others of its bucket."""

    worker: int
    buffers: Wire
    scale: float
    weight: float
    absent: tuple[int, ...]
    release: Release


@dataclass
class Compared:
    """What the buckets of a round say about one worker so far."""

    numbers: int = 0
    cut: float = 0.0  # times the numbers
    agrees: float = 0.0
    same: bool = True  # as in the round before


class RobustReducer(Reducer):
    """A `Reducer` whose averages follow a `rule`."""

    def __init__(
        self, plan: BucketPlan, up: Codec, down: Codec, rule: Rule, room: RoomOf = fresh_room
    ) -> None:
        super().__init__(plan, up, down, room)
        self._rule = rule
        self._held: dict[int, list[Held]] = {}
        self._rows: dict[tuple[str, int], torch.Tensor] = {}  # by dtype and place among the rows
        self._centres: dict[int, Array] = {}  # by bucket: its newest average in the log
        self._next: dict[int, Array] = {}  # the same, of the open round
        self._compared: dict[int, Compared] = {}
        self._samples: dict[tuple[int, int], Array] = {}  # the newest, by worker and bucket

    def add(
        self,
        bucket: int,
        buffers: Wire,
        scale: float,
        samples: float,
        release: Release,
        worker: int = 0,
        absent: tuple[int, ...] = (),
        *,
        late: bool = False,
    ) -> None:
        if self._plan.buckets[bucket].kind == "whole":
            super().add(bucket, buffers, scale, samples, release, worker, absent, late=late)
            return
        held = Held(worker, buffers, scale, samples, absent, release)
        self._held.setdefault(bucket, []).append(held)

    def finish(
        self, bucket: int, samples: float, absent: tuple[int, ...]
    ) -> tuple[list[Any], float, tuple[int, ...]]:
        b = self._plan.buckets[bucket]
        if b.kind == "whole":
            return super().finish(bucket, samples, absent)
        held = sorted(self._held.pop(bucket), key=lambda push: push.worker)
        values = self._down.values(b, self._room_of(b))
        rows = self._decoded_rows(b, held)
        with np.errstate(over="ignore"):  # what is absurdly large is cut away
            if b.kind == "count":
                weights = _whole_numbers([push.weight for push in held])
                values.copy_(torch.from_numpy(robust.upper_median(rows, weights)))
            else:
                self._average(b, held, rows, values.numpy())
        for push in held:
            push.release()
        buffers, scale = self._down.encode(b, values, absent, self._room_of(b))
        return buffers, scale, absent

    def close(self, buckets: tuple[int, ...]) -> None:
        super().close(buckets)
        for pushes in self._held.values():
            for push in pushes:
                push.release()
        self._held.clear()
        self._centres |= {b: centre for b, centre in self._next.items() if b in buckets}
        self._next.clear()
        if self._samples:  # of who took part: others may never come back
            kept = self._samples.items()
            self._samples = {key: s for key, s in kept if key[0] in self._compared}
        self._compared.clear()

    def comparisons(self) -> Mapping[int, Comparison]:
        """What the averages of the open round say about each worker, by number."""
        return {
            worker: Comparison(c.cut / c.numbers, c.agrees, c.same)
            for worker, c in sorted(self._compared.items())
        }

    # ------------------------------------------------------------------ the numbers

    def _decoded_rows(self, b: Bucket, held: list[Held]) -> list[Array]:
        """The numbers of each push: where they lie, or decoded into memory for that."""
        rows = []
        for place, push in enumerate(held):
            row = self._row(b, place)
            rows.append(self._codec(b).decode(push.buffers, push.scale, row).numpy())
        return rows

    def _row(self, b: Bucket, place: int) -> torch.Tensor:
        """Memory for the numbers of one push; it takes none before it is written to."""
        if (row := self._rows.get((b.sent, place))) is None:
            row = self._rows[b.sent, place] = torch.empty_like(self._scratch[b.sent])
        return row[: b.size]

    def _average(self, b: Bucket, held: list[Held], rows: list[Array], out: Array) -> None:
        weights = _whole_numbers([push.weight for push in held])
        if self._rule.scale_to_median and b.kind == "grad":
            rows = self._scaled(b, rows)
        if self._rule.aggregate == MEAN:
            total = sum(weights)
            robust.combine(rows, [w / total for w in weights], out)
        elif self._rule.aggregate == CLIPPED:
            factors = self._clip(b, held, rows, weights, out)
            self._compare(b, held, rows, [1.0 - factor for factor in factors], out)
        else:
            for span, here in self._spans(b, held):
                self._middle([rows[i][span] for i in here], [weights[i] for i in here], out[span])
                if 0 < len(here) < len(held):
                    out[span] *= sum(weights[i] for i in here) / sum(weights)
            if len(held) > 2:
                self._compare(b, held, rows, None, out)

    def _middle(self, rows: list[Array], weights: list[int], out: Array) -> None:
        if not rows:
            out[:] = 0.0
        elif self._rule.aggregate == TRIMMED:
            lost = robust.lost_weight(weights, trimmed_of(self._rule.trim, len(rows)))
            robust.middle(rows, weights, lost, out)
        else:
            robust.middle(rows, weights, robust.most_lost(weights), out)

    def _clip(
        self, b: Bucket, held: list[Held], rows: list[Array], weights: list[int], out: Array
    ) -> list[float]:
        centre = self._centres.get(b.index)
        if centre is None:
            centre = np.zeros_like(out)
        everywhere = [span for span, here in self._spans(b, held) if not here]
        for span in everywhere:  # it has no average this time, and so none before the next one
            centre[span] = 0.0
        tau = self._rule.clip_tau if b.kind == "grad" else None
        factors = robust.clipped(rows, weights, centre, tau, out)
        self._next[b.index] = out.copy()
        return factors

    def _scaled(self, b: Bucket, rows: list[Array]) -> list[Array]:
        """The rows, each as long as the median of them; one of zeros stays as it is."""
        norms = [robust.norm(row) for row in rows]
        usual = statistics.median([n for n in norms if n > 0.0] or [0.0])
        scaled = []
        for place, (row, norm) in enumerate(zip(rows, norms, strict=True)):
            factor = usual / norm if norm > 0.0 else 1.0
            if factor != 1.0:
                into = self._row(b, place).numpy()
                row = np.multiply(row, row.dtype.type(factor), out=into)
            scaled.append(row)
        return scaled

    def _spans(self, b: Bucket, held: list[Held]) -> Iterator[tuple[slice, list[int]]]:
        """The bucket's parts, each with the places of the pushes that have numbers for it: whose
        parameter is not absent."""
        lacking = [frozenset(push.absent) for push in held]
        everybody = list(range(len(held)))
        start, before = 0, everybody
        for tensor in b.tensors if any(lacking) else ():
            here = [i for i in everybody if tensor not in lacking[i]]
            begin = max(self._plan.offsets[tensor], b.start) - b.start
            if here != before and begin > start:
                yield slice(start, begin), before
                start = begin
            before = here
        yield slice(start, b.size), before

    def _compare(
        self, b: Bucket, held: list[Held], rows: list[Array], cut: list[float] | None, out: Array
    ) -> None:
        """Compare the gradients of this bucket, on a sample of its numbers."""
        if b.kind != "grad" or len(held) < 2:
            return
        sample = robust.sampled(b.size)
        some = [row[sample] for row in rows]
        if not out[sample].any():
            return  # nobody has a gradient
        cut = robust.outermost(some) if cut is None else cut
        agrees = robust.along(some, out[sample])
        usual = sum(push.weight for push in held) / len(held)
        for push, own, along, numbers in zip(held, cut, agrees, some, strict=True):
            before = self._samples.get((push.worker, b.index))
            self._samples[push.worker, b.index] = numbers.copy()
            if push.weight < COMPARED_SHARE * usual:
                continue
            compared = self._compared.setdefault(push.worker, Compared())
            compared.same &= before is not None and np.array_equal(before, numbers)
            compared.numbers += b.size
            compared.cut += own * b.size
            compared.agrees += along


def _whole_numbers(weights: list[float]) -> list[int]:
    """Weights in proportion to these: they are numbers of samples, or tokens, but for late ones."""
    if all(isinstance(w, int) for w in weights):
        return [int(w) for w in weights]
    return [max(1, round(w * LATE_UNITS)) for w in weights]
