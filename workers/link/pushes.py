"""The buckets of one round on their way to the server: where their numbers lie, and when each goes.

Where the server is on this host, numbers are written into the slots of an outbox, which the server
reads where they lie (`paramserver.transport.shm`). `paramserver.protocol.pacing` tells when the
next push may be sent. No socket and no clock in here: `now` comes in, and what is to be sent comes
out.
"""

from __future__ import annotations

from typing import Any

import msgspec
from torch import Tensor

from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import Pacer
from paramserver.tensors.codec import fresh
from paramserver.transport import shm

WAIT_S = 0.05


class Pushes:
    """The pushes of a round: `room` for a bucket's numbers, `add` when it is complete, and send
    what is `due`; `forget` the rest when the round is over."""

    def __init__(self) -> None:
        self._outbox: shm.Outbox | None = None
        self._moves = True
        """The outbox's slots become free soon: in this round nobody has waited for one in vain."""
        self._filled: dict[int, shm.Slot] = {}  # by bucket: not complete yet
        self._pacer: Pacer[tuple[wire.Push, list[Any], shm.Slot | None]] = Pacer()

    def begin(self, outbox: shm.Outbox | None) -> None:
        """The peer joins (again), with an outbox of its own or with none: all before is void."""
        self._outbox = outbox
        self._filled.clear()
        self._pacer.begin()

    def without_outbox(self) -> None:
        """The server does not read it: everything goes through the socket."""
        self._outbox = None
        self._filled.clear()

    def room(self, bucket: int, nbytes: int) -> Tensor:
        """Memory for what is sent of this bucket, uint8 [nbytes]: a slot of the outbox where one is
        free. Never waits."""
        self._free(self._filled.pop(bucket, None))  # of a push that did not come to be
        slot = None if self._outbox is None else self._outbox.room(nbytes)
        if slot is None:
            return fresh(nbytes)
        self._filled[bucket] = slot
        return slot.tensor

    @property
    def full(self) -> bool:
        """Is it worth while to wait until the next bucket has a slot?

        A little waiting costs less than sending through the socket: the server is busy either way.
        """
        return self._moves and self._outbox is not None and self._outbox.full

    def waited_in_vain(self) -> None:
        """No slot became free: others are what the averages wait for. Once in a round is enough."""
        self._moves = False

    def add(self, push: wire.Push, buffers: list[Any], now: float) -> None:
        """A bucket is complete; its buffers are not the caller's from now on."""
        slot = self._filled.pop(push.bucket, None)
        self._pacer.add(push.bucket, (push, buffers, slot), now)

    def averaged(self, bucket: int, now: float) -> None:
        """The average of a bucket has come."""
        self._pacer.averaged(bucket, now)

    def due(self, now: float) -> list[tuple[wire.Push, list[Any]]]:
        """What is to be sent now, each push with the buffers that travel with it: none where the
        server reads them in the outbox."""
        found: list[tuple[wire.Push, list[Any]]] = []
        for push, buffers, slot in self._pacer.due(now):
            if slot is None or self._outbox is None:
                found.append((push, buffers))
            else:
                found.append((msgspec.structs.replace(push, places=(slot.place,)), []))
        return found

    def forget(self) -> None:
        """The round is over: what has not been sent is of no use any more."""
        self._moves = True
        for _, _, slot in self._pacer.begin():
            self._free(slot)
        for slot in self._filled.values():
            self._free(slot)
        self._filled.clear()

    def _free(self, slot: shm.Slot | None) -> None:
        if slot is not None and self._outbox is not None:
            self._outbox.free(slot.place[2])
