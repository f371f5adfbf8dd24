"""Where each worker's time went, round by round, for people who ask why a run is not faster.

A worker tells with its last push of a round how long it was busy since its last push before that,
and how long it waited (`wire.Spent`). The server knows how much of the wait was for others: as long
as it has all of a worker's pushes and an average is missing, other members are waited for. The rest
of the wait is the exchange itself. Nothing is decided by this.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from paramserver.rounds.ledger import DONE
from paramserver.rounds.round import Member, Round

ROUNDS_KEPT = 60
MINUTE_S = 60


class Part(NamedTuple):
    """Seconds of one member in one round."""

    compute: float = 0.0
    encode: float = 0.0
    cable: float = 0.0
    wait: float = 0.0
    late: float = 0.0


class Took(NamedTuple):
    """A closed round: the optimizer steps that it led to, its seconds, and the parts by worker."""

    step: int
    seconds: float
    parts: dict[int, Part]


class Sums:
    """What a worker's rounds of some time came to."""

    __slots__ = ("late", "parts", "rounds")

    def __init__(self) -> None:
        self.parts = [0.0] * len(Part._fields)
        self.rounds = 0
        self.late = 0

    def add_part(self, part: Part) -> None:
        sums = self.parts
        sums[0] += part[0]  # each round of each worker comes here
        sums[1] += part[1]
        sums[2] += part[2]
        sums[3] += part[3]
        sums[4] += part[4]

    def add(self, other: Sums) -> None:
        for i, seconds in enumerate(other.parts):
            self.parts[i] += seconds
        self.rounds += other.rounds
        self.late += other.late


class Clocks:
    """The times of the newest rounds, and their sums over the last minute."""

    def __init__(self) -> None:
        self.newest: deque[Took] = deque(maxlen=ROUNDS_KEPT)
        self.learning_rate: float | None = None
        """As a worker told it last."""
        self._closed_at: float | None = None
        self._waited: dict[int, float] = {}  # for others, in the round before, by worker
        self._seconds: deque[tuple[int, dict[int, Sums]]] = deque(maxlen=MINUTE_S + 1)

    def closed(self, current: Round, how: Mapping[int, str], step: int, now: float) -> None:
        """A round closes, which led to this optimizer `step`; `how` each member's lease was settled
        is in the ledger's words."""
        seconds = now - current.opened_at
        between = seconds if self._closed_at is None else now - self._closed_at
        self._closed_at = now
        parts, waited = dict[int, Part](), dict[int, float]()
        sums = self._sums_of(int(now))
        for worker, member in current.members.items():
            waited[worker] = current.waited_s(member, now)
            own = sums.get(worker)
            if own is None:
                own = sums[worker] = Sums()
            if how[worker] == DONE:
                part = _part(member, between, self._waited.get(worker, 0.0), seconds)
            else:
                part = Part(late=seconds)
                own.late += 1
            own.rounds += 1
            own.add_part(part)
            parts[worker] = part
            if member.spent is not None:
                self.learning_rate = member.spent.learning_rate
        self._waited = waited
        self.newest.append(Took(step, seconds, parts))

    def minute(self, now: float) -> dict[int, Sums]:
        """What the rounds of the last minute came to, by worker."""
        total: dict[int, Sums] = {}
        for second, sums in self._seconds:
            if second > now - MINUTE_S:
                for worker, own in sums.items():
                    total.setdefault(worker, Sums()).add(own)
        return total

    def _sums_of(self, second: int) -> dict[int, Sums]:
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append((second, {}))
        return self._seconds[-1][1]


def _part(member: Member, between: float, waited_s: float, seconds: float) -> Part:
    """The parts of a member that was in time, `between` two closes. A worker may tell any numbers:
    they are cut to what can be."""
    spent = member.spent
    if spent is None:  # a peer that is older, or its first round
        compute = _within(member.compute_s or 0.0, between)
        wait = _within(waited_s, between - compute)
        return Part(compute, 0.0, max(0.0, seconds - compute - wait), wait)
    busy, all_waits = _within(spent.busy_s, between), _within(spent.waited_s, between)
    encode = _within(spent.encode_s, busy)
    wait = _within(waited_s, all_waits)
    return Part(busy - encode, encode, all_waits - wait, wait)


def _within(seconds: float, most: float) -> float:
    if 0.0 <= seconds <= most:  # as usual; not so for a NaN
        return seconds
    return min(max(seconds, 0.0), max(most, 0.0)) if math.isfinite(seconds) else 0.0
