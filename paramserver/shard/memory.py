"""What a shard shares with replicas on its host: its averages, and their pushes.

The shard has a ring, and each worker an outbox (`paramserver.transport.shm`), as between the server
and peers on its own host. Both lie in a folder that only this user may enter, whose name travels in
Channel. In the first records of a channel its ends say what they use (`sealing.Share`): a worker
makes its outbox under the name of the channel's key before it connects, and the shard opens it.
From then on a record tells of a push or an average where it lies. Whatever cannot be used is not
said to be, and those numbers go through the channel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from torch import Tensor

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.tensors.bucket import BucketPlan
from paramserver.tensors.codec import fresh
from paramserver.transport import shm
from paramserver.transport.sealing import Share

Release = Callable[[], None]

OUTBOXES = 2
"""A ring takes one part in so many of what may be taken: the rest is for the peers' outboxes."""

OPEN_ROUND = 2
"""The averages of the open round take one part in so many of the ring, so that none is written over
before it is read; more than that goes through channels."""


class Memory:
    """The memory that one shard shares; see the module's docstring. `history`: bytes of averages
    that the shard keeps, which lie in the ring."""

    def __init__(self, history: int, *, wanted: bool = True) -> None:
        self._history = history
        self._private = shm.shared_folder() if wanted else None
        self._ring: shm.Ring | None = None
        self._outboxes: dict[bytes, shm.Outbox] = {}  # by the id of the channel's key
        self._open_bytes = 0  # of the ring, taken for the open round
        self._places: dict[int, list[shm.Place] | None] = {}  # by bucket; None: not all lie there

    @property
    def folder(self) -> str:
        return "" if self._private is None else str(self._private.path)

    def begin(self, plan: BucketPlan) -> None:
        """Make a ring for the averages of this plan, where there is room for two rounds, in which a
        shard has half of them; channels and rings before are over."""
        self._outboxes.clear()
        self._ring = None
        self.over()
        if self._private is None:
            return
        path = shm.ring_path(self._private.path)
        path.unlink(missing_ok=True)
        least = plan.nbytes + 4 * plan.largest_bytes
        room = shm.room(self._private.path) // OUTBOXES
        if room < least:
            return  # its peers say that they read no ring
        with suppress(OSError):  # the same
            self._ring = shm.Ring(path, min(max(self._history, least), room))

    # ------------------------------------------------------------------ channels

    def bound(self, id: bytes, ready: Share) -> Share:
        """See `channels.Sharing`."""
        share = Share.NOTHING
        if Share.RING in ready and self._ring is not None:
            share |= Share.RING
        if Share.OUTBOX in ready and self._private is not None:
            path = shm.channel_path(self._private.path, id.hex())
            try:
                self._outboxes[id] = shm.Outbox(path)
                path.unlink()  # both have it mapped, so the name is not needed any more
                share |= Share.OUTBOX
            except (OSError, ValueError):
                pass  # its pushes come through the channel, and it says so
        return share

    def forget(self, id: bytes) -> None:
        self._outboxes.pop(id, None)

    def located(self, id: bytes, push: wire.Push, buffers: list[Any]) -> tuple[list[Any], Release]:
        """The buffers of a push that came through the channel with this key, or that lie in its
        peer's outbox, and what releases them. Raises `PeerError` for impossible places."""
        if not push.places:
            return buffers, _nothing
        outbox = self._outboxes.get(id)
        if outbox is None:
            raise PeerError("it has no outbox here")
        return outbox.buffers(push.places), partial(outbox.free_all, push.places)

    # ------------------------------------------------------------------ averages

    def room(self, bucket: int, nbytes: int) -> Tensor:
        """Memory for a buffer of this bucket's average."""
        ring = self._ring
        if ring is None or OPEN_ROUND * (self._open_bytes + nbytes) > ring.nbytes:
            self._places[bucket] = None
            return fresh(nbytes)
        slot = ring.room(nbytes)
        self._open_bytes += nbytes + 2 * shm.ALIGN
        places = self._places.setdefault(bucket, [])
        if places is not None:
            places.append(slot.place)
        return slot.tensor

    def places(self, bucket: int) -> bytes | None:
        """Where the average of this bucket lies, for the peers that read the ring; None: it does
        not lie there as a whole."""
        places = self._places.get(bucket)
        return None if places is None else msgspec.msgpack.encode(places)

    def over(self) -> None:
        """The round is over."""
        self._places.clear()
        self._open_bytes = 0

    @property
    def newest(self) -> int:
        """The stamp of the next block; blocks before `oldest` are written over."""
        return 0 if self._ring is None else self._ring.next

    @property
    def oldest(self) -> int:
        return 0 if self._ring is None else self._ring.oldest

    def close(self) -> None:
        """Remove the folder; who has mapped what lies there keeps that."""
        self._ring = None
        self._outboxes.clear()
        if self._private is not None:
            self._private.close()
            self._private = None


def _nothing() -> None:
    pass


__all__ = ["Memory"]
