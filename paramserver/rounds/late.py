"""Late work that is carried over: a gradient that its round did not wait for, and that enters a
later one.

With `max_staleness` of s > 0 a round does not wait long. A member that is late, and of which
nothing came, is **carried**: it keeps its lease, and its pushes for that round are kept until the
gradient is complete. It enters the next round of which no bucket is averaged yet, all of it or
nothing, as long as at most s updates were made since the one that it was made at; what it weighs is
multiplied by `weight_of_late`. Its samples are settled then, once. While a worker is carried it has
no other lease, and no round waits for it.
"""

from __future__ import annotations

from msgspec import UNSET

from paramserver.protocol.messages import Lease, Push
from paramserver.rounds.round import Member, misfit

WAIT_TIMES = 1.5
"""As long as the workers' median push takes, a round lasts where late work is carried over."""
WAIT_MIN_S = 0.02
"""After its quorum it waits at least so long: what only a scheduler delays is not late."""


def weight_of_late(lag: int) -> float:
    """The share of its usual weight that a gradient has after so many updates that it was made
    without."""
    return float((1 + lag) ** -0.5)


class Carried:
    """What a worker brings late. `round` is that of its lease, which led to `step`; `member` is its
    part in the round that it will enter."""

    def __init__(self, round: int, step: int, lease: Lease, member: Member, buckets: int) -> None:
        self.round = round
        self.step = step
        self.lease = lease
        self.member = member
        self.pushes: list[Push] = []
        self._buckets = buckets
        self.made_at = step - 1
        """The step of the log at which the gradient was made."""

    @property
    def is_complete(self) -> bool:
        """Has all of it come, or was it refused?"""
        member = self.member
        return member.bad is not None or len(member.got) + len(member.without) == self._buckets

    def refusal(self, push: Push, step: int, tensors: int) -> str | None:
        """Why this push must not be used, where the log stands at `step`; None when its payload may
        be looked at."""
        made_at = self.step - 1 if push.made_at is UNSET else push.made_at
        if not self.step - 1 <= made_at <= step or (self.pushes and made_at != self.made_at):
            return f"a gradient of round {self.round} cannot have been made at step {made_at}"
        return misfit(self.member, push, buckets=self._buckets, tensors=tensors)

    def take(self, push: Push) -> None:
        """Keep a push that `refusal` let pass and whose numbers are good."""
        if push.made_at is not UNSET:
            self.made_at = push.made_at
        self.pushes.append(push)
        self.member.got.add(push.bucket)
        self.member.without.update(push.without)

    def refuse(self, why: str) -> list[int]:
        """Nothing of it is used: its samples are skipped. Returns the buckets that were kept."""
        self.member.bad = why
        return self.empty()

    def empty(self) -> list[int]:
        """Forget what has come; returns its buckets."""
        kept = [push.bucket for push in self.pushes]
        self.pushes.clear()
        self.member.got.clear()
        self.member.without.clear()
        return kept
