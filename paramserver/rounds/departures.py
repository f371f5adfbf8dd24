"""How each worker left, and what follows when no worker is left.

A worker that left in order does not come back by itself; a supervisor may start a failed one again;
a silent one (power, a cable, `kill -9`) may still be there, or come back.

Any worker can greet and leave. For others may be away for a moment, the run ends only when one has
left of which something is in the log, or, while nothing is there yet, when as many as were expected
have taken part.
"""

from __future__ import annotations

import msgspec

LEFT, FAILED, SILENT = "left", "failed", "fell silent"
FAILED_TIMEOUTS = 3  # heartbeat timeouts that a supervisor has to start a failed worker again
NAMED_MAX, REASON_MAX = 4, 200  # workers, and characters of each reason, in one sentence


class Departure(msgspec.Struct, frozen=True):
    name: str
    how: str
    reason: str
    at: float
    finished: bool = False
    """It left because its work is done."""


class Departures:
    """The newest departure of each worker. Times are those of `Rounds`; the server
    waits `silent_s` for a silent worker, and `timeout_s` or a multiple of it for others. It keeps
    one departure for each worker id at most. `expected`: so many workers are to take part.
    `goes_on`: the log had begun before this server."""

    def __init__(self, timeout_s: float, silent_s: float, expected: int) -> None:
        self._timeout_s, self._silent_s = timeout_s, silent_s
        self._expected = expected
        self._went: dict[int, Departure] = {}
        self.goes_on = False
        self._took_part: set[int] = set()
        self._contributed: set[int] = set()
        self._missing: dict[int, Departure] = {}
        self._since = 0.0

    def stood_still(self, seconds: float) -> None:
        """This time of waiting does not count."""
        self._since += seconds

    def joined(self, id: int) -> None:
        """This worker takes part."""
        self._took_part.add(id)
        self._missing.pop(id, None)

    def contributes(self, id: int) -> None:
        """Something of this worker is in the log."""
        self._contributed.add(id)

    def went(self, id: int, departure: Departure) -> None:
        """This worker has left."""
        self._since = departure.at
        if departure.finished:
            self._missing.pop(id, None)
        else:
            self._missing[id] = departure
        if id in self._took_part:
            self._went[id] = departure

    def missing(self, *how: str) -> str:
        """Who left and has not come back, and why, whether it had taken part or not; empty: nobody.
        For a sentence about those who are waited for. With `how`, only those who went so."""
        return _told([d for _, d in sorted(self._missing.items()) if not how or d.how in how])

    def due(self, now: float) -> float | None:
        """When the run ends, if no worker is here and none comes; None while the server waits for a
        silent one, or if none has taken part whose leaving counts."""
        how = {d.how for d in self._went.values() if not self._is_given_up(d, now)}
        if SILENT in how or not how or not self.counts:
            return None
        return self._since + self._timeout_s * (FAILED_TIMEOUTS if FAILED in how else 1)

    @property
    def counts(self) -> bool:
        """Has one left of which something is in the log, or have all taken part who were
        expected?"""
        all_came = self._nothing_yet and not self.to_come
        return all_came or bool(self._went.keys() & self._contributed)

    @property
    def _nothing_yet(self) -> bool:
        """Is nothing in the log?"""
        return not (self._contributed or self.goes_on)

    @property
    def to_come(self) -> int:
        """How many workers are still to come, before there is a first update."""
        return max(0, self._expected - len(self._took_part)) if self._nothing_yet else 0

    @property
    def all_finished(self) -> bool:
        """Did every worker that took part leave because its work is done? One at least must have
        done some."""
        finished = all(d.how == LEFT and d.finished for d in self._went.values())
        return finished and bool(self._went.keys() & self._contributed)

    def verdict(self, *, own: bool) -> tuple[str, bool]:
        """Why the run ends when all workers have left, and whether that is an error. `own`: each
        had samples of its own, so that a worker that left in order leaves no work undone."""
        went = sorted(self._went.items())
        left = [d for _, d in went if d.how == LEFT]
        others = [d for _, d in went if d.how != LEFT]
        if not own and self.all_finished:
            return "every worker has finished, before all samples were done", False
        if not own:
            all_failed = not left and all(d.how == FAILED for d in others)
            what = "failed" if all_failed else "left before all samples were done"
            return f"every worker has {what}: {_told([*others, *left])}", True
        what = "finished" if all(d.finished for d in left) else "left"
        if not left:
            return f"no worker has finished: {_told(others)}", True
        if others:
            return f"every worker has {what}, except: {_told(others)}", False
        return f"every worker has {what}", False

    def _is_given_up(self, departure: Departure, now: float) -> bool:
        return departure.how == SILENT and now - departure.at > self._silent_s


def _told(departures: list[Departure]) -> str:
    told = [
        f"{d.name} {d.how}" + (f": {d.reason[:REASON_MAX]}" if d.reason else "")
        for d in departures[:NAMED_MAX]
    ]
    if len(departures) > NAMED_MAX:
        told.append(f"and {len(departures) - NAMED_MAX} more")
    return "; ".join(told)
