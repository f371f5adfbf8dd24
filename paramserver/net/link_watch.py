"""Checks that workers use the path that was chosen for them, and that it is as fast as when it was
measured.

`make up` sets the paths in the server's environment (`VARIABLE`). The server passes every push to
`LinkWatch`, which returns sentences for a person, each once. Pure: no socket, no clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import msgspec

VARIABLE = "PARAMSERVER_PATHS"
WINDOW = 4  # pushes under way at once, as in `paramserver.protocol.pacing`
FAR_BELOW = 0.25  # of its share of the measured speed
ROUNDS = 5  # in a row
RATES_KEPT = 15
SLOW_BYTES_PER_S = 60e6
"""Half of what 1 Gbit/s carries."""


class Chosen(msgspec.Struct, frozen=True):
    """A worker's path: its own address (None: its system decides), the server's, the bytes a second
    from worker to server as measured on an idle link, and the kind of the interface."""

    worker: int
    near: str | None
    far: str
    bytes_per_s: float
    by: str = "make up"


def write(chosen: list[Chosen]) -> str:
    return msgspec.json.encode(chosen).decode()


def read(environment: Mapping[str, str]) -> LinkWatch | None:
    """The paths in this environment; None where there are none."""
    text = environment.get(VARIABLE)
    try:
        return LinkWatch(msgspec.json.decode(text, type=list[Chosen])) if text else None
    except msgspec.DecodeError:  # only `up` writes it, and the run goes on without it
        return None


@dataclass
class _Round:
    """The first pushes of a worker's round: when the first was ready there and came here, the same
    for the last, and the bytes after the first."""

    number: int
    ready: float
    came: float
    last_ready: float
    last_came: float
    count: int = 1
    bytes: int = 0

    def goes_on(self, ready_s: float, size: int, now: float) -> None:
        """One more push has come."""
        if self.count < WINDOW:
            self.count += 1
            self.bytes += size
            self.last_ready, self.last_came = ready_s, now

    @property
    def waited(self) -> bool:
        """Were these pushes under way for longer than it took to compute them?"""
        took, computed = self.last_came - self.came, self.last_ready - self.ready
        return self.count > 1 and took > 0 and took > 2 * computed


class LinkMeter:
    """The rate at which each worker's pushes come over the network, while several are under way.

    A round tells of it where a worker sends faster than its link carries: its pushes are ready
    sooner than they come. The rate is the median of the newest of these rounds.
    """

    def __init__(self) -> None:
        self._rounds: dict[int, _Round] = {}
        self._rates: dict[int, deque[float]] = {}

    def pushed(self, worker: int, round: int, ready_s: float, size: int, now: float) -> None:
        """As of `LinkWatch`."""
        open_one = self._rounds.get(worker)
        if open_one is None or open_one.number != round:
            if open_one is not None and open_one.waited:
                rate = open_one.bytes / (open_one.last_came - open_one.came)
                self._rates.setdefault(worker, deque(maxlen=RATES_KEPT)).append(rate)
            self._rounds[worker] = _Round(round, ready_s, now, ready_s, now)
        else:
            open_one.goes_on(ready_s, size, now)

    def rate(self, worker: int) -> float | None:
        """Bytes a second; None where no round has told."""
        rates = self._rates.get(worker)
        return None if rates is None else median(rates)


class LinkWatch:
    """The chosen paths, and which of them are slow."""

    def __init__(self, chosen: list[Chosen]) -> None:
        self.expected = {each.worker: each.bytes_per_s for each in chosen}
        """Bytes a second from each worker, as measured on an idle link."""
        self._chosen = {each.worker: each for each in chosen}
        self._sharing = Counter(each.far for each in chosen)
        self._rounds: dict[int, _Round] = {}
        self._slow: Counter[int] = Counter()  # rounds in a row
        self._told: set[tuple[int, str]] = set()

    @property
    def has_slow_cable(self) -> bool:
        """Is the cable of a worker's host slow? Workers with one address share it."""
        rates: Counter[str] = Counter()
        for each in self._chosen.values():
            rates[each.near or f"worker {each.worker}"] += int(each.bytes_per_s)
        return min(rates.values(), default=SLOW_BYTES_PER_S) < SLOW_BYTES_PER_S

    def cables(self, places: Iterable[tuple[int, str]]) -> dict[str, float]:
        """Bytes a second that the cable of each address carries, where these workers come from
        these addresses: a host's workers share what was measured. The server's own, "", carries at
        least what the fastest of them does. Empty where none was measured."""
        found: dict[str, float] = {}
        for worker, address in places:
            if address and worker in self.expected:
                found[address] = found.get(address, 0.0) + self.expected[worker]
        return {"": max(found.values()), **found} if found else {}

    def pushed(
        self,
        worker: int,
        name: str,
        address: str,
        round: int,
        ready_s: float,
        size: int,
        now: float,
    ) -> list[str]:
        """A push of `size` bytes has come from `address` ("": not over a network); it was ready at
        `ready_s` of the worker's own clock."""
        chosen = self._chosen.get(worker)
        if chosen is None or not address:
            return []
        told = []
        if chosen.near is not None and address != chosen.near:
            told += self._once(
                worker,
                address,
                f"{name} comes by {address}, not by {chosen.near} as make up had chosen: is that "
                "cable out? make doctor looks closer",
            )
        open_one = self._rounds.get(worker)
        if open_one is None or open_one.number != round:
            if open_one is not None:
                told += self._judge(chosen, name, open_one)
            self._rounds[worker] = _Round(round, ready_s, now, ready_s, now)
        else:
            open_one.goes_on(ready_s, size, now)
        return told

    def _judge(self, chosen: Chosen, name: str, done: _Round) -> list[str]:
        """Were this round's pushes under way for too long? Where a worker's backward is slow, its
        pushes are ready no sooner than they come, which says nothing about its link."""
        took = done.last_came - done.came
        share = chosen.bytes_per_s / self._sharing[chosen.far]
        slow = done.waited and done.bytes < FAR_BELOW * share * took
        self._slow[chosen.worker] = self._slow[chosen.worker] + 1 if slow else 0
        if self._slow[chosen.worker] < ROUNDS:
            return []
        return self._once(
            chosen.worker,
            "slow",
            f"{name} brings {8e-9 * done.bytes / took:.3f} Gbit/s, where {chosen.by} had measured "
            f"{8e-9 * chosen.bytes_per_s:.3f}: a cable, a busy network? make doctor looks closer",
        )

    def _once(self, worker: int, what: str, sentence: str) -> list[str]:
        if (worker, what) in self._told or len(self._told) >= 100:
            return []
        self._told.add((worker, what))
        return [sentence]
