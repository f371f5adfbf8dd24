"""A peer's channels to the shards, and the shard that it carries itself.

Headers travel over link and SUB, as with the channel to the server (`payloads`); only the numbers
of a shard's buckets go to it and come from it (docs/protocol.md, "Shards").
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from paramserver import notify
from paramserver.errors import PeerError
from paramserver.program import command
from paramserver.protocol import messages as wire
from paramserver.protocol.sharding import SERVER, owners
from paramserver.shard.orders import LINGER_S, Orders
from paramserver.tensors.bucket import BucketPlan
from paramserver.transport import private_dir, shm, sockets

from .channel import SKIPS_MAX, Channel, Lost, brought
from .payloads import MEASURE_S
from .shared import Shared

if TYPE_CHECKING:
    from .connection import Connection

CONNECT_S = 5.0
"""In which a channel must be bound."""

END_S = 3.0


class Shards:
    """The channels of one peer to shards, by their numbers, and its own shard's process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bound: dict[int, Channel] = {}
        self._coming: dict[int, Channel] = {}
        self._old: dict[int, Channel] = {}  # their last averages may be on their way, or unread
        self._ended: dict[int, float] = {}  # the server has ended these channels, since when
        self._number = 0  # of the newest push
        self._awaited: dict[int, tuple[int, float]] = {}  # by shard: payload, since when
        self._map: tuple[Any, tuple[int, ...]] = (None, ())
        self._measured_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._follows = False  # another one, when this process has ended
        self.slot_bytes = 0
        """Of the outboxes for shards on this host; 0: this peer pushes nothing."""
        self._slower: set[str] = set()  # what was said to go through channels

    def sockets(self, shard: int) -> list[zmq.Socket[bytes]]:
        """From which averages of this shard may come."""
        return [channel.socket for channel in self._sources(shard)]

    def _sources(self, shard: int) -> list[Channel]:
        """The channels that averages of this shard may come through, the oldest first."""
        found = self._old.get(shard), self._bound.get(shard)
        return [channel for channel in found if channel is not None]

    # ------------------------------------------------------------------ the map

    def owner(self, plan: BucketPlan, current: wire.Open | None, bucket: int) -> int:
        """The shard that averages this bucket in the open round."""
        if current is None or not current.shards:
            return SERVER
        if self._map[0] != current.shards:
            self._map = current.shards, owners(plan.sizes, current.shards, plan.whole)
        return self._map[1][bucket]

    # ------------------------------------------------------------------ channels

    def told(self, message: wire.Channel, now: float) -> None:
        """A shard has made a channel for this peer, or ended it. One that works is used until the
        new one is bound."""
        shard = message.shard
        if not message.port:
            self._told_of_end(message, now)
            return
        self._close(self._coming, shard)
        self._ended.pop(shard, None)
        shared = self._share(message)
        try:
            self._coming[shard] = self._connection.channel(message, now, shared)
        except PeerError as e:
            if shared is not None:
                shared.close()
            self.lose(shard, str(e))

    def _told_of_end(self, message: wire.Channel, now: float) -> None:
        """A channel is over. The server names no host where it has ended all to this shard itself:
        it needs no answer, and averages that the shard has made before may still be needed."""
        shard = message.shard
        bound, coming = self._bound.get(shard), self._coming.get(shard)
        if not message.host:
            self._close(self._coming, shard)
            self._replace(shard)
            self._ended[shard] = now
        elif bound is not None and coming is not None and message.id == bound.id:
            self._replace(shard)  # the other one comes up, or does not
        elif not message.id or message.id in [c.id for c in (bound, coming) if c is not None]:
            self.lose(shard, message.reason)
        # Else it was given up here, too, and the server knows.

    def _replace(self, shard: int) -> None:
        """Nothing is pushed any more through the channel to this shard, if there is one."""
        before = self._bound.pop(shard, None)
        if before is not None:
            self._close(self._old, shard)
            self._old[shard] = before

    def _share(self, told: wire.Channel) -> Shared | None:
        """The memory that this peer can share with a shard, if that is on this host."""
        folder = told.shared
        if not (folder and self._connection.share_memory and re.fullmatch("[0-9a-f]+", told.id)):
            return None
        if not (sockets.is_local(told.host) and sockets.ipc_usable(folder)):
            return None
        return Shared(Path(folder), told.id, self.slot_bytes, self._say_slower)

    def _say_slower(self, what: str, why: str) -> None:
        if what not in self._slower:
            self._slower.add(what)
            self._connection.log.info(
                f"between this worker and the shard on its host {what} go through a socket, which "
                f"is slower: {shm.SHARED}: {why}"
            )

    def outbox(self, shard: int) -> shm.Outbox | None:
        """The memory that this shard reads pushes from."""
        channel = self._bound.get(shard)
        return None if channel is None else channel.outbox

    def _drop(self, shard: int) -> None:
        self._awaited.pop(shard, None)
        self._ended.pop(shard, None)
        for table in (self._bound, self._coming, self._old):
            self._close(table, shard)

    def _close(self, table: dict[int, Channel], shard: int) -> None:
        channel = table.pop(shard, None)
        if channel is not None:
            channel.close()

    def lose(self, shard: int, why: str) -> None:
        """There is no channel to this shard any more: the server may let it make another one, if it
        has not ended them itself."""
        tells = shard not in self._ended
        self._drop(shard)
        if tells:
            self._connection.send(wire.Reached(shard=shard, problem=why))

    def measure(self) -> None:
        """Bound what channels hold here. Call it from time to time, in a long step, too; any thread
        may."""
        for table in (self._bound, self._coming, self._old):
            for channel in list(table.values()):  # the main thread may change it meanwhile
                channel.measure()

    def tick(self, now: float, makers: Collection[int] = ()) -> None:
        """Time has passed. `makers`: the shards of the open round, as far as this peer has followed
        the log; averages of others that were ended are not awaited for long."""
        if now - self._measured_at > MEASURE_S:
            self._measured_at = now
            self.measure()
        if self._follows:
            self.carry()
        for shard, channel in list(self._coming.items()):
            if channel.come_up(now):
                del self._coming[shard]
                self._replace(shard)
                self._bound[shard] = channel
                self._connection.send(wire.Reached(shard=shard))
            elif now - channel.since > CONNECT_S and shard in self._bound:
                self._close(self._coming, shard)  # the shard offers another one later
            elif now - channel.since > CONNECT_S:
                why = f"nothing comes through its port {channel.port}: is a firewall in between?"
                self.lose(shard, why)
        patience_s = self._connection.heartbeat_timeout / 2
        for shard, since in list(self._ended.items()):
            if shard not in makers and now - since > patience_s:
                del self._ended[shard]
                self._close(self._old, shard)

    def close(self, *, leaves: bool = False) -> None:
        """Forget all keys, and end the own shard: this session is over. With a worker that `leaves`
        the shard may go on for a few seconds, while the server takes over what others lack."""
        for shard in {*self._bound, *self._coming, *self._old, *self._ended}:
            self._drop(shard)
        self._number = 0
        process, self._process = self._process, None
        self._follows = False
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            if not leaves:
                process.stdin.write(b"\n")  # it ends at once
            process.stdin.close()  # it ends with its pipe
        try:
            process.wait(END_S + leaves * LINGER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        private_dir.sweep(shm.SHARED)  # where it was killed, its memory is still there

    # ------------------------------------------------------------------ payloads

    def push(self, push: wire.Push, buffers: Sequence[Any]) -> None:
        """Send a push whose bucket its `shard` averages, and whose numbers may lie in the outbox
        for that."""
        self._number += 1
        push = msgspec.structs.replace(push, sealed=self._number)
        self._connection.send(msgspec.structs.replace(push, places=()))
        channel = self._bound.get(push.shard)
        if channel is None:
            return  # the server knows, or will soon
        try:
            channel.push(push, wire.to_frames(push, *buffers))
        except Lost:
            self.lose(push.shard, "its connection was cut")

    def forgive(self, missing: int) -> None:
        """So many averages may be missing on each channel without harm."""
        for channel in self._bound.values():
            channel.skips = -missing

    def payload(
        self, average: wire.Sharded, now: float, *, patient: bool = False
    ) -> list[Any] | shm.Blocks | None:
        """The buffers of an average; None if they are on their way. Raises `Lost` where they do
        not come. `patient`: they need not come this way, and the channel is not to blame."""
        shard, number = average.shard, average.number
        channels = self._sources(shard)
        try:
            found = brought(channels, average, now, patient=patient)
        except Lost:
            self._awaited.pop(shard, None)
            if channels and channels[-1].skips > SKIPS_MAX and not patient:
                self.lose(shard, f"{SKIPS_MAX} averages were missing")
            raise
        if found is not None:
            self._awaited.pop(shard, None)
            channel, buffers = found
            if channel is self._bound.get(shard):
                self._close(self._old, shard)
            return buffers
        if patient:
            return None
        if self._awaited.get(shard, (0, 0.0))[0] != number:
            self._awaited[shard] = number, now
        heard_at = max(self._awaited[shard][1], *(c.heard_at for c in channels))
        if now - heard_at > self._connection.heartbeat_timeout / 2:
            self.lose(shard, "nothing comes through it")
            raise Lost
        return None

    # ------------------------------------------------------------------ the own shard

    def carry(self) -> None:
        """Start a shard beside this worker: the server wants one on this host. One that runs offers
        itself again, or the server has ended it: then another one follows it."""
        self._follows = self._process is not None and self._process.poll() is None
        if not self._follows:
            self._start()

    def _start(self) -> None:
        connection = self._connection
        welcome, settings, keys = connection.welcome, connection.settings, connection.keys
        address = sockets.towards(connection.host)
        if welcome is None or not address:
            return
        orders = Orders(
            host=connection.host,
            port=connection.port,
            address=address,
            server_key="" if keys is None else keys.server.decode(),
            secret_key="" if keys is None else keys.secret.decode(),
            session=welcome.session,
            secret=connection.hello.secret,
            codec=settings.codec,
            codec_down=settings.codec_of_averages,
            topk_ratio=settings.topk_ratio,
            bucket_mb=settings.bucket_size_mb,
            min_bucket_mb=settings.min_bucket_mb,
            history_mb=settings.history_mb,
            heartbeat_timeout=settings.heartbeat_timeout,
            guarded=connection.with_keys,
            shared_memory=connection.share_memory,
        )
        with suppress(OSError):  # no room for a process: the server waits in vain
            process = self._process = subprocess.Popen(
                command("paramserver.shard"),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the worker, which ends its shard
                env={
                    **{k: v for k, v in os.environ.items() if k != notify.VARIABLE},
                    "OMP_NUM_THREADS": "1",
                },
            )
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(msgspec.json.encode(orders) + b"\n")
                process.stdin.flush()  # it stays open: its end means that the worker is gone


__all__ = ["Lost", "Shards"]
