"""The memory that a peer shares with a shard on its host: the shard's ring, and an outbox.

The shard's end is `paramserver.shard.memory`, which says how the two agree. What cannot be used is
said once, and those numbers go through the channel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from paramserver.protocol import messages as wire
from paramserver.transport import shm
from paramserver.transport.sealing import Share

Slower = Callable[[str, str], object]


class Shared:
    """For one channel, whose key has this `id`, to a shard whose memory lies in `folder`. An outbox
    has slots of `slot_bytes`; 0: this peer pushes nothing. `slower` gets what goes through a
    socket, and why."""

    def __init__(self, folder: Path, id: str, slot_bytes: int, slower: Slower) -> None:
        self.ready = Share.NOTHING
        """What this peer is ready to use."""
        self.outbox: shm.Outbox | None = None
        """For pushes, once the shard has agreed."""
        self._slower = slower
        self._made: shm.Outbox | None = None
        self._ring: shm.Ring | None = None
        self._path = shm.channel_path(folder, id)
        try:
            self._ring = shm.Ring(shm.ring_path(folder))
            self.ready |= Share.RING
        except FileNotFoundError:
            slower("averages", "there is no room for them")
        except OSError as e:
            slower("averages", e.strerror or str(e))
        except ValueError as e:  # it is no ring
            slower("averages", str(e))
        if not slot_bytes:
            return
        try:
            shm.check(shm.outbox_bytes(slot_bytes), folder)
            self._made = shm.Outbox(self._path, slot_bytes)
            self.ready |= Share.OUTBOX
        except OSError as e:
            slower("gradients", e.strerror or str(e))

    def agreed(self, share: Share) -> None:
        """The shard has said what both use."""
        missing = self.ready & ~share
        if Share.OUTBOX in missing:
            self._slower("gradients", "the shard cannot use it")
        if Share.RING in missing:
            self._slower("averages", "the shard cannot use it")
        self.outbox = self._made if Share.OUTBOX in share else None
        self._path.unlink(missing_ok=True)

    def blocks(self, told: Any) -> shm.Blocks | None:
        """The buffers of an average, from the record that tells where they lie; None where that
        cannot be."""
        if self._ring is None:
            return None
        try:
            return self._ring.blocks(msgspec.msgpack.decode(told, type=wire.Places))
        except (msgspec.DecodeError, ValueError):
            return None

    def close(self) -> None:
        """The channel is over."""
        self.outbox = self._made = None
        self._path.unlink(missing_ok=True)


__all__ = ["Shared"]
