"""Did the workers come by the path that was chosen for them, and does it carry what it did then?

`make up` tells the server by its environment (`VARIABLE`). The server shows every
push to `Paths`, which answers with sentences for a person, each once. No socket and no clock here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

VARIABLE = "PARAMSERVER_PATHS"
WINDOW = 4  # pushes sent without waiting for anybody's average (`paramserver.protocol.pacing`)
FAR_BELOW = 0.25  # of its share of what was measured
ROUNDS = 5  # in a row


class Chosen(msgspec.Struct, frozen=True):
    """A worker's path: its own address (None: its system decides), the server's, and how many bytes
    a second came up when it was measured, on a link that was otherwise idle, and by what."""

    worker: int
    near: str | None
    far: str
    bytes_per_s: float
    by: str = "make up"


def write(chosen: list[Chosen]) -> str:
    return msgspec.json.encode(chosen).decode()


def read(environment: Mapping[str, str]) -> Paths | None:
    """What this environment tells; None where nothing was chosen."""
    text = environment.get(VARIABLE)
    try:
        return Paths(msgspec.json.decode(text, type=list[Chosen])) if text else None
    except msgspec.DecodeError:  # nobody's but `up`'s to write: without it the run goes on as well
        return None


@dataclass
class _Round:
    """The first pushes of a worker's round: the time of the first one, ready there and come here,
    and the same of the last with the bytes after the first."""

    number: int
    ready: float
    came: float
    last_ready: float
    last_came: float
    count: int = 1
    bytes: int = 0


class Paths:
    """The chosen paths, and how they do."""

    def __init__(self, chosen: list[Chosen]) -> None:
        self._chosen = {each.worker: each for each in chosen}
        self._sharing = Counter(each.far for each in chosen)
        self._rounds: dict[int, _Round] = {}
        self._slow: Counter[int] = Counter()  # rounds in a row
        self._told: set[tuple[int, str]] = set()

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
        elif open_one.count < WINDOW:
            open_one.count += 1
            open_one.bytes += size
            open_one.last_ready, open_one.last_came = ready_s, now
        return told

    def _judge(self, chosen: Chosen, name: str, done: _Round) -> list[str]:
        """Whether this round's pushes were long under way. A worker whose backward is slow has them
        ready no sooner than they come: that says nothing about its link."""
        took, computed = done.last_came - done.came, done.last_ready - done.ready
        share = chosen.bytes_per_s / self._sharing[chosen.far]
        waited = done.count > 1 and took > 0 and took > 2 * computed
        slow = waited and done.bytes < FAR_BELOW * share * took
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
