"""What a shard does: keeps payloads by their numbers, and adds, averages and keeps what it is told.

An `Adder` knows no round, member or lease, and decides nothing (docs/protocol.md, "Shards"): it
carries out the orders of the server in the order in which they come. Pure: payloads and orders come
in, reports go out through `tell`, averages through `send`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire

Release = Callable[[], None]
"""Says that a payload's memory is not read any more."""


class Sums(Protocol):
    """Adds the numbers of pushes. Averages lie in memory that is written over: those made since
    `newest` had one value are there until `oldest` is higher."""

    @property
    def newest(self) -> int: ...
    @property
    def oldest(self) -> int: ...

    def check(self, push: wire.Push, buffers: list[Any]) -> tuple[str | None, float | None]:
        """Why a push must not be used, and a gradient's norm; raises `PeerError` where it does not
        fit the layout."""

    def add(self, payload: Payload, worker: int, weight: float, *, late: bool) -> None:
        """Add a payload to the sum of its bucket, `weight` times, and release it."""

    def finish(self, divide: wire.Divide) -> tuple[list[Any], float, tuple[int, ...]]:
        """The average of a bucket: its buffers, scale and absent tensors."""

    def give_up(self, bucket: int) -> list[Any]:
        """What was left out here of the averages of a bucket that others average now."""

    def take_over(self, bucket: int, buffers: list[Any]) -> None:
        """Others have left this out of averages of this bucket: it goes into the next one."""

    def close(self, averaged: tuple[int, ...]) -> None:
        """The round is over: the averages of these buckets are in an update."""


class Payload(msgspec.Struct, frozen=True):
    """The numbers of one push."""

    push: wire.Push
    buffers: list[Any]
    release: Release


class Waiting(msgspec.Struct):
    """The payloads of one peer that wait for an order, by number."""

    payloads: dict[int, Payload] = msgspec.field(default_factory=dict)
    unneeded: set[int] = msgspec.field(default_factory=set)
    """Numbers of payloads that have not come, and are not needed any more."""
    refused: set[int] = msgspec.field(default_factory=set)
    """Numbers of those that cannot be used, until the server has taken note of that."""
    newest: int = 0
    parted: bool = False
    """The peer is gone."""


class Kept(msgspec.Struct):
    """The averages of one update."""

    round: int
    averages: dict[int, list[Any]]
    bytes: int
    since: int
    """What `Sums.newest` was when the round began."""


def _nothing() -> None:
    pass


class Adder:
    """The sums of one shard, and the averages of the newest updates: at least one, at most `limit`
    bytes. `most` payloads of a peer may wait. `send` sends an average to all peers and returns the
    number of its payload."""

    def __init__(
        self,
        sums: Sums,
        *,
        most: int,
        limit: int,
        tell: Callable[..., object],
        send: Callable[[wire.Divide, list[Any]], int],
        size: Callable[[Any], int] = lambda buffer: memoryview(buffer).nbytes,
    ) -> None:
        self._sums = sums
        self._most, self._limit = most, limit
        self._tell, self._send, self._size = tell, send, size
        self._waiting: dict[str, Waiting] = {}  # by session
        self._open: dict[int, list[Any]] = {}  # averages of the open round, by bucket
        self._round = 0  # of those
        self._since = sums.newest
        self._kept: deque[Kept] = deque()
        self._bytes = 0

    # ------------------------------------------------------------------ payloads

    def came(
        self,
        session: str,
        number: int,
        push: wire.Push,
        buffers: list[Any],
        release: Release = _nothing,
    ) -> None:
        """A payload of this peer is here as a whole; `release` is called once it is not read any
        more. Raises `PeerError` where it cannot be one of a push, or where too many wait."""
        if number > wire.NUMBER_MAX:
            raise PeerError(f"a payload of number {number}")
        waiting = self._waiting.setdefault(session, Waiting())
        if number <= waiting.newest:
            release()
            return
        waiting.newest = number
        unneeded = number in waiting.unneeded
        waiting.unneeded = {n for n in waiting.unneeded if n > number}
        if unneeded:
            release()
            return
        if len(waiting.payloads) + len(waiting.refused) >= self._most:
            raise PeerError(f"{self._most} payloads wait for the server's word")
        bad, norm = self._sums.check(push, buffers)
        if norm is not None and not math.isfinite(norm):
            bad, norm = "its norm is not finite", None
        if bad is None:
            waiting.payloads[number] = Payload(push, buffers, release)
        else:
            waiting.refused.add(number)
            release()
        self._tell(
            wire.Arrived(
                session=session,
                number=number,
                round=push.round,
                bucket=push.bucket,
                bad=bad or "",
                norm=norm,
            )
        )

    @property
    def waiting(self) -> int:
        """The number of payloads that wait for an order."""
        return sum(len(w.payloads) for w in self._waiting.values())

    # ------------------------------------------------------------------ orders

    def order(self, message: Any, buffers: Sequence[Any] = ()) -> None:
        """Carry out an order. Raises `PeerError` where it cannot be."""
        match message:
            case wire.AddUp():
                self._add(message)
            case wire.Unneeded():
                self._drop(message)
            case wire.Divide():
                self._divide(message)
            case wire.GiveUp():
                left_out = self._sums.give_up(message.bucket)
                self._tell(wire.LeftOut(bucket=message.bucket), *left_out)
            case wire.LeftOut():
                self._sums.take_over(message.bucket, list(buffers))
            case wire.Over():
                self._over(message)
            case wire.Recall():
                self._recall(message)
            case wire.Part():
                gone = self._waiting.pop(message.session, Waiting())
                for number, payload in gone.payloads.items():
                    if number not in message.taken:
                        payload.release()
                taken = {n: p for n, p in gone.payloads.items() if n in message.taken}
                if taken:
                    self._waiting[message.session] = Waiting(taken, parted=True)
            case _:
                raise PeerError(f"a {type(message).__name__} is not for a shard")

    def _add(self, order: wire.AddUp) -> None:
        waiting = self._waiting.get(order.session)
        found = None if waiting is None else waiting.payloads.pop(order.number, None)
        if found is None:
            raise PeerError(f"there is no payload {order.number} to add")
        if found.push.bucket != order.bucket:
            raise PeerError(f"payload {order.number} is of bucket {found.push.bucket}")
        self._sums.add(found, order.worker, order.weight, late=order.late)
        self._forget_parted(order.session)

    def _forget_parted(self, session: str) -> None:
        """Of a peer that is gone nothing is kept but what waits for an order."""
        waiting = self._waiting.get(session)
        if waiting is not None and waiting.parted and not waiting.payloads:
            del self._waiting[session]

    def _drop(self, order: wire.Unneeded) -> None:
        waiting = self._waiting.setdefault(order.session, Waiting())
        if order.number > waiting.newest and len(waiting.unneeded) < self._most:
            waiting.unneeded.add(order.number)
        waiting.refused.discard(order.number)
        dropped = waiting.payloads.pop(order.number, None)
        if dropped is not None:
            dropped.release()
        self._forget_parted(order.session)

    def _divide(self, order: wire.Divide) -> None:
        if order.round != self._round:
            self._open, self._round = {}, order.round
        buffers, scale, absent = self._sums.finish(order)
        self._open[order.bucket] = buffers
        number = self._send(order, buffers)
        self._tell(
            wire.Averaged(
                round=order.round,
                bucket=order.bucket,
                number=number,
                absent=absent,
                scale=scale,
            )
        )

    def _over(self, order: wire.Over) -> None:
        averages, self._open = self._open, {}
        closed = bool(order.step)
        self._sums.close(tuple(sorted(averages)) if closed else ())
        since, self._since = self._since, self._sums.newest
        if not (closed and averages):
            return
        size = sum(self._size(buffer) for found in averages.values() for buffer in found)
        self._kept.append(Kept(self._round, averages, size, since))
        self._bytes += size
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popleft().bytes

    def _recall(self, order: wire.Recall) -> None:
        found = self._open.get(order.bucket) if order.round == self._round else None
        while self._kept and self._kept[0].since < self._sums.oldest:
            self._bytes -= self._kept.popleft().bytes
        for kept in self._kept:
            if kept.round == order.round:
                found = kept.averages.get(order.bucket)
        told = wire.Recalled(round=order.round, bucket=order.bucket, kept=found is not None)
        self._tell(told, *(found or ()))


__all__ = ["Adder", "Payload", "Release", "Sums"]
