"""Rounds of local steps, as a worker goes through them: the steps of this round, and the exchange
of the one before, which may be under way meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from paramserver.protocol.messages import Lease

from .batches import Sizes
from .contribution import Contribution

if TYPE_CHECKING:
    from .link.client import Client
    from .link.solo import Solo
    from .replica.gradients import Gradients
    from .replica.outer import Outer
    from .replica.replica import Replica


class LocalRounds:
    """Where this worker stands in its local steps. `part` is what it contributes."""

    def __init__(
        self,
        client: Client | Solo,
        replica: Replica,
        gradients: Gradients,
        part: Contribution,
        settled: Callable[[], None],
        *,
        worker: int,
        overlap: bool,
    ) -> None:
        """`settled` is called when an exchange is over."""
        self._client, self._replica, self._gradients = client, replica, gradients
        self._part, self._settled = part, settled
        self._worker, self._overlap = worker, overlap
        self.most = 1
        """Optimizer steps that are made by ourselves in a round, at most; 1: none, gradients are
        exchanged."""
        self.left = 0
        """Those that follow this one."""
        self.exchanged = False
        """What they came to has left."""
        self.under_way: int | None = None
        """The round that is exchanged while we go on"""
        self.ahead: Lease | None = None
        """with this lease."""
        self._outer: Outer | None = None

    def begin(self, steps: int) -> None:
        """A round begins in which this worker makes so many optimizer steps by itself, or fewer."""
        self._outer = self._replica.begin_local()
        self._gradients.begin_local()
        self._part.begin_local()
        self.left = steps
        self.exchanged = False

    def step(self, batch: Sizes) -> None:
        """Make one, with the gradient of this batch."""
        self._replica.step_locally()
        self._part.add(batch)

    def send(self, last_epoch: int | None = None, *, go_on: bool = True) -> bool:
        """Send what the steps of this round came to. True where the next lease can be worked on
        meanwhile: with `overlap`, where it is known and not of an epoch behind `last_epoch`."""
        assert self._outer is not None and self._client.follow is not None
        self.exchanged = True
        self._gradients.send_local(self._outer)
        if self._overlap and go_on:
            self.ahead = self._client.follow.lease_ahead(self._worker)
            if self.ahead is not None and last_epoch is not None and self.ahead[0] > last_epoch:
                self.ahead = None
        if self.ahead is None:
            return False
        self.under_way = self._part.round
        self._replica.run_ahead()
        return True

    def is_open(self) -> bool:
        """Is the round still open in which this worker makes steps of its own, or will it be the
        next one? Where the exchange before it ends now, it begins now."""
        client, follow = self._client, self._client.follow
        assert follow is not None
        going_on = self._replica.local and client.ended is None
        if not going_on or client.greetings != self._part.greetings:
            self._stay()
            return False
        if self.under_way is None:
            return not follow.is_over(self._part.round)
        if not follow.is_over(self.under_way):
            return True
        found = follow.lease(self._worker, self.under_way)
        if found is None:
            return True  # it is not open yet
        lease = self.ahead
        self.settle()
        if found[1] != lease:
            self._stay()
            return False
        self._part.round = found[0]
        return True

    def settle(self) -> None:
        """The exchange of a round is over."""
        self._settled()
        self.under_way, self.ahead = None, None

    def greeted(self, greetings: int) -> None:
        """This worker has greeted again: rounds of before are not its own any more."""
        self._part.greetings, self._part.round = greetings, 0
        if self.under_way is not None:
            self._stay()

    def _stay(self) -> None:
        """Go on from the anchor: steps that were made ahead are void."""
        if self.under_way is not None:
            self.settle()
        self._replica.come_back()
