"""Seals payloads: AES-256-GCM, or ChaCha20-Poly1305 where a machine has no AES instructions.

A **channel** carries the numbers of pushes or averages between the server and one peer, on a socket
without CURVE. Each direction of each channel has a random key of its own, which nobody else holds:
not another worker, and not the same process after a restart. So what opens comes from the other
end, and nobody among those who take part can forge it.

A buffer is cut into **records** of at most `RECORD_BYTES`. A record is one message of one frame:
`CLEAR`, which everybody can read and nobody can change (it is the associated data), then the
ciphertext, then its tag. The nonce is the record's counter, which is part of `CLEAR`; a receiver
takes only counters that are higher than all before. docs/protocol.md, "Sealed payloads", has the
whole of it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from paramserver.errors import PeerError
from paramserver.tensors.codec.lengths import fresh

CIPHERS: dict[str, type[AESGCM] | type[ChaCha20Poly1305]] = {
    "aes-256-gcm": AESGCM,
    "chacha20-poly1305": ChaCha20Poly1305,
}
"""By name, the preferred one first."""

PLAIN = "none"
"""In place of a cipher, between the ends of a run that has no keys: records carry numbers as they
are."""

KEY_BYTES, TAG_BYTES, NONCE_BYTES, ID_BYTES = 32, 16, 12, 16
RECORD_BYTES = 2**21
"""Of a buffer in one record, at most. It bounds what a connection may send before it has proven
anything; larger ones are hardly faster."""

RECORDS_SPARE = 4
"""ZeroMQ holds so many records more of a connection than wait to be read, or fewer: some are on
their way into or out of its queue."""

RECORDS_MAX = 2**32
BYTES_MAX = 2**44
"""Under one key. Long before, the channel is replaced by one with new keys."""

CLEAR = struct.Struct(">4sBBHI16s16sQIQBBxxQQ12s")
"""What is readable in a record, and authenticated; see `Clear`."""

PATIENCE = 0.5
"""Of `heartbeat_timeout`: when nothing has come through a channel for so long, a payload that is
awaited does not come any more."""
_ID = slice(28, 28 + 16)
"""Where the key's id lies in it."""

MAGIC = b"psS1"
OVERHEAD_BYTES = CLEAR.size + TAG_BYTES
MEASURE_BYTES, MEASURE_TIMES = 2**18, 5


class Kind(IntEnum):
    """What a record is part of."""

    BIND = 1
    """Nothing: it proves that its sender has the key."""
    PUSH = 2
    AVERAGE = 3
    SHARED = 4
    """An average, too: it lies in the sender's ring, and this says where."""


class Share(IntFlag):
    """The memory that the ends of a channel share. The first record of the peer has what it is
    ready to use, the first one of the other end what both use from now on."""

    NOTHING = 0
    RING = 1
    OUTBOX = 2


class Unopened(Exception):
    """This is no record that the other end of the channel sent now; the reason is for a log."""


@dataclass(frozen=True)
class Ends:
    """What all records of one direction of a channel have in common, and its key."""

    cipher: str
    key: bytes = field(repr=False)
    id: bytes
    """The key's id: random, never used twice."""
    nonce: str
    """Of the server process."""
    shard: int
    sender: int
    """The worker's number; 0 is the server."""

    @property
    def without_key(self) -> Ends:
        return replace(self, key=b"")


@dataclass(frozen=True)
class Payload:
    """The buffers of one push or average, as the other end has sealed them."""

    kind: Kind
    round: int
    bucket: int
    number: int
    buffers: list[Any]
    id: bytes = b""
    """Of the key that it was sealed with."""

    @property
    def bytes(self) -> int:
        return sum(memoryview(b).nbytes for b in self.buffers)


class _Plain:
    """See `PLAIN`."""

    def __init__(self, key: bytes) -> None:
        pass

    def encrypt_into(self, nonce: bytes, data: Any, aad: bytes, buf: Any) -> None:
        buf[: len(data)] = data

    def decrypt_into(self, nonce: bytes, data: Any, aad: bytes, buf: Any) -> None:
        buf[:] = data[:-TAG_BYTES]


_Aead = AESGCM | ChaCha20Poly1305 | _Plain


def _aead(ends: Ends) -> _Aead:
    """Raises `PeerError` where this machine's OpenSSL has not that cipher."""
    if ends.cipher == PLAIN:
        return _Plain(ends.key)
    try:
        return CIPHERS[ends.cipher](ends.key)
    except UnsupportedAlgorithm:
        raise PeerError(f"this machine has no {ends.cipher}") from None


def id_of(record: Any) -> bytes:
    """The id of the key under which a record says that it is sealed; empty where it is none."""
    view = memoryview(record)
    return bytes(view[_ID]) if view.nbytes >= CLEAR.size else b""


@cache
def measured() -> dict[str, float]:
    """Seconds of processor time in which this machine seals a MiB, by the ciphers that it has."""
    plain, sealed = fresh(MEASURE_BYTES).zero_(), fresh(MEASURE_BYTES + TAG_BYTES)
    taken = {}
    for name, cipher in CIPHERS.items():
        try:
            aead, times = cipher(secrets.token_bytes(KEY_BYTES)), list[float]()
        except UnsupportedAlgorithm:  # OpenSSL as FIPS wants it knows AES only
            continue
        for turn in range(MEASURE_TIMES):
            start = time.thread_time()
            aead.encrypt_into(_nonce(turn), plain.numpy().data, b"", sealed.numpy().data)
            times.append(time.thread_time() - start)
        taken[name] = min(times) * 2**20 / MEASURE_BYTES
    return taken


def cheapest(*machines: Mapping[str, float]) -> str | None:
    """The cipher that takes these machines the least time together, of those that all have."""
    common = [name for name in CIPHERS if all(name in machine for machine in machines)]
    return min(common, key=lambda name: sum(m[name] for m in machines), default=None)


_held: weakref.WeakSet[Sealer | Opener] = weakref.WeakSet()


def _forget() -> None:
    """In a forked child: it must not seal under the counters of its parent, nor hold its keys."""
    for each in list(_held):
        each.forget()


os.register_at_fork(after_in_child=_forget)


class Sealer:
    """Seals what one end of a channel sends. Safe to use from several threads."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.records = self.bytes = 0
        """Sealed so far, of the plaintext."""
        self._aead: _Aead | None = _aead(ends)
        self._nonce = nonce_bytes(ends.nonce)
        self._lock = threading.Lock()
        _held.add(self)

    @property
    def worn(self) -> bool:
        """Has this key sealed as much as it may? Then the channel needs new ones."""
        return _worn(self.ends, self.records, self.bytes)

    def forget(self) -> None:
        """Forget the key."""
        self._aead, self.ends = None, self.ends.without_key

    def bind(self, share: Share = Share.NOTHING) -> memoryview:
        """The record with which an end of a channel proves that it has the key."""
        return self._record(Kind.BIND, (0, 0, share), (0, 1, 0, 0), memoryview(b""))

    def seal(
        self, kind: Kind, round: int, bucket: int, number: int, buffers: Sequence[Any]
    ) -> Iterator[memoryview]:
        """The records of these buffers, to be sent in this order."""
        for part, buffer in enumerate(buffers):
            view = memoryview(buffer).cast("B")
            size = view.nbytes
            for offset in range(0, max(1, size), RECORD_BYTES):
                yield self._record(
                    kind,
                    (round, bucket, number),
                    (part, len(buffers), offset, size),
                    view[offset : offset + RECORD_BYTES],
                )

    def _record(
        self,
        kind: Kind,
        what: tuple[int, int, int],
        place: tuple[int, int, int, int],
        plain: memoryview,
    ) -> memoryview:
        aead, e = self._aead, self.ends
        if aead is None:
            raise RuntimeError("the keys of this channel belong to the process that was forked")
        record = fresh(CLEAR.size + plain.nbytes + TAG_BYTES).numpy().data
        with self._lock:
            counter = self.records
            self.records += 1
            self.bytes += plain.nbytes
        nonce = _nonce(counter)
        clear = CLEAR.pack(
            MAGIC, kind, 0, e.shard, e.sender, self._nonce, e.id, *what, *place, nonce
        )
        record[: CLEAR.size] = clear
        aead.encrypt_into(nonce, plain, clear, record[CLEAR.size :])
        return record


class Opener:
    """Opens payloads of these kinds that the other end of a channel sends, at most `largest` bytes
    in a buffer."""

    def __init__(self, ends: Ends, kinds: Collection[Kind], largest: int, parts: int) -> None:
        self.ends = ends
        self.opened = self.unopened = self.torn = 0
        """Records that were opened and that were not; payloads of which a record was missing."""
        self.bytes = 0
        """Opened so far, of the plaintext."""
        self.bound = False
        """The other end has proven that it has the key."""
        self.share = Share.NOTHING
        """What it has said then."""
        self.newest = 0
        """The highest number of a payload of which anything has come."""
        self.number = 0
        """Of the payload that the newest record is part of; 0: of none."""
        self._kinds = frozenset((Kind.BIND, *kinds))
        self._largest, self._parts = largest, parts
        self._aead: _Aead | None = _aead(ends)
        self._nonce = nonce_bytes(ends.nonce)
        self._last = -1  # the counter of the last record
        self._partial: _Partial | None = None
        _held.add(self)

    @property
    def worn(self) -> bool:
        """Has the other end sealed as much with this key as it may?"""
        return _worn(self.ends, self._last + 1, self.bytes)

    def forget(self) -> None:
        """Forget the key, and what was opened of a payload."""
        self._aead = self._partial = None
        self.ends = self.ends.without_key

    def open(self, record: Any) -> Payload | None:
        """Open one record; returns the payload that it completes. Raises `Unopened` for a record
        that is not the other end's, or not new: then nothing has changed."""
        try:
            payload = self._open(memoryview(record))
        except Unopened:
            self.unopened += 1
            raise
        self.opened += 1
        return payload

    def _open(self, record: memoryview) -> Payload | None:
        size = record.nbytes - OVERHEAD_BYTES
        if not 0 <= size <= RECORD_BYTES:
            raise Unopened("not a record's size")
        clear = bytes(record[: CLEAR.size])
        magic, kind, zero, shard, sender, nonce, id, *rest, counter = CLEAR.unpack(clear)
        round, bucket, number, part, parts, offset, whole = rest
        e = self.ends
        if (magic, zero, shard, sender, nonce, id) != (
            *(MAGIC, 0, e.shard, e.sender),
            *(self._nonce, e.id),
        ) or kind not in self._kinds:
            raise Unopened("not of this channel")
        if (count := int.from_bytes(counter)) <= self._last:
            raise Unopened("not newer than the last one")
        if whole > self._largest or offset + size > whole or not part < parts <= self._parts:
            raise Unopened("an impossible size")
        what, place = (kind, round, bucket, number, parts), (part, offset)
        partial, begins = self._partial, place == (0, 0)
        if begins:
            partial = _Partial(what)
        elif partial is None or not partial.continues(what, place, whole):
            partial = None
        scratch = fresh(size).numpy().data if partial is None else partial.room(whole, size)
        if self._aead is None:
            raise RuntimeError("the keys of this channel belong to the process that was forked")
        try:
            self._aead.decrypt_into(counter, record[CLEAR.size :], clear, scratch)
        except InvalidTag:
            raise Unopened("its tag is wrong") from None
        # From here on it is known who has sent it.
        self._last = count
        self.bytes += size
        self.torn += self._partial is not None and (begins or partial is None)
        if kind == Kind.BIND:
            if not self.bound:
                self.bound, self.share = True, Share(number & sum(Share))
            self._partial, self.number = None, 0
            return None
        self.number, self.newest = number, max(self.newest, number)
        self._partial = partial
        if partial is None or not partial.filled(size):
            return None
        self._partial = None
        return Payload(Kind(kind), round, bucket, number, partial.buffers, id)


class _Partial:
    """A payload that is coming in. Its memory is not anybody else's until all tags were right."""

    def __init__(self, what: tuple[int, ...]) -> None:
        self._what = what
        self._parts = what[-1]
        self._rooms: list[Any] = []
        self._offset = self._whole = 0  # of the newest part

    def continues(self, what: tuple[int, ...], place: tuple[int, int], whole: int) -> bool:
        """Is this the place at which the next record belongs?"""
        if what != self._what or not self._rooms:
            return False
        if self._offset == self._whole:
            return place == (len(self._rooms), 0)
        return place == (len(self._rooms) - 1, self._offset) and whole == self._whole

    def room(self, whole: int, size: int) -> memoryview:
        """Memory for the next `size` bytes, of a buffer of so many as a `whole`. Nothing counts as
        written before `filled`."""
        if not self._rooms or self._offset == self._whole:
            self._next = fresh(whole).numpy().data
            return self._next[:size]
        self._next = self._rooms[-1]
        return self._next[self._offset : self._offset + size]

    def filled(self, size: int) -> bool:
        """The next record is in its place; is the payload complete?"""
        if not self._rooms or self._next is not self._rooms[-1]:
            self._rooms.append(self._next)
            self._offset, self._whole = 0, self._next.nbytes
        self._offset += size
        return len(self._rooms) == self._parts and self._offset == self._whole

    @property
    def buffers(self) -> list[Any]:
        return self._rooms


def _worn(ends: Ends, records: int, bytes: int) -> bool:
    return ends.cipher != PLAIN and (records >= RECORDS_MAX or bytes >= BYTES_MAX)


def nonce_bytes(nonce: str) -> bytes:
    """A server's nonce as it stands in `CLEAR`: the first half of its SHA-256."""
    return hashlib.sha256(nonce.encode()).digest()[:16]


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(NONCE_BYTES)
