"""Memory that processes of one host share, so that numbers need not travel through the kernel.

Between peers on the server's own host only headers go through sockets; a header says where the
numbers lie. Two kinds, each a file in a private folder of /dev/shm that its maker writes:

* an **outbox** belongs to a worker and holds the buckets on their way up: a few slots, each free or
  not. The worker takes a free one, the server frees it when the numbers are added (or refused). If
  none is free the bucket goes through the socket.
* a **ring** belongs to the server and holds averages, newest over oldest. Each block has a stamp; a
  reader that was too slow sees another stamp and sends a Fetch, as if PUB had dropped the message.

A shard and the peers on its host do the same.

Everything works without it (other hosts, other systems, a full /dev/shm, `shared_memory=false`),
only slower.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from paramserver.errors import PeerError
from paramserver.transport.private_dir import PrivateFolder

SHARED = Path("/dev/shm")
ALIGN = 64  # bytes: a cache line
STATES = 4096  # bytes at an outbox's start, one for each slot
FREE, TAKEN = 0, 1
OUTBOX_SLOTS = 5
RING_UPDATES = 4
"""A ring for fewer updates is none: whoever falls behind by so few needs a snapshot each time."""

Place = tuple[int, int, int]
"""Offset and length in bytes, and the stamp (of a ring) or the slot (of an outbox)."""


def shared_folder() -> PrivateFolder | None:
    """A new private folder for this server's shared memory; None where there cannot be one."""
    if not SHARED.is_dir() or not hasattr(os, "posix_fallocate"):
        return None
    try:
        return PrivateFolder(SHARED)
    except OSError:
        return None


def room(folder: Path) -> int:
    """Bytes of shared memory that this project may still use where this folder lies.

    Half of the total stays free for others. Measured with docker's default of 64 MB: two workers,
    each with a DataLoader of two processes and batches of 3 MB. Beside two outboxes of 20 MB one of
    the workers died ("unable to allocate shared memory"); beside one, all went well.
    """
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    if status.f_blocks == 0:  # without a limit
        return sys.maxsize
    return max(0, status.f_frsize * (status.f_bavail - status.f_blocks // 2))


def check(size: int, folder: Path) -> None:
    """Raises OSError where there is no `room` for it."""
    if size > room(folder):
        raise OSError(errno.ENOSPC, "half of it is left to others")


class Memory:
    """A file of shared memory, mapped. With `size` it is made, else opened.

    Raises OSError where there is no memory for it, it cannot be mapped, or there is none.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        new = size is not None
        fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
        try:
            if size is not None:
                os.posix_fallocate(fd, 0, size)  # otherwise full memory would be a crash, later
            self.map = mmap.mmap(fd, os.fstat(fd).st_size)
        except (OSError, ValueError) as e:  # ValueError: an empty file
            if new:
                with suppress(OSError):
                    path.unlink()
            raise e if isinstance(e, OSError) else OSError(errno.EINVAL, str(e)) from None
        finally:
            os.close(fd)
        # A page's first touch costs more than the numbers in it: without this the sums of 1.35 MB
        # take five times as long until a ring of 256 MiB has gone round. Other threads go on.
        np.frombuffer(self.map, dtype=np.uint8)[:: mmap.PAGESIZE].max()
        self.size = len(self.map)
        self.tensor = torch.frombuffer(self.map, dtype=torch.uint8)
        self.view = memoryview(self.map)


class Slot(NamedTuple):
    """A part of an outbox or a ring, taken for one buffer."""

    tensor: Tensor
    """Its memory, uint8 [nbytes]."""
    place: Place
    """Its place, for a header."""

    def fill(self, content: Any) -> None:
        """Write a buffer of that length there."""
        self.tensor.numpy()[:] = np.frombuffer(content, dtype=np.uint8)

    def copy(self) -> Any:
        """What lies there, in memory of its own."""
        return self.tensor.clone().numpy().data


def outbox_path(folder: Path, session: str, number: int) -> Path:
    """Where a worker makes its outbox; a new one each time it joins."""
    return folder / f"{session}-{number}"


def channel_path(folder: Path, id: str) -> Path:
    """Where a worker makes its outbox for the shard at the other end of a channel: `id` is that of
    its key, in hexadecimal."""
    return folder / f"channel-{id}"


def ring_path(folder: Path) -> Path:
    """Where the ring lies."""
    return folder / "ring"


def outbox_bytes(slot_bytes: int) -> int:
    """The size of an outbox with slots of this size."""
    return STATES + OUTBOX_SLOTS * (-(-slot_bytes // ALIGN) * ALIGN)


class Outbox:
    """A worker's slots for buckets on their way to the server; both sides have one of these."""

    def __init__(self, path: Path, slot_bytes: int | None = None) -> None:
        """With `slot_bytes` it is made, by the worker; else opened, by the server."""
        size = None if slot_bytes is None else outbox_bytes(slot_bytes)
        self._memory = Memory(path, size)
        self._slot_bytes = (self._memory.size - STATES) // OUTBOX_SLOTS
        self._states = np.frombuffer(self._memory.map, dtype=np.uint8, count=OUTBOX_SLOTS)

    def room(self, nbytes: int) -> Slot | None:
        """A free slot, its tensor uint8 [nbytes]; None when all are taken."""
        if nbytes > self._slot_bytes:
            return None
        for slot in range(OUTBOX_SLOTS):  # the first free one: it may still be in the cache
            if self._states[slot] == FREE:
                self._states[slot] = TAKEN
                start = STATES + slot * self._slot_bytes
                return Slot(self._memory.tensor[start : start + nbytes], (start, nbytes, slot))
        return None

    @property
    def full(self) -> bool:
        """Are all slots taken?"""
        return FREE not in self._memory.view[:OUTBOX_SLOTS]

    def buffer(self, place: Place) -> Any:
        """The bytes at a place that a worker sent; raises ValueError for an impossible one."""
        offset, nbytes, slot = place
        start = STATES + slot * self._slot_bytes
        if not (0 <= slot < OUTBOX_SLOTS and offset == start and 0 < nbytes <= self._slot_bytes):
            raise ValueError(f"no such place in an outbox: {place}")
        return self._memory.view[offset : offset + nbytes]

    def buffers(self, places: Sequence[Place]) -> list[Any]:
        """The bytes at all these places; raises `PeerError` for an impossible one."""
        try:
            return [self.buffer(place) for place in places]
        except ValueError as e:
            raise PeerError(str(e)) from None

    def free(self, slot: int) -> None:
        self._states[slot] = FREE

    def free_all(self, places: Sequence[Place]) -> None:
        """Free the slots of these places, which are not read any more."""
        for _, _, slot in places:
            self.free(slot)


class Ring:
    """The server's averages, newest over oldest; its readers open the same file."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        """With `size` it is made, by the server; else opened, by a reader."""
        self._memory = Memory(path, None if size is None else -(-size // ALIGN) * ALIGN)
        self._stamps = np.frombuffer(self._memory.map, dtype=np.int64)
        self._live: deque[tuple[int, int, int]] = deque()  # start, stop, stamp; oldest first
        self._head = 0
        self._stamp = 0

    def room(self, nbytes: int) -> Slot:
        """A new block, its tensor uint8 [nbytes], over the oldest ones."""
        whole = ALIGN + -(-nbytes // ALIGN) * ALIGN
        if self._head + whole > self._memory.size:
            self._free_up_to(self._memory.size)
            self._head = 0
        start = self._head
        self._free_up_to(start + whole)
        self._stamp += 1
        self._stamps[start // 8] = self._stamp
        self._live.append((start, start + whole, self._stamp))
        self._head = start + whole
        begin = start + ALIGN
        return Slot(self._memory.tensor[begin : begin + nbytes], (begin, nbytes, self._stamp))

    def _free_up_to(self, stop: int) -> None:
        """Remove the stamps of the blocks from the head to `stop`, which will be written over."""
        while self._live and self._head <= self._live[0][0] < stop:
            start, _, _ = self._live.popleft()
            self._stamps[start // 8] = 0

    @property
    def oldest(self) -> int:
        """The stamp of the oldest block that is still whole."""
        return self._live[0][2] if self._live else self.next

    @property
    def next(self) -> int:
        """The stamp of the next block."""
        return self._stamp + 1

    @property
    def nbytes(self) -> int:
        return self._memory.size

    def buffer(self, place: Place) -> Any:
        """The bytes at a place; check with `whole`, before and after reading, that they are still
        the block's."""
        return self._memory.view[place[0] : place[0] + place[1]]

    def whole(self, place: Place) -> bool:
        return int(self._stamps[(place[0] - ALIGN) // 8]) == place[2]

    def blocks(self, places: Sequence[Place]) -> Blocks:
        """The buffers at these places, which somebody has told; raises ValueError for impossible
        ones."""
        for offset, nbytes, _ in places:
            if offset % ALIGN or not ALIGN <= offset < offset + nbytes <= self._memory.size:
                raise ValueError(f"no such place in a ring: {offset}, {nbytes}")
        return Blocks(self, tuple(places))


class Blocks(NamedTuple):
    """The buffers of an average in a ring, which may be written over."""

    ring: Ring
    places: tuple[Place, ...]

    @property
    def buffers(self) -> list[Any]:
        return [self.ring.buffer(place) for place in self.places]

    @property
    def whole(self) -> bool:
        """Are they still there? Ask before and after reading them."""
        return all(map(self.ring.whole, self.places))
