"""The ledger: which samples of which epoch are leased, done, or still to do.

The work of a run is one endless queue of ranges, epoch after epoch without a barrier. A lease takes
a range from its head; the last range of an epoch may be short. What comes back is put in front, in
its old order, so that nothing is skipped, and what has been counted never comes back, so that
nothing is applied twice. At any time, in samples:

    done + partly + skipped + leased + returned + ahead = epochs * samples

Where workers bring samples of their own there is nothing to lease out: `OwnLedger` counts what they
tell.

No clock, no socket; the state goes as a small dict into every close (`state`, `from_state`).
"""

from __future__ import annotations

import bisect
from typing import Any

import msgspec

from paramserver.wire import OWN, Lease

DONE, PARTLY, SKIPPED, RETURNED = "done", "partly", "skipped", "returned"


class LedgerState(msgspec.Struct, frozen=True):
    """What a replica keeps of a ledger. Leases that were out count as waiting again."""

    samples: int
    epochs: int
    head: tuple[int, int]
    waiting: tuple[Lease, ...]
    done: int
    partly: int
    skipped: int
    own: bool = False
    """It was an `OwnLedger`."""


class Ledger:
    """Samples of `epochs` passes over a set of `samples`; see the module's head."""

    def __init__(self, samples: int, epochs: int) -> None:
        self.samples = samples
        self.epochs = epochs
        self.done = 0
        self.partly = 0
        self.skipped = 0
        self._epoch, self._start = 0, 0  # the head of what was never leased
        self._waiting: list[Lease] = []  # returned ranges, sorted; they go first
        self._leased: set[Lease] = set()

    def lease(self, size: int) -> Lease | None:
        """The next range of at most `size` samples; None when nothing is left to lease."""
        if size < 1:
            raise ValueError("a lease holds at least one sample")
        if self._waiting:
            epoch, start, stop = self._waiting.pop(0)
            if stop - start > size:
                self._waiting.insert(0, (epoch, start + size, stop))
                stop = start + size
        else:
            if self._epoch >= self.epochs or self.samples == 0:
                return None
            epoch, start = self._epoch, self._start
            stop = min(start + size, self.samples)
            self._epoch, self._start = (epoch, stop) if stop < self.samples else (epoch + 1, 0)
        taken = (epoch, start, stop)
        self._leased.add(taken)
        return taken

    def settle(self, lease: Lease, how: str) -> None:
        """End a lease: done, partly, skipped (all counted) or returned to the queue's head."""
        self._leased.remove(lease)
        size = lease[2] - lease[1]
        if how == DONE:
            self.done += size
        elif how == PARTLY:
            self.partly += size
        elif how == SKIPPED:
            self.skipped += size
        elif how == RETURNED:
            bisect.insort(self._waiting, lease)
        else:
            raise ValueError(how)

    @property
    def exhausted(self) -> bool:
        """Nothing left to lease (leases may still be out, and come back)."""
        return not self._waiting and (self._epoch >= self.epochs or self.samples == 0)

    @property
    def finished(self) -> bool:
        return self.exhausted and not self._leased

    @property
    def counted(self) -> int:
        """Samples that are settled for good."""
        return self.done + self.partly + self.skipped

    @property
    def total(self) -> int:
        return self.samples * self.epochs

    def leased(self) -> int:
        return sum(stop - start for _, start, stop in self._leased)

    def unleased(self) -> int:
        waiting = sum(stop - start for _, start, stop in self._waiting)
        return waiting + max(0, (self.epochs - self._epoch) * self.samples - self._start)

    def state(self) -> dict[str, Any]:
        """JSON-ready; leases that are out are written as waiting, as a restart would see them."""
        return {
            "samples": self.samples,
            "epochs": self.epochs,
            "head": (self._epoch, self._start),
            "waiting": sorted([*self._waiting, *self._leased]),
            "done": self.done,
            "partly": self.partly,
            "skipped": self.skipped,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], epochs: int | None = None) -> Ledger:
        """The ledger that `state` tells of, with `epochs` in place of its own if given.

        Raises `msgspec.ValidationError` (a ValueError) for what no ledger can have told.
        """
        s = msgspec.convert(state, LedgerState)
        epoch, start = s.head
        waiting = sorted(s.waiting)
        counts = (s.samples, s.epochs, s.done, s.partly, s.skipped, epoch, start)
        if min(counts) < 0 or start >= max(1, s.samples):
            raise msgspec.ValidationError("the ledger's numbers cannot be right")
        before = (0, 0)  # ranges lie apart, and behind the head
        for lease in waiting:
            if not (0 <= lease[1] < lease[2] <= s.samples and before <= lease[:2]):
                raise msgspec.ValidationError(f"{lease} cannot wait in the ledger")
            before = (lease[0], lease[2])
        if before > s.head:
            raise msgspec.ValidationError("what waits in the ledger was never leased")
        if s.own and (s.samples, s.head, waiting) == (0, (0, 0), []):
            own = OwnLedger()
            own.done, own.partly, own.skipped = s.done, s.partly, s.skipped
            return own
        spans = sum(stop - start for _, start, stop in waiting)
        if s.done + s.partly + s.skipped + spans != epoch * s.samples + start:
            raise msgspec.ValidationError("the ledger's sums do not agree")
        ledger = cls(s.samples, s.epochs if epochs is None else epochs)
        ledger.done, ledger.partly, ledger.skipped = s.done, s.partly, s.skipped
        ledger._epoch, ledger._start = s.head
        ledger._waiting = waiting
        return ledger


class OwnLedger(Ledger):
    """Of a run whose workers bring samples of their own: what they tell is counted, no more.

    There is always another lease, `OWN`, and what is returned is forgotten: it is the worker's.
    """

    def __init__(self) -> None:
        super().__init__(samples=0, epochs=0)

    def lease(self, size: int) -> Lease | None:
        return OWN

    def settle(self, lease: Lease, how: str) -> None:
        """`lease` is (0, 0, so many samples as were told)."""
        if how != RETURNED:
            self._leased.add(lease)
            super().settle(lease, how)

    @property
    def exhausted(self) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {**super().state(), "own": True}
