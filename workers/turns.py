"""Several pairs of a model and its optimizer, as a worker's loop steps them: a lease is for all
rounds from one batch to the next."""

from __future__ import annotations

from .contribution import Contribution
from .link.client import Client
from .link.solo import Solo


class Turns:
    """Where this worker stands among the steps with its lease. `part` is what it contributes."""

    def __init__(self, client: Client | Solo, part: Contribution, *, worker: int) -> None:
        self._client, self._part, self._worker = client, part, worker
        self.pair = ""
        """Whose step it is, or was the last time."""
        self._began, self._made = 0, 0  # the lease's first round; steps since then
        self._asked = 0  # the round in which the next lease was asked for

    def begin(self, began: int) -> None:
        """A batch begins, whose lease `began` in this round; 0: leases are for one round."""
        self._began, self._made = began, 0

    def lost(self) -> None:
        """Rounds are those of another session: none of them is of the lease."""
        self._began = self._asked = 0

    @property
    def next(self) -> int:
        """The round of the next step: each step has its place, also one that is missed."""
        return self._began + self._made

    def made(self) -> None:
        """A step was made, or came to nothing."""
        self._made += 1

    def may_step(self) -> bool | None:
        """Does the lease go on in the round of the next step? None while that is not open yet."""
        client = self._client
        if client.greetings != self._part.greetings or client.ended is not None:
            return False
        assert client.follow is not None
        return client.follow.may_step(self._worker, self._began, self.next)

    def ask_for_next(self) -> None:
        """All steps with the lease are made: ask for the next one, where that goes on."""
        if not self._began or self._client.ended is not None:
            return
        assert self._client.follow is not None
        number = self._client.follow.asks_in(self._worker, self._began)
        if number is not None and number > self._asked:
            self._asked = number
            self._client.next_lease(number)
