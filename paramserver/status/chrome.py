"""The rounds of the last minute as a Chrome trace: Perfetto (ui.perfetto.dev) opens it.

`Recorder` collects the rounds of the statuses that a watcher gets. Statuses have the newest rounds
only, so where rounds are short, some are missing; those that are there lie where they happened.
Pure.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any

from paramserver.status.value import PARTS, RoundTimes, Status

MINUTE_S = 60.0
TIMES_KEPT = 10_000
"""Times of workers in rounds that are kept, in all: with many workers, or short rounds, they are of
less than a minute."""
ORDER = ("wait", "cable", "compute", "encode", "late")
"""How the parts of a round are laid one after another: a worker first waits for the end of the
round before. That is an order for the eye: in truth they overlap."""


class Recorder:
    """The rounds of the last minute, of the statuses that it was given."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[float, RoundTimes]] = deque()
        self._times = 0  # in them
        self._hosts: dict[int, str] = {}

    def add(self, status: Status) -> None:
        """Take the rounds of this status that are newer than those before."""
        newest = self._rounds[-1][1].step if self._rounds else -1
        if self._rounds and status.step < newest:  # another run, or an older state
            self._rounds.clear()
            self._times, newest = 0, -1
        at, found = status.made_at, list[tuple[float, RoundTimes]]()
        for took in reversed(status.rounds):
            if took.step <= newest:
                break
            found.append((at, took))  # about when it closed
            at -= took.seconds
            self._times += len(took.workers)
        self._rounds.extend(reversed(found))
        self._hosts |= {machine.id: machine.name for machine in status.machines}
        since = status.made_at - MINUTE_S
        while self._rounds and (self._rounds[0][0] < since or self._times > TIMES_KEPT):
            self._times -= len(self._rounds.popleft()[1].workers)

    def trace(self) -> dict[str, Any]:
        """In Chrome's format, with a track for each worker; times in microseconds."""
        events: list[dict[str, Any]] = []
        begin = self._rounds[0][0] - self._rounds[0][1].seconds if self._rounds else 0.0
        workers = sorted({worker for _, took in self._rounds for worker in took.workers})
        for worker in workers:
            name = {"name": self._hosts.get(worker, f"worker {worker}")}
            events.append({"ph": "M", "pid": 1, "tid": worker, "name": "thread_name", "args": name})
        ends: dict[int, float] = {}
        for closed_at, took in self._rounds:
            for worker, times in took.workers.items():
                at = max(ends.get(worker, begin), closed_at - max(took.seconds, times.total))
                for part in ORDER:
                    seconds = getattr(times, part)
                    if seconds > 0:
                        events.append(
                            {
                                "ph": "X",
                                "pid": 1,
                                "tid": worker,
                                "name": part,
                                "cat": "round",
                                "ts": round(1e6 * (at - begin), 1),
                                "dur": round(1e6 * seconds, 1),
                                "args": {"step": took.step},
                            }
                        )
                        at += seconds
                ends[worker] = at
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def to_json(self) -> str:
        return json.dumps(self.trace())


assert set(ORDER) == set(PARTS)
