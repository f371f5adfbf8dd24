"""The process of a shard: its link to the server, its channels to the peers, and its sums.

One thread, one poll loop, as in `paramserver.server.server`. What it does is in `adder`; here are
only sockets. It holds no state that outlives it: when its link is lost, the server gives its
buckets to others.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import zmq

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.server.channels import Channels
from paramserver.shard.adder import Adder, Payload
from paramserver.shard.memory import Memory
from paramserver.shard.orders import Orders
from paramserver.tensors.bucket import SENT_BYTES, BucketPlan, plan
from paramserver.tensors.codec import codec_of_averages, codec_of_pushes
from paramserver.tensors.reducer import Reducer
from paramserver.tensors.whole import BUFFER_BYTES
from paramserver.transport import sealing, sockets
from paramserver.transport.handshake import Strangers
from paramserver.transport.passwords import Passwords

BEATS_PER_TIMEOUT = 5
STRANGERS_MAX = 64
MESSAGES_PER_TURN = 64
MEASURE_S, LOOK_S = 0.1, 0.25


class Numbers:
    """The sums of a shard, in tensors."""

    def __init__(self, cut: BucketPlan, orders: Orders, memory: Memory) -> None:
        up = codec_of_pushes(orders.codec, orders.topk_ratio)
        down = codec_of_averages(orders.codec_down, orders.topk_ratio)
        self._memory = memory
        self._reducer = Reducer(cut, up, down, memory.room)

    @property
    def newest(self) -> int:
        return self._memory.newest

    @property
    def oldest(self) -> int:
        return self._memory.oldest

    def check(self, push: wire.Push, buffers: list[Any]) -> tuple[str | None, float | None]:
        return self._reducer.check(push.bucket, buffers, push.scale, push.absent)

    def add(self, payload: Payload, worker: int, weight: float, *, late: bool) -> None:
        push, buffers, release = payload.push, payload.buffers, payload.release
        self._reducer.add(
            *(push.bucket, buffers, push.scale, weight, release, worker, push.absent), late=late
        )

    def finish(self, divide: wire.Divide) -> tuple[list[Any], float, tuple[int, ...]]:
        return self._reducer.finish(divide.bucket, divide.weight, divide.absent)

    def give_up(self, bucket: int) -> list[Any]:
        return self._reducer.give_up(bucket)

    def take_over(self, bucket: int, buffers: list[Any]) -> None:
        self._reducer.take_over(bucket, buffers)

    def close(self, averaged: tuple[int, ...]) -> None:
        self._reducer.close(averaged)
        self._memory.over()


class Process:
    """A shard. Another thread may call `end`."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._end_at = math.inf
        self._adder: Adder | None = None
        self._history = int(orders.history_mb * 2**20)
        self._memory = Memory(self._history, wanted=orders.shared_memory)
        self._channels: Channels | None = None
        self._shard = 0
        torch.set_num_threads(1)
        self._ctx = sockets.context()
        self._passwords: Passwords | None = None
        self._strangers: Strangers | None = None
        unread, mark = sockets.channel_marks(
            orders.history_mb, orders.bucket_mb, sealing.RECORD_BYTES
        )
        record_bytes = sealing.RECORD_BYTES + sealing.OVERHEAD_BYTES
        self._records = sockets.channel_router(self._ctx, record_bytes, unread, mark)
        if orders.guarded:
            self._passwords = Passwords(self._ctx)
            most_bytes = (unread + sealing.RECORDS_SPARE) * record_bytes
            self._strangers = Strangers(self._ctx, self._records, STRANGERS_MAX, most_bytes)
        self._port = sockets.bind_shard(self._records, orders.address, guarded=orders.guarded)
        self._link_ctx = sockets.context()
        self._link = sockets.dealer(self._link_ctx)
        keys = None
        if orders.secret_key:
            keys = sockets.PeerKeys(orders.server_key.encode(), orders.secret_key.encode())
        sockets.connect(self._link, sockets.tcp(orders.host, orders.port), keys)
        self._poller = zmq.Poller()
        watched = [self._link, self._records]
        watched += [] if self._passwords is None else [self._passwords.socket]
        watched += [] if self._strangers is None else [self._strangers.watch]
        for s in watched:
            self._poller.register(s, zmq.POLLIN)

    def run(self) -> None:
        """Serve until the server needs this shard no more, or its end has come."""
        every_s = self._orders.heartbeat_timeout / BEATS_PER_TIMEOUT
        offer_at = measure_at = 0.0
        while (now := time.monotonic()) < self._end_at:
            if now >= offer_at:
                offer_at = now + every_s
                session, secret = self._orders.session, self._orders.secret
                self._tell(wire.Offer(session=session, secret=secret))
            if self._strangers is not None and now >= measure_at:
                measure_at = now + MEASURE_S
                self._strangers.measure()
            wait_s = min(MEASURE_S if self._strangers is not None else LOOK_S, offer_at - now)
            self._poller.poll(math.ceil(1000 * max(0.0, wait_s)))
            if self._passwords is not None:
                self._passwords.answer(time.monotonic)
            if self._strangers is not None:
                self._strangers.look()
            for _ in range(MESSAGES_PER_TURN):
                if not sockets.readable(self._link):
                    break
                if not self._hear(sockets.receive(self._link)):
                    return
            self._read_records()

    def end(self, after_s: float) -> None:
        """The worker is gone: end within this time, also if the server says nothing."""
        self._end_at = time.monotonic() + (0.0 if self._adder is None else after_s)

    def _hear(self, frames: list[zmq.Frame]) -> bool:
        """One message of the server; False where this shard has no place any more."""
        message, buffers = wire.from_frames(frames)
        now = time.monotonic()
        match message:
            case wire.Employ():
                self._begin(message)
            case wire.Greet() | wire.Reject():
                return False
            case wire.Meet() if self._channels is not None:
                costs = message.costs or {sealing.PLAIN: 1.0}
                self._channels.forgive(message.session)  # the server counts its channels
                self._channels.dial(message.session, message.worker, costs, now)
            case wire.Spare() if self._channels is not None:
                self._channels.spare(message.session, message.on)
            case _ if self._adder is not None:
                self._adder.order(message, buffers)
                if isinstance(message, wire.Part) and self._channels is not None:
                    self._channels.forget(message.session)
                if isinstance(message, wire.Over) and self._channels is not None:
                    self._channels.round_over(now)
        return True

    def _begin(self, employ: wire.Employ) -> None:
        orders = self._orders
        cut = plan(employ.layout, orders.bucket_mb, orders.min_bucket_mb)
        if self._channels is not None:
            self._channels.close()
        self._shard = employ.shard
        self._memory.begin(cut)
        bucket_bytes = int(orders.bucket_mb * 2**20) + max(SENT_BYTES.values())
        largest = max(bucket_bytes, wire.HEADER_BYTES_MAX, BUFFER_BYTES)
        most = 2 * len(cut.buckets) + 2
        self._channels = Channels(
            self._records,
            self._passwords,
            self._strangers,
            self._port,
            employ.nonce,
            largest,
            self._met,
            lambda text: None,
            shard=employ.shard,
            unclaimed=most,
            sharing=self._memory,
        )
        self._adder = Adder(
            Numbers(cut, orders, self._memory),
            most=most,
            limit=self._history,
            tell=self._tell,
            send=self._send,
        )

    def _met(self, session: str, channel: wire.Channel) -> None:
        self._tell(wire.Met(session=session, channel=channel))

    def _read_records(self) -> None:
        channels, adder = self._channels, self._adder
        for _ in range(MESSAGES_PER_TURN):
            if not sockets.readable(self._records):
                return
            frames = sockets.receive(self._records)
            if channels is None or adder is None:
                continue
            session = channels.receive(frames, time.monotonic())
            if session is None:
                continue
            for payload in channels.take(session):
                try:
                    push, buffers = wire.from_frames(payload.buffers)
                    if not isinstance(push, wire.Push) or (push.round, push.bucket) != (
                        *(payload.round, payload.bucket),
                    ):
                        raise PeerError("it is not of its push")
                    located, release = self._memory.located(payload.id, push, buffers)
                    adder.came(session, payload.number, push, located, release)
                except PeerError as e:
                    channels.lose(session, f"a payload cannot be used: {e}")
                    break

    def _send(self, divide: wire.Divide, buffers: list[Any]) -> int:
        assert self._channels is not None
        places = self._memory.places(divide.bucket)
        return self._channels.send(divide.round, divide.bucket, buffers, places)

    def _tell(self, message: wire.Message, *buffers: Any) -> None:
        """To the server. Buffers are copied: they may lie in the ring, which is written over."""
        sockets.send(self._link, wire.to_frames(message, *buffers), wait=False)

    def close(self) -> None:
        """Forget all keys, and release the sockets."""
        if self._channels is not None:
            self._channels.close()
        if self._strangers is not None:
            self._strangers.close()
        self._link.close(linger=0)
        self._records.close(linger=0)
        if self._passwords is not None:
            self._passwords.close()
        self._ctx.term()
        self._link_ctx.term()
        self._memory.close()


__all__ = ["Numbers", "Process"]
